"""Progressive keys: an 8-bit box, then bit planes that say in which cell of it each number lies.

    box         [lo * scale, hi * scale] holds a channel's numbers, all tokens of the chunk
    planes 1..  the bits, most significant first, of the number u of the cell each number lies in

Cells nest, so the first 2, 4, ... planes are codes of so many bits: a draft of an answer can be made from a part of each row, and
checked with all of it (`at`). Box and the first four planes are the bytes of the `sketch` abstract, with nothing between them.

What stands for a cell is its centre; for the first and the last of a channel's, which lie at the edge of the box and hold
its extremes, a point a quarter of a cell from the edge. Measured on 4 096 real keys of SmolLM2-135M, the KL from attention over exact
keys, mean over all query heads of one token:

    bits                                       2       3       4       6       8
    edge                                       .302    .0494   .0107   .00075  .000043
    a quarter                                  .223    .0415   .0094   .00063  .000039
    centre                                     .206    .0470   .0110   .00067  .000041
    a quarter, box of float16 instead          .222    .0420   .0099   .00057  .000033

and the mean error of the attention sink's logit with 4 bits .095, .116, .188 (edge, quarter, centre). A box of float16 takes 124 bytes more of
64 channels, as much as another plane.
source: boxes, LeoAM, arXiv 2506.20187; keys by channel, KIVI, arXiv 2402.02750; a draft within the stored, QuantSpec, arXiv 2502.10424.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, ClassVar, Final

import numpy as np

from kvdb.abstracts.sketch_build import LARGEST
from kvdb.codecs import planes_numpy
from kvdb.codecs.base import Array, whole_number
from kvdb.codecs.lossy import Lossy
from kvdb.geometry import div_ceil

_LEAST: Final = 2
_MOST: Final = 8


@dataclass(frozen=True, slots=True)
class Planes(Lossy):
    """The half is, with D = head_dim:

        lo, hi   D int8 each
        scale    float32, its last eight bits zeros: lo * scale, hi * scale and width = (hi - lo) * scale are exact in float32
        planes   `bits` of them, ceil(chunk_tokens / 8) lines of D bytes each: byte d of line l of plane p has bit bits - p of u
                 for channel d of tokens 8 l, 8 l + 1, ..., the first in the lowest bit; tokens beyond the chunk are zeros

    With b bits of u, and to within a 2^-20th of the width,

        lo * scale + width * u / 2^b  <=  x  <=  lo * scale + width * (u + 1) / 2^b
        decoded = lo * scale + width / 2^(b + 2) * v        v = 4 u + 2, less 1 where u is 0, and 1 more where it is 2^b - 1

    so |x - decoded| is at most half a cell, at the edges three quarters. Numbers up to 2^126; scales are 2^-100 or more.

    bits   stored
    taken  of these, how many `decode` looks at; None: all. See `at`
    """

    name: ClassVar[str] = "planes"
    values_beside: ClassVar[str | None] = "int4"
    largest: ClassVar[np.float32] = LARGEST

    bits: int = 6
    taken: int | None = None

    def __post_init__(self) -> None:
        whole_number(self.name, "bits", self.bits, range(_LEAST, _MOST + 1))
        if self.taken is not None:
            whole_number(self.name, "bits that are decoded", self.taken, range(_LEAST, self.bits + 1))

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits}

    def at(self, bits: int) -> Planes:
        return replace(self, taken=bits)

    def half_bytes(self, chunk_tokens: int, head_dim: int, dtype: str) -> int:
        return 2 * head_dim + 4 + self.bits * div_ceil(chunk_tokens, 8) * head_dim

    def bound(self, rows: Array, chunk_tokens: int, head_dim: int) -> Array:
        _, width = planes_numpy.box(rows, head_dim)
        bits = self.taken or self.bits
        return np.broadcast_to(width * np.float32(0.75 / 2**bits + 2.0**-20), (len(rows), chunk_tokens, head_dim))

    def _pack(self, values: Array, rows: Array) -> None:
        _best().encode(values, self.bits, rows)

    def _decode(self, rows: Array, which: Array, first: int, out: Array, dtype: str) -> None:
        _best().decode(rows, which, first, self.taken or self.bits, out, dtype)


@cache
def _best() -> ModuleType:
    try:
        from kvdb.codecs import planes_kernel
    except (ImportError, OSError):  # not installed, not for this NumPy, or a library of it is missing
        return planes_numpy
    return planes_kernel
