"""Elementwise minimum and maximum of a record's keys: enough to bound any query's score.

The two corners are themselves key values, so storing them in the KV dtype rounds nothing and the bound stays a bound:
for every key k of the record, q.k <= sum_d max(q_d lo_d, q_d hi_d).
source: LeoAM, arXiv 2506.20187 (chunk abstracts); Quest, arXiv 2406.10774, section 3.2.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvdb.abstracts.base import Abstract, Array, Form
from kvdb.geometry import STORAGE_DTYPES, Geometry, as_float32, from_float32


class Box(Abstract):
    """One plane: per record lo (head_dim), then hi (head_dim), in the KV dtype. Scorers get them in float32."""

    name: ClassVar[str] = "box"
    planes: ClassVar[int] = 1

    def row_bytes(self, chunk_tokens: int, head_dim: int, itemsize: int) -> int:
        return 2 * head_dim * itemsize

    def form(self, chunks: int, geometry: Geometry, group: int) -> Form:
        g = geometry.groups[group]
        return Form(("chunk", "head", "part", "dim"), (chunks, g.kv_heads, 2, g.head_dim), geometry.dtype)

    def build(self, keys: Array, tokens: int, dtype: str, values: Array | None = None) -> Array:
        heads, chunks, chunk_tokens, dim = keys.shape
        box = np.empty((1, chunks, heads, 2, dim), np.float32)
        full = tokens // chunk_tokens
        by_chunk = keys.swapaxes(0, 1)  # [chunks, heads, chunk_tokens, dim]
        low = by_chunk[:full, :, 0].copy()
        high = low.copy()
        for token in range(1, chunk_tokens):  # 4 times faster than a reduction over the axis
            np.minimum(low, by_chunk[:full, :, token], out=low)
            np.maximum(high, by_chunk[:full, :, token], out=high)
        box[0, :full, :, 0], box[0, :full, :, 1] = low, high
        if full < chunks:
            last = by_chunk[full, :, : tokens - full * chunk_tokens]
            box[0, full, :, 0] = last.min(axis=1)
            box[0, full, :, 1] = last.max(axis=1)
        return from_float32(box, dtype).view(np.uint8).reshape(1, chunks, heads, -1)

    def load(self, stored: Array, head_dim: int, dtype: str) -> Array:
        """(chunks, kv_heads, 2, head_dim) float32: lo, hi."""
        _, chunks, heads, _ = stored.shape
        values = stored.view(STORAGE_DTYPES[dtype]).reshape(chunks, heads, 2, head_dim)
        return as_float32(values, dtype)
