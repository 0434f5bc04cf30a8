"""The largest of each row, by whoever finds them first: compiled for long rows on CPU, in torch elsewhere."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from kvdb.runtime.selection.loops import can_compile

_LONG: Final = 1024
"""8 rows of 2 048, the 1 024 largest: .11 ms compiled, .51 in torch; of 467, the 47 largest: .05 and .03. NumPy's partition, three times
as slow on rows of 8 192, takes twenty times as long where many are equal."""


def largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, in their own order, so that who goes there goes through memory once: (rows, n) float32 ->
    (rows, k) int64. What is no number is larger than any."""
    if k and values.dtype == torch.float32 and values.shape[1] > _LONG and can_compile(values):
        from kvdb.runtime.selection.largest_kernel import kernel

        out = np.empty((len(values), k), np.int64)
        kernel()(values.detach().numpy().view(np.uint32), k, out)
        return torch.from_numpy(out)
    return torch.topk(values, k, sorted=False).indices.sort().values
