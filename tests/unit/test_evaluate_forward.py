"""The judge's one pass over many positions computes what decoding through a store computes, position by position.

And a past goes through a codec as a store's records do, one by one: whole chunks only, not the first, and nothing that was there before
changes.

The oracles are KVDB itself, with the same selector and stop rule, and the stock model for dense attention. What a pass says it
cost is compared with what the cache counted.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import opened
from tiny_models import one_thread, prompt, rounding, tiny
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvdb.abstracts import ABSTRACTS
from kvdb.codecs import CodecPlan
from kvdb.geometry import STORAGE_DTYPES, as_float32, from_float32
from kvdb.runtime.attach import Attachment
from kvdb.runtime.selection import (
    SELECTORS,
    BoxSelector,
    Budget,
    CentroidSelector,
    Certified,
    Mass,
    Resident,
    Selector,
    SketchSelector,
    StopRule,
)
from kvdb.segments import row_bytes
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


def step_by_step(
    model: nn.Module, ids: list[int], folder: Path, rule: StopRule | None, selector: Selector, codec: CodecPlan
) -> tuple[Tensor, dict[str, Any]]:
    """Logits after each of the last positions, decoded through a store, and what the cache counted."""
    tokens, stepped = torch.tensor([ids]), list[Tensor]()
    with (
        opened(folder / "a.kvdb") as db,
        Attachment(model, db, rule=rule, fidelity="exact", selector=selector, codec=codec) as kv,
        torch.no_grad(),
    ):
        cache = kv.cache(tokens[:, : STORED + 1])
        for at in range(STORED, STORED + POSITIONS):
            stepped.append(model(input_ids=tokens[:, at : at + 1], past_key_values=cache).logits[0, -1])
        return torch.stack(stepped), cache.stats()


@pytest.mark.parametrize("codec", ["raw", "int4", "planes:bits=4+int2;1=raw"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", SELECTORS)
def test_a_pass_is_decoding_step_by_step(
    model: nn.Module, ids: list[int], past: Past, slack: float, tmp_path: Path, name: str, rule: StopRule, codec: str
) -> None:
    """Over what a store holds: codecs leave the first chunk as it is, in a segment of its own, and abstracts are those of exact keys."""
    selector, lossy = SELECTORS[name](), codec != "raw"
    if isinstance(rule, Certified) and not selector.proves:
        pytest.skip("proves no bounds")
    if isinstance(rule, Certified) and lossy:
        pytest.skip("certificates are refused where keys are rounded")
    plan = CodecPlan.parse(codec)
    resident = resident_by_segment(past, selector, [0, 1, past.chunks] if lossy else [0, past.chunks])
    coded = past.through(plan)
    found = forward(model, coded, ids[STORED:], Selecting(selector, resident, rule))
    stepped, stats = step_by_step(model, ids, tmp_path, rule, selector, plan)
    assert (found.logits - stepped).abs().max() <= slack
    assert stats["kv_bytes_read"] == sum(cost.kv_bytes for cost in found.costs.values())
    assert stats["ranges_evaluated"] == sum(cost.evaluated for cost in found.costs.values())
    assert stats["abstract_bytes_read"] == sum(cost.abstract_bytes for cost in found.costs.values())
    if name == "box" and isinstance(rule, Certified):
        return  # boxes prove nothing here, and everything is read
    everything = forward(model, coded, ids[STORED:], None).logits
    assert (found.logits - everything).abs().max() > 10 * slack, "nothing was left out: the test compares nothing"
    dense = forward(model, past, ids[STORED:], None).logits
    assert lossy == bool((everything - dense).abs().max() > 10 * slack)


def resident_by_segment(past: Past, selector: Selector, edges: list[int]) -> dict[int, Resident]:
    """Abstracts as `Past.resident` has them, of segments that begin and end at these chunks: what clusters tokens stays within one."""
    found = {}
    for layer in past.layers:
        halves = [
            kv[0, :, : past.chunks * CHUNK_TOKENS].unflatten(1, (past.chunks, -1)).numpy() for kv in held(past)[layer]
        ]
        loaded: dict[str, Any] = {}
        for name, planes in selector.abstracts.items():
            built = [
                ABSTRACTS[name].build(keys, keys.shape[1] * CHUNK_TOKENS, "float32", values)
                for keys, values in ([half[:, a:b] for half in halves] for a, b in itertools.pairwise(edges))
            ]
            stored = np.concatenate(built, axis=1)[:planes]
            loaded[name] = ABSTRACTS[name].load(stored, halves[0].shape[-1], "float32")
        found[layer] = selector.prepare(loaded, CHUNK_TOKENS, halves[0].shape[-1])
    return found


@pytest.mark.parametrize("rule", [RULES["budget"], RULES["mass"]], ids=["budget", "mass"])
def test_an_estimate_of_what_is_not_read_changes_the_answer_and_no_read(
    model: nn.Module, ids: list[int], past: Past, slack: float, rule: StopRule
) -> None:
    """So the comparison above is one of estimates too."""
    found = [
        forward(model, past, ids[STORED:], Selecting(selector, past.resident(selector), rule))
        for selector in (CentroidSelector(), SketchSelector())
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


# -- codecs


def held(past: Past) -> list[tuple[Tensor, Tensor]]:
    layers: list[Any] = past.cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def record_by_record(past: Past, plan: CodecPlan, dtype: str) -> list[tuple[Tensor, Tensor]]:
    """K and V of each layer, every record that is there as a whole encoded alone, and decoded; but those of the first chunk."""
    found = []
    for layer, (k, v) in enumerate(held(past)):
        codec = plan.of(layer)
        keys, values = k.clone(), v.clone()
        missing = past.tokens - keys.shape[2]
        for head in range(keys.shape[1]):
            for start in range(past.chunk_tokens, past.tokens - past.chunk_tokens + 1, past.chunk_tokens):
                at = slice(start - missing, start - missing + past.chunk_tokens)
                if start < missing:
                    continue
                record = np.stack([each[0, head, at].float().numpy() for each in (k, v)])
                rows = codec.encode(from_float32(record[None], dtype), dtype)
                out = np.empty((2, 1, *record.shape[1:]), STORAGE_DTYPES[dtype])
                codec.decode(rows, np.array([0]), out, dtype)
                keys[0, head, at], values[0, head, at] = torch.from_numpy(as_float32(out[:, 0], dtype).copy())
        found.append((keys, values))
    return found


@pytest.mark.parametrize("codec", ["raw", "int4", "planes:bits=4+int2", "int8;1=raw"])
@pytest.mark.parametrize(
    ("architecture", "dtype", "chunk_tokens", "tokens"),
    [
        ("llama", torch.float32, 16, STORED),
        ("llama", torch.bfloat16, 32, STORED),
        ("gemma3", torch.float32, 16, STORED),
        ("gemma3", torch.float32, 16, 190),
        ("gemma3", torch.float16, 512, STORED),
    ],
)
def test_a_past_goes_through_a_codec_record_by_record(
    architecture: str, dtype: torch.dtype, chunk_tokens: int, tokens: int, codec: str
) -> None:
    """gemma3's windows of 200 tokens hold the first chunk of a text of 190, and no whole chunk of 512."""
    past = Past.of(tiny(architecture, dtype=dtype), prompt(tokens, seed=3)[0].tolist(), chunk_tokens)
    before = [(k.clone(), v.clone()) for k, v in held(past)]
    made = CodecPlan.parse(codec)
    through = past.through(made)
    for found, expected in zip(held(through), record_by_record(past, made, str(dtype)[6:]), strict=True):
        assert all(map(torch.equal, found, expected))
    for after, was in zip(held(past), before, strict=True):
        assert all(map(torch.equal, after, was))
    changed = [not all(map(torch.equal, *pair)) for pair in zip(held(through), before, strict=True)]
    window = (architecture, chunk_tokens) == ("gemma3", 512)
    assert changed == [
        not made.of(layer).lossless and (layer in past.layers or not window) for layer in range(len(changed))
    ]


def test_bytes_are_those_that_a_store_has_on_disk(model: nn.Module, ids: list[int], past: Past, tmp_path: Path) -> None:
    plan, whole = CodecPlan.parse("planes+int2;0=int8"), STORED // CHUNK_TOKENS * CHUNK_TOKENS
    with (
        opened(tmp_path / "a.kvdb") as db,
        Attachment(model, db, rule=None, fidelity="exact", selector=BoxSelector(), codec=plan) as kv,
    ):
        kv.save(kv.cache(torch.tensor([ids[: whole + 1]])), name="n")
        infos = [segment.info for segment in db.segments(db.sequence("n").spans)]
        rows = [
            info.chunks * len(group.layers) * group.kv_heads * row_bytes(info, index)
            for info in infos
            for index, group in enumerate(info.geometry.groups)
        ]
    through = past.through(plan)
    assert [info.tokens for info in infos] == [CHUNK_TOKENS, whole - CHUNK_TOKENS]
    assert through.token_bytes * whole == sum(rows)
    assert sum(map(through.stored_bytes, past.layers)) == sum(rows)


def test_a_pass_attends_to_what_a_codec_gives_back(model: nn.Module, ids: list[int], past: Past, slack: float) -> None:
    """Under a rule that reads everything, as without selection: the stock model with that KV in its cache."""
    through = past.through(CodecPlan.parse("int4"))
    cache = Cache(layers=[copy.copy(layer) for layer in past.cache.layers])
    layers: list[Any] = cache.layers
    for layer, (keys, values) in zip(layers, record_by_record(past, through.codec, "float32"), strict=True):
        layer.keys, layer.values = keys, values
    with torch.no_grad():
        stock = model(input_ids=torch.tensor([ids[STORED:]]), past_key_values=cache).logits[0]
    selecting = Selecting(BoxSelector(), past.resident(BoxSelector()), Budget.of(1.0))
    dense = forward(model, past, ids[STORED:], None).logits
    for how in (None, selecting):
        found = forward(model, through, ids[STORED:], how).logits
        assert (found - stock).abs().max() <= slack
        assert (found - dense).abs().max() > 10 * slack
