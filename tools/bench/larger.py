"""A larger model's shape, filled with the recorded heads of a small one, and a store of its KV.

Layer l, KV head h holds what the small model has in layer l + 10 * (h // its KV heads), counted around, head h % its KV heads: no two heads of a layer are
one. Where heads are wider, keys, values and queries are repeated side by side and queries divided by how often: every logit is the
real one. Query heads beyond the recorded group are repeated. The context ends with the text that goes on; the other texts come before it,
again and again where that is not long enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvdb import EXACT, KVDB, Geometry, Identity, LayerGroup
from kvdb.codecs import RAW, CodecPlan
from kvdb.geometry import CHUNK_TOKENS, SEGMENT_TOKENS
from kvdb.identity import joined_fidelity
from kvdb.runtime.history import FLUSH_TOKENS
from kvdb.tools.bench.recording import Texts, Track

Array = np.ndarray[Any, np.dtype[Any]]

NAME: Final = "replay"
IDENTITY: Final = Identity(weights="recorded heads, side by side", config={}, dtype="bfloat16")
_APART: Final = 10
"""Layers between the sources of a layer's first heads and the next ones."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model; by default Llama-3.1-8B."""

    layers: int = 32
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128

    @property
    def geometry(self) -> Geometry:
        group = LayerGroup(layers=tuple(range(self.layers)), kv_heads=self.kv_heads, head_dim=self.head_dim)
        return Geometry(dtype="bfloat16", chunk_tokens=CHUNK_TOKENS, groups=(group,))

    def sources(self, layer: int, layers: int, heads: int) -> tuple[Array, Array]:
        """Which of a model of so many layers and KV heads the heads of a layer are made of: (kv_heads,) twice."""
        head = np.arange(self.kv_heads)
        return (layer + _APART * (head // heads)) % layers, head % heads

    def wide(self, vectors: Array) -> Array:
        """Vectors (..., their head_dim) as they are in this shape."""
        return np.tile(vectors, self.head_dim // vectors.shape[-1])


def context_ids(texts: Texts, tokens: int) -> Array:
    """(tokens,) uint32"""
    return texts.ids[_places(texts, tokens, 0, tokens)]


def context(shape: Shape, texts: Texts, layer: int, tokens: int, start: int, stop: int) -> tuple[Array, Array]:
    """Keys and values of positions [start, stop) of a context of `tokens` tokens: (kv_heads, stop - start, head_dim) bfloat16 each."""
    text, position = _places(texts, tokens, start, stop)
    _, layers, heads, _, _ = texts.keys.shape
    source, head = (each[:, None] for each in shape.sources(layer, layers, heads))
    return shape.wide(texts.keys[text, source, head, position]), shape.wide(texts.values[text, source, head, position])


def _places(texts: Texts, tokens: int, start: int, stop: int) -> tuple[Array, Array]:
    """Text and position in it of each token."""
    count, each = texts.ids.shape
    before_end = tokens - 1 - np.arange(start, stop)
    return before_end // each % count, each - 1 - before_end % each


class LayerStep(NamedTuple):
    """What a layer gets in a decoding step. bfloat16; queries are scaled already.

    k, v              (1, kv_heads, 1, head_dim)
    query, predicted  (1, kv_heads * group, 1, head_dim)
    """

    k: Tensor
    v: Tensor
    query: Tensor
    predicted: Tensor


def layer_steps(shape: Shape, track: Track, step: int) -> list[LayerStep]:
    """A recorded step, layer by layer. Where a layer's source is the first one of the small model, its prediction is of the step before."""
    _, layers, heads, _, own_dim = track.queries.shape
    groups = np.arange(shape.group) % track.queries.shape[3]
    found = []
    for layer in range(shape.layers):
        at = shape.sources(layer, layers, heads)
        k, v = (torch.from_numpy(shape.wide(new[step][at])).view(torch.bfloat16) for new in (track.keys, track.values))
        queries = [
            shape.wide(made[step][at][:, groups]) * (own_dim / shape.head_dim)
            for made in (track.queries, track.predicted)
        ]
        query, predicted = (torch.from_numpy(q).flatten(0, 1).bfloat16()[None, :, None] for q in queries)
        found.append(LayerStep(k[None, :, None], v[None, :, None], query, predicted))
    return found


def fidelity_of(codec: CodecPlan) -> str:
    return EXACT if codec.lossless else joined_fidelity(EXACT, str(codec))


def write_store(
    db: KVDB, shape: Shape, texts: Texts, tokens: int, abstracts: tuple[str, ...], codec: CodecPlan = RAW
) -> None:
    """Store a context of whole chunks under `NAME`, as a prefill would: block by block, in segments of 16 384 tokens.

    cost  memory of one block of one layer; on one core a minute for every GB
    """
    geometry, ids, parent = shape.geometry, context_ids(texts, tokens), None
    for start in range(0, tokens, SEGMENT_TOKENS):
        stop = min(start + SEGMENT_TOKENS, tokens)
        writer = db.writer(
            identity=IDENTITY, fidelity=fidelity_of(codec), geometry=geometry, parent=parent, start=start,
            capacity=geometry.chunks(stop - start), codec=codec, abstracts=abstracts,
        )  # fmt: skip
        for layer in geometry.layers:
            for at in range(start, stop, FLUSH_TOKENS):
                writer.append(layer, *context(shape, texts, layer, tokens, at, min(at + FLUSH_TOKENS, stop)))
        last = db.commit(writer, ids[start:stop]).segment
        parent = last.info.segment
    db.put_sequence(last, tokens, name=NAME)
