"""The means of a record's keys and of its values: enough to rank it, and to stand in for it in attention where it is not read.

As one token with the mean key, the mean value and the weight of all its tokens, a record adds n exp(q.key) to the denominator of
attention and n exp(q.key) value to the numerator.
source: RetroInfer, arXiv 2505.02922 (meta index: centroid, sum of values, size). Here clusters are records, and the mean of the
values is kept: their sum could overflow float16.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvdb.abstracts.base import Abstract, Array, Form
from kvdb.abstracts.mean import as_stored, record_means
from kvdb.geometry import STORAGE_DTYPES, Geometry, as_float32


class Centroid(Abstract):
    """Two planes: the mean (head_dim) of the keys, the mean of the values, rounded to the KV dtype. Scorers get them in float32."""

    name: ClassVar[str] = "centroid"
    planes: ClassVar[int] = 2
    of_values: ClassVar[bool] = True

    def row_bytes(self, chunk_tokens: int, head_dim: int, itemsize: int) -> int:
        return head_dim * itemsize

    def form(self, chunks: int, geometry: Geometry, group: int) -> Form:
        g = geometry.groups[group]
        return Form(("plane", "chunk", "head", "dim"), (2, chunks, g.kv_heads, g.head_dim), geometry.dtype)

    def build(self, keys: Array, tokens: int, dtype: str, values: Array | None = None) -> Array:
        assert values is not None
        return as_stored(np.stack([record_means(vectors, tokens) for vectors in (keys, values)]), dtype)

    def load(self, stored: Array, head_dim: int, dtype: str) -> Array:
        """(1 or 2, chunks, kv_heads, head_dim) float32: of keys, of values; inf or NaN as in `mean`."""
        return as_float32(stored.view(STORAGE_DTYPES[dtype]), dtype)
