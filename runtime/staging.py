"""Staging: the memory through which stored records come to where they are computed with.

Records are decoded here and taken to the device as numbers, or taken there as they are stored and decoded by it. On a CPU the buffer is where
they are used: every read takes it again, so what `read_into` returns is valid until the next call. It grows to the largest read asked for
and never shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvdb.codecs import RecordCodec
from kvdb.runtime.dequantise import Decoder, decoder_on
from kvdb.runtime.transfers import Transfers
from kvdb.runtime.uploads import Copies, CudaCopies, UploadRing

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
    """decoder: what decodes stored rows on the device; None: nothing does. copies: how bytes come to it, where that is not memory."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, decoder: Decoder | None = None, copies: Copies | None = None
    ) -> None:
        self.dtype, self.device, self._decoder = dtype, device, decoder
        self._buffer = torch.empty(0, dtype=dtype)
        self._coded = torch.empty(0, dtype=torch.uint8)
        self._views: dict[tuple[int, ...], tuple[Tensor, Array]] = {}
        self._ring = None if copies is None else UploadRing(copies)
        self.transfers = None if decoder is None else Transfers()

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> Staging:
        """For a device as it is."""
        return cls(dtype, device, decoder_on(device), CudaCopies(device) if device.type == "cuda" else None)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes + self._coded.nbytes + (0 if self._ring is None else self._ring.nbytes)

    def read_into(self, shape: tuple[int, ...], fill: Callable[[Array], None]) -> Tensor:
        """Let `fill` write a NumPy view of the given shape, and return it as a tensor on the device."""
        if self._ring is not None:
            count = math.prod(shape) * self.dtype.itemsize
            sent = self._ring.send(
                count, lambda out: fill(storage_view(torch.from_numpy(out).view(self.dtype).view(shape)))
            )
            return sent.view(self.dtype).view(shape)
        if shape not in self._views:
            self._make_room(shape)
        host, view = self._views[shape]
        fill(view)
        return host

    def decodes(self, codecs: Iterable[RecordCodec]) -> bool:
        """Whether rows of these codecs are for `read_coded`: the device decodes them all, some are not records as they are, and they take
        less time that way."""
        if self._decoder is None or self.transfers is None:
            return False
        found = list(codecs)
        can = all(map(self._decoder.decodes, found)) and not all(codec.stored_as_is for codec in found)
        return can and self.transfers.coded()

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

        sent = self._take(starts[-1], fill)
        to = sent[: columns.nbytes].view(torch.int64).split([len(part.columns) for part in parts])
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        for part, each, start, stop in zip(parts, to, starts, starts[1:], strict=False):
            self._decoder.decode(part.codec, sent[start:stop].view(-1, part.row_bytes), each, out)
        return out

    def _take(self, count: int, fill: Callable[[Array], None]) -> Tensor:
        """Coded bytes on the device; in memory, a buffer that the next ones take."""
        if self._ring is not None:
            return self._ring.send(count, fill)
        if self._coded.numel() < count:
            self._coded = torch.empty(count, dtype=torch.uint8)
        fill(self._coded[:count].numpy())
        return self._coded[:count]

    def _make_room(self, shape: tuple[int, ...]) -> None:
        count = math.prod(shape)
        if self._buffer.numel() < count or len(self._views) > 64:
            self._views.clear()
        if self._buffer.numel() < count:
            self._buffer = torch.empty(count, dtype=self.dtype)
        host = self._buffer[:count].view(shape)
        self._views[shape] = host, storage_view(host)


def storage_view(tensor: Tensor) -> Array:
    """A CPU tensor as NumPy in its storage dtype (bfloat16 as uint16), sharing memory."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
