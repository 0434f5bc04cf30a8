"""Integers of 8, 4 or 2 bits, each group of numbers with a scale and a minimum of its own.

KIVI: keys by channel, where outliers are whole channels; values by token. A group is the chunk's tokens of a channel, or some
neighbouring channels of a token.

    decoded = minimum + code * scale        scale = (maximum - minimum) / (2^bits - 1)

Minimum and scale are float16, and codes are chosen after both were rounded: the minimum down, the scale up, so that the greatest
code reaches the maximum. So, in exact arithmetic, |x - (minimum + code * scale)| <= scale / 2 holds for every number whatever the group
is: constant (where float16 holds that number the scale is 0 and nothing is lost), subnormal, or anything else up to 65504. To that
comes rounding to float32, and then to the KV dtype. -0 comes back as a number within the same bound, and as 0 from a group of zeros.
source: KIVI, arXiv 2402.02750, section 3; scale and minimum in float16 as in its code, where both are rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar, Final, Self

import numpy as np

from kvdb.codecs import integers_numpy
from kvdb.codecs.base import Array, whole_number
from kvdb.codecs.integers_numpy import Form
from kvdb.codecs.lossy import LARGEST_HALF, Lossy
from kvdb.errors import InvalidInput
from kvdb.geometry import div_ceil

CHANNEL: Final = "channel"
TOKEN: Final = "token"
_GROUP: Final = 32
_MOST: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Integers(Lossy):
    """The half is, with G groups and P = 8 / bits codes in a byte:

        scales    G float16
        minima    G float16
        codes     ceil(chunk_tokens / P) lines of head_dim bytes: byte d of line l has channel d of tokens P l, P l + 1, ..., the
                  first in the lowest bits; tokens beyond the chunk are zeros

    So one line of bytes becomes P vectors in place, whichever way numbers are grouped.

    axis   "channel": a group is a channel, all tokens. "token": a group is `group` channels of one token; groups go token by token
    group  None: the greatest number up to 32 that divides head_dim
    """

    nbits: ClassVar[int]
    largest: ClassVar[np.float32] = LARGEST_HALF

    axis: str = CHANNEL
    group: int | None = None

    @classmethod
    def of_values(cls, **config: Any) -> Self:
        return cls(**{"axis": TOKEN, **config})

    def __post_init__(self) -> None:
        if self.axis not in (CHANNEL, TOKEN):
            raise InvalidInput(f"codec {self.name}: axis is {self.axis!r}, expected {CHANNEL!r} or {TOKEN!r}")
        if self.group is not None:
            whole_number(self.name, "group", self.group, range(1, _MOST + 1))
            if self.axis == CHANNEL:
                raise InvalidInput(
                    f"codec {self.name}: group is {self.group}, expected none: by channel, a group is the chunk's tokens"
                )

    def check(self, chunk_tokens: int, head_dim: int, dtype: str) -> None:
        Lossy.check(self, chunk_tokens, head_dim, dtype)  # `super()` does not know the class that slots made anew
        if self.group is not None and head_dim % self.group:
            raise InvalidInput(f"codec {self.name}: group is {self.group}, expected it to divide head_dim, {head_dim}")

    def half_bytes(self, chunk_tokens: int, head_dim: int, dtype: str) -> int:
        groups = self.form(head_dim).groups(chunk_tokens, head_dim)
        return 4 * groups + div_ceil(chunk_tokens * self.nbits, 8) * head_dim

    def bound(self, rows: Array, chunk_tokens: int, head_dim: int) -> Array:
        scales, _ = integers_numpy.steps(rows, self.form(head_dim), chunk_tokens, head_dim)
        return np.broadcast_to(scales / 2, (len(rows), chunk_tokens, head_dim))

    def form(self, head_dim: int) -> Form:
        """How halves of so many channels are cut into groups."""
        if self.axis == CHANNEL:
            return Form(self.nbits, False, 1)
        return Form(self.nbits, True, self.group or max(size for size in range(1, _GROUP + 1) if head_dim % size == 0))

    def _pack(self, values: Array, rows: Array) -> None:
        _best().encode(values, self.form(values.shape[2]), rows)

    def _decode(self, rows: Array, which: Array, first: int, out: Array, dtype: str) -> None:
        _best().decode(rows, which, first, self.form(out.shape[2]), out, dtype)


@dataclass(frozen=True, slots=True)
class Int8(Integers):
    name: ClassVar[str] = "int8"
    nbits: ClassVar[int] = 8


@dataclass(frozen=True, slots=True)
class Int4(Integers):
    name: ClassVar[str] = "int4"
    nbits: ClassVar[int] = 4


@dataclass(frozen=True, slots=True)
class Int2(Integers):
    name: ClassVar[str] = "int2"
    nbits: ClassVar[int] = 2


@cache
def _best() -> ModuleType:
    try:
        from kvdb.codecs import integers_kernel
    except (ImportError, OSError):  # not installed, not for this NumPy, or a library of it is missing
        return integers_numpy
    return integers_kernel
