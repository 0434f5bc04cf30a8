"""Staging: the buffers through which stored records come into memory. Pinned when the model is on a GPU.

Records are decoded here and taken to the device as numbers, or taken there as they are stored and decoded by it. Both buffers are
reused by every read, so what `read_into` returns is valid until the next call. They grow to the largest read asked for and
never shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvdb.codecs import RecordCodec
from kvdb.runtime.dequantise import Decoder

Array = np.ndarray[Any, np.dtype[Any]]


class Coded(NamedTuple):
    """A part of a read that is of one codec.

    columns  (m,) int64: the record of each row in what is read
    fill     writes the rows, (m, row_bytes) uint8
    """

    codec: RecordCodec
    row_bytes: int
    columns: Array
    fill: Callable[[Array], None]


class Staging:
    """decoder: what decodes stored rows on the device; None: nothing does."""

    def __init__(self, dtype: torch.dtype, device: torch.device, decoder: Decoder | None = None) -> None:
        self.dtype, self.device, self._decoder = dtype, device, decoder
        self._pinned = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=dtype)
        self._views: dict[tuple[int, ...], tuple[Tensor, Array]] = {}
        self._upload = _Upload(device)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + self._upload.nbytes

    def read_into(self, shape: tuple[int, ...], fill: Callable[[Array], None]) -> Tensor:
        """Let `fill` write a NumPy view of the given shape, and return it as a tensor on the device."""
        if shape not in self._views:
            self._make_room(shape)
        host, view = self._views[shape]
        fill(view)
        return host if self.device.type == "cpu" else host.to(self.device)

    def decodes(self, codecs: Iterable[RecordCodec]) -> bool:
        """Whether rows of these codecs are for `read_coded`: the device decodes them all, and some are not records as they are."""
        if self._decoder is None:
            return False
        found = list(codecs)
        return all(map(self._decoder.decodes, found)) and not all(codec.stored_as_is for codec in found)

    def read_coded(self, shape: tuple[int, int, int, int], parts: list[Coded]) -> Tensor:
        """Take rows to the device as they are stored, and decode them there: a new tensor (2, n, chunk_tokens, head_dim), keys first.

        parts  whose columns together are 0 to n - 1, each once
        """
        assert self._decoder is not None
        columns = np.concatenate([part.columns for part in parts])
        starts = np.cumsum([columns.nbytes, *(len(part.columns) * part.row_bytes for part in parts)]).tolist()

        def fill(out: Array) -> None:
            out[: columns.nbytes] = columns.view(np.uint8)
            for part, start, stop in zip(parts, starts, starts[1:], strict=False):
                part.fill(out[start:stop].reshape(-1, part.row_bytes))

        sent = self._upload.send(starts[-1], fill)
        to = sent[: columns.nbytes].view(torch.int64).split([len(part.columns) for part in parts])
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part, each, start, stop in zip(parts, to, starts, starts[1:], strict=False):
            self._decoder.decode(part.codec, sent[start:stop].view(-1, part.row_bytes), each, out)
        return out

    def _make_room(self, shape: tuple[int, ...]) -> None:
        count = math.prod(shape)
        if self._buffer.numel() < count or len(self._views) > 64:
            self._views.clear()
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=self.dtype, pin_memory=self._pinned)
        host = self._buffer[:count].view(shape)
        self._views[shape] = host, storage_view(host)


class _Upload:
    """Bytes on their way to a device, which nobody waits for but the next that come: the buffer is not written to before the last
    ones have left it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._left: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def send(self, count: int, fill: Callable[[Array], None]) -> Tensor:
        """Let `fill` write `count` bytes, and return them on the device; in memory, the buffer itself."""
        if self._left is not None:
            self._left.synchronize()
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        host = self._buffer[:count]
        fill(host.numpy())
        if self._device.type == "cpu":
            return host
        sent = host.to(self._device, non_blocking=True)
        self._left = torch.cuda.Event()
        self._left.record(torch.cuda.current_stream(self._device))
        return sent


def storage_view(tensor: Tensor) -> Array:
    """A CPU tensor as NumPy in its storage dtype (bfloat16 as uint16), sharing memory."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
