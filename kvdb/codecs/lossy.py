"""What codecs that round have in common: they take float32 block by block, refuse what they cannot keep, and round what they give.

Nothing is clamped when it is stored: an attention sink that became a smaller number would not be noticed. What is decoded is rounded to
the nearest number of the KV dtype, ties to even; beyond the largest finite float16 there is no nearer one than that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Final

import numpy as np

from kvdb.codecs.base import Array, Codec
from kvdb.errors import NotFinite
from kvdb.geometry import as_float32

_BLOCK_BYTES: Final = 1 << 20
"""Numbers in float32 that are worked on at a time, so that what is computed on them stays in the cache."""
LARGEST_HALF: Final = np.float32(65504)
"""The largest finite float16."""


class Lossy(Codec):
    lossless: ClassVar[bool] = False
    largest: ClassVar[np.float32]
    """The greatest magnitude it can keep."""

    def _encode(self, vectors: Array, dtype: str, rows: Array) -> None:
        for block in blocks(vectors.shape):
            values = as_float32(np.require(vectors[block], requirements=["C", "A"]), dtype)
            least, most = values.min(), values.max()  # a NaN is both of what it is in
            if not (-self.largest <= least and most <= self.largest):
                half, token, channel = (int(i) for i in np.argwhere(~(abs(values) <= self.largest))[0])
                raise NotFinite(
                    f"codec {self.name}: vectors {block.start + half}, token {token}, channel {channel} is "
                    f"{values[half, token, channel]!s}, expected finite numbers of a magnitude up to {self.largest:g}; store "
                    "these as 'raw'"
                )
            self._pack(values, rows[block])

    @abstractmethod
    def _pack(self, values: Array, rows: Array) -> None:
        """values (n, chunk_tokens, head_dim) float32, C-contiguous, all of them such as it can keep -> rows (n, half_bytes)."""


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of (n, chunk_tokens, head_dim) numbers that are small enough to be worked on at a time."""
    n, chunk_tokens, head_dim = shape
    step = max(1, _BLOCK_BYTES // (4 * chunk_tokens * head_dim))
    return (slice(start, min(n, start + step)) for start in range(0, n, step))


def rounded(values: Array, dtype: str) -> Array:
    """float32 as the nearest number of the KV dtype, in its storage dtype. The oracle of `rounding_kernel`."""
    if dtype == "float32":
        return values
    bits = values.view(np.uint32)
    if dtype == "bfloat16":
        return (bits + np.uint32(0x7FFF) + (bits >> 16 & 1) >> 16).astype("<u2")
    return np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype("<f2")
