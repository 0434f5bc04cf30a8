"""How sketches are made of keys: compiled where numba is installed, in NumPy elsewhere, the same to the bit.

NumPy alone takes several times as long: every key element passes through memory a dozen times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

import numpy as np

from kvdb.abstracts.base import Array
from kvdb.geometry import div_ceil

_BLOCK_BYTES: Final = 1 << 20
"""Keys in float32 that NumPy summarises at a time, so that what is computed on them stays in the cache."""
LARGEST: Final = np.float32(2.0**126)
"""Above it, (hi - lo) * scale could overflow."""
SMALLEST_SCALE: Final = np.float32(2.0**-100)
"""Keeps subnormal numbers, which a processor may be told to take for zeros, out of every step."""
CELLS: Final = np.float32(16 * (1 - 2.0**-21))
"""A little below 16, so that no rounding of (k - lo) / width * 16 reaches it: the last cell is 15."""


def summarise(records: Array, tokens: int, stored: Array) -> None:
    """Fill rows of sketches.

    records  (chunks, kv_heads, chunk_tokens, head_dim) float32, C-contiguous; only the first `tokens` tokens count
    stored   (planes, chunks, kv_heads, row_bytes) uint8, C-contiguous, zeros
    """
    _best()(records, tokens, stored)


@cache
def _best() -> Callable[[Array, int, Array], None]:
    try:
        from kvdb.abstracts.sketch_kernel import kernel
    except (ImportError, OSError):  # not installed, not for this NumPy, or a library of it is missing
        return summarise_in_numpy
    return kernel()


def summarise_in_numpy(records: Array, tokens: int, stored: Array) -> None:
    """As `summarise`."""
    chunks, heads, chunk_tokens, dim = records.shape
    step = max(1, _BLOCK_BYTES // (4 * heads * chunk_tokens * dim))
    for start in range(0, chunks, step):
        stop = min(chunks, start + step)
        own = min(tokens, stop * chunk_tokens) - start * chunk_tokens
        _summarise(records[start:stop], own, stored[:, start:stop])


def _summarise(records: Array, tokens: int, stored: Array) -> None:
    """It works on a copy of the keys token by token, so that NumPy's loops run over all records at once."""
    chunks, heads, chunk_tokens, dim = records.shape
    ordered = records.transpose(2, 0, 1, 3).copy(order="C")  # [chunk_tokens, chunks, kv_heads, head_dim]
    if rest := tokens % chunk_tokens:
        ordered[rest:, -1] = ordered[0, -1]  # moves no extreme
    extremes = np.empty((2, chunks, heads, dim), np.float32)  # lo and -hi: to round both down is to round outwards
    ordered.min(axis=0, out=extremes[0])
    np.negative(ordered.max(axis=0), out=extremes[1])
    largest = -np.minimum(*extremes).min(axis=-1)  # [chunks, kv_heads]
    unknown = ~(largest <= LARGEST)
    if unknown.any():
        ordered[:, unknown] = 0
        extremes[:, unknown] = 0
        largest[unknown] = 0
    scale = box_scale(largest)[..., None]
    steps = np.floor(extremes / scale)
    steps -= steps * scale > extremes  # where the quotient was rounded up to a whole number
    lo = steps[0] * scale
    width = (steps[0] + steps[1]) * -scale
    ordered -= lo
    ordered *= CELLS / np.maximum(width, scale)  # where the width is 0, so is every key less lo
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
    for plane, packed in enumerate(_packed(cells.reshape(eights, 8, -1), len(stored) - 1), start=1):
        by_record = packed[:, :row].reshape(eights, chunks, heads, dim).transpose(1, 2, 0, 3)
        stored[plane, ..., : eights * dim] = by_record.reshape(chunks, heads, eights * dim)


def _packed(cells: Array, bits: int) -> Iterator[Array]:
    """Of each bit of cell numbers, the most significant first, a byte that holds it for eight tokens.

    cells   (eights, 8, n) uint8, n a multiple of 8: bits move in words
    yields  (eights, n) uint8
    """
    words = cells.view(np.uint64)
    for bit in reversed(range(bits)):
        own = words & np.uint64(0x0101_0101_0101_0101 << bit)
        for t in range(8):
            shift, by = (np.left_shift, t - bit) if t >= bit else (np.right_shift, bit - t)
            shift(own[:, t], np.uint64(by), out=own[:, t])
        yield np.bitwise_or.reduce(own, axis=1).view(np.uint8)


def box_scale(largest: Array) -> Array:
    """A number of 16 significant bits a little above largest / 127: next above what the quotient is rounded to."""
    quotient = np.maximum(largest / np.float32(127), SMALLEST_SCALE)
    scale: Array = ((quotient.view(np.uint32) + np.uint32(0x100)) & np.uint32(0xFFFF_FF00)).view(np.float32)
    return scale
