"""Staging: the one buffer through which stored records come into memory. Pinned when the model is on a GPU.

The buffer is reused by every read, so what `read_into` returns is valid until the next call. It grows to the largest
read asked for and never shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]


class Staging:
    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._pinned = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=dtype)
        self._views: dict[tuple[int, ...], tuple[Tensor, Array]] = {}

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def read_into(self, shape: tuple[int, ...], fill: Callable[[Array], None]) -> Tensor:
        """Let `fill` write a NumPy view of the given shape, and return it as a tensor on the device."""
        if shape not in self._views:
            self._make_room(shape)
        host, view = self._views[shape]
        fill(view)
        return host if self.device.type == "cpu" else host.to(self.device)

    def _make_room(self, shape: tuple[int, ...]) -> None:
        count = math.prod(shape)
        if self._buffer.numel() < count or len(self._views) > 64:
            self._views.clear()
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=self.dtype, pin_memory=self._pinned)
        host = self._buffer[:count].view(shape)
        self._views[shape] = host, storage_view(host)


def storage_view(tensor: Tensor) -> Array:
    """A CPU tensor as NumPy in its storage dtype (bfloat16 as uint16), sharing memory."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
