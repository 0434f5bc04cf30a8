"""Boxes and bit planes, in NumPy: where numba is not installed, and the oracle of what it compiles."""

from __future__ import annotations

import numpy as np

from kvdb.abstracts.sketch_build import CELLS, box_scale
from kvdb.codecs.base import Array
from kvdb.codecs.lossy import blocks, rounded
from kvdb.geometry import div_ceil


def encode(values: Array, bits: int, rows: Array) -> None:
    """values (n, chunk_tokens, head_dim) float32, C-contiguous, up to 2^126 in magnitude -> rows (n, half_bytes), overwritten."""
    n, chunk_tokens, head_dim = values.shape
    least, most = values.min(axis=1), values.max(axis=1)  # [n, head_dim]
    scale = box_scale(np.maximum(-least, most).max(axis=1, keepdims=True))
    lo, hi = np.floor(least / scale), np.ceil(most / scale)
    lo -= lo * scale > least  # where the quotient was rounded to a whole number
    hi += hi * scale < most
    rows[:, :head_dim] = lo.astype(np.int8).view(np.uint8)
    rows[:, head_dim : 2 * head_dim] = hi.astype(np.int8).view(np.uint8)
    rows[:, 2 * head_dim : 2 * head_dim + 4] = scale.astype("<f4").view(np.uint8)
    factor = CELLS * np.float32(2.0 ** (bits - 4)) / np.maximum((hi - lo) * scale, scale)
    cells = np.zeros((n, div_ceil(chunk_tokens, 8) * 8, head_dim), np.uint8)
    cells[:, :chunk_tokens] = (values - (lo * scale)[:, None]) * factor[:, None]
    by_eights = cells.reshape(n, -1, 8, head_dim)
    planes = [np.packbits(by_eights >> bit & 1, axis=2, bitorder="little") for bit in reversed(range(bits))]
    rows[:, 2 * head_dim + 4 :] = np.stack(planes, axis=1).reshape(n, -1)


def decode(rows: Array, which: Array, first: int, bits: int, out: Array, dtype: str) -> None:
    """As `Codec.decode`, of arrays that were looked at, from the first bits that are stored."""
    _, chunk_tokens, head_dim = out.shape
    begin, lines = first + 2 * head_dim + 4, div_ceil(chunk_tokens, 8)
    for block in blocks(out.shape):
        halves = rows[:, first : begin + bits * lines * head_dim][which[block]]
        planes = halves[:, begin - first :].reshape(len(halves), bits, lines, 1, head_dim)
        ones = np.unpackbits(planes, axis=3, bitorder="little").reshape(len(halves), bits, -1, head_dim)
        places = (1 << np.arange(bits)[::-1, None, None]).astype(np.uint8)
        cells = np.bitwise_or.reduce(ones * places, axis=1)[:, :chunk_tokens].astype(np.float32)
        points = 4 * cells + 2 - (cells == 0) + (cells == 2**bits - 1)
        with np.errstate(all="ignore"):  # damaged scales may be anything
            low, width = box(halves, head_dim)
            out[block] = rounded(low + width * np.float32(2.0 ** -(bits + 2)) * points.astype(np.float32), dtype)


def box(rows: Array, head_dim: int) -> tuple[Array, Array]:
    """Lower edges and widths of the boxes of rows (n, half_bytes), each (n, 1, head_dim) float32, exact."""
    corners = rows[:, : 2 * head_dim].view(np.int8).astype(np.float32).reshape(-1, 2, 1, head_dim)
    scale = np.ascontiguousarray(rows[:, 2 * head_dim : 2 * head_dim + 4]).view("<f4")[:, :, None]
    return corners[:, 0] * scale, (corners[:, 1] - corners[:, 0]) * scale
