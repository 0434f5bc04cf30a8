"""Selection by progressive keys: the boxes of ranges, of the records in them, then a few bits of every key of some records.

The box of a record costs little and ranks roughly (see `box`). The leading bits of the code planes put each key element into
its cell of the box; with the cell's centre in its place a record's log-sum-exp is nearly exact. So the boxes of all records are
scored, and the codes of the best `margin` times as many as will be read. On request the boxes of whole ranges of records come
before all that, and only the best ranges are opened. What stays closed keeps the score of the box around it, moved to the
scale of the others.

A cell also bounds its key: the true logit is at most the centre's plus sum_d |q_d| w_d / 2^(bits + 1), w the width of the box.
source: LeoAM, arXiv 2506.20187 (abstracts first, adaptive ranges); KIVI, arXiv 2402.02750 (keys are quantised per channel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvdb.abstracts.sketch import BITS, corners
from kvdb.errors import InvalidInput
from kvdb.geometry import div_ceil
from kvdb.runtime.selection.base import Array, Resident, Scores, Selector
from kvdb.runtime.selection.largest import largest
from kvdb.runtime.selection.shares import shares
from kvdb.runtime.selection.sketch_scores import joined, of_boxes, of_codes, of_open_boxes, off_by

RANGE: Final = 8
"""Records of a range."""
_CELL_SLACK: Final = 1 + 2.0**-15
"""A key may lie outside its cell by rounding: 2^-20 of the box's width, see `kvdb.abstracts.sketch`."""


class Sketches(NamedTuple):
    """A sketch in memory: as large as on disk, and a box for every range.

    boxes         (kv_heads, chunks, 2 * head_dim) int8: lo, hi
    scales        (kv_heads, chunks) float32; inf: the record is unknown
    codes         (kv_heads, chunks, bits, bytes) uint8
    tokens        (chunks,) int32
    range_boxes   (kv_heads, ranges, 2 * head_dim) int8, range_scales (kv_heads, ranges) float32: to rank by, no bounds;
                  no ranges where all are opened
    """

    boxes: Tensor
    scales: Tensor
    codes: Tensor
    tokens: Tensor
    range_boxes: Tensor
    range_scales: Tensor


@dataclass(frozen=True, slots=True)
class SketchSelector(Selector):
    """bits    code planes to read, 1..4
    beta    share of the radius in a box's score
    margin  records to look at closely, as a multiple of those that will be read; inf: all of them
    least   so many records of a KV head are looked at closely in any case
    opened  share of the ranges whose boxes are scored; 1: all, and ranges need no scores

    raises  InvalidInput for other numbers
    """

    name: ClassVar[str] = "sketch"
    bits: int = 3
    beta: float = 0.5
    margin: float = 6.0
    least: int = 1024
    opened: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= BITS:
            raise InvalidInput(f"selector 'sketch': bits is {self.bits}, expected 1..{BITS}")
        if not self.beta >= 0 or not self.margin > 0 or not self.least >= 1 or not 0 < self.opened <= 1:
            raise InvalidInput(
                f"selector 'sketch': beta {self.beta}, margin {self.margin}, least {self.least}, opened {self.opened}, expected beta at "
                "least 0, a margin above 0, at least 1 record and a share to open, 0 < opened <= 1"
            )

    @property
    def abstracts(self) -> dict[str, int | None]:
        return {"sketch": 1 + self.bits}

    def prepare(self, stored: Mapping[str, Array], chunk_tokens: int, head_dim: int) -> Resident:
        """`Sketches`."""
        planes = stored["sketch"]  # [1 + bits, chunks, kv_heads, row_bytes]
        box, scale = corners(planes[0], head_dim)
        codes = planes[1:, :, :, : div_ceil(chunk_tokens, 8) * head_dim].transpose(2, 1, 0, 3)
        parts = (box.swapaxes(0, 1), scale.swapaxes(0, 1), codes, np.full(planes.shape[1], chunk_tokens, np.int32))
        return self._with_ranges(*(torch.from_numpy(part.copy(order="C")) for part in parts))

    def join(self, parts: list[Resident]) -> Resident:
        boxes, scales, codes, tokens, *_ = zip(*parts, strict=True)
        return self._with_ranges(torch.cat(boxes, 1), torch.cat(scales, 1), torch.cat(codes, 1), torch.cat(tokens))

    def _with_ranges(self, boxes: Tensor, scales: Tensor, codes: Tensor, tokens: Tensor) -> Sketches:
        around = _around(boxes, scales) if self.opened < 1 else (boxes[:, :0], scales[:, :0])
        return Sketches(boxes, scales, codes, tokens, *around)

    def score(self, q: Tensor, resident: Resident, take: int, *, ceilings: bool = False) -> Scores:
        kept = Sketches(*resident)
        heads, chunks, _ = kept.boxes.shape
        close = chunks if ceilings else min(chunks, max(self.least, math.ceil(min(chunks, self.margin * take))))
        if close == chunks:
            return self._all(q, kept, ceilings)
        coarse, scored, read = self._coarse(q, kept, close)
        best = largest(shares(coarse)[:, :-1], close)  # [kv_heads, close]
        lse = of_codes(q, kept[:4], best, self.bits)
        read += best.numel() * kept.codes[0, 0].nbytes
        return Scores(joined(coarse, best, lse), None, scored + heads * close, read)

    def _all(self, q: Tensor, kept: Sketches, ceilings: bool) -> Scores:
        """Every record closely."""
        heads, chunks, _ = kept.boxes.shape
        dim = q.shape[2]
        lse = of_codes(q, kept[:4], _every(heads, chunks, q.device), self.bits)
        ceiling = None
        if ceilings:
            box = kept.boxes.float()
            radius = (box[..., dim:] - box[..., :dim]) / 2
            slack = torch.bmm(q.abs(), radius.transpose(1, 2)) * kept.scales[:, None] * (_CELL_SLACK / 2**self.bits)
            slack += off_by(q, kept.scales)
            ceiling = (lse + slack).masked_fill(kept.scales[:, None].isinf(), math.inf)
        return Scores(lse, ceiling, heads * chunks, sum(t.nbytes for t in kept[:4]))

    def _coarse(self, q: Tensor, kept: Sketches, close: int) -> tuple[Tensor, int, int]:
        """Scores of records by boxes, (kv_heads, group, chunks); how many boxes were scored; bytes they have."""
        heads, chunks, values = kept.boxes.shape
        ranges = kept.range_boxes.shape[1]
        shrunk = self.beta * q.abs()
        weights = torch.cat((q - shrunk, q + shrunk), -1) / 2  # times lo and hi: q.centre + beta |q|.radius
        box_bytes = values + kept.scales.element_size()
        opened = max(math.ceil(self.opened * ranges), div_ceil(2 * close, RANGE))
        if opened >= ranges:
            return of_boxes(weights, *kept[:2]), heads * chunks, heads * chunks * box_bytes
        around = of_boxes(weights, *kept[4:])
        best = largest(shares(around)[:, :-1], opened)
        scored = heads * (ranges + opened * RANGE)
        coarse = of_open_boxes(weights, *kept[:2], best, RANGE, around)
        return coarse, scored, scored * box_bytes


@lru_cache(maxsize=8)
def _every(heads: int, chunks: int, device: torch.device) -> Tensor:
    """Rows of all records, (kv_heads, chunks): the same for every layer of a step."""
    return torch.arange(chunks, device=device).repeat(heads, 1)


def _around(boxes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes around those of every range, and their scales."""
    chunks, values = boxes.shape[1:]
    unknown = scales.isinf()
    exact = boxes.float() * scales.masked_fill(unknown, 0)[..., None]
    exact[..., values // 2 :] *= -1  # so that both ends are minima
    exact = torch.nn.functional.pad(exact, (0, 0, 0, -chunks % RANGE), value=math.inf)
    ends = exact.unflatten(1, (-1, RANGE)).amin(2)
    ends[..., values // 2 :] *= -1
    scale = ends.abs().amax(-1) / 127
    holes = torch.nn.functional.pad(unknown, (0, -chunks % RANGE)).unflatten(1, (-1, RANGE)).any(2)
    rounded = (ends / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round().to(torch.int8)
    return rounded, scale.masked_fill(holes, math.inf)
