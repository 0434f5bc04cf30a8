"""The judge's one pass over many positions computes what decoding through a store computes, position by position.

The oracles are KVDB itself, with the same selector and stop rule, and the stock model for dense attention. What a pass says it
cost is compared with what the cache counted.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import opened
from tiny_models import one_thread, prompt, rounding, tiny
from torch import Tensor, nn

from kvdb.runtime.attach import Attachment
from kvdb.runtime.selection import SELECTORS, Budget, CentroidSelector, Certified, Mass, StopRule
from kvdb.tools.evaluate.forward import Selecting, forward
from kvdb.tools.evaluate.oracle import Oracle
from kvdb.tools.evaluate.past import Past

STORED, POSITIONS, CHUNK_TOKENS = 1100, 5, 16
RULES = {"budget": Budget.of(0.1), "mass": Mass.of(0.8), "certified": Certified.of(0.5)}


@pytest.fixture(autouse=True)
def _single_thread() -> Any:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def ids() -> list[int]:
    found: list[int] = prompt(STORED + POSITIONS, seed=3)[0].tolist()
    return found


@pytest.fixture(scope="module")
def past(model: nn.Module, ids: list[int]) -> Past:
    return Past.of(model, ids[:STORED], CHUNK_TOKENS)


@pytest.fixture(scope="module")
def slack(model: nn.Module) -> float:
    return rounding(model, copy.deepcopy(model).double(), STORED, runs=2)


def test_without_selection_it_is_the_stock_model(model: nn.Module, ids: list[int], past: Past, slack: float) -> None:
    before = model.config._attn_implementation  # type: ignore[union-attr]
    found = forward(model, past, ids[STORED:], None)
    assert model.config._attn_implementation == before  # type: ignore[union-attr]
    with torch.no_grad():
        stock = model(input_ids=torch.tensor([ids])).logits[0, STORED:]
    assert (found.logits - stock).abs().max() <= slack
    for cost in found.costs.values():
        assert cost.mass == pytest.approx(POSITIONS)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", SELECTORS)
def test_a_pass_is_decoding_step_by_step(
    model: nn.Module, ids: list[int], past: Past, slack: float, tmp_path: Path, name: str, rule: StopRule
) -> None:
    selector = SELECTORS[name]()
    if isinstance(rule, Certified) and not selector.proves:
        pytest.skip("proves no bounds")
    found = forward(model, past, ids[STORED:], Selecting(selector, past.resident(selector), rule))
    tokens = torch.tensor([ids])
    stepped: list[Tensor] = []
    with (
        opened(tmp_path / "a.kvdb") as db,
        Attachment(model, db, rule=rule, fidelity="exact", selector=selector) as kv,
        torch.no_grad(),
    ):
        cache = kv.cache(tokens[:, : STORED + 1])
        for at in range(STORED, STORED + POSITIONS):
            stepped.append(model(input_ids=tokens[:, at : at + 1], past_key_values=cache).logits[0, -1])
        stats = cache.stats()
    assert (found.logits - torch.stack(stepped)).abs().max() <= slack
    read = sum(cost.records * past.record_bytes[layer] for layer, cost in found.costs.items())
    assert stats["kv_bytes_read"] == read
    assert stats["ranges_evaluated"] == sum(cost.evaluated for cost in found.costs.values())
    assert stats["abstract_bytes_read"] == sum(cost.abstract_bytes for cost in found.costs.values())
    if name == "box" and isinstance(rule, Certified):
        return  # boxes prove nothing here, and everything is read
    dense = forward(model, past, ids[STORED:], None)
    assert (found.logits - dense.logits).abs().max() > 10 * slack, "nothing was left out: the test compares nothing"


@pytest.mark.parametrize("rule", [RULES["budget"], RULES["mass"]], ids=["budget", "mass"])
def test_an_estimate_of_what_is_not_read_changes_the_answer_and_no_read(
    model: nn.Module, ids: list[int], past: Past, slack: float, rule: StopRule
) -> None:
    """So the comparison above is one of estimates too."""
    found = [
        forward(model, past, ids[STORED:], Selecting(selector, past.resident(selector), rule))
        for selector in (CentroidSelector(), CentroidSelector(estimated=0.0))
    ]
    assert (found[0].logits - found[1].logits).abs().max() > 10 * slack
    first = past.layers[0]  # later ones have other queries
    some, none = (each.costs[first] for each in found)
    assert (some.records, some.mass) == (none.records, none.mass)
    assert some.abstract_bytes > none.abstract_bytes


def test_positions_do_not_depend_on_how_many_are_fed_at_once(
    model: nn.Module, ids: list[int], past: Past, slack: float
) -> None:
    selecting = Selecting(Oracle(), past.resident(Oracle()), Budget.of(0.1))
    whole = forward(model, past, ids[STORED:], selecting).logits
    cache = past.begun()
    single = [forward(model, past, [token], selecting, cache).logits for token in ids[STORED:]]
    assert (whole - torch.cat(single)).abs().max() <= slack
    assert past.cache.get_seq_length() == STORED


def test_the_layers_that_have_a_window_do_not_select() -> None:
    model = tiny("gemma3")
    ids = prompt(STORED + POSITIONS, seed=4)[0].tolist()
    past = Past.of(model, ids[:STORED], CHUNK_TOKENS)
    assert past.layers == [2]
    dense = forward(model, past, ids[STORED:], None)
    with torch.no_grad():
        stock = model(input_ids=torch.tensor([ids])).logits[0, STORED:]
    assert (dense.logits - stock).abs().max() <= rounding(model, copy.deepcopy(model).double(), STORED, runs=1)
    some = forward(model, past, ids[STORED:], Selecting(Oracle(), past.resident(Oracle()), Budget.of(0.1)))
    assert list(some.costs) == [2]
    assert 0 < some.costs[2].mass < POSITIONS
