"""Bytes on their way from memory to a device, while the device computes and the next ones are read.

A ring of pinned buffers: each is filled, sent on a stream of its own, and not written to again before its bytes have left it. What the device
computes with them waits for them there; here nobody waits but for a buffer, when all are on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
DEPTH: Final = 3
"""One is filled, one on its way, and one spare for reads of uneven length."""


class Left(Protocol):
    def synchronize(self) -> None:
        """Return once the bytes have left their buffer."""


class Copies(Protocol):
    """Copies to one device, one after the other."""

    def room(self, count: int) -> Tensor:
        """(count,) uint8 in memory that it can copy from."""

    def begin(self, host: Tensor) -> tuple[Tensor, Left]:
        """The copy, to which the device's later computations see to it that they wait; and when `host` may be written to."""


class CudaCopies:
    """On a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def room(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)

    def begin(self, host: Tensor) -> tuple[Tensor, Left]:
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            sent = host.to(self._device, non_blocking=True)
            left = torch.cuda.Event()
            left.record(self._stream)
        computing.wait_event(left)
        sent.record_stream(computing)  # its memory serves the other stream now
        return sent, left


class UploadRing:
    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._buffers: list[Tensor] = [torch.empty(0, dtype=torch.uint8)] * DEPTH
        self._left: list[Left | None] = [None] * DEPTH
        self._next = 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def send(self, count: int, fill: Callable[[Array], None]) -> Tensor:
        """Let `fill` write `count` bytes, and return them on the device: (count,) uint8, new memory."""
        place, self._next = self._next, (self._next + 1) % DEPTH
        left = self._left[place]
        if left is not None:
            left.synchronize()
            self._left[place] = None
        if self._buffers[place].numel() < count:
            self._buffers[place] = self._copies.room(count)
        host = self._buffers[place][:count]
        fill(host.numpy())
        sent, self._left[place] = self._copies.begin(host)
        return sent
