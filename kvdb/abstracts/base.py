"""What an abstract is: the small summary of a record from which its importance to a query is estimated unread.

Abstracts are computed from exact keys, some from values too, while a segment is written, and stored beside it as an array of their own: per
layer one or more *planes*, each with a row of bytes for every record. The first planes are of use without the others, and
can be read and verified without them. The engine moves bytes; only an abstract knows what they mean. How a query is
scored against one is the business of `kvdb.runtime.selection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np

from kvdb.geometry import Geometry

Array = np.ndarray[Any, np.dtype[Any]]


class Form(NamedTuple):
    """One layer of an abstract as Zarr shows it.

    dimensions  names, four of them
    dtype       the KV dtype, or "uint8"
    """

    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


class Abstract(ABC):
    """Contract. One instance per kind; stateless.

    The table is closed: packages cannot add to it. A segment names its abstracts, and whoever verifies, repairs, compacts or moves
    it must know the size of their rows; a name in a file must mean the same everywhere, and must not decide what code is loaded.
    """

    name: ClassVar[str]
    planes: ClassVar[int]
    """Contiguous pieces of a layer. Who reads the first n of them has a coarser abstract."""
    of_values: ClassVar[bool] = False
    """Whether it summarises values beside keys."""
    of_blocks: ClassVar[bool] = False
    """Whether a record's row follows from the other records that are built with it, too. Such a row must make sense where
    rows beside it are missing, or were built with others."""

    @abstractmethod
    def row_bytes(self, chunk_tokens: int, head_dim: int, itemsize: int) -> int:
        """Stored bytes of one record in one plane, the same in every plane. `itemsize`: of the KV dtype."""

    @abstractmethod
    def form(self, chunks: int, geometry: Geometry, group: int) -> Form:
        """How the planes of `chunks` chunks of one layer look as an array of four dimensions, in the order they lie."""

    @abstractmethod
    def build(self, keys: Array, tokens: int, dtype: str, values: Array | None = None) -> Array:
        """Summarise records. Modifies nothing; a record's rows follow from its own keys and values alone, but for abstracts
        `of_blocks`.

        keys     (kv_heads, chunks, chunk_tokens, head_dim) float32, after RoPE; only the first `tokens` tokens count,
                 the rest of the last chunk is padding
        dtype    the KV dtype, which represents every key and value
        values   as keys; may be None unless it is an abstract `of_values`, since to convert them costs time
        returns  (planes, chunks, kv_heads, row_bytes) uint8, C-contiguous, as it is stored
        """

    @abstractmethod
    def load(self, stored: Array, head_dim: int, dtype: str) -> Array:
        """What scorers get, from the first planes as they are stored.

        stored   (planes or fewer, chunks, kv_heads, row_bytes) uint8, contiguous rows
        returns  the abstract's own form
        """
