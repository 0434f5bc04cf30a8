"""The inner loops of sketch building, compiled: a record at a time, while its keys are in the nearest cache.

The same arithmetic as in NumPy, operation by operation, so no result may differ in a bit: nothing is fused or put in another
order. Loops run over the head dimension, eight tokens in each step, with nothing in them that keeps the compiler from making
vectors of them. Import it only to build: numba takes a while.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from kvdb.abstracts import sketch_build
from kvdb.abstracts.sketch_build import CELLS, LARGEST, SMALLEST_SCALE
from kvdb.compiled import compiled, stamp

_LARGEST_BITS: Final = int(LARGEST.view(np.int32))
_SIGNATURE: Final = "void(float32[:, :, :, ::1], int64, uint8[:, :, :, ::1])"


def kernel() -> Callable[[Any, int, Any], None]:
    """`kvdb.abstracts.sketch_build.summarise`, compiled; without Python's ZeroDivisionError, a branch at every division."""
    return compiled(_summarise_of(stamp(sketch_build)), _SIGNATURE, error_model="numpy", nogil=True)


def _summarise_of(made_of: int) -> Callable[[Any, int, Any], None]:
    """made_of: see `stamp`."""

    def summarise(records: Any, tokens: int, stored: Any) -> None:
        if made_of < 0:
            return
        chunks, heads, chunk_tokens, dim = records.shape
        eights = (chunk_tokens + 7) // 8
        padded = np.empty((8 * eights, dim), np.float32)
        lo, hi, factor = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
        tops = np.empty(dim, np.int32)  # bits of the greatest magnitude: inf is above all numbers, NaN above inf
        bits = np.empty(dim, np.uint32)  # of eight cell numbers, a byte for each plane
        scale_bits = np.empty(1, np.int32)
        scales = scale_bits.view(np.float32)
        one = np.float32(1)
        for chunk in range(chunks):
            count = min(chunk_tokens, tokens - chunk * chunk_tokens)
            for head in range(heads):
                keys = records[chunk, head]
                if count < 8 * eights:
                    for t in range(8 * eights):
                        for d in range(dim):
                            padded[t, d] = keys[t if t < count else 0, d]  # the first key once more moves no extreme
                    keys = padded
                patterns = keys.view(np.int32)
                for d in range(dim):
                    lo[d], hi[d], tops[d] = keys[0, d], keys[0, d], 0
                for e in range(eights):
                    eight, pattern = keys[8 * e : 8 * e + 8], patterns[8 * e : 8 * e + 8]
                    for d in range(dim):
                        low, high, top = lo[d], hi[d], tops[d]
                        for t in range(8):
                            low = min(low, eight[t, d])
                            high = max(high, eight[t, d])
                            top = max(top, pattern[t, d] & np.int32(0x7FFF_FFFF))
                        lo[d], hi[d], tops[d] = low, high, top
                largest = np.int32(0)
                for d in range(dim):
                    largest = max(largest, tops[d])
                box = stored[0, chunk, head]
                if largest > _LARGEST_BITS:
                    for d in range(dim):
                        box[d], box[dim + d] = 255, 1  # -1 and 1
                    box[2 * dim + 2], box[2 * dim + 3] = 0x80, 0x7F  # inf
                    continue
                scale_bits[0] = largest
                scales[0] = max(scales[0] / np.float32(127), SMALLEST_SCALE)
                scale_bits[0] = scale_bits[0] + np.int32(0x100) & np.int32(-0x100)
                scale = scales[0]
                for byte in range(4):
                    box[2 * dim + byte] = scale_bits[0] >> 8 * byte
                lows, highs = box[:dim], box[dim : 2 * dim]
                for d in range(dim):
                    low, high = np.float32(np.int32(lo[d] / scale)), np.float32(np.int32(hi[d] / scale))
                    low = low - one if low * scale > lo[d] else low
                    high = high + one if high * scale < hi[d] else high
                    lows[d], highs[d] = np.int32(low), np.int32(high)
                    lo[d] = low * scale
                    factor[d] = CELLS / max((high - low) * scale, scale)
                for e in range(eights):
                    eight = keys[8 * e : 8 * e + 8]
                    for d in range(dim):
                        own = np.uint32(0)
                        for t in range(8):
                            cell = np.uint32(np.int32((eight[t, d] - lo[d]) * factor[d]))
                            own |= (cell * np.uint32(0x0020_4081) & np.uint32(0x0101_0101)) << np.uint32(t)
                        bits[d] = own
                    real = np.uint32((1 << min(8, max(0, count - 8 * e))) - 1)
                    planes = stored[1:, chunk, head, e * dim : (e + 1) * dim]
                    for d in range(dim):
                        planes[0, d] = bits[d] >> np.uint32(24) & real
                        planes[1, d] = bits[d] >> np.uint32(16) & real
                        planes[2, d] = bits[d] >> np.uint32(8) & real
                        planes[3, d] = bits[d] & real

    return summarise
