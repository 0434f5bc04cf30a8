"""Selection by the mean of a record's keys, and an estimate of what is not read: RetroInfer's estimation zone.

The best of the records that are left unread enter attention as one token each: the mean key, the mean value, the weight of all
its tokens. The others are ignored. By Jensen's inequality a record never weighs more than in truth.
source: RetroInfer, arXiv 2505.02922 (1.8 % of clusters are read, the next 23.2 % are estimated).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvdb.errors import InvalidInput
from kvdb.runtime.selection.base import SURE, Array, Estimate, Resident, Scores, Selector
from kvdb.runtime.selection.mean import ranked, score_means

if TYPE_CHECKING:
    from kvdb.runtime.selection.rules import Plan


@dataclass(frozen=True, slots=True)
class CentroidSelector(Selector):
    """estimated  records to estimate for each KV head, as a share of all it has; 0: none, 1: all that are unread

    raises  InvalidInput for anything that is no share
    """

    name: ClassVar[str] = "centroid"
    chunk_axes: ClassVar[tuple[int, ...]] = (2, 1, 1)
    proves: ClassVar[bool] = False
    estimated: float = 0.232

    def __post_init__(self) -> None:
        if not 0.0 <= self.estimated <= 1.0:
            raise InvalidInput(f"selector 'centroid': estimated is {self.estimated}, expected a share between 0 and 1")

    @property
    def abstracts(self) -> dict[str, int | None]:
        return {"centroid": None}

    def prepare(self, stored: Mapping[str, Array], chunk_tokens: int, head_dim: int) -> Resident:
        """As `MeanSelector.prepare`, and the means of values (kv_heads, chunks, head_dim) float32."""
        keys, values = torch.from_numpy(stored["centroid"]).transpose(1, 2)  # [kv_heads, chunks, head_dim] twice
        known = keys.isfinite().all(-1) & values.isfinite().all(-1)
        return *ranked(keys.mT, chunk_tokens, known), values.masked_fill(~known[..., None], 0).contiguous()

    def score(self, q: Tensor, resident: Resident, take: int, *, ceilings: bool = False) -> Scores:
        means, log_tokens, _ = resident
        return score_means(self.name, q, means, log_tokens, ceilings=ceilings)

    def estimate(self, q: Tensor, resident: Resident, scores: Scores, plan: Plan) -> Estimate | None:
        _, log_tokens, values = resident
        _, group, chunks = scores.lse.shape
        unknown = log_tokens == SURE  # [kv_heads, chunks]
        without = plan.read(chunks) | unknown
        count = min(math.ceil(self.estimated * chunks), int((~without).sum(1).max()))
        if count == 0:
            return None
        shares = torch.softmax(scores.lse.masked_fill(unknown[:, None], -math.inf), -1).sum(1)
        best = torch.topk(shares.masked_fill(without, -1), count, sorted=False).indices  # [kv_heads, count]
        lse = scores.lse.masked_fill(without[:, None], -math.inf).gather(2, best[:, None].expand(-1, group, -1))
        weights = torch.softmax(lse, -1).nan_to_num(0)  # where a KV head has nothing to estimate, all are -inf
        chosen = values.gather(1, best[..., None].expand(-1, -1, values.shape[2]))
        return Estimate(torch.bmm(weights, chosen), torch.logsumexp(lse, -1), chosen.nbytes)
