"""How far logits are from those of dense attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Distance(NamedTuple):
    """Of the logits of one text's positions from dense ones, and of both from the text itself.

    kl          nats, KL(dense || other), mean over positions
    top1        share of positions whose likeliest token is the same
    perplexity  of the text under `other` / under dense
    """

    kl: float
    top1: float
    perplexity: float


def distance(dense: Tensor, other: Tensor, targets: list[int]) -> Distance:
    """dense, other: (positions, vocabulary) logits; targets: the token that came after each position."""
    p, q = torch.log_softmax(dense, -1), torch.log_softmax(other, -1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    after = torch.tensor(targets)[:, None]
    lost = (p.gather(1, after) - q.gather(1, after)).double().mean()  # nats per token
    return Distance(float(kl.double().mean()), float(same.mean()), float(lost.exp()))
