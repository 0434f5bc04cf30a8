"""Selection by the mean of a record's keys: q.mean + log(tokens), which its log-sum-exp is at least (Jensen's inequality).

Half the bytes of a box and half the work. It proves nothing: how far the true log-sum-exp lies above is not known.
source: InfLLM, arXiv 2402.04617 (one vector for a block).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvdb.errors import Unsupported
from kvdb.runtime.selection.base import SURE, Array, Resident, Scores, Selector


@dataclass(frozen=True, slots=True)
class MeanSelector(Selector):
    name: ClassVar[str] = "mean"
    chunk_axes: ClassVar[tuple[int, ...]] = (2, 1)
    proves: ClassVar[bool] = False

    @property
    def abstracts(self) -> dict[str, int | None]:
        return {"mean": None}

    def prepare(self, stored: Mapping[str, Array], chunk_tokens: int, head_dim: int) -> Resident:
        """Means (kv_heads, head_dim, chunks) and the logarithms of token numbers (kv_heads, chunks), `SURE` where a mean is
        not finite; both float32."""
        means = torch.from_numpy(stored["mean"])[0].permute(1, 2, 0)
        return ranked(means, chunk_tokens, means.isfinite().all(1))

    def score(self, q: Tensor, resident: Resident, take: int, *, ceilings: bool = False) -> Scores:
        means, log_tokens = resident
        return score_means(self.name, q, means, log_tokens, ceilings=ceilings)


def ranked(means: Tensor, chunk_tokens: int, known: Tensor) -> tuple[Tensor, Tensor]:
    """What `score_means` wants: means (kv_heads, head_dim, chunks) of records that are known, (kv_heads, chunks) of bool."""
    log_tokens = torch.full(known.shape, math.log(chunk_tokens)).masked_fill(~known, SURE)
    return means.masked_fill(~known[:, None], 0).contiguous(), log_tokens


def score_means(name: str, q: Tensor, means: Tensor, log_tokens: Tensor, *, ceilings: bool) -> Scores:
    """Scores by means, for selectors that prove nothing."""
    if ceilings:
        raise Unsupported(
            f"selector {name!r}: upper bounds were asked for, expected a selector that proves some, such as 'box' or 'sketch'"
        )
    lse = torch.baddbmm(log_tokens[:, None], q, means)
    return Scores(lse, None, log_tokens.numel(), means.nbytes)
