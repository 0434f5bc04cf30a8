"""What a codec is: how the bytes of keys, or of values, look on disk.

A record is two *halves*, keys and values, each (chunk_tokens, head_dim) numbers; a codec is for one of them. It turns halves into
rows of equal length and back. It never changes shape or order, knows nothing of files, and says by its fields what the
engine must know: the engine never asks which codec it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar, Self

import numpy as np

from kvdb.errors import InvalidInput
from kvdb.geometry import STORAGE_DTYPES

Array = np.ndarray[Any, np.dtype[Any]]


class Codec(ABC):
    """Contract. Members are frozen dataclasses whose `__post_init__` takes nothing that is wrong by itself; `config` rebuilds them.

    `vectors` and `out` are of the storage dtype of the KV dtype `dtype`: bfloat16 travels as uint16.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    stored_as_is: ClassVar[bool] = False
    """True when a stored half *is* the vectors, so that a reader may gather it without `decode`."""
    values_beside: ClassVar[str | None] = None
    """What values are stored as beside such keys, where nothing is said; None: as the keys."""

    @classmethod
    def of_keys(cls, **config: Any) -> Self:
        """As it is for keys, where `config` says nothing else."""
        return cls(**config)

    @classmethod
    def of_values(cls, **config: Any) -> Self:
        """As it is for values, where `config` says nothing else."""
        return cls(**config)

    def config(self) -> dict[str, Any]:
        """All constructor arguments that say what is stored, JSON-safe: with them, no default of a later version changes a row.
        Zero case: {}."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    def at(self, bits: int) -> Codec:
        """The same rows, decoded from the first bits of each number where these lie apart. Zero case: itself, all bits.

        raises  InvalidInput for a number of bits that no prefix has
        """
        return self

    def check(self, chunk_tokens: int, head_dim: int, dtype: str) -> None:
        """Whether halves of this shape can be stored.

        raises  InvalidInput where parameters do not fit
        """
        if dtype not in STORAGE_DTYPES or chunk_tokens < 1 or head_dim < 1:
            raise InvalidInput(
                f"codec {self.name}: {chunk_tokens} tokens of {head_dim} x {dtype}, expected one or more of each, of "
                f"{sorted(STORAGE_DTYPES)}"
            )

    @abstractmethod
    def half_bytes(self, chunk_tokens: int, head_dim: int, dtype: str) -> int:
        """Stored bytes of one half, known before anything is decoded."""

    @abstractmethod
    def bound(self, rows: Array, chunk_tokens: int, head_dim: int) -> Array:
        """How far a decoded number may lie from what was encoded, before it is rounded to the KV dtype.

        rows     (n, half_bytes) uint8, as `encode` made them
        returns  (n, chunk_tokens, head_dim) float32; 0 where nothing is lost
        """

    def encode(self, vectors: Array, dtype: str) -> Array:
        """Halves as rows of bytes. Modifies nothing.

        vectors  (n, chunk_tokens, head_dim), in memory as they like; n may be 0
        returns  (n, half_bytes) uint8
        raises   InvalidInput for other arrays or parameters that do not fit; NotFinite for numbers that a lossy codec cannot keep
        """
        if vectors.ndim != 3 or vectors.dtype != STORAGE_DTYPES.get(dtype):
            raise InvalidInput(
                f"codec {self.name}: vectors {vectors.shape} of {vectors.dtype}, expected (n, chunk_tokens, head_dim) of "
                f"{STORAGE_DTYPES.get(dtype, 'a KV dtype')} for {dtype}"
            )
        n, chunk_tokens, head_dim = vectors.shape
        self.check(chunk_tokens, head_dim, dtype)
        rows = np.empty((n, self.half_bytes(chunk_tokens, head_dim, dtype)), np.uint8)
        self._encode(vectors, dtype, rows)
        return rows

    def decode(self, rows: Array, which: Array, first: int, out: Array, dtype: str) -> None:
        """Gather halves out of rows and decode them, in one pass. Whatever the bytes are, it reads and writes nothing else.

        rows    (m, row_bytes) uint8, C-contiguous; may be a read-only map
        which   (n,) int64: the row of each half, in any order, repeated or not
        first   where in a row the half begins
        out     (n, chunk_tokens, head_dim), C-contiguous; overwritten entirely
        raises  InvalidInput for other arrays, for rows that are not there or end within the half
        """
        if out.ndim != 3 or out.dtype != STORAGE_DTYPES.get(dtype) or not out.flags.carray:
            raise InvalidInput(
                f"codec {self.name}: out {out.shape} of {out.dtype}, expected (n, chunk_tokens, head_dim) of "
                f"{STORAGE_DTYPES.get(dtype, 'a KV dtype')} for {dtype}, C-contiguous and writeable"
            )
        n, chunk_tokens, head_dim = out.shape
        self.check(chunk_tokens, head_dim, dtype)
        stop = first + self.half_bytes(chunk_tokens, head_dim, dtype)
        if (
            rows.ndim != 2
            or rows.dtype != np.uint8
            or not rows.flags.c_contiguous
            or not 0 <= first <= stop <= rows.shape[1]
        ):
            raise InvalidInput(
                f"codec {self.name}: rows {rows.shape} of {rows.dtype}, expected uint8, C-contiguous, with bytes {first} to {stop}"
            )
        if which.shape != (n,) or which.dtype != np.int64:
            raise InvalidInput(f"codec {self.name}: which {which.shape} of {which.dtype}, expected ({n},) of int64")
        if n == 0:
            return
        which = np.require(which, requirements=["C", "A"])
        # A negative number is huge as unsigned: one pass checks both ends.
        if int(which.view(np.uint64).max()) >= len(rows):
            raise InvalidInput(
                f"codec {self.name}: rows {int(which.min())} to {int(which.max())}, expected them within 0 to {len(rows) - 1}"
            )
        self._decode(rows, which, first, out, dtype)

    @abstractmethod
    def _encode(self, vectors: Array, dtype: str, rows: Array) -> None:
        """`encode` into rows that hold anything, of arrays that were looked at."""

    @abstractmethod
    def _decode(self, rows: Array, which: Array, first: int, out: Array, dtype: str) -> None:
        """`decode` of arrays that were looked at; n is 1 or more."""


def whole_number(codec: str, field: str, value: object, allowed: range) -> None:
    """raises  InvalidInput unless it is one of the numbers allowed: a config may come from anybody's file"""
    if type(value) is not int or value not in allowed:
        raise InvalidInput(f"codec {codec}: {field} is {value!r}, expected {allowed.start} to {allowed.stop - 1}")
