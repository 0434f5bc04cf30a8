"""Estimated shares of attention mass, of scores that may say 'unknown'."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from kvdb.runtime.selection.base import SURE
from kvdb.runtime.selection.loops import can_compile

UNKNOWN_SHARE: Final = 2.0
"""Above any share: of a record that is to be read whatever the others are."""


def shares(lse: Tensor, tail_lse: Tensor | None = None) -> Tensor:
    """Softmax over all records and the newest tokens for each query head, then the mean over the heads of a group. Who scores
    `SURE` or more has `UNKNOWN_SHARE`, and the others share what there is.

    lse       (kv_heads, group, chunks) float32
    tail_lse  (kv_heads, group) float32, of the newest tokens; -inf, or None for all: there are none
    returns   (kv_heads, chunks + 1) float32: of each record and, last, of the newest tokens. Compiled loops give at least 2^-126
    """
    heads, group, chunks = lse.shape
    if tail_lse is None:
        tail_lse = lse.new_full((heads, group), -math.inf)
    if (kernel := _compiled(lse)) is not None:
        out = torch.empty(heads, chunks + 1)
        arrays = (t.detach().contiguous().numpy() for t in (lse, tail_lse))
        kernel.share()(*arrays, SURE, UNKNOWN_SHARE, out.numpy())
        return out
    both = torch.cat((lse, tail_lse[..., None]), -1)
    unknown = both >= SURE
    known = torch.softmax(both.masked_fill(unknown, -math.inf), -1)
    known = known.nan_to_num(nan=0.0)  # where all are unknown, nothing is left to share
    return known.masked_fill(unknown, UNKNOWN_SHARE).mean(1)


def _compiled(lse: Tensor) -> ModuleType | None:
    if not can_compile(lse):
        return None
    from kvdb.runtime.selection import shares_kernel

    return shares_kernel
