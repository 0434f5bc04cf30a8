"""Clusters of keys that lie close together, and their means: what stands in for tokens that are not read.

A cluster of n unread tokens counts in attention as one token with the mean key, the mean value and n times the weight. That is good where
the keys of a cluster are alike, wherever in the text they stand; tokens that merely follow each other are not. So the keys of up to
`BLOCK_TOKENS` tokens are halved across the direction in which they differ most, and the halves again, until a cluster has as many
tokens as a record: as many clusters as records, each kept in the row of one of them. Rows of a block follow from all its keys and values.
source: RetroInfer, arXiv 2505.02922 (meta index: centroid, sum of values, size; segmented clustering). Here clusters are of one size, and
the mean of the values is kept: their sum could overflow float16.
"""

from __future__ import annotations

from typing import ClassVar, Final, NamedTuple

import numpy as np

from kvdb.abstracts.base import Abstract, Array, Form
from kvdb.abstracts.centroid_build import LARGEST, SMALLEST, cluster
from kvdb.geometry import Geometry

BLOCK_TOKENS: Final = 1024
"""Tokens that share clusters: as many as leave a tail at a time."""
NOBODY: Final = -(2**15)
"""In place of a member."""


class Clusters(NamedTuple):
    """Rows taken apart.

    keys, values              (chunks, kv_heads, head_dim) int8: mean = scale * these
    key_scales, value_scales  (chunks, kv_heads) float32
    members                   (chunks, kv_heads, chunk_tokens) int16: positions, counted from the first token of the row's own
                              chunk, of this cluster's tokens; `NOBODY` beyond them
    """

    keys: Array
    key_scales: Array
    values: Array
    value_scales: Array
    members: Array


class Centroid(Abstract):
    """One plane: mean key and mean value in 8 bits, their scales, the members."""

    name: ClassVar[str] = "centroid"
    planes: ClassVar[int] = 1
    of_values: ClassVar[bool] = True
    of_blocks: ClassVar[bool] = True

    def row_bytes(self, chunk_tokens: int, head_dim: int, itemsize: int) -> int:
        return 2 * head_dim + 8 + 2 * chunk_tokens

    def form(self, chunks: int, geometry: Geometry, group: int) -> Form:
        g = geometry.groups[group]
        row = self.row_bytes(geometry.chunk_tokens, g.head_dim, geometry.storage_dtype.itemsize)
        return Form(("plane", "chunk", "head", "byte"), (1, chunks, g.kv_heads, row), "uint8")

    def build(self, keys: Array, tokens: int, dtype: str, values: Array | None = None) -> Array:
        assert values is not None
        heads, chunks, chunk_tokens, dim = keys.shape
        stored = np.zeros((1, chunks, heads, self.row_bytes(chunk_tokens, dim, 0)), np.uint8)
        clusters = unpack(stored[0], dim)
        clusters.members[...] = NOBODY
        step = max(1, BLOCK_TOKENS // chunk_tokens)
        for head in range(heads):
            for start in range(0, chunks, step):
                stop = min(chunks, start + step)
                own = min(tokens, stop * chunk_tokens) - start * chunk_tokens
                k, v = (vectors[head, start:stop].reshape(-1, dim)[:own] for vectors in (keys, values))
                _summarise(k, v, chunk_tokens, Clusters(*(part[start:stop, head] for part in clusters)))
        return stored

    def load(self, stored: Array, head_dim: int, dtype: str) -> Array:
        """(1, chunks, kv_heads, row_bytes) uint8 as stored: `unpack` takes them apart."""
        return stored


def unpack(rows: Array, head_dim: int) -> Clusters:
    """Views of rows (chunks, kv_heads, row_bytes) uint8, with contiguous bytes in each."""
    d = head_dim
    return Clusters(
        rows[..., :d].view(np.int8),
        rows[..., 2 * d : 2 * d + 4].view("<f4")[..., 0],
        rows[..., d : 2 * d].view(np.int8),
        rows[..., 2 * d + 4 : 2 * d + 8].view("<f4")[..., 0],
        rows[..., 2 * d + 8 :].view("<i2"),
    )


def _summarise(keys: Array, values: Array, size: int, rows: Clusters) -> None:
    """Fill the rows of one KV head's part of a block. keys, values (tokens, head_dim) float32; size: of a cluster."""
    keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
    known = np.arange(len(keys))
    if not np.maximum(np.abs(keys).max(), np.abs(values).max()) <= LARGEST:
        known = np.flatnonzero((np.abs(keys).max(1) <= LARGEST) & (np.abs(values).max(1) <= LARGEST))
    if not len(known):
        return
    order, *both = cluster(keys, values, known, size)
    used = len(both[0])
    for means, in_8_bits, scales in zip(
        both, (rows.keys, rows.values), (rows.key_scales, rows.value_scales), strict=True
    ):
        scales[:used] = np.abs(means).max(1) / np.float32(127)
        in_8_bits[:used] = np.rint(means / np.maximum(scales[:used, None], SMALLEST))
    members = np.full(used * size, len(keys))
    members[: len(order)] = order
    members = np.sort(members.reshape(used, size), 1)
    rows.members[:used] = np.where(members < len(keys), members - size * np.arange(used)[:, None], NOBODY)
