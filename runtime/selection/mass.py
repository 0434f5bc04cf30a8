"""How much attention mass a plan covers, estimated from what was read and the scores of what was not."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdb.runtime.selection.base import Scores
from kvdb.runtime.selection.rules import Plan


def covered_mass(scores: Scores, plan: Plan, record_lse: Tensor, tail_lse: Tensor) -> Tensor:
    """Estimated share of attention mass that the attended tokens hold.

    The mass of unread records is estimated from their scores, shifted by how far scores of the *lowest* read records lie
    from those records' true log-sum-exp: they resemble the unread ones most. An estimate, not a bound.

    record_lse  (kv_heads, group, n) true log-sum-exp of each record in `plan.chunks`; ignored beyond `plan.counts`
    tail_lse    (kv_heads, group) log-sum-exp over the unstored newest tokens
    returns     scalar, mean over heads
    """
    heads, group, n = record_lse.shape
    counts = [n] * heads if plan.counts is None else plan.counts.tolist()
    covered = []
    for head, count in enumerate(counts):
        lse, true = scores.lse[head], record_lse[head, :, :count]
        index = plan.chunks[head, :count].expand(group, -1)
        free_read, free_true = lse.gather(1, index)[:, plan.forced :], true[:, plan.forced :]
        if free_read.shape[-1] == 0:
            shift = torch.zeros_like(tail_lse[head])
        else:
            weakest = torch.topk(free_read, max(1, free_read.shape[-1] // 2), largest=False).indices
            shift = (free_true.gather(1, weakest) - free_read.gather(1, weakest)).mean(-1)
        total_lse = torch.logaddexp(torch.logsumexp(true, -1), tail_lse[head])
        unread_lse = torch.logsumexp(lse.scatter(1, index, float("-inf")), -1) + shift
        covered.append(torch.sigmoid(total_lse - unread_lse))
    return torch.stack(covered).mean()
