"""What a layer will ask is predicted by its own code, and whatever is read ahead changes nothing but time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import opened
from tiny_models import ARCHITECTURES, greedy, prompt, tiny
from torch import Tensor, nn

from kvdb import KVDB
from kvdb.runtime import KVDBCache, attach
from kvdb.runtime.layers import FullLayer
from kvdb.runtime.prediction import asked, decoder_layers

pytestmark = pytest.mark.usefixtures("single_thread")
TOKENS = 1500


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with opened(tmp_path / "s") as db:
        yield db


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"mistral"}))  # all its layers have windows
def test_a_probe_asks_what_the_layer_asks(store: KVDB, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given what enters a layer, the probe's query is the layer's, whatever its norms, projections and rotations are."""
    model, ids = tiny(architecture), prompt(TOKENS)
    probed: dict[int, Tensor] = {}
    true: dict[int, Tensor] = {}

    def probe(index: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            cache = next(each for each in (*kwargs.values(), *args) if isinstance(each, KVDBCache))
            if not cache.is_probing and isinstance(cache.layers[index], FullLayer):
                with torch.no_grad():
                    query = asked(layer, cache, args, kwargs)
                assert query is not None, cache.prefetch.stats()
                probed[index] = query

        return hook

    real = FullLayer._attend_row

    def attend_row(self: FullLayer, row: Any, b: int, q: Tensor, scale: float) -> Tensor:
        true[self.stored.index] = (q * scale).flatten(0, 1)
        return real(self, row, b, q, scale)

    monkeypatch.setattr(FullLayer, "_attend_row", attend_row)
    with attach(model, store, budget=0.2) as kv:
        cache = kv.cache(ids)
        layers = decoder_layers(model, len(cache.layers))
        assert layers is not None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(probe(index), with_kwargs=True)
        tokens = cache.length
        model(input_ids=ids[:, -1:], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [tokens + 1] * len(cache.layers)
    assert probed
    assert probed.keys() == true.keys()
    for index, query in probed.items():
        assert torch.equal(query[0], true[index])


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("rule", [{"budget": 0.2}, {"mass": 0.9}], ids=lambda rule: next(iter(rule)))
def test_reading_ahead_changes_no_answer(store: KVDB, architecture: str, rule: dict[str, Any]) -> None:
    full_and_windows = {"layer_types": ["full_attention", "sliding_attention"] * 2} if architecture == "gemma3" else {}
    model, ids = tiny(architecture, num_hidden_layers=4, **full_and_windows), prompt(TOKENS)
    answers, hits = [], {}
    for prefetch in (False, True):
        with attach(model, store, prefetch=prefetch, fidelity="any", **rule) as kv:
            cache = kv.cache(ids)
            answers.append(greedy(model, ids, cache, 12))
            hits[prefetch] = cache.stats()["prefetch"]["layers"]
            assert (cache.stats()["stage_seconds"]["predict"] > 0) == bool(hits[prefetch])
    assert torch.equal(*answers)
    assert hits[False] == {}
    full = [layer for layer in range(4) if isinstance(cache.layers[layer], FullLayer)]
    assert list(hits[True]) == [str(layer) for layer in full[1:]]
    for counts in hits[True].values():
        assert 0 < counts["hit_rate"] <= 1
        assert counts["expected"] > 0


def test_a_layer_that_gets_what_the_one_before_got_asks_as_predicted(store: KVDB) -> None:
    """Then every record that is chosen was expected: what is expected is what the predicted query would choose."""
    model, ids = tiny("llama"), prompt(TOKENS)
    with torch.no_grad():
        for part in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):  # type: ignore[union-attr,index]
            part.weight.zero_()  # the first layer adds nothing
        with attach(model, store, prefetch=True, budget=0.2) as kv:
            cache = kv.cache(ids)
            greedy(model, ids, cache, 4)
            assert cache.stats()["prefetch"]["layers"]["1"]["hit_rate"] == 1


@pytest.mark.parametrize("trouble", ["raises", "returns"])
def test_a_layer_that_cannot_be_probed_is_not_predicted(
    store: KVDB, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with attach(model, store, prefetch=False, budget=0.2) as kv:
        expected = greedy(model, ids, kv.cache(ids), 8)
    layer: Any = model.model.layers[1]  # type: ignore[union-attr,index]
    real = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, KVDBCache) and cache.is_probing:
            if trouble == "raises":
                raise ValueError("not today")
            return args[0]
        return real(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    with attach(model, store, prefetch=True, budget=0.2) as kv:
        cache = kv.cache(ids)
        assert torch.equal(greedy(model, ids, cache, 8), expected)
        told = cache.stats()["prefetch"]
    assert not told["active"]
    assert ("not today" if trouble == "raises" else "did not come to KVDB's attention") in told["why"]


def test_a_model_whose_layers_are_not_found_is_not_predicted(store: KVDB, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    monkeypatch.setattr("kvdb.runtime.prediction.decoder_layers", lambda *_: None)
    with attach(model, store, prefetch=True, budget=0.2) as kv:
        cache = kv.cache(ids)
        greedy(model, ids, cache, 2)
        assert "not found" in cache.stats()["prefetch"]["why"]


def test_caches_that_take_turns_within_a_step_are_not_mixed_up(store: KVDB) -> None:
    """A step of one begins while another one, as long, is between two layers: as two threads with one model do."""
    model, ids = (
        tiny("gemma3", num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2),
        prompt(TOKENS),
    )
    other_ids = torch.cat((ids[:, :-2], prompt(2, seed=4)), 1)
    with attach(model, store, prefetch=True, budget=0.2) as kv:
        expected = [kv.cache(each) for each in (ids, other_ids)]
        logits = [
            model(input_ids=i[:, -1:], past_key_values=c).logits
            for i, c in zip((ids, other_ids), expected, strict=True)
        ]
        one, other = kv.cache(ids), kv.cache(other_ids)
        layers = decoder_layers(model, 4)
        assert layers is not None
        between = list[Tensor]()

        def turn(_: nn.Module, args: Any, kwargs: Any) -> None:
            if kwargs.get("past_key_values") is one and not one.is_probing and not between:
                between.append(model(input_ids=other_ids[:, -1:], past_key_values=other).logits)

        layers[1].register_forward_pre_hook(turn, with_kwargs=True, prepend=True)
        found = model(input_ids=ids[:, -1:], past_key_values=one).logits
        assert torch.equal(found, logits[0])
        assert torch.equal(between[0], logits[1])
        for cache in (one, other):
            assert {layer.get_seq_length() for layer in cache.layers} == {TOKENS}
            assert cache.given is None


def test_layers_with_hooks_of_others_are_not_probed(store: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    calls = []
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,index]
    with attach(model, store, prefetch=True, budget=0.2) as kv:
        cache = kv.cache(ids)
        calls.clear()
        greedy(model, ids, cache, 5)
        assert "have hooks" in cache.prefetch.stats()["why"]
    assert len(calls) == 5
