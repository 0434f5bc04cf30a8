"""How far the KV of two sequences is apart, over the tokens they have in common.

For the same text under two codecs, dtypes, versions of a model or ways to compute attention. Distances are of what is read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np

from kvdb.entries import Sequence
from kvdb.errors import Damaged, InvalidInput
from kvdb.geometry import Geometry
from kvdb.inspection import planes
from kvdb.prefix import common_prefix

if TYPE_CHECKING:
    from kvdb.store import KVDB

Array = np.ndarray[Any, np.dtype[Any]]

_STEP: Final = 1024
"""Tokens of a layer that are in memory at a time."""
CHUNK: Final = 16
"""Tokens that a worst place is given in, whatever the records of the stores hold."""


class Error(NamedTuple):
    """relative  root mean square of the difference / that of the first sequence's numbers; inf where those are all 0
    most         greatest magnitude of a difference

    Either is NaN where what is stored is not finite.
    """

    relative: float
    most: float


class LayerDistance(NamedTuple):
    layer: int
    keys: Error
    values: Error


class ChunkDistance(NamedTuple):
    """Relative errors of the tokens [start, stop) of a layer, against their own numbers."""

    layer: int
    start: int
    stop: int
    keys: float
    values: float


class Distance(msgspec.Struct, frozen=True, kw_only=True):
    """common  leading tokens that are equal; `shared` of them lie in the same segments and are not compared
    fields    of the identity that differ
    layers    ascending; empty where no token is common, or none is left to compare
    worst     chunks with the greatest relative error of keys or values, the worst first: NaN, then by size
    wrong     what could not be read, and is left out
    """

    common: int
    shared: int
    fields: list[str]
    layers: list[LayerDistance]
    worst: list[ChunkDistance]
    wrong: list[str]


Progress = Callable[[int, int], None]
"""Called with bytes of KV compared so far, and in all."""


def distance(
    first: tuple[KVDB, Sequence], second: tuple[KVDB, Sequence], *, worst: int = 5, progress: Progress = lambda *_: None
) -> Distance:
    """Compare two sequences, of one store or two.

    raises  InvalidInput where layers, KV heads or head dimensions differ; Damaged where token ids or segments are missing
    cost    reads the KV of all common tokens of both, once; memory for _STEP tokens of one layer
    """
    (a, sequence_a), (b, sequence_b) = first, second
    common = common_prefix(a.tokens(sequence_a.spans), b.tokens(sequence_b.spans))
    holding = [planes.held(s.spans, db.segments(s.spans)) for db, s in (first, second)]
    _check_shapes(*(part[0].segment.info.geometry for part in holding))
    shared = _shared(*holding) if a.path == b.path else 0
    shared = min(shared, common)
    wrong: list[str] = []
    found: list[LayerDistance] = []
    chunks: list[ChunkDistance] = []
    geometry = holding[0][0].segment.info.geometry
    total, done = 2 * (common - shared) * geometry.token_bytes, 0
    readers = a.reader(), b.reader()
    try:
        for layer in geometry.layers if common > shared else ():
            sums = _Sums(layer)
            for start in range(shared, common, _STEP):
                stop = min(start + _STEP, common)
                try:
                    pair = [planes.read(r, h, layer, start, stop) for r, h in zip(readers, holding, strict=True)]
                    sums.add(start, np.stack(pair[0]), np.stack(pair[1]))
                except Damaged as e:
                    wrong.append(str(e))
                done += 2 * (stop - start) * _layer_bytes(geometry, layer)
                progress(done, total)
            found.append(sums.layer_distance())
            chunks = sorted([*chunks, *sums.chunks], key=_worst_first)[:worst]
    finally:
        for reader in readers:
            reader.close()
    identities = a.identity(sequence_a.identity), b.identity(sequence_b.identity)
    return Distance(
        common=common,
        shared=shared,
        fields=identities[0].difference(identities[1]),
        layers=found,
        worst=chunks,
        wrong=wrong,
    )


def _worst_first(chunk: ChunkDistance) -> tuple[bool, float, int, int]:
    """A key to sort by. NaN compares with nothing, so it has a place of its own; of equal errors, the first place is first."""
    known = not (math.isnan(chunk.keys) or math.isnan(chunk.values))
    return known, -max(chunk.keys, chunk.values) if known else 0.0, chunk.layer, chunk.start


def _layer_bytes(geometry: Geometry, layer: int) -> int:
    """KV bytes of one token in one layer."""
    g = geometry.groups[geometry.locate(layer)[0]]
    return 2 * g.kv_heads * g.head_dim * geometry.storage_dtype.itemsize


class _Sums:
    """Of squares, over the tokens of a layer."""

    def __init__(self, layer: int) -> None:
        self.layer, self.chunks = layer, list[ChunkDistance]()
        self._apart, self._own, self._most = np.zeros(2), np.zeros(2), np.zeros(2)

    def add(self, start: int, a: Array, b: Array) -> None:
        """a, b (2, kv_heads, tokens, head_dim) float32: keys, then values"""
        with np.errstate(invalid="ignore"):  # inf - inf
            apart = np.subtract(a, b, dtype=np.float64)
        by_token = np.square(apart).sum(axis=(1, 3))  # [2, tokens]
        own = np.square(a, dtype=np.float64).sum(axis=(1, 3))
        self._apart += by_token.sum(axis=1)
        self._own += own.sum(axis=1)
        self._most = np.maximum(self._most, np.abs(apart).max(axis=(1, 2, 3)))
        edges = np.arange(0, by_token.shape[1], CHUNK)
        relative = _relative(np.add.reduceat(by_token, edges, axis=1), np.add.reduceat(own, edges, axis=1))
        for i, edge in enumerate(edges.tolist()):
            stop = min(edge + CHUNK, by_token.shape[1])
            keys, values = relative[:, i].tolist()
            self.chunks.append(ChunkDistance(self.layer, start + edge, start + stop, keys, values))

    def layer_distance(self) -> LayerDistance:
        relative = _relative(self._apart, self._own).tolist()
        return LayerDistance(self.layer, *(Error(r, m) for r, m in zip(relative, self._most.tolist(), strict=True)))


def _relative(apart: Array, own: Array) -> Array:
    """Of sums of squares; 0 where nothing differs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(apart == 0, 0.0, np.sqrt(apart / own))


def _check_shapes(a: Geometry, b: Geometry) -> None:
    shapes = [
        [(n, g.groups[g.locate(n)[0]].kv_heads, g.groups[g.locate(n)[0]].head_dim) for n in g.layers] for g in (a, b)
    ]
    if shapes[0] != shapes[1]:
        told = [f"{len(s)} layers of {sorted({(h, d) for _, h, d in s})}" for s in shapes]
        raise InvalidInput(
            f"sequences: {told[0]} and {told[1]} (KV heads, head dimension), expected the same shapes; compare sequences of one model"
        )


def _shared(a: list[planes.Held], b: list[planes.Held]) -> int:
    """Leading tokens that lie in the same segments of one store."""
    shared = 0
    for mine, theirs in zip(a, b, strict=False):
        if mine.segment.info.segment != theirs.segment.info.segment:
            break
        shared = min(mine.stop, theirs.stop)
        if mine.stop != theirs.stop:
            break
    return shared
