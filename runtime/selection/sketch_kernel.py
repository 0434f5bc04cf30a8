"""The inner loops of sketch scoring, compiled: straight from 8-bit boxes and packed codes.

With NumPy or torch every key element passes through memory several times; here a record's keys live in registers. Import it only
to score: numba takes a while. Arrays are C-contiguous; their shapes are those of `kvdb.runtime.selection.sketch_scores`. Loops run over
the head dimension wherever they can, with nothing in them that keeps the compiler from making vectors of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from kvdb.compiled import compiled, stamp
from kvdb.runtime.selection import exponential, sketch_scores, sketch_vectors
from kvdb.runtime.selection.exponential import FAST, exp_parts
from kvdb.runtime.selection.sketch_scores import LEAST_QUERY, REACH_UNIT
from kvdb.runtime.selection.sketch_vectors import LANES, LINE, address, fetch, products, sixteen

_RANK: Final = (
    "void(float32[:, :, ::1], int8[:, :, ::1], float32[:, ::1], int64[:, ::1], int64, float32[:, :, ::1], float64, "
    "float32[:, :, ::1])"
)
_SCORE: Final = (
    "void(float32[:, :, ::1], int8[:, :, ::1], float32[:, ::1], uint8[:, :, :, ::1], int32[::1], int64[:, ::1], float64, "
    "float32[:, :, ::1], float32[:, :, ::1])"
)
_JOIN: Final = "void(float32[:, :, ::1], int64[:, ::1], float32[:, :, ::1], float64)"
_QUERIES: Final = 4
"""Query heads that are scored together: their sums fit into registers."""
_AHEAD: Final = 4
"""So many records before it is needed, one is asked for."""
_BLOCK: Final = 256
"""Boxes whose products are kept until all are made."""
_NEVER: Final = -(2**30)
"""Below any sum there is: of a key that is not there."""


def _made_of() -> int:
    return stamp(sketch_vectors, sketch_scores, exponential)


def rank(group: int) -> Callable[..., None]:
    """rank(corners, boxes, scales, runs, length, around, sure, out), for so many query heads to a KV head: see `of_open_boxes`."""
    return _compiled_rank(min(group, _QUERIES))


@cache
def _compiled_rank(queries: int) -> Callable[..., None]:
    return compiled(_rank_of(queries, _made_of()), _RANK, fastmath=FAST, nogil=True)


def score(bits: int, group: int) -> Callable[..., None]:
    """score(q, boxes, scales, codes, tokens, rows, sure, tops, sums), for codes of so many planes, 1..4, and so many query heads to a
    KV head: the log-sum-exp is tops + log(sums)."""
    return _compiled_score(bits, min(group, _QUERIES))


@cache
def _compiled_score(bits: int, queries: int) -> Callable[..., None]:
    return compiled(_score_of(bits, queries, _made_of()), _SCORE, fastmath=FAST, nogil=True)


@cache
def join() -> Callable[..., None]:
    """join(coarse, rows, lse, sure): see `joined`."""
    return compiled(_join_of(_made_of()), _JOIN, fastmath=FAST, nogil=True)


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
        dots = np.zeros((_BLOCK, turns * queries), np.int32)
        all_boxes, all_whole, all_dots = boxes.reshape(-1), whole.reshape(-1), dots.reshape(-1)
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
                end = min(n, (run + 1) * length)
                for start in range(run * length, end, _BLOCK):
                    stop = min(end, start + _BLOCK)
                    for row in range(start, stop):
                        for turn in range(turns if steps else 0):
                            first = turn * queries
                            products(
                                address(all_boxes, (head * n + row) * values),
                                address(all_whole, first * steps * 2 * LANES),
                                steps,
                                address(all_dots, (row - start) * turns * queries + first),
                                queries,
                            )
                    if steps * 2 * LANES < values:
                        for row in range(start, stop):
                            for g in range(group):
                                rest = np.int32(0)
                                for d in range(steps * 2 * LANES, values):
                                    rest += np.int32(weights[g, d]) * np.int32(boxes[head, row, d])
                                dots[row - start, g] = rest + (dots[row - start, g] if steps else 0)
                    for g in range(group):
                        for row in range(start, stop):
                            scale = scales[head, row]
                            score = np.float32(dots[row - start, g]) * (units[g] * scale)
                            out[head, g, row] = sure if np.isinf(scale) else score
                if runs.shape[1] < len(closed) and around[head, 0, run] < sure:
                    for row in range(run * length, end):
                        if not np.isinf(scales[head, row]):
                            known += 1
                            for g in range(group):
                                shifts[g] += out[head, g, row] - around[head, g, run]
            for g in range(group):
                shift = shifts[g] / np.float32(max(1, known))
                for run in range(len(closed)):
                    if closed[run]:
                        score = around[head, g, run]
                        for row in range(run * length, min(n, (run + 1) * length)):
                            out[head, g, row] = score + shift if score < sure else score

    return rank


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
                        power, exponent = exp_parts((np.float32(mine[t]) - best) * unit)
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


def _join_of(made_of: int) -> Callable[..., None]:
    """made_of: see `stamp`."""

    def join(coarse: Any, rows: Any, lse: Any, sure: float) -> None:
        heads, group, chunks = coarse.shape
        if made_of < 0:
            return
        limit, n = np.float32(sure), rows.shape[1]
        for head in range(heads):
            for g in range(group):
                mine, own = coarse[head, g], lse[head, g]
                total, known = np.float64(0), np.float64(0)
                for i in range(n):
                    total += own[i] if own[i] < limit else np.float32(0)
                    known += own[i] < limit
                mean = total / max(np.float64(1), known)  # not in float32: it could be rounded below all
                gap, weak = np.float32(0), np.float32(0)
                for i in range(n):
                    score = mine[rows[head, i]]
                    one = np.float32(own[i] <= mean and own[i] < limit and score < limit)
                    gap += one * (own[i] - score)
                    weak += one
                shift = gap / max(np.float32(1), weak)
                for c in range(chunks):
                    mine[c] = mine[c] + shift if mine[c] < limit else mine[c]
                for i in range(n):
                    mine[rows[head, i]] = own[i]

    return join
