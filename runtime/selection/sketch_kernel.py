"""The inner loops of sketch scoring, compiled: straight from 8-bit boxes and packed codes.

With NumPy or torch every key element passes through memory several times; here a record's keys live in registers. Import it only
to score: numba takes a while. Loops run over the head dimension wherever they can, with nothing
in them that keeps the compiler from making vectors of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import numba
import numpy as np

from kvdb.compiled import compiled

_FAST: Final = {"reassoc", "contract", "nsz"}
_RANK: Final = (
    "void(float32[:, :, ::1], int8[:, :, ::1], float32[:, ::1], int64[:, ::1], int64, float32[:, :, ::1], float64, "
    "float32[:, :, ::1])"
)
_SCORE: Final = (
    "void(float32[:, :, ::1], int8[:, :, ::1], float32[:, ::1], uint8[:, :, :, ::1], int32[::1], int64[:, ::1], float64, "
    "float32[:, :, ::1])"
)


class Kernels(NamedTuple):
    """Arrays are C-contiguous; their shapes are those of `kvdb.runtime.selection.sketch_scores`.

    rank(corners, boxes, scales, runs, length, around, sure, out)
    score(q, boxes, scales, codes, tokens, rows, sure, out)
    """

    rank: Callable[..., None]
    score: Callable[..., None]


@cache
def kernels(bits: int) -> Kernels:
    """For codes of so many planes, 1..4."""
    return Kernels(_compiled_rank(), compiled(_score_of(bits), _SCORE, fastmath=_FAST))


@cache
def _compiled_rank() -> Callable[..., None]:
    return compiled(_rank, _RANK, fastmath=_FAST)


def _rank(corners: Any, boxes: Any, scales: Any, runs: Any, length: int, around: Any, sure: float, out: Any) -> None:
    heads, group, values = corners.shape
    n = boxes.shape[1]
    for head in range(heads):
        closed = np.ones(around.shape[2], np.bool_)
        shifts, known = np.zeros(group, np.float32), 0
        for run in runs[head]:
            closed[run] = False
            for row in range(run * length, min(n, (run + 1) * length)):
                box, scale = boxes[head, row], scales[head, row]
                if np.isinf(scale):
                    out[head, :, row] = sure
                    continue
                known += 1
                for g in range(group):
                    total = np.float32(0)
                    for d in range(values):
                        total += corners[head, g, d] * np.float32(box[d])
                    out[head, g, row] = total * scale
                    shifts[g] += total * scale - around[head, g, run]
        for g in range(group):
            shift = shifts[g] / np.float32(max(1, known))
            for run in range(len(closed)):
                if closed[run]:
                    out[head, g, run * length : (run + 1) * length] = around[head, g, run] + shift


@numba.njit(fastmath=_FAST)
def _exp_parts(x: Any) -> tuple[Any, Any]:
    """exp(x) = m * 2^n for x <= 0, m to within 1.1e-7 of itself: a polynomial, which a compiler can make vectors of."""
    y = max(x * np.float32(1.4426950408889634), np.float32(-126))
    n = np.floor(y + np.float32(0.5))
    f = y - n
    m = np.float32(1.546973e-4)
    m = m * f + np.float32(1.3400432e-3)
    m = m * f + np.float32(9.618026e-3)
    m = m * f + np.float32(5.5503272e-2)
    m = m * f + np.float32(2.4022651e-1)
    m = m * f + np.float32(6.9314721e-1)
    return m * f + np.float32(1), np.int32(n)


def _score_of(bits: int) -> Callable[..., None]:
    """Closes over numbers only: what closes over another compiled function is compiled anew by each process."""
    second, third, fourth = bits > 1, bits > 2, bits > 3  # constants to the compiler

    def score(q: Any, boxes: Any, scales: Any, codes: Any, tokens: Any, rows: Any, sure: float, out: Any) -> None:
        heads, group, dim = q.shape
        eights = codes.shape[3] // dim
        reach = np.empty((group, dim), np.float32)  # q times the width of a cell
        places = np.empty((8, dim), np.float32)  # of eight keys, in cells
        starts = np.empty(group, np.float32)  # q times the centre of the first cell
        logits = np.empty((group, 8 * eights), np.float32)
        powers = np.empty(8 * eights, np.float32)
        exponents = powers.view(np.int32)
        one, half = np.uint8(1), np.float32(0.5)
        for head in range(heads):
            for i in range(rows.shape[1]):
                row = rows[head, i]
                box, scale, count = boxes[head, row], scales[head, row], tokens[row]
                if np.isinf(scale):
                    out[head, :, i] = sure
                    continue
                cell = scale * np.float32(2.0**-bits)
                for g in range(group):
                    total = np.float32(0)
                    for d in range(dim):
                        lo, hi = np.float32(box[d]), np.float32(box[dim + d])
                        width = (hi - lo) * cell
                        reach[g, d] = q[head, g, d] * width
                        total += q[head, g, d] * (lo * scale + half * width)
                    starts[g] = total
                for e in range(eights):
                    planes = codes[head, row, :, e * dim : (e + 1) * dim]
                    for t in range(8):
                        shift = np.uint8(t)
                        for d in range(dim):
                            place = planes[0, d] >> shift & one
                            if second:
                                place = place << one | planes[1, d] >> shift & one
                            if third:
                                place = place << one | planes[2, d] >> shift & one
                            if fourth:
                                place = place << one | planes[3, d] >> shift & one
                            places[t, d] = np.float32(place)
                    for g in range(group):
                        for t in range(8):
                            total = np.float32(0)
                            for d in range(dim):
                                total += reach[g, d] * places[t, d]
                            logits[g, 8 * e + t] = total
                for g in range(group):
                    top = logits[g, 0]
                    for t in range(1, count):
                        top = max(top, logits[g, t])
                    for t in range(count):
                        power, exponent = _exp_parts(logits[g, t] - top)
                        powers[t] = power
                        exponents[t] += exponent << np.int32(23)
                    total = np.float32(0)
                    for t in range(count):
                        total += powers[t]
                    out[head, g, i] = top + np.log(total) + starts[g]

    return score
