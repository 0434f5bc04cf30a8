"""What boxes and codes say of records: compiled on CPU, in torch elsewhere.

A record of which a sketch knows nothing (scale inf) gets `SURE`: it must be read.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kvdb.errors import InvalidInput
from kvdb.runtime.heads import over_heads
from kvdb.runtime.selection.base import SURE
from kvdb.runtime.selection.loops import can_compile

LEAST_QUERY: Final = 1e-30
"""Compiled loops take a query's largest element to be at least this."""
_WIDEST: Final = 2048
"""Times 2^4 places of 2^15 units each is 2^30."""
REACH_UNIT: Final = 256 / 32767
"""Of a query's largest element: compiled loops round its product with the width of a box, which is 254 or less, to such units."""


def of_boxes(corners: Tensor, boxes: Tensor, scales: Tensor) -> Tensor:
    """Sum of corners times lo and hi, to within `boxes_off_by`.

    corners  (kv_heads, group, 2 * head_dim) float32
    boxes    (kv_heads, n, 2 * head_dim) int8; scales (kv_heads, n) float32
    returns  (kv_heads, group, n) float32
    """
    heads, group, _ = corners.shape
    whole = torch.zeros(heads, 1, dtype=torch.int64, device=corners.device)
    return of_open_boxes(corners, boxes, scales, whole, boxes.shape[1], corners.new_zeros(heads, group, 1))


def of_open_boxes(corners: Tensor, boxes: Tensor, scales: Tensor, runs: Tensor, length: int, around: Tensor) -> Tensor:
    """As `of_boxes`, of the boxes of some runs; all others get the score of their run, moved by how far those two differ on
    average where both are known, but for runs that score `SURE` or more.

    runs    (kv_heads, m) int64: run r is boxes [r * length, (r + 1) * length), as far as there are any
    around  (kv_heads, group, runs in all) float32
    """
    heads, group, _ = corners.shape
    n = boxes.shape[1]
    if (kernel := _compiled(corners, corners.shape[2])) is not None:
        out = corners.new_empty(heads, group, n)
        rank, arrays = kernel.rank(group), [t.numpy() for t in (corners, boxes, scales, runs)]
        of_run, to = around.numpy(), out.numpy()
        over_heads(heads, boxes.nbytes, lambda h: rank(*(a[h] for a in arrays), length, of_run[h], SURE, to[h]))
        return out
    unknown = scales.isinf()[:, None]
    own = torch.bmm(corners, boxes.float().transpose(1, 2)) * scales[:, None].masked_fill(unknown, 0)
    closed = torch.ones(heads, around.shape[2], dtype=torch.bool, device=boxes.device).scatter(1, runs, False)
    closed = closed.repeat_interleave(length, 1)[:, None, :n]
    around = around.repeat_interleave(length, 2)[..., :n]
    both = ~(closed | unknown | (around >= SURE))
    shift = ((own - around) * both).sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp_min(1)
    moved = torch.where(around < SURE, around + shift, around)
    return torch.where(closed, moved, own.masked_fill(unknown, SURE))


def of_codes(q: Tensor, records: tuple[Tensor, Tensor, Tensor, Tensor], rows: Tensor, bits: int) -> Tensor:
    """Log-sum-exp of records by the centres of their keys' cells, to within `off_by`.

    q        (kv_heads, group, head_dim) float32, scaled
    records  boxes, scales, codes, tokens as `SketchSelector.prepare` makes them
    rows     (kv_heads, n) int64
    returns  (kv_heads, group, n) float32
    raises   InvalidInput for records of other planes
    """
    heads, n, dim = *rows.shape, q.shape[2]
    if records[2].shape[2] != bits:
        raise InvalidInput(f"sketch: codes of {records[2].shape[2]} planes, expected {bits}, as many as are scored")
    if (kernel := _compiled(q, dim)) is not None:
        tops, sums = q.new_empty(2, heads, q.shape[1], n)
        queries, *kept, lengths, asked = (t.numpy() for t in (q.contiguous(), *records, rows.contiguous()))
        score, to = kernel.score(bits, q.shape[1]), (tops.numpy(), sums.numpy())

        def run(h: slice) -> None:
            top, total = (each[h] for each in to)
            score(queries[h], *(each[h] for each in kept), lengths, asked[h], SURE, top, total)
            top += np.log(total, out=total)

        over_heads(heads, rows.numel() * records[2][0, 0].nbytes, run)
        return tops
    boxes, scales, codes, tokens = records
    flat = (rows + boxes.shape[1] * torch.arange(heads, device=rows.device)[:, None]).ravel()
    box, scale, planes = (
        t.flatten(0, 1).index_select(0, flat).unflatten(0, (heads, n)) for t in (boxes, scales, codes)
    )
    unknown = scale.isinf()
    lo, hi = (box.float() * scale.masked_fill(unknown, 0)[..., None])[:, :, None].split(dim, -1)
    cell = (hi - lo) / 2**bits
    eight = torch.arange(8, device=q.device)[:, None]
    ones = planes.unflatten(3, (-1, 1, dim)) >> eight & 1  # [kv_heads, n, bits, eights, 8, head_dim]
    weights = 1 << torch.arange(bits - 1, -1, -1, device=q.device)
    place = (ones * weights[:, None, None, None]).sum(2).flatten(2, 3)
    keys = torch.addcmul(lo + cell / 2, place.float(), cell)
    logits = torch.bmm(q, keys.flatten(1, 2).transpose(1, 2)).unflatten(2, (n, -1))
    padding = torch.arange(logits.shape[3], device=q.device) >= tokens[rows][:, None, :, None]
    return torch.logsumexp(logits.masked_fill(padding, -math.inf), -1).masked_fill(unknown[:, None], SURE)


def joined(coarse: Tensor, rows: Tensor, lse: Tensor) -> Tensor:
    """Scores of some records by codes, of the others by boxes: these moved by how far both differ on the weaker of those, at or below
    their mean. Who scores `SURE` or more by boxes stays where it is. Modifies coarse and returns it.

    coarse  (kv_heads, group, chunks) float32
    rows    (kv_heads, n) int64, lse (kv_heads, group, n) float32: what codes say of them
    """
    if (kernel := _compiled(coarse)) is not None:
        kernel.join()(coarse.numpy(), rows.numpy(), lse.numpy(), SURE)
        return coarse
    index = rows[:, None].expand(-1, coarse.shape[1], -1)
    own, known = coarse.gather(2, index), lse < SURE
    total = (lse * known).sum(-1, keepdim=True, dtype=torch.float64)  # in float32 a mean may be rounded below all
    weak = known & (own < SURE) & (lse <= total / known.sum(-1, keepdim=True).clamp_min(1))
    shift = ((lse - own) * weak).sum(-1, keepdim=True) / weak.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(coarse < SURE, coarse + shift, coarse).scatter_(2, index, lse)


def off_by(q: Tensor, scales: Tensor) -> Tensor:
    """By how much `of_codes` may differ from exact arithmetic, beside float32's own rounding: (kv_heads, group, n)."""
    return q.shape[2] * (0.501 * REACH_UNIT) * q.abs().amax(-1, keepdim=True).clamp_min(LEAST_QUERY) * scales[:, None]


def boxes_off_by(corners: Tensor, scales: Tensor) -> Tensor:
    """By how much `of_boxes` may differ from exact arithmetic, beside float32's own rounding: (kv_heads, group, n)."""
    values = corners.shape[2]
    unit = corners.abs().amax(-1, keepdim=True).clamp_min(LEAST_QUERY) / min(32767, (2**31 - 1) // (128 * values))
    return values * 127 * 0.501 * unit * scales[:, None]


def _compiled(of: Tensor, elements: int = 4) -> ModuleType | None:
    """The compiled loops where they can be used: for vectors of so many elements, in fours, whose sums fit into 32 bits."""
    if elements % 4 or elements > _WIDEST or not can_compile(of):
        return None
    from kvdb.runtime.selection import sketch_kernel

    return sketch_kernel
