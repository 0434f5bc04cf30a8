"""Selection by key boxes: centre plus a share of the radius.

For a box [lo, hi] with centre c and radius r, q.c + |q|.r is the largest logit any key inside could have: LeoAM's and
Quest's bound. On real keys the bound exceeds the true maximum by 10-19 logits, so records are ranked by the shrunken score
q.c + beta |q|.r instead; beta = 1 is the bound itself. A record whose box is not finite is unknown.
source: LeoAM, arXiv 2506.20187; Quest, arXiv 2406.10774.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvdb.runtime.selection.base import SURE, Array, Resident, Scores, Selector


@dataclass(frozen=True, slots=True)
class BoxSelector(Selector):
    name: ClassVar[str] = "box"
    chunk_axes: ClassVar[tuple[int, ...]] = (2, 1, 0)
    beta: float = 0.5

    @property
    def abstracts(self) -> dict[str, int | None]:
        return {"box": None}

    def prepare(self, stored: Mapping[str, Array], chunk_tokens: int, head_dim: int) -> Resident:
        """Centres and radii (kv_heads, 2 * head_dim, chunks), zeros of unknown records; what is added to a score (kv_heads, chunks),
        `SURE` of unknown records, else 0; the logarithms of token numbers (chunks,). All float32."""
        box = torch.from_numpy(stored["box"])
        lo, hi = box[:, :, 0], box[:, :, 1]  # [chunks, kv_heads, head_dim]
        boxes = torch.cat(((hi + lo) / 2, (hi - lo) / 2), -1).permute(1, 2, 0)
        unknown = ~boxes.isfinite().all(1)  # [kv_heads, chunks]
        added = torch.zeros(unknown.shape).masked_fill_(unknown, SURE)
        log_tokens = torch.full((len(box),), math.log(chunk_tokens))
        return boxes.masked_fill(unknown[:, None], 0).contiguous(), added, log_tokens

    def score(self, q: Tensor, resident: Resident, take: int, *, ceilings: bool = False) -> Scores:
        boxes, added, log_tokens = resident
        heads, width, chunks = boxes.shape
        lse = torch.baddbmm(added[:, None], torch.cat((q, self.beta * q.abs()), -1), boxes)
        ceiling = None
        if ceilings:
            bound = torch.bmm(torch.cat((q, q.abs()), -1), boxes) + log_tokens
            ceiling = bound.masked_fill(added[:, None] == SURE, math.inf)
        evaluated = heads * chunks
        return Scores(lse, ceiling, evaluated, evaluated * width * boxes.element_size())
