"""The mean of a record's keys: the cheapest summary from which records can be ranked.

For a query q, the mean of the logits of a record is q times the mean of its keys; their log-sum-exp is at least that plus the
logarithm of their number. It bounds nothing from above.
source: InfLLM, arXiv 2402.04617 (one vector for a block); Jensen's inequality.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvdb.abstracts.base import Abstract, Array, Form
from kvdb.geometry import STORAGE_DTYPES, Geometry, as_float32, from_float32


class Mean(Abstract):
    """One plane: per record the mean (head_dim) of its keys, rounded to the KV dtype. Scorers get it in float32."""

    name: ClassVar[str] = "mean"
    planes: ClassVar[int] = 1

    def row_bytes(self, chunk_tokens: int, head_dim: int, itemsize: int) -> int:
        return head_dim * itemsize

    def form(self, chunks: int, geometry: Geometry, group: int) -> Form:
        g = geometry.groups[group]
        return Form(("plane", "chunk", "head", "dim"), (1, chunks, g.kv_heads, g.head_dim), geometry.dtype)

    def build(self, keys: Array, tokens: int, dtype: str, values: Array | None = None) -> Array:
        return as_stored(record_means(keys, tokens), dtype)[None]

    def load(self, stored: Array, head_dim: int, dtype: str) -> Array:
        """(1, chunks, kv_heads, head_dim) float32; inf or NaN somewhere in a mean says that nothing is known of its record."""
        return as_float32(stored.view(STORAGE_DTYPES[dtype]), dtype)


def record_means(vectors: Array, tokens: int) -> Array:
    """Mean of each record's keys, or of its values. Modifies nothing; summed in the order of tokens, in float32.

    vectors  (kv_heads, chunks, chunk_tokens, head_dim) float32; only the first `tokens` tokens count
    returns  (chunks, kv_heads, head_dim) float32; not finite where a vector is not, or a sum overflows
    """
    chunks, chunk_tokens = vectors.shape[1:3]
    by_chunk = vectors.swapaxes(0, 1)  # [chunks, kv_heads, chunk_tokens, head_dim]
    full, rest = divmod(tokens, chunk_tokens)
    counts = np.full((chunks, 1, 1), chunk_tokens, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = by_chunk[:, :, 0].copy()
        for token in range(1, chunk_tokens):
            stop = full + (token < rest)
            sums[:stop] += by_chunk[:stop, :, token]
        if rest:
            counts[full] = rest
        means: Array = sums / counts
    return means


def as_stored(means: Array, dtype: str) -> Array:
    """Means (..., head_dim) float32 as rows of bytes (..., row_bytes), rounded to the nearest number of the KV dtype."""
    if dtype == "bfloat16":  # `from_float32` cuts bits off: add half of them first, ties to even. A NaN would overflow
        bits = np.where(np.isnan(means), np.float32(np.inf), means).view(np.uint32)
        means = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)).view(np.float32)
    return np.ascontiguousarray(from_float32(means, dtype)).view(np.uint8)
