"""Numbers stored as they are, little-endian: every bit pattern comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvdb.codecs.base import Array, Codec
from kvdb.geometry import STORAGE_DTYPES


@dataclass(frozen=True, slots=True)
class Raw(Codec):
    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True
    stored_as_is: ClassVar[bool] = True

    def half_bytes(self, chunk_tokens: int, head_dim: int, dtype: str) -> int:
        return chunk_tokens * head_dim * STORAGE_DTYPES[dtype].itemsize

    def bound(self, rows: Array, chunk_tokens: int, head_dim: int) -> Array:
        return np.zeros((len(rows), chunk_tokens, head_dim), np.float32)

    def _encode(self, vectors: Array, dtype: str, rows: Array) -> None:
        rows[...] = np.ascontiguousarray(vectors).view(np.uint8).reshape(rows.shape)

    def _decode(self, rows: Array, which: Array, first: int, out: Array, dtype: str) -> None:
        stored = out.view(np.uint8).reshape(len(out), -1)
        stored[...] = rows[:, first : first + stored.shape[1]][which]
