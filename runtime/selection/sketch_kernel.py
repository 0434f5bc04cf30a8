"""The inner loops of sketch scoring, compiled: straight from 8-bit boxes and packed codes.

With NumPy or torch every key element passes through memory several times; here a record's keys live in registers. Import it only
to score: numba takes a while. Arrays are C-contiguous; their shapes are those of `kvdb.runtime.selection.sketch_scores`. Loops run over
the head dimension wherever they can, with nothing in them that keeps the compiler from making vectors of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numba
import numpy as np

from kvdb.compiled import compiled, stamp
from kvdb.runtime.selection import sketch_scores, sketch_vectors
from kvdb.runtime.selection.sketch_scores import LEAST_QUERY, REACH_UNIT
from kvdb.runtime.selection.sketch_vectors import LANES, LINE, address, fetch, products, sixteen

_FAST: Final = {"reassoc", "contract", "nsz"}
_RANK: Final = (
    "void(float32[:, :, ::1], int8[:, :, ::1], float32[:, ::1], int64[:, ::1], int64, float32[:, :, ::1], float64, "
    "float32[:, :, ::1])"
)
_SCORE: Final = (
    "void(float32[:, :, ::1], int8[:, :, ::1], float32[:, ::1], uint8[:, :, :, ::1], int32[::1], int64[:, ::1], float64, "
    "float32[:, :, ::1], float32[:, :, ::1])"
)
_QUERIES: Final = 4
"""Query heads that are scored together: their sums fit into registers."""
_AHEAD: Final = 2
"""So many records before it is needed, one is asked for."""
_NEVER: Final = -(2**30)
"""Below any sum there is: of a key that is not there."""


def _made_of() -> int:
    return stamp(sketch_vectors, sketch_scores)


def rank(group: int) -> Callable[..., None]:
    """rank(corners, boxes, scales, runs, length, around, sure, out), for so many query heads to a KV head: see `of_open_boxes`."""
    return _compiled_rank(min(group, _QUERIES))


@cache
def _compiled_rank(queries: int) -> Callable[..., None]:
    return compiled(_rank_of(queries, _made_of()), _RANK, fastmath=_FAST, nogil=True)


def score(bits: int, group: int) -> Callable[..., None]:
    """score(q, boxes, scales, codes, tokens, rows, sure, tops, sums), for codes of so many planes, 1..4, and so many query heads to a
    KV head: the log-sum-exp is tops + log(sums)."""
    return _compiled_score(bits, min(group, _QUERIES))


@cache
def _compiled_score(bits: int, queries: int) -> Callable[..., None]:
    return compiled(_score_of(bits, queries, _made_of()), _SCORE, fastmath=_FAST, nogil=True)


def _rank_of(queries: int, made_of: int) -> Callable[..., None]:
    """Closes over numbers only: what closes over another compiled function is compiled anew by each process. made_of: see `stamp`."""

    def rank(corners: Any, boxes: Any, scales: Any, runs: Any, length: int, around: Any, sure: float, out: Any) -> None:
        heads, group, values = corners.shape
        if made_of < 0:
            return
        n, steps = boxes.shape[1], values // (2 * LANES)
        turns = (group + queries - 1) // queries
        weights, units = np.zeros((turns * queries, values), np.int16), np.empty(group, np.float32)
        whole = np.zeros((turns * queries, steps * 2 * LANES), np.int16)  # the part that is scored in vectors
        dots = np.zeros(turns * queries, np.int32)
        all_boxes, all_whole = boxes.reshape(-1), whole.reshape(-1)
        most = min(32767, (2**31 - 1) // (128 * values))
        for head in range(heads):
            for g in range(group):
                largest = np.float32(LEAST_QUERY)
                for d in range(values):
                    largest = max(largest, abs(corners[head, g, d]))
                units[g] = largest / np.float32(most)
                for d in range(values):
                    weights[g, d] = np.int16(np.floor(corners[head, g, d] / units[g] + np.float32(0.5)))
                for d in range(steps * 2 * LANES):
                    whole[g, d] = weights[g, d]
            closed = np.ones(around.shape[2], np.bool_)
            shifts, known = np.zeros(group, np.float32), 0
            for i in range(runs.shape[1]):
                run = runs[head, i]
                closed[run] = False
                if i + 1 < runs.shape[1]:
                    ahead = (head * n + runs[head, i + 1] * length) * values
                    for at in range(0, length * values, LINE):
                        fetch(address(all_boxes, ahead + at))
                for row in range(run * length, min(n, (run + 1) * length)):
                    box, scale = boxes[head, row], scales[head, row]
                    if np.isinf(scale):
                        for g in range(group):
                            out[head, g, row] = sure
                        continue
                    known += 1 if around[head, 0, run] < sure else 0
                    for turn in range(turns if steps else 0):
                        first = turn * queries
                        products(
                            address(all_boxes, (head * n + row) * values),
                            address(all_whole, first * steps * 2 * LANES),
                            steps,
                            address(dots, first),
                            queries,
                        )
                    for g in range(group):
                        dot = np.int64(dots[g])
                        for d in range(steps * 2 * LANES, values):
                            dot += np.int64(weights[g, d]) * np.int64(box[d])
                        score = np.float32(dot) * (units[g] * scale)
                        out[head, g, row] = score
                        shifts[g] += score - around[head, g, run] if around[head, g, run] < sure else np.float32(0)
            for g in range(group):
                shift = shifts[g] / np.float32(max(1, known))
                for run in range(len(closed)):
                    if closed[run]:
                        for row in range(run * length, min(n, (run + 1) * length)):
                            out[head, g, row] = around[head, g, run] + shift

    return rank


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


def _score_of(bits: int, queries: int, made_of: int) -> Callable[..., None]:
    """Closes over numbers only: what closes over another compiled function is compiled anew by each process. made_of: see `stamp`."""

    def score(
        q: Any, boxes: Any, scales: Any, codes: Any, tokens: Any, rows: Any, sure: float, tops: Any, sums: Any
    ) -> None:
        heads, group, dim = q.shape
        if made_of < 0:
            return
        chunks, quads = boxes.shape[1], dim // 4
        row_bytes = codes.shape[3]
        eights = row_bytes // dim
        turns, lanes = (group + queries - 1) // queries, (eights + 1) // 2 * LANES
        scaled, units = np.empty((group, dim), np.float32), np.empty(group, np.float32)
        reach = np.zeros((turns * queries, dim), np.int16)
        width, centre = np.empty(dim, np.float32), np.empty(dim, np.float32)  # of the first cell; in parts of the scale
        dots = np.zeros((turns * queries, lanes), np.int32)
        powers = np.empty(lanes, np.float32)
        exponents = powers.view(np.int32)
        all_boxes = boxes.reshape(-1)
        all_codes, all_reach, all_dots = codes.reshape(-1), reach.reshape(-1), dots.reshape(-1)
        quarters = all_reach.view(np.uint64)
        for head in range(heads):
            for g in range(group):
                largest = np.float32(LEAST_QUERY)
                for d in range(dim):
                    largest = max(largest, abs(q[head, g, d]))
                units[g] = largest * np.float32(REACH_UNIT)
                for d in range(dim):
                    scaled[g, d] = q[head, g, d] / units[g]
            for i in range(rows.shape[1]):
                row = rows[head, i]
                scale, count = scales[head, row], tokens[row]
                if i + _AHEAD < rows.shape[1]:
                    ahead = head * chunks + rows[head, i + _AHEAD]
                    for at in range(0, 2 * dim, LINE):
                        fetch(address(all_boxes, 2 * dim * ahead + at))
                    for at in range(0, bits * row_bytes, LINE):
                        fetch(address(all_codes, bits * row_bytes * ahead + at))
                if np.isinf(scale):
                    for g in range(group):
                        tops[head, g, i], sums[head, g, i] = sure, 1
                    continue
                box = boxes[head, row]
                for d in range(dim):
                    lo, hi = np.float32(box[d]), np.float32(box[dim + d])
                    width[d] = hi - lo
                    centre[d] = lo * np.float32(2 << bits) + (hi - lo)
                for g in range(group):
                    for d in range(dim):
                        reach[g, d] = np.int16(np.floor(scaled[g, d] * width[d] + np.float32(0.5)))
                for quad in range(group * quads):
                    quarters[quad] = _crossed(quarters[quad])
                start = (head * chunks + row) * bits * row_bytes
                for turn in range(turns):
                    for first in range(0, eights, 2):
                        sixteen(
                            address(all_codes, start + first * dim),
                            row_bytes,
                            dim if first + 1 < eights else 0,  # no second eight: the first once more, not counted
                            address(all_reach, turn * queries * dim),
                            quads,
                            address(all_dots, turn * queries * lanes + first * 8),
                            lanes,
                            bits,
                            queries,
                        )
                for g in range(group):
                    mine = dots[g]
                    for t in range(count, lanes):
                        mine[t] = _NEVER
                    top = mine[0]
                    for t in range(lanes):
                        top = max(top, mine[t])
                    best, unit = np.float32(top), units[g] * scale * np.float32(2.0**-bits)
                    for t in range(lanes):
                        power, exponent = _exp_parts((np.float32(mine[t]) - best) * unit)
                        powers[t] = power
                        exponents[t] += exponent << np.int32(23)
                    for t in range(count, lanes):
                        powers[t] = 0
                    total, low = np.float32(0), np.float32(0)
                    for t in range(lanes):
                        total += powers[t]
                    for d in range(dim):
                        low += q[head, g, d] * centre[d]
                    tops[head, g, i] = best * unit + low * scale * np.float32(0.5 / 2**bits)
                    sums[head, g, i] = total

    return score


@numba.njit(fastmath=_FAST)
def _crossed(four: Any) -> Any:
    """Four 16-bit numbers in the order 0, 2, 1, 3."""
    first, second = np.uint64(0xFFFF), np.uint64(0xFFFF << 16)
    third, fourth = np.uint64(0xFFFF << 32), np.uint64(0xFFFF << 48)
    up, down = (four & second) << np.uint64(16), (four & third) >> np.uint64(16)
    return (four & first) | up | down | (four & fourth)
