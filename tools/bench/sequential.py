"""All KV of a store, layer by layer, in large sequential reads: what decoding costs where nothing is selected, after FlexGen.

A thread reads one part ahead, a layer of a segment, while the part before is attended to; after the last layer it goes on with the first
one of the next step. The page cache is passed by or read through, whichever is faster on this disk. Digests are not looked at.
source: FlexGen, arXiv 2303.06865 (KV on disk, reads overlapped with the computation of the layer before).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np

from kvdb import format
from kvdb.errors import Damaged
from kvdb.runtime.gather import Lent
from kvdb.segments import Segment, layout, row_bytes

Array = np.ndarray[Any, np.dtype[Any]]

READ_BYTES: Final = 16 << 20
_TRIED_PARTS: Final = 4
WAYS: Final = {"direct": os.O_DIRECT, "cached": 0}


class Part(NamedTuple):
    """A layer of a segment: `chunks` of it in a row, from byte `offset` of a file on."""

    layer: int
    segment: Segment
    offset: int
    chunks: int
    bytes: int


class Sequential:
    """A context manager over segments of one geometry with one layer group, whose KV is stored as it is.

    way    of `WAYS`
    bytes  read so far
    """

    def __init__(self, segments: list[Segment], way: str) -> None:
        self.way, self.bytes = way, 0
        self._geometry = segments[0].info.geometry
        self.parts = [_part(segment, layer) for layer in self._geometry.layers for segment in segments]
        self._fds = {segment.info.segment: _opened(segment, way) for segment in segments}
        largest, own = max(part.bytes for part in self.parts), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._buffers = [mmap.mmap(-1, largest, flags=own) for _ in range(2)]  # whole pages, as O_DIRECT needs
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        for buffer in self._buffers:
            with contextlib.suppress(BufferError):  # a step that failed still holds a view: the memory goes with it
                buffer.close()
        for fd in self._fds.values():
            os.close(fd)

    def layers(self) -> Iterator[tuple[int, Lent]]:
        """Layer and records of each part, step after step without end; good until the next one is asked for."""
        parts, buffers = cycle(self.parts), cycle(self._buffers)
        ahead = self._begin(next(parts), next(buffers))
        while True:
            part, buffer = ahead.result()
            ahead = self._begin(next(parts), next(buffers))
            yield part.layer, self._lent(part, buffer)

    def seconds(self, parts: list[Part]) -> float:
        """What reading these parts takes."""
        started = time.perf_counter()
        for part in parts:
            self._read(part, self._buffers[0])
        return time.perf_counter() - started

    def _begin(self, part: Part, buffer: mmap.mmap) -> Future[tuple[Part, mmap.mmap]]:
        return self._thread.submit(self._read, part, buffer)

    def _read(self, part: Part, buffer: mmap.mmap) -> tuple[Part, mmap.mmap]:
        fd, whole = self._fds[part.segment.info.segment], memoryview(buffer)
        for at in range(0, part.bytes, READ_BYTES):
            wanted = min(READ_BYTES, part.bytes - at)
            if (found := os.preadv(fd, [whole[at : at + wanted]], part.offset + at)) != wanted:
                raise Damaged(
                    f"segment {part.segment.info.segment}: {found} bytes at {part.offset + at}, expected {wanted}"
                )
        self.bytes += part.bytes
        return part, buffer

    def _lent(self, part: Part, buffer: mmap.mmap) -> Lent:
        geometry = self._geometry
        group = geometry.groups[0]
        ct, heads = geometry.chunk_tokens, group.kv_heads
        flat, plane = np.frombuffer(buffer, geometry.storage_dtype), ct * group.head_dim
        at = (np.arange(part.chunks) * heads + np.arange(heads)[:, None]).ravel() * (2 * plane)
        return Lent(flat, flat, at, at + plane, np.arange(heads + 1) * part.chunks, ct)


def fastest(segments: list[Segment]) -> str:
    """The way that reads the first parts faster, tried on files that are not in memory: each way on parts of its own."""
    taken = {}
    for number, way in enumerate(WAYS):
        with Sequential(segments, way) as opened:
            taken[way] = opened.seconds(opened.parts[number :: len(WAYS)][:_TRIED_PARTS])
    return min(taken, key=lambda way: taken[way])


def _part(segment: Segment, layer: int) -> Part:
    info = segment.info
    group, layer_row = info.geometry.locate(layer)
    slot = info.geometry.groups[group].kv_heads * row_bytes(info, group)
    return Part(layer, segment, layer_row * info.capacity * slot, info.chunks, info.chunks * slot)


def _opened(segment: Segment, way: str) -> int:
    """raises  Damaged for a file that is cut"""
    path = segment.folder / format.kv_array(segment.info.segment, 0) / format.SHARD_KEY
    fd = os.open(path, os.O_RDONLY | WAYS[way])
    if not WAYS[way]:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    if (size := os.fstat(fd).st_size) < (least := layout(segment.info, 0).payload_bytes):
        os.close(fd)
        raise Damaged(f"file {path}: {size} bytes, expected at least {least}")
    return fd
