"""What a replay is made of is what the real model computed, in the shape that is said, and its ways of decoding attend to all of it.

Oracles: the stock model's own attention outputs and hidden states, dense attention in float64, texts laid end to end in a list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import opened
from tiny_models import one_thread

from kvdb import KVDB
from kvdb.geometry import as_float32
from kvdb.runtime.gather import Gather
from kvdb.tools.bench import replay
from kvdb.tools.bench.larger import NAME, Shape, context, context_ids, layer_steps, write_store
from kvdb.tools.bench.recording import Recording, Texts, Track, record, texts_in
from kvdb.tools.bench.sequential import WAYS, Sequential, fastest
from kvdb.tools.models import LoadedModel

Array = np.ndarray[Any, np.dtype[Any]]

TEXTS, TOKENS, STEPS = 2, 240, 4
SHAPE = Shape(layers=3, kv_heads=5, group=4, head_dim=128)
CONTEXT = 1040
"""Tokens: each text twice, and a part of one."""
ROUNDING = 2.0**-8
"""Of bfloat16, relative to the largest number that is rounded."""


@pytest.fixture(scope="module")
def recording(smollm2: LoadedModel) -> Iterator[Recording]:
    with one_thread():
        yield record(TEXTS, TOKENS, STEPS)


@pytest.fixture
def stored(tmp_path: Path, recording: Recording) -> Iterator[KVDB]:
    with opened(tmp_path / "a.kvdb") as db:
        write_store(db, SHAPE, recording.texts, CONTEXT, ("sketch", "centroid"))
        yield db


def dense(q: Array, keys: Array, values: Array) -> Array:
    """q (kv_heads, group, dim), keys and values (kv_heads, tokens, dim): attention in float64."""
    logits = np.einsum("hgd,htd->hgt", q.astype(np.float64), keys.astype(np.float64))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hgt,htd->hgd", weights / weights.sum(-1, keepdims=True), values.astype(np.float64))


def wide(bits: Array) -> Array:
    return as_float32(np.ascontiguousarray(bits), "bfloat16")


def test_recorded_queries_over_recorded_keys_give_what_the_model_attends_to(
    recording: Recording, smollm2: LoadedModel
) -> None:
    model: Any = smollm2.model
    texts, track = recording
    heard: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: heard.append(args[0][0, -STEPS:]))
        for layer in model.model.layers
    ]
    ids = np.concatenate((texts.ids[0], track.ids)).astype(np.int64)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids)[None])
    for hook in hooks:
        hook.remove()
    for step in range(STEPS):
        for layer, outputs in enumerate(heard):
            keys, values = (
                np.concatenate((wide(before[0, layer]), wide(new[: step + 1, layer]).swapaxes(0, 1)), 1)
                for before, new in ((texts.keys, track.keys), (texts.values, track.values))
            )
            q = track.queries[step, layer]
            largest = np.abs(np.einsum("hgd,htd->hgt", q, keys)).max()  # a logit that is off moves weights by as much
            slack = 4 * ROUNDING * (1 + largest) * np.abs(values).max()
            assert np.abs(dense(q, keys, values).reshape(-1) - outputs[step].numpy()).max() < slack
            assert (
                np.abs(dense(q, keys, values).reshape(-1) - outputs[step].numpy()).mean()
                < ROUNDING * np.abs(values).max()
            )


def test_a_prediction_is_the_next_layers_query_of_this_layers_input(recording: Recording, smollm2: LoadedModel) -> None:
    model: Any = smollm2.model
    texts, track = recording
    ids = torch.from_numpy(np.concatenate((texts.ids[0], track.ids)).astype(np.int64))[None]
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        cos, sin = (each[0, -1].numpy() for each in model.model.rotary_emb(hidden[0], torch.arange(ids.shape[1])[None]))
        for layer in range(1, len(model.model.layers)):
            own = model.model.layers[layer]
            q = own.self_attn.q_proj(own.input_layernorm(hidden[layer - 1][0, -1])).numpy().reshape(3, 3, 64)
            turned = q * cos + np.concatenate((-q[..., 32:], q[..., :32]), -1) * sin
            np.testing.assert_allclose(track.predicted[-1, layer], turned * 64**-0.5, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(track.predicted[1:, 0], track.queries[:-1, 0])


def test_a_file_keeps_a_recording(recording: Recording, tmp_path: Path) -> None:
    recording.save(tmp_path / "r.npz")
    assert texts_in(tmp_path / "r.npz") == (TEXTS, TOKENS)
    for kept, part in zip((Texts.load(tmp_path / "r.npz"), Track.load(tmp_path / "r.npz")), recording, strict=True):
        for field in type(part).__dataclass_fields__:
            np.testing.assert_array_equal(getattr(kept, field), getattr(part, field))


def test_a_context_is_texts_end_to_end_in_every_head(recording: Recording) -> None:
    texts = recording.texts
    order = [text for _ in range(3) for text in reversed(range(TEXTS))]
    np.testing.assert_array_equal(context_ids(texts, CONTEXT), np.concatenate([texts.ids[t] for t in order])[-CONTEXT:])
    for layer in range(SHAPE.layers):
        keys, values = context(SHAPE, texts, layer, CONTEXT, 16, 1040)
        for head in range(SHAPE.kv_heads):
            source = (layer + 10 * (head // 3)) % 30, head % 3
            for found, own in ((keys, texts.keys), (values, texts.values)):
                expected = np.concatenate([own[(t, *source)] for t in order])[-CONTEXT:][16:1040]
                np.testing.assert_array_equal(found[head], np.concatenate((expected, expected), 1))


def test_logits_of_the_larger_shape_are_the_real_ones(recording: Recording) -> None:
    track = recording.track
    for layer, given in enumerate(layer_steps(SHAPE, track, 1)):
        k = given.k[0, :, 0].float().numpy()
        for kind, own in ((given.query, track.queries), (given.predicted, track.predicted)):
            q = kind[0, :, 0].unflatten(0, (SHAPE.kv_heads, SHAPE.group)).float().numpy()
            for head in range(SHAPE.kv_heads):
                source = (layer + 10 * (head // 3)) % 30, head % 3
                for g in range(SHAPE.group):
                    real = own[(1, *source, g % 3)]
                    expected = float(real @ wide(track.keys[(1, *source)]))
                    slack = ROUNDING * float(np.abs(real) @ np.abs(wide(track.keys[(1, *source)])))
                    assert abs(float(q[head, g] @ k[head]) - expected) <= slack


@pytest.mark.parametrize("way", WAYS)
def test_sequential_reads_give_all_kv_of_every_layer_again_and_again(
    stored: KVDB, recording: Recording, way: str
) -> None:
    segments = stored.segments(stored.sequence(NAME).spans)
    assert fastest(segments) in WAYS
    with Sequential(segments, way) as source:
        parts = source.layers()
        for step in range(2):
            for layer, given in enumerate(layer_steps(SHAPE, recording.track, step)):
                found, lent = next(parts)
                q = given.query[0, :, 0].unflatten(0, (SHAPE.kv_heads, SHAPE.group)).float()
                running = Gather(q, "bfloat16")
                running.add(lent)
                keys, values = (wide(each) for each in context(SHAPE, recording.texts, layer, CONTEXT, 0, CONTEXT))
                assert found == layer
                np.testing.assert_allclose(
                    running.finish().numpy(), dense(q.numpy(), keys, values), rtol=1e-4, atol=1e-4
                )


def test_it_replays_every_way_and_keeps_what_it_found(
    recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recording.save(tmp_path / "r.npz")
    sizes = {"tokens": 2048, "layers": 2, "steps": 2, "warm": 2, "turns": 1}
    replay.run(**sizes, limit="256MiB", budget=256, recording=tmp_path / "r.npz", folder=tmp_path)  # type: ignore[arg-type]
    result = tmp_path / "benchmarks/results/replay-2048.json"
    if not result.exists():
        pytest.skip("this process may make no control group, or its temporary folder is in memory")
    rows = {row["way"]: row for row in json.loads(result.read_text())["rows"]}
    assert set(rows) == set(replay.WAYS)
    token_bytes = 2 * 8 * 128 * 2 * sizes["layers"]
    assert rows["memory"]["disk_bytes"] == 0
    assert rows["memory"]["read_bytes"] == rows["apart"]["read_bytes"] == 256 * token_bytes
    assert rows["apart"]["disk_bytes"] >= rows["apart"]["read_bytes"]
    assert rows["all"]["read_bytes"] == 2048 * token_bytes
