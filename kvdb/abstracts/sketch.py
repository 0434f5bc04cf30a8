"""Progressive keys: an 8-bit box, then bit planes that say in which cell of it each key element lies.

    plane 0      the box: [lo * scale, hi * scale] holds every key of the record
    planes 1..4  the bits, most significant first, of the number u of the sixteenth of the box each key element lies in

Cells nest: planes 1..b alone give u >> (4 - b), the cell out of 2^b. So the box, a sketch at 1 to 4 bits and, at 4 bits,
KIVI's key quantisation with a group per chunk (but for half a cell) are prefixes of one encoding.

The scale has 16 significant bits: lo * scale, hi * scale and (hi - lo) * scale are exact in float32, so that the box holds
its keys in any arithmetic. A record with a key that is not finite, or beyond 2^126, is *unknown*: its box is
[-inf, inf], its cells are 0, and a scorer must treat it as one to be read.
source: LeoAM, arXiv 2506.20187 (boxes); KIVI, arXiv 2402.02750 (keys by channel).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final, NamedTuple

import numpy as np

from kvdb.abstracts.base import Abstract, Array, Form
from kvdb.errors import InvalidInput
from kvdb.geometry import Geometry, div_ceil

BITS: Final = 4
_BLOCK_BYTES: Final = 1 << 20
"""Keys in float32 that are summarised at a time, so that what is computed on them stays in the cache."""
_LARGEST: Final = np.float32(2.0**126)
"""Above it, (hi - lo) * scale could overflow."""
_SMALLEST_SCALE: Final = np.float32(2.0**-100)
"""Keeps subnormal numbers, which a processor may be told to take for zeros, out of every step."""
_CELLS: Final = np.float32(16 * (1 - 2.0**-21))
"""A little below 16, so that no rounding of (k - lo) / width * 16 reaches it: the last cell is 15."""


class Sketch(Abstract):
    """Five planes. Per record, plane 0 is lo (head_dim int8), hi (head_dim int8), scale (float32, little-endian); plane
    1 + i is bit 3 - i of every cell number: eight tokens after eight tokens, a byte per element of the head dimension, the
    first token in the lowest bit. So a scorer takes eight tokens apart with shifts of whole vectors. The rest of a row is
    zeros, and so are the bits of padding. Each key element k lies in its cell to within rounding:

        lo * scale + width * (u / 16 - 2^-20) <= k <= lo * scale + width * ((u + 1) / 16 + 2^-20),  width = (hi - lo) * scale
    """

    name: ClassVar[str] = "sketch"
    planes: ClassVar[int] = 1 + BITS

    def row_bytes(self, chunk_tokens: int, head_dim: int, itemsize: int) -> int:
        return max(2 * head_dim + 4, div_ceil(chunk_tokens, 8) * head_dim)

    def form(self, chunks: int, geometry: Geometry, group: int) -> Form:
        g = geometry.groups[group]
        row = self.row_bytes(geometry.chunk_tokens, g.head_dim, geometry.storage_dtype.itemsize)
        return Form(("plane", "chunk", "head", "byte"), (self.planes, chunks, g.kv_heads, row), "uint8")

    def build(self, keys: Array, tokens: int, dtype: str, values: Array | None = None) -> Array:
        heads, chunks, chunk_tokens, dim = keys.shape
        stored = np.zeros((self.planes, chunks, heads, self.row_bytes(chunk_tokens, dim, 0)), np.uint8)
        step = max(1, _BLOCK_BYTES // (4 * heads * chunk_tokens * dim))
        for start in range(0, chunks, step):
            stop = min(chunks, start + step)
            own = min(tokens, stop * chunk_tokens) - start * chunk_tokens
            _summarise(keys[:, start:stop], own, stored[:, start:stop])
        return stored

    def load(self, stored: Array, head_dim: int, dtype: str) -> Array:
        """(planes, chunks, kv_heads, row_bytes) uint8 as stored: `unpack` takes them apart."""
        return stored


def _summarise(keys: Array, tokens: int, stored: Array) -> None:
    """Fill the rows of `stored`, which are zeros.

    It works on a copy of the keys token by token, so that NumPy's loops run over all records at once.
    """
    heads, chunks, chunk_tokens, dim = keys.shape
    ordered = keys.transpose(2, 1, 0, 3).copy(order="C")  # [chunk_tokens, chunks, kv_heads, head_dim]
    if rest := tokens % chunk_tokens:
        ordered[rest:, -1] = ordered[0, -1]  # moves no extreme
    extremes = np.empty((2, chunks, heads, dim), np.float32)  # lo and -hi: to round both down is to round outwards
    ordered.min(axis=0, out=extremes[0])
    np.negative(ordered.max(axis=0), out=extremes[1])
    largest = -np.minimum(*extremes).min(axis=-1)  # [chunks, kv_heads]
    unknown = ~(largest <= _LARGEST)
    if unknown.any():
        ordered[:, unknown] = 0
        extremes[:, unknown] = 0
        largest[unknown] = 0
    scale = _scale(largest)[..., None]
    steps = np.floor(extremes / scale)
    steps -= steps * scale > extremes  # where the quotient was rounded up to a whole number
    lo = steps[0] * scale
    width = (steps[0] + steps[1]) * -scale
    ordered -= lo
    ordered *= _CELLS / np.maximum(width, scale)  # where the width is 0, so is every key less lo
    row, eights = chunks * heads * dim, div_ceil(chunk_tokens, 8)
    cells = np.zeros((eights * 8, div_ceil(row, 8) * 8), np.uint8)
    np.copyto(
        cells[:chunk_tokens, :row], ordered.reshape(chunk_tokens, row), casting="unsafe"
    )  # towards zero: the floor
    if rest:
        cells[rest:, row - heads * dim : row] = 0
    steps[0][unknown], steps[1][unknown], scale[unknown] = -1, -1, np.inf
    box = stored[0]
    box[..., :dim] = steps[0].astype(np.int8).view(np.uint8)
    box[..., dim : 2 * dim] = (-steps[1]).astype(np.int8).view(np.uint8)
    box[..., 2 * dim : 2 * dim + 4] = scale.astype("<f4").view(np.uint8)
    for plane, packed in enumerate(_packed(cells.reshape(eights, 8, -1)), start=1):
        by_record = packed[:, :row].reshape(eights, chunks, heads, dim).transpose(1, 2, 0, 3)
        stored[plane, ..., : eights * dim] = by_record.reshape(chunks, heads, eights * dim)


def _packed(cells: Array) -> Iterator[Array]:
    """Of each bit of cell numbers, the most significant first, a byte that holds it for eight tokens.

    cells   (eights, 8, n) uint8, n a multiple of 8: bits move in words
    yields  (eights, n) uint8
    """
    words = cells.view(np.uint64)
    for bit in reversed(range(BITS)):
        own = words & np.uint64(0x0101_0101_0101_0101 << bit)
        for t in range(8):
            shift, by = (np.left_shift, t - bit) if t >= bit else (np.right_shift, bit - t)
            shift(own[:, t], np.uint64(by), out=own[:, t])
        yield np.bitwise_or.reduce(own, axis=1).view(np.uint8)


def _scale(largest: Array) -> Array:
    """A number of 16 significant bits a little above largest / 127: next above what the quotient is rounded to."""
    quotient = np.maximum(largest / np.float32(127), _SMALLEST_SCALE)
    scale: Array = ((quotient.view(np.uint32) + np.uint32(0x100)) & np.uint32(0xFFFF_FF00)).view(np.float32)
    return scale


def corners(box: Array, head_dim: int) -> tuple[Array, Array]:
    """Plane 0 as scorers want it: the box is [lo * scale, hi * scale].

    box      (chunks, kv_heads, row_bytes) uint8
    returns  lo and hi (chunks, kv_heads, 2 * head_dim) int8; scale (chunks, kv_heads) float32, inf where a record is unknown
    """
    scale = np.ascontiguousarray(box[..., 2 * head_dim : 2 * head_dim + 4]).view("<f4")[..., 0]
    return box[..., : 2 * head_dim].view(np.int8), scale


class Unpacked(NamedTuple):
    """A sketch at some number of bits: cell u is [lo + width u / 2^bits, lo + width (u + 1) / 2^bits].

    lo, width  (chunks, kv_heads, head_dim) float32, exact; -inf and inf where a record is unknown
    cells      (chunks, kv_heads, chunk_tokens, head_dim) uint8; padding is in cell 0
    """

    lo: Array
    width: Array
    cells: Array


def unpack(planes: Array, bits: int, chunk_tokens: int, head_dim: int) -> Unpacked:
    """Take the first 1 + bits planes apart.

    planes  (1 + bits or more, chunks, kv_heads, row_bytes) uint8, as `Reader.abstract` gives them
    bits    0..4; at 0 every cell is the whole box
    raises  InvalidInput for other planes or bits
    """
    row = Sketch().row_bytes(chunk_tokens, head_dim, 0)
    if not 0 <= bits <= BITS or planes.ndim != 4 or len(planes) < 1 + bits or planes.shape[-1] != row:
        raise InvalidInput(
            f"sketch: planes {planes.shape} for {bits} bits, expected 0..{BITS} bits and (1 + bits or more, chunks, "
            f"kv_heads, {row})"
        )
    _, chunks, heads, _ = planes.shape
    box, scale = corners(planes[0], head_dim)
    lo, hi = np.split(box.astype(np.float32), 2, axis=-1)
    cells = np.zeros((chunks, heads, chunk_tokens, head_dim), np.uint8)
    for plane in planes[1 : 1 + bits]:
        by_eights = plane[..., : div_ceil(chunk_tokens, 8) * head_dim].reshape(chunks, heads, -1, 1, head_dim)
        ones = np.unpackbits(by_eights, axis=3, bitorder="little").reshape(chunks, heads, -1, head_dim)
        cells <<= 1
        cells |= ones[:, :, :chunk_tokens]
    return Unpacked(lo * scale[..., None], (hi - lo) * scale[..., None], cells)
