"""Reading records of segments: one interface, two ways.

    mmap   one shared read-only map per array. MADV_RANDOM stops read-ahead (which amplified cold reads 61 times);
           WILLNEED on records that are not in the page cache makes the kernel fetch them together; then one gather
           copies them.
    pread  positioned reads into the caller's buffer: no map, so a truncated file is an error and never a SIGBUS. The
           way for network file systems.

Readers count bytes requested. They check that files are present and whole, not what they hold: `kvdb.check` does.
Not thread-safe: one reader per thread of generation.
"""

from __future__ import annotations

import contextlib
import mmap as _mmap
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from kvdb import files, format
from kvdb.codecs import Codec
from kvdb.errors import Damaged, InvalidInput
from kvdb.format import SegmentInfo
from kvdb.segments import Segment, abstract_bytes, codec_of, layout, row_bytes

Array = np.ndarray[Any, np.dtype[Any]]


class _OpenArray:
    """One KV array of a segment: descriptor, sizes, and for mmap its view."""

    __slots__ = ("base", "codec", "fd", "group", "heads", "layer_records", "path", "planes", "row", "seen", "view")

    def __init__(self, segment: Segment, group: int) -> None:
        info = segment.info
        self.group, self.codec = group, codec_of(info)
        g = info.geometry.groups[group]
        self.heads = g.kv_heads
        self.layer_records = info.capacity * g.kv_heads
        self.row = row_bytes(info, group)
        self.path = segment.folder / format.kv_array(info.segment, group) / format.SHARD_KEY
        self.base: _mmap.mmap | None = None
        self.view: Array = np.empty((0, self.row), np.uint8)  # [records, row_bytes]
        self.planes: Array = np.empty((0, 0))  # [2 * records, plane values] when stored as is
        self.seen = np.zeros(0, bool)
        self.fd = _open_checked(self.path, layout(info, group).payload_bytes, info, group, self.row)


def _open_checked(path: Path, payload_bytes: int, info: SegmentInfo, group: int, row: int) -> int:
    """Open a shard that must hold its whole payload.

    raises  Damaged naming segment, first layer that is cut off, and file
    """
    where = f"segment {info.segment}"
    try:
        fd = files.open_read(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        layer = info.geometry.groups[group].layers[0]
        raise Damaged(
            f"{where}, layer {layer}, file {path}: {e.strerror}, expected a shard of at least {payload_bytes} bytes; "
            "run 'kvdb verify' and delete the sequence to recompute it"
        ) from e
    size = files.file_size(fd)
    if size < payload_bytes:
        files.close(fd)
        g = info.geometry.groups[group]
        layer = g.layers[min(size // (info.capacity * g.kv_heads * row), len(g.layers) - 1)]
        raise Damaged(
            f"{where}, layer {layer}, file {path}: {size} bytes, expected at least {payload_bytes}; "
            "run 'kvdb verify' and delete the sequence to recompute it"
        )
    return fd


class Reader(ABC):
    """Contract: whole files are checked on `open`, every byte asked for is delivered or an error is raised."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self.bytes_read = 0
        self._open: dict[tuple[str, int], _OpenArray] = {}
        self._abstracts: dict[tuple[str, int, str], int] = {}  # descriptors

    def open(self, segment: Segment) -> None:
        """Open all files of a segment now instead of at the first read: what is open stays readable if it is deleted.

        raises  Damaged when a file is missing or short
        """
        for group in range(len(segment.info.geometry.groups)):
            self._array(segment, group)
            for name in segment.info.abstracts:
                self._abstract(segment, group, name)

    def read(self, segment: Segment, layer: int, records: Array, out: Array) -> None:
        """Bring records of one layer into memory, K planes first, then V planes.

        records  (n,) int64: chunk inside the segment * kv_heads + head
        out      (2, n, chunk_tokens, head_dim), storage dtype, C-contiguous; overwritten
        raises   InvalidInput for a record outside the segment; Damaged for missing or short files
        """
        info = segment.info
        group, row = info.geometry.locate(layer)
        array = self._array(segment, group)
        if len(records) == 0:
            return
        limit = info.chunks * array.heads
        if int(records.view(np.uint64).max()) >= limit:  # a negative one is huge as unsigned: one pass checks both ends
            raise InvalidInput(
                f"segment {info.segment}, layer {layer}: records {int(records.min())}..{int(records.max())}, "
                f"expected 0..{limit - 1}"
            )
        self._fetch(array, records + row * array.layer_records, out)
        self.bytes_read += len(records) * array.row

    def abstract(self, segment: Segment, name: str, layer: int) -> Array:
        """One layer of an abstract as (chunks, kv_heads, parts, head_dim) float32.

        raises  Damaged when the file is missing or short
        """
        info = segment.info
        group, row = info.geometry.locate(layer)
        g, size = info.geometry.groups[group], abstract_bytes(info, group, name)
        data = files.pread(self._abstract(segment, group, name), size, row * size)
        if len(data) != size:
            raise Damaged(
                f"segment {info.segment}, layer {layer}, {name} abstract: {len(data)} bytes at {row * size}, "
                f"expected {size}; run 'kvdb verify'"
            )
        stored = np.frombuffer(data, info.geometry.storage_dtype).reshape(info.capacity, g.kv_heads, -1, g.head_dim)
        return format.as_float32(stored[: info.chunks], info.geometry.dtype)

    def _abstract(self, segment: Segment, group: int, name: str) -> int:
        key = (segment.info.segment, group, name)
        if key not in self._abstracts:
            path = segment.folder / format.abstract_array(segment.info.segment, name, group) / format.SHARD_KEY
            try:
                self._abstracts[key] = files.open_read(path)
            except (FileNotFoundError, NotADirectoryError) as e:
                raise Damaged(
                    f"segment {segment.info.segment}, file {path}: {e.strerror}, expected its {name} abstract; "
                    "run 'kvdb verify' and delete the sequence to recompute it"
                ) from e
        return self._abstracts[key]

    def close(self) -> None:
        """Release descriptors and maps. Arrays handed out by nobody else: reads always copy."""
        while self._abstracts:
            files.close(self._abstracts.popitem()[1])
        while self._open:
            self._release(self._open.popitem()[1])

    @staticmethod
    def _release(array: _OpenArray) -> None:
        files.close(array.fd)
        array.view = array.planes = np.empty(0)
        if array.base is not None:
            with contextlib.suppress(BufferError):  # a traceback still holds a view: the map goes with it
                array.base.close()

    def forget(self, segment: str) -> None:
        """Drop a segment that was discarded."""
        for abstract in [key for key in self._abstracts if key[0] == segment]:
            files.close(self._abstracts.pop(abstract))
        for array in [key for key in self._open if key[0] == segment]:
            self._release(self._open.pop(array))

    def _array(self, segment: Segment, group: int) -> _OpenArray:
        key = (segment.info.segment, group)
        array = self._open.get(key)
        if array is None:
            array = self._open[key] = _OpenArray(segment, group)
            self._prepare(array, layout(segment.info, group).payload_bytes, segment.info)
        return array

    @abstractmethod
    def _prepare(self, array: _OpenArray, payload_bytes: int, info: SegmentInfo) -> None:
        """Called once after opening, before the first `_fetch`."""

    @abstractmethod
    def _fetch(self, array: _OpenArray, rows: Array, out: Array) -> None:
        """Copy stored rows (numbered in the whole shard, in range) into `out`."""


def _decode_into(codec: Codec, rows: Array, out: Array) -> None:
    records = np.empty((len(rows), 2, *out.shape[2:]), out.dtype)
    codec.decode(rows, records)
    out[...] = records.swapaxes(0, 1)


class MmapReader(Reader):
    name: ClassVar[str] = "mmap"
    LOOK_AGAIN_AFTER: ClassVar[int] = 4096
    """Gathers after which the kernel is asked again what is in the page cache."""

    def __init__(self) -> None:
        super().__init__()
        self._gathers = 0

    def _prepare(self, array: _OpenArray, payload_bytes: int, info: SegmentInfo) -> None:
        array.base = files.mmap(array.fd, payload_bytes)
        array.base.madvise(_mmap.MADV_RANDOM)
        flat = np.frombuffer(array.base, np.uint8)
        array.view = flat.reshape(-1, array.row)
        if array.codec.stored_as_is:
            array.planes = flat.view(info.geometry.storage_dtype).reshape(2 * len(array.view), -1)
        array.seen = _cached_rows(array)

    def _fetch(self, array: _OpenArray, rows: Array, out: Array) -> None:
        self._prefetch(array, rows)
        # mode="clip" is 2.6x faster than "raise"; `read` has checked the range.
        if array.codec.stored_as_is:
            planes = np.concatenate((2 * rows, 2 * rows + 1))
            np.take(array.planes, planes, axis=0, out=out.reshape(len(planes), -1), mode="clip")
        else:
            _decode_into(array.codec, np.take(array.view, rows, axis=0, mode="clip"), out)

    def _prefetch(self, array: _OpenArray, rows: Array) -> None:
        self._gathers += 1
        if self._gathers % self.LOOK_AGAIN_AFTER == 0:
            for opened in self._open.values():
                opened.seen = _cached_rows(opened)
        seen = array.seen[rows]
        if seen.all():
            return
        cold = np.unique(rows[~seen])
        array.seen[cold] = True
        assert array.base is not None
        breaks = np.flatnonzero(np.diff(cold) != 1) + 1
        for run in np.split(cold, breaks):
            start = int(run[0]) * array.row
            aligned = start - start % _mmap.PAGESIZE
            array.base.madvise(_mmap.MADV_WILLNEED, aligned, (int(run[-1]) + 1) * array.row - aligned)


def _cached_rows(array: _OpenArray) -> Array:
    """For each stored row, whether all its pages are in the page cache."""
    assert array.base is not None
    missing = np.concatenate(([0], np.cumsum(~files.resident_pages(array.base))))
    first = np.arange(len(array.view)) * array.row // _mmap.PAGESIZE
    last = ((np.arange(len(array.view)) + 1) * array.row - 1) // _mmap.PAGESIZE
    cached: Array = missing[last + 1] == missing[first]
    return cached


class PreadReader(Reader):
    name: ClassVar[str] = "pread"

    def _prepare(self, array: _OpenArray, payload_bytes: int, info: SegmentInfo) -> None:
        """The descriptor is all it needs."""

    def _fetch(self, array: _OpenArray, rows: Array, out: Array) -> None:
        if array.codec.stored_as_is:
            for i, row in enumerate(rows.tolist()):
                buffers = [memoryview(out[0, i]).cast("B"), memoryview(out[1, i]).cast("B")]
                self._read_row(array, row, buffers)
        else:
            stored = np.empty((len(rows), array.row), np.uint8)
            for i, row in enumerate(rows.tolist()):
                self._read_row(array, row, [memoryview(stored[i])])
            _decode_into(array.codec, stored, out)

    @staticmethod
    def _read_row(array: _OpenArray, row: int, buffers: list[memoryview]) -> None:
        n = files.preadv(array.fd, buffers, row * array.row)
        if n != array.row:
            raise Damaged(f"file {array.path}: {n} bytes at {row * array.row}, expected {array.row}; run 'kvdb verify'")


READERS: Final[dict[str, type[Reader]]] = {reader.name: reader for reader in (MmapReader, PreadReader)}
