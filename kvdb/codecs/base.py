"""What a codec is: how the bytes of records look on disk.

A codec turns records into rows of equal length and back. It never changes shape or order, knows nothing of files, and
says by its fields what the engine must know: the engine never asks which codec it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Codec(ABC):
    """Contract. Members are frozen dataclasses; `config` rebuilds them."""

    name: ClassVar[str]
    lossless: ClassVar[bool]
    stored_as_is: ClassVar[bool]
    """True when a stored row *is* the record, so that a reader may gather it without `decode`."""

    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-safe. Zero case: {}."""
        return {}

    @abstractmethod
    def row_bytes(self, chunk_tokens: int, head_dim: int, itemsize: int) -> int:
        """Stored bytes of one record, known before anything is decoded."""

    @abstractmethod
    def encode(self, records: Array) -> Array:
        """records (n, 2, chunk_tokens, head_dim) -> rows (n, row_bytes) uint8. Modifies nothing; n may be 0."""

    @abstractmethod
    def decode(self, rows: Array, out: Array) -> None:
        """rows (n, row_bytes) uint8 -> out (n, 2, chunk_tokens, head_dim), which is overwritten entirely."""
