"""Estimated shares of attention mass, of scores that may say 'unknown'."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from kvdb.runtime.selection.base import SURE

UNKNOWN_SHARE: Final = 2.0
"""Above any share: of a record that is to be read whatever the others are."""


def shares(lse: Tensor) -> Tensor:
    """Softmax over the last axis. Who scores `SURE` has `UNKNOWN_SHARE`, and the others share what there is."""
    if not lse.amax() >= SURE:
        return torch.softmax(lse, -1)
    unknown = lse >= SURE
    known = torch.softmax(lse.masked_fill(unknown, -math.inf), -1)
    known = known.nan_to_num(nan=0.0)  # where all are unknown, nothing is left to share
    return known.masked_fill(unknown, UNKNOWN_SHARE)
