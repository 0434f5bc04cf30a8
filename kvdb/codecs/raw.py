"""Records stored as they are: K plane, then V plane, little-endian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvdb.codecs.base import Array, Codec


@dataclass(frozen=True, slots=True)
class Raw(Codec):
    name: ClassVar[str] = "raw"
    lossless: ClassVar[bool] = True
    stored_as_is: ClassVar[bool] = True

    def row_bytes(self, chunk_tokens: int, head_dim: int, itemsize: int) -> int:
        return 2 * chunk_tokens * head_dim * itemsize

    def encode(self, records: Array) -> Array:
        n = len(records)
        return np.ascontiguousarray(records).view(np.uint8).reshape(n, records.nbytes // n if n else 0)

    def decode(self, rows: Array, out: Array) -> None:
        out[...] = np.ascontiguousarray(rows).view(out.dtype).reshape(out.shape)
