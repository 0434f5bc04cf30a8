"""Selection by key boxes: centre plus a share of the radius.

For a box [lo, hi] with centre c and radius r, q.c + |q|.r is the largest score any key inside could have: LeoAM's and
Quest's bound. On real keys the bound exceeds the true maximum by 10-19 logits, so records are ranked by the shrunken score
q.c + beta |q|.r instead; beta = 1 is the bound itself.
source: LeoAM, arXiv 2506.20187; Quest, arXiv 2406.10774.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvdb.runtime.selection.base import Selector


@dataclass(frozen=True, slots=True)
class BoxSelector(Selector):
    name: ClassVar[str] = "box"
    abstract: ClassVar[str] = "box"
    beta: float = 0.5

    def prepare(self, abstract: Tensor) -> Tensor:
        lo, hi = abstract[:, :, 0], abstract[:, :, 1]  # [chunks, kv_heads, head_dim]
        return torch.cat(((hi + lo) / 2, self.beta * (hi - lo) / 2), -1).permute(1, 2, 0).contiguous()

    def score(self, q: Tensor, resident: Tensor) -> Tensor:
        return torch.bmm(torch.cat((q, q.abs()), -1), resident)
