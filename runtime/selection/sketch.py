"""Selection by progressive keys: boxes first, then, inside the boxes that look promising, a few bits of every key.

The box of a record costs little and ranks roughly (see `box`). The leading bits of the code planes put each key element into
its cell of the box; with the cell's centre in its place a record's log-sum-exp is nearly exact. So the boxes of all records are
scored, and the codes of the best `margin` times as many as will be read. Records that are not looked at closely keep the score
of their box, moved to the scale of the others.

A cell also bounds its key: the true logit is at most the centre's plus sum_d |q_d| w_d / 2^(bits + 1), w the width of the box.
source: LeoAM, arXiv 2506.20187 (abstracts first); KIVI, arXiv 2402.02750 (keys are quantised per channel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from kvdb.abstracts.sketch import corners
from kvdb.geometry import div_ceil
from kvdb.runtime.selection.base import Array, Resident, Scores, Selector

if TYPE_CHECKING:
    from kvdb.runtime.selection.sketch_kernel import Kernels

_SURE: Final = 1e4
"""A logit above any real one: for records of which the sketch knows nothing."""
_CELL_SLACK: Final = 1 + 2.0**-15
"""A key may lie outside its cell by rounding: 2^-20 of the box's width, see `kvdb.abstracts.sketch`."""


@dataclass(frozen=True, slots=True)
class SketchSelector(Selector):
    """bits    code planes to read, 1..4
    beta    share of the radius in a box's score
    margin  records to look at closely, as a multiple of those that will be read; inf: all of them
    """

    name: ClassVar[str] = "sketch"
    chunk_axes: ClassVar[tuple[int, ...]] = (1, 1, 1, 0)
    bits: int = 2
    beta: float = 0.5
    margin: float = 3.0

    @property
    def abstracts(self) -> dict[str, int | None]:
        return {"sketch": 1 + self.bits}

    def prepare(self, stored: Mapping[str, Array], chunk_tokens: int, head_dim: int) -> Resident:
        """Boxes (kv_heads, chunks, 2 * head_dim) int8, lo and hi; their scales (kv_heads, chunks) float32; codes
        (kv_heads, chunks, bits, bytes) uint8; tokens (chunks,) int32: in memory a sketch is as large as on disk."""
        planes = stored["sketch"]  # [1 + bits, chunks, kv_heads, row_bytes]
        box, scale = corners(planes[0], head_dim)
        codes = planes[1:, :, :, : div_ceil(chunk_tokens, 8) * head_dim].transpose(2, 1, 0, 3)
        parts = (box.swapaxes(0, 1), scale.swapaxes(0, 1), codes, np.full(planes.shape[1], chunk_tokens, np.int32))
        return tuple(torch.from_numpy(part.copy(order="C")) for part in parts)

    def score(self, q: Tensor, resident: Resident, take: int, *, ceilings: bool = False) -> Scores:
        boxes, scales, codes, _ = resident
        heads, chunks, _ = boxes.shape
        unknown = scales[:, None].isinf()
        close = chunks if ceilings else math.ceil(min(chunks, self.margin * take))
        if close == chunks:
            every = torch.arange(chunks, device=boxes.device).expand(heads, -1)
            lse = self._look(q, resident, every).masked_fill(unknown, _SURE)
            ceiling = None
            if ceilings:
                box = boxes.float()
                radius = (box[..., q.shape[2] :] - box[..., : q.shape[2]]) / 2
                slack = torch.bmm(q.abs(), radius.transpose(1, 2)) * scales[:, None] * (_CELL_SLACK / 2**self.bits)
                ceiling = lse + slack.masked_fill(unknown, _SURE)
            return Scores(lse, ceiling, heads * chunks, sum(t.nbytes for t in resident))
        shrunk = self.beta * q.abs()
        corners = torch.cat((q - shrunk, q + shrunk), -1) / 2  # times lo and hi: q.centre + beta |q|.radius
        coarse = self._rank(corners, boxes, scales).masked_fill(unknown, _SURE)
        best = torch.topk(torch.softmax(coarse, -1).sum(1), close, sorted=False).indices  # [kv_heads, close]
        index = best[:, None].expand(-1, q.shape[1], -1)
        lse = self._look(q, resident, best).masked_fill(unknown.expand_as(coarse).gather(2, index), _SURE)
        weakest = torch.topk(lse, max(1, close // 2), largest=False, sorted=False).indices
        shift = (lse.gather(2, weakest) - coarse.gather(2, index).gather(2, weakest)).mean(-1, keepdim=True)
        read = boxes.nbytes + scales.nbytes + best.numel() * codes[0, 0].nbytes
        return Scores((coarse + shift).scatter(2, index, lse), None, heads * (chunks + close), read)

    def _rank(self, corners: Tensor, boxes: Tensor, scales: Tensor) -> Tensor:
        """Scores of all boxes, (kv_heads, group, chunks)."""
        if corners.device.type == "cpu" and (compiled := _kernels(self.bits)) is not None:
            out = corners.new_empty(*corners.shape[:2], boxes.shape[1])
            compiled.rank(*(t.numpy() for t in (corners, boxes, scales, out)))
            return out
        return torch.bmm(corners, boxes.float().transpose(1, 2)) * scales[:, None]

    def _look(self, q: Tensor, resident: Resident, rows: Tensor) -> Tensor:
        """Log-sum-exp of records by the centres of their keys' cells; anything where a record is unknown.

        rows     (kv_heads, n)
        returns  (kv_heads, group, n)
        """
        heads, n, dim = *rows.shape, q.shape[2]
        if q.device.type == "cpu" and (compiled := _kernels(self.bits)) is not None:
            out = q.new_empty(heads, q.shape[1], n)
            compiled.score(*(t.numpy() for t in (q.contiguous(), *resident, rows.contiguous(), out)))
            return out
        boxes, scales, codes, tokens = resident
        flat = (rows + boxes.shape[1] * torch.arange(heads, device=rows.device)[:, None]).ravel()
        box, scale, planes = (
            t.flatten(0, 1).index_select(0, flat).unflatten(0, (heads, n)) for t in (boxes, scales, codes)
        )
        lo, hi = (box.float() * scale[..., None])[:, :, None].split(dim, -1)
        cell = (hi - lo) / 2**self.bits
        eight = torch.arange(8, device=q.device)[:, None]
        ones = planes.unflatten(3, (-1, 1, dim)) >> eight & 1  # [kv_heads, n, bits, eights, 8, head_dim]
        weights = 1 << torch.arange(self.bits - 1, -1, -1, device=q.device)
        place = (ones * weights[:, None, None, None]).sum(2).flatten(2, 3)
        keys = torch.addcmul(lo + cell / 2, place.float(), cell)
        logits = torch.bmm(q, keys.flatten(1, 2).transpose(1, 2)).unflatten(2, (n, -1))
        padding = torch.arange(logits.shape[3], device=q.device) >= tokens[rows][:, None, :, None]
        return torch.logsumexp(logits.masked_fill(padding, -math.inf), -1)


@cache
def _kernels(bits: int) -> Kernels | None:
    """None where numba is not installed (extra `fast`)."""
    try:
        from kvdb.runtime.selection.sketch_kernel import kernels
    except ImportError:
        return None
    return kernels(bits)
