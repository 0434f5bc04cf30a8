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

from typing import ClassVar, Final, NamedTuple

import numpy as np

from kvdb.abstracts.base import Abstract, Array, Form
from kvdb.abstracts.sketch_build import summarise
from kvdb.errors import InvalidInput
from kvdb.geometry import Geometry, div_ceil

BITS: Final = 4


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
        summarise(np.require(keys.swapaxes(0, 1), requirements=["C", "A", "W"]), tokens, stored)
        return stored

    def load(self, stored: Array, head_dim: int, dtype: str) -> Array:
        """(planes, chunks, kv_heads, row_bytes) uint8 as stored: `unpack` takes them apart."""
        return stored


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
