"""The inner loops of sketch scoring, compiled: straight from 8-bit boxes and packed codes.

With NumPy or torch every key element passes through memory several times; here a record's keys live in registers. Used where
the package numba is installed (extra `fast`), on CPU; 7 times as fast as the same in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np


class Kernels(NamedTuple):
    """Compiled at their first call, once for a machine. Arrays are C-contiguous; q (kv_heads, group, head_dim) float32.

    rank(corners, boxes, scales, out)                   corners (kv_heads, group, 2 * head_dim) float32, the weights of lo and hi;
                                                        out (kv_heads, group, chunks) float32
    score(q, boxes, scales, codes, rows, places, out)   rows (kv_heads, n) int64, the records to score; places (bits, 256, 8)
                                                        float32, what a byte of each plane adds to the places of its eight key
                                                        elements; out (kv_heads, group, n) float32. head_dim is a multiple of 8
    boxes, scales and codes are what `SketchSelector.prepare` makes; `out` is overwritten.
    """

    rank: Callable[..., None]
    score: Callable[..., None]


@cache
def kernels() -> Kernels | None:
    """None without numba."""
    try:
        import numba
    except ImportError:
        return None
    compiled = numba.njit(fastmath={"reassoc", "contract", "nsz"}, cache=True)
    return Kernels(compiled(_rank), compiled(_score))


def _rank(corners: Any, boxes: Any, scales: Any, out: Any) -> None:
    heads, group, values = corners.shape
    for head in range(heads):
        for row in range(boxes.shape[1]):
            box = boxes[head, row]
            for g in range(group):
                total = np.float32(0)
                for d in range(values):
                    total += corners[head, g, d] * np.float32(box[d])
                out[head, g, row] = total * scales[head, row]


def _score(q: Any, boxes: Any, scales: Any, codes: Any, rows: Any, places: Any, out: Any) -> None:
    heads, group, dim = q.shape
    bits, octets = codes.shape[2], dim // 8
    tokens = codes.shape[3] // octets
    reach = np.empty((group, dim), np.float32)  # q times the radius of the box
    inside = np.empty(dim, np.float32)  # of a key, from -1 to 1 across its box
    logits = np.empty((group, tokens), np.float32)
    middle = np.empty(group, np.float32)  # q times the centre of the box
    half = np.float32(0.5)
    for head in range(heads):
        for i in range(rows.shape[1]):
            row = rows[head, i]
            box, scale = boxes[head, row], scales[head, row] * half
            for g in range(group):
                total = np.float32(0)
                for d in range(dim):
                    lo, hi = np.float32(box[d]), np.float32(box[dim + d])
                    reach[g, d] = q[head, g, d] * ((hi - lo) * scale)
                    total += q[head, g, d] * (hi + lo)
                middle[g] = total * scale
            for t in range(tokens):
                for j in range(octets):
                    place = places[0, codes[head, row, 0, t * octets + j]]
                    for d in range(8):
                        inside[8 * j + d] = place[d]
                for b in range(1, bits):
                    for j in range(octets):
                        place = places[b, codes[head, row, b, t * octets + j]]
                        for d in range(8):
                            inside[8 * j + d] += place[d]
                for g in range(group):
                    total = np.float32(0)
                    for d in range(dim):
                        total += reach[g, d] * inside[d]
                    logits[g, t] = total + middle[g]
            for g in range(group):
                top = logits[g, 0]
                for t in range(1, tokens):
                    top = max(top, logits[g, t])
                total = np.float32(0)
                for t in range(tokens):
                    total += np.exp(logits[g, t] - top)
                out[head, g, i] = top + np.log(total)
