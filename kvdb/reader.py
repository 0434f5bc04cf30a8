"""Reading records of segments: what every way to read has in common. The ways are in `kvdb.readers`.

Every record is compared with its digest before it is used: `verify` "always", the "first" time it is read through a store
handle (the default), or "never". The digests themselves are sealed by the catalog. What is missing is an error and never
zeros. Rows that are compressed in blocks are the same to all: a block is read and unpacked whole, into memory where rows are then found
as in a map.
Not thread-safe: one reader per thread of generation.
"""

from __future__ import annotations

import contextlib
import mmap as _mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import xxhash

from kvdb import files, forks, format
from kvdb.abstracts import ABSTRACTS
from kvdb.blocks import Unpacked, UnpackedArray
from kvdb.errors import Damaged, InvalidInput
from kvdb.segments import Segment, abstract_layout, block_file, codec_of, layout, row_bytes

Array = np.ndarray[Any, np.dtype[Any]]
_U64: Final = (1 << 64) - 1

VERIFY: Final = ("first", "always", "never")
TRASH: Final = "trash"
"""Beside chunks/: where arrays wait between their deletion and their end. A reader that was on its way finds them there."""


class Verified:
    """Which records a handle's readers have verified: one bool per row of a shard. Bounded: the oldest shards are forgotten."""

    LIMIT_BYTES: ClassVar[int] = 64 << 20

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, int], Array] = {}
        self._lock = threading.Lock()
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def of(self, shard: tuple[int, int, int], count: int) -> Array:
        """The marks of a shard of `count` rows, to be set in place.

        shard  what tells its file from any other: not its name, which an import may bring back
        """
        with self._lock:
            marks = self._rows.pop(shard, None)
            if marks is None:
                marks = np.zeros(count, bool)
            self._rows[shard] = marks
            while len(self._rows) > 1 and sum(map(len, self._rows.values())) > self.LIMIT_BYTES:
                del self._rows[next(iter(self._rows))]
            return marks


class OpenArray:
    """One KV array of a segment: descriptor, sizes, digests, and for mmap its view."""

    __slots__ = (
        "base", "codec", "digests", "fd", "group", "heads", "info", "layer_records", "path", "planes", "row", "seen", "told",
        "unpacked", "verified", "view",
    )  # fmt: skip

    def __init__(self, segment: Segment, group: int) -> None:
        info = segment.info
        self.info, self.group, self.codec = info, group, codec_of(info, group)
        g = info.geometry.groups[group]
        self.heads = g.kv_heads
        self.layer_records = info.capacity * g.kv_heads
        self.row = row_bytes(info, group)
        self.base: _mmap.mmap | None = None
        self.view: Array = np.empty((0, self.row), np.uint8)  # [records, row_bytes]
        self.planes: Array = np.empty((0, 0))  # [2 * records, plane values] when stored as is
        self.unpacked: UnpackedArray | None = None  # what `view` shows, of rows that are compressed in blocks
        self.seen = np.zeros(0, bool)  # rows that were touched by a call that can fail
        self.told = False  # whether the kernel tells what of the file is in memory
        self.digests: Array | None = None  # [records] u64, when there is something to verify
        self.verified = np.zeros(0, bool)
        self.path, self.fd = _open_checked(segment, group, layout(info, group), self.row)

    def show(self, flat: Array) -> None:
        """Let rows be found in `flat`, the payload as bytes."""
        self.view = flat.reshape(-1, self.row)
        if self.codec.stored_as_is:
            self.planes = flat.view(self.info.geometry.storage_dtype).reshape(2 * len(self.view), -1)

    def load_digests(self, seal: str) -> None:
        """raises  Damaged when the digests do not match the seal that the catalog holds"""
        place = layout(self.info, self.group)
        count = len(self.info.geometry.groups[self.group].layers) * self.layer_records
        data = files.pread(self.fd, 8 * count, place.digests_offset)
        actual = xxhash.xxh3_64_hexdigest(data)
        if actual != seal:
            raise Damaged(
                f"segment {self.info.segment}, file {self.path}: digests at {place.digests_offset} have xxh3 {actual}, "
                f"expected {seal}; run 'kvdb repair'"
            )
        self.digests = np.frombuffer(data, "<u8")


def _open_array(segment: Segment, group: int, array: str, key: str = format.SHARD_KEY) -> tuple[Path, int]:
    """Open one of an array's files, in chunks/ or where a deletion has just put it.

    raises  Damaged when it is nowhere
    """
    path = segment.folder / array / key
    try:
        return path, files.open_read(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            aside = segment.folder.parent / TRASH / array / key
            return aside, files.open_read(aside)
        raise Damaged(
            f"segment {segment.info.segment}, layer {segment.info.geometry.groups[group].layers[0]}, file {path}: {e.strerror}, "
            "expected it; run 'kvdb verify' and delete the sequence to recompute it"
        ) from e


def _open_checked(segment: Segment, group: int, place: format.ShardLayout, row: int) -> tuple[Path, int]:
    """Open a shard that must be whole; one in the making need only hold its payload.

    raises  Damaged naming segment, first layer that is cut off, and file
    """
    info = segment.info
    path, fd = _open_array(segment, group, format.kv_array(info.segment, group))
    size, expected = files.file_size(fd), place.payload_bytes if segment.seals is None else place.file_bytes
    if size < expected:
        files.close(fd)
        g = info.geometry.groups[group]
        layer = g.layers[min(size // (info.capacity * g.kv_heads * row), len(g.layers) - 1)]
        raise Damaged(
            f"segment {info.segment}, layer {layer}, file {path}: {size} bytes, expected at least {expected}; "
            "run 'kvdb verify' and delete the sequence to recompute it"
        )
    return path, fd


@contextlib.contextmanager
def _concerning(segment: str) -> Iterator[None]:
    """Damage found in the block says that it is of this segment."""
    try:
        yield
    except Damaged as e:
        e.segment = e.segment or segment
        raise


_AbstractKey = tuple[str, int, int, str]
"""Segment, how often its abstracts had changed, layer group, abstract."""


def _taking(stored: Array, which: Array) -> Callable[[int], Any]:
    return lambda i: stored[which[i]]


class Wanted(NamedTuple):
    """Records of one layer in a segment, (n,) int64: chunk inside the segment * kv_heads + head."""

    segment: Segment
    records: Array


class Lending(NamedTuple):
    """Some of the records that were asked for.

    stored  (m, numbers of a record): K, then V, read-only
    which   (n,) int64: their rows in `stored`
    of      (n,) int64, ascending: which of the records asked for they are, counted through all segments
    """

    stored: Array
    which: Array
    of: Array


class Located(NamedTuple):
    """Rows of an array that are asked for; `first`: how many records of other segments were asked for before them."""

    array: OpenArray
    rows: Array
    first: int

    @property
    def of(self) -> Array:
        return np.arange(self.first, self.first + len(self.rows))


class Place(NamedTuple):
    """Where a stored record lies.

    offset, nbytes  in the file; of rows that are compressed in blocks those of the block, which other records share
    digest          as it must be; None where nothing is verified
    """

    path: Path
    offset: int
    nbytes: int
    digest: int | None


class Reader(ABC):
    """Contract: whole files are checked on `open`, every byte asked for is delivered or an error is raised."""

    name: ClassVar[str]
    UNPACKED_BYTES: ClassVar[int] = 1 << 30
    """Most that unpacked blocks take in memory, but for those of one read."""

    def __init__(self, verify: str = "first", verified: Verified | None = None) -> None:
        self.bytes_read = 0  # of rows that were asked for
        self.bytes_fetched = 0  # of files, of what was not in memory as far as is known
        self._unpacked = Unpacked(self.UNPACKED_BYTES)
        self._verify, self._verified = verify, verified or Verified()
        self._open: dict[tuple[str, int], OpenArray] = {}
        self._abstracts: dict[_AbstractKey, tuple[Path, int]] = {}  # path, descriptor
        self._plane_digests: dict[_AbstractKey, list[str]] = {}

    @property
    def loses(self) -> bool:
        """Whether what was in memory was found gone lately: another way to read may do better."""
        return False

    @property
    def unpacked_bytes(self) -> int:
        """What unpacked blocks take in memory now."""
        return self._unpacked.nbytes

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
        raises   InvalidInput for a record outside the segment; Damaged for missing or short files and for a record that
                 does not match its digest; OSError when the device fails
        """
        if len(records) == 0:
            return
        array, rows = self._locate(segment, layer, records)
        if array.codec.stored_as_is:
            self._fetch_planes(array, rows, out)
            self._check(array, rows, self._stored(array, rows, out))
            self.bytes_read += out.nbytes
        else:
            stored, which = self._fetch_coded(array, rows)
            self._check(array, rows, _taking(stored, which))
            array.codec.decode(stored, which, out, segment.info.geometry.dtype)
            self.bytes_read += len(rows) * array.row

    def lend(self, layer: int, wanted: Sequence[Wanted]) -> Iterator[Lending]:
        """Records of one layer, stored as they are, where they can be read without a copy: a part at a time, those in memory first, so that
        they can be used while others, of all segments, arrive. A part is good until the next one is asked for, or anything else of this
        reader.

        wanted  each segment once, all of one geometry
        raises  InvalidInput for records that a codec must decode: `read` does; else as `read`
        """
        located, count = [], 0
        for segment, records in wanted:
            array, rows = self._locate(segment, layer, records)
            if not array.codec.stored_as_is:
                raise InvalidInput(
                    f"segment {segment.info.segment}, layer {layer}: coded, expected records as they are; read them"
                )
            located.append(Located(array, rows, count))
            count += len(rows)
        starts = [each.first for each in located] + [count]
        for stored, which, of in self._parts(located):
            ends = np.searchsorted(of, starts).tolist()
            for (array, rows, first), (start, stop) in zip(located, pairwise(ends), strict=True):
                if start < stop:
                    self._check(array, rows[of[start:stop] - first], _taking(stored, which[start:stop]))
            self.bytes_read += len(of) * stored.shape[1]
            yield Lending(stored.view(located[0].array.info.geometry.storage_dtype), which, of)

    def expect(self, layer: int, wanted: Sequence[Wanted]) -> None:
        """Begin to bring records in that may be asked for soon, and return at once. What fails shows when they are read. What is lent stays
        good.

        wanted  as for `lend`
        raises  InvalidInput as `read`
        """
        located = [Located(*self._locate(segment, layer, records), 0) for segment, records in wanted if len(records)]
        if located:
            self._begin(located)

    def weigh(self, segment: Segment, layer: int, records: Array, weights: Array) -> None:
        """Say what records, none twice, are worth: their share of attention mass, (n,) float. For a tier whose policy looks at it. What is lent
        stays good.
        """
        return

    def absent_bytes(self, segment: Segment) -> int:
        """Bytes of a segment's KV that would be read from the file; those of which nobody can tell count."""
        groups = range(len(segment.info.geometry.groups))
        return sum(self._absent(self._array(segment, group)) for group in groups)

    def rows(self, segment: Segment, layer: int, records: Array, out: Array | None = None) -> Array:
        """Records of one layer as they are stored, (n, row_bytes) uint8; otherwise as `read`.

        out  C-contiguous; overwritten and returned. None: new memory
        """
        array, rows = self._locate(segment, layer, records)
        stored = np.empty((len(rows), array.row), np.uint8) if out is None else out
        self._fetch_rows(array, rows, stored)
        self._check(array, rows, stored.__getitem__)
        self.bytes_read += stored.nbytes
        return stored

    def place_of(self, segment: Segment, layer: int, record: int) -> Place:
        """Where a record lies; nothing of it is read.

        raises  InvalidInput for a record outside the segment; Damaged for missing or short files
        """
        array, rows = self._locate(segment, layer, np.array([record]))
        row = int(rows[0])
        offset, nbytes = (row * array.row, array.row) if array.unpacked is None else array.unpacked.place_of(row)
        return Place(array.path, offset, nbytes, None if array.digests is None else int(array.digests[row]))

    def _locate(self, segment: Segment, layer: int, records: Array) -> tuple[OpenArray, Array]:
        """The array that holds records of a layer, and their rows in it."""
        info = segment.info
        group, layer_row = info.geometry.locate(layer)
        array = self._array(segment, group)
        limit = info.chunks * array.heads
        if (
            len(records) and int(records.view(np.uint64).max()) >= limit
        ):  # a negative one is huge as unsigned: one pass checks both ends
            raise InvalidInput(
                f"segment {info.segment}, layer {layer}: records {int(records.min())}..{int(records.max())}, "
                f"expected 0..{limit - 1}"
            )
        return array, records + layer_row * array.layer_records

    def _check(self, array: OpenArray, rows: Array, stored: Callable[[int], Any]) -> None:
        """Compare rows that were read with their digests.

        stored  the bytes of the i-th row read, as one contiguous buffer
        """
        if array.digests is None:
            return
        if self._verify == "always":
            wanted = np.arange(len(rows))
        else:
            wanted = np.flatnonzero(~array.verified[rows])
            if not len(wanted):
                return
        seed, checked = format.place_seed(array.info.segment), rows[wanted]
        digests = array.digests[checked].tolist()
        for i, row, expected in zip(wanted.tolist(), checked.tolist(), digests, strict=True):
            actual = xxhash.xxh3_64_intdigest(stored(i), (seed + row) & _U64)
            if actual != expected:
                raise self._damaged(array, row, actual, expected)
        array.verified[checked] = True

    @staticmethod
    def _damaged(array: OpenArray, row: int, actual: int, expected: int) -> Damaged:
        layer_row, record = divmod(row, array.layer_records)
        chunk, head = divmod(record, array.heads)
        layer = array.info.geometry.groups[array.group].layers[layer_row]
        return Damaged(
            f"segment {array.info.segment}, layer {layer}, chunk {chunk}, head {head}, file {array.path}, offset "
            f"{row * array.row}: xxh3 is {actual:#018x}, expected {expected:#018x}; run 'kvdb repair', then recompute it",
            segment=array.info.segment,
        )

    def abstract(self, segment: Segment, name: str, layer: int, planes: int | None = None) -> Array:
        """The first `planes` planes of one layer of an abstract (None: all), in the form its `load` gives them: a box as
        (chunks, kv_heads, 2, head_dim) float32, a sketch as (planes, chunks, kv_heads, row_bytes) uint8.

        raises  InvalidInput for planes or an abstract that the segment does not have; Damaged when the file is missing,
                short, or one of these planes does not match its digest
        """
        geometry = segment.info.geometry
        stored = self.stored_abstract(segment, name, layer, planes)
        return ABSTRACTS[name].load(stored, geometry.groups[geometry.locate(layer)[0]].head_dim, geometry.dtype)

    def stored_abstract(self, segment: Segment, name: str, layer: int, planes: int | None = None) -> Array:
        """The same as it is stored, (planes, chunks, kv_heads, row_bytes) uint8."""
        info = segment.info
        group, row = info.geometry.locate(layer)
        if name not in info.abstracts:
            raise InvalidInput(f"segment {info.segment}: abstract {name!r}, expected one of {info.abstracts}")
        most = ABSTRACTS[name].planes
        count = most if planes is None else planes
        if not 1 <= count <= most:
            raise InvalidInput(f"segment {info.segment}: {planes} planes of its {name}, expected 1..{most}")
        place = abstract_layout(info, group, name)
        path, fd = self._abstract(segment, group, name)
        start, size = row * place.layer_bytes, count * place.plane_bytes
        data = files.pread(fd, size, start)
        where = f"segment {info.segment}, layer {layer}, {name} abstract, file {path}, offset "
        if len(data) != size:
            raise Damaged(f"{where}{start}: {len(data)} bytes, expected {size}; run 'kvdb verify'")
        stored = np.frombuffer(data, np.uint8).reshape(count, info.capacity, -1, place.row_bytes)
        if segment.seals is not None and self._verify != "never":
            digests = self._abstract_digests(segment, group, name)[row * most :]
            for plane, expected in zip(range(count), digests, strict=False):
                if (actual := xxhash.xxh3_64_hexdigest(stored[plane])) != expected:
                    raise Damaged(
                        f"{where}{start + plane * place.plane_bytes}: xxh3 is {actual}, expected {expected}; "
                        "'kvdb abstracts' makes it anew"
                    )
        return stored[:, : info.chunks]

    def _abstract_digests(self, segment: Segment, group: int, name: str) -> list[str]:
        """Of every plane, layer after layer."""
        assert segment.seals is not None
        key = (segment.info.segment, segment.changes, group, name)
        if key not in self._plane_digests:
            array = format.abstract_array(segment.info.segment, name, group)
            path, fd = _open_array(segment, group, array, format.METADATA_KEY)
            try:
                digests = format.abstract_digests(files.read_all(fd, path), str(path))
            finally:
                files.close(fd)
            seal, count = segment.seals.get(array), len(segment.info.geometry.groups[group].layers)
            if format.abstract_seal(digests) != seal or len(digests) != count * ABSTRACTS[name].planes:
                raise Damaged(
                    f"file {path}: {name} abstract has seal {format.abstract_seal(digests)}, expected {seal}; 'kvdb abstracts' "
                    "makes it anew"
                )
            self._plane_digests[key] = digests
        return self._plane_digests[key]

    def _abstract(self, segment: Segment, group: int, name: str) -> tuple[Path, int]:
        key = (segment.info.segment, segment.changes, group, name)
        if key not in self._abstracts:
            self._abstracts[key] = _open_array(segment, group, format.abstract_array(segment.info.segment, name, group))
            if segment.seals is not None and self._verify != "never":
                self._abstract_digests(segment, group, name)
        return self._abstracts[key]

    def close(self) -> None:
        """Release descriptors and maps. Arrays handed out by nobody else: reads always copy."""
        while self._abstracts:
            files.close(self._abstracts.popitem()[1][1])
        while self._open:
            self._release(self._open.popitem()[1])

    def _release(self, array: OpenArray) -> None:
        if array.unpacked is not None:
            self._unpacked.forget(array.unpacked)
            array.unpacked = None
        files.close(array.fd)
        array.view = array.planes = np.empty(0)
        if array.base is not None:
            with contextlib.suppress(BufferError):  # a traceback still holds a view: the map goes with it
                array.base.close()

    def forget(self, segment: str) -> None:
        """Drop a segment that was discarded."""
        for abstract in [key for key in self._abstracts if key[0] == segment]:
            files.close(self._abstracts.pop(abstract)[1])
        for array in [key for key in self._open if key[0] == segment]:
            self._release(self._open.pop(array))

    def _array(self, segment: Segment, group: int) -> OpenArray:
        key = (segment.info.segment, group)
        array = self._open.get(key)
        if array is None:
            with _concerning(segment.info.segment):
                array = self._opened(segment, group)
            self._open[key] = array
        return array

    def _opened(self, segment: Segment, group: int) -> OpenArray:
        array = OpenArray(segment, group)
        try:
            if segment.seals is not None and self._verify != "never":
                name = format.kv_array(segment.info.segment, group)
                array.load_digests(segment.seals.get(name, "no seal"))
                assert array.digests is not None
                array.verified = self._verified.of(files.content_of(array.fd), len(array.digests))
            if array.codec.blocks is not None:
                file = block_file(segment.info, group, array.fd, array.path)
                array.unpacked = UnpackedArray(file, segment.info.capacity)
                array.show(array.unpacked.view.reshape(-1))
            else:
                self._prepare(array, layout(segment.info, group).payload_bytes)
        except BaseException:
            self._release(array)
            raise
        return array

    @abstractmethod
    def _prepare(self, array: OpenArray, payload_bytes: int) -> None:
        """Called once after opening, before the first fetch; not of compressed rows."""

    def _bring(self, array: OpenArray, rows: Array) -> None:
        """Have rows where `array.view` shows them."""
        assert array.unpacked is not None
        self._unpacked.bring(array.unpacked, rows)

    def _absent(self, array: OpenArray) -> int:
        return layout(array.info, array.group).payload_bytes

    def _begin(self, located: list[Located]) -> None:
        """Have rows that are not in memory on their way, where that is possible without waiting."""
        return

    def _parts(self, located: list[Located]) -> Iterator[Lending]:
        """Rows where they are, as they are stored: those that need not be waited for come first."""
        for each in located:
            with _concerning(each.array.info.segment):
                stored, which = self._fetch_coded(each.array, each.rows)
            yield Lending(stored, which, each.of)

    def _fetch_planes(self, array: OpenArray, rows: Array, out: Array) -> None:
        """Copy rows that are stored as they are (numbered in the whole shard, in range) into `out`, K planes first."""
        self._bring(array, rows)
        planes = np.concatenate((2 * rows, 2 * rows + 1))
        # mode="clip" is 2.6x faster than "raise"; `read` has checked the range.
        np.take(array.planes, planes, axis=0, out=out.reshape(len(planes), -1), mode="clip")

    def _stored(self, array: OpenArray, rows: Array, out: Array) -> Callable[[int], Any]:
        """The bytes behind what `_fetch_planes` has copied to `out`: i -> those of rows[i], contiguous."""
        view, numbers = array.view, rows.tolist()
        return lambda i: view[
            numbers[i]
        ]  # the pages just copied; joining the planes again would take three times as long

    def _fetch_coded(self, array: OpenArray, rows: Array) -> tuple[Array, Array]:
        """Rows where a codec can take them from: (m, row_bytes) uint8, and which of those they are, (n,) int64."""
        self._bring(array, rows)
        return array.view, rows

    def _fetch_rows(self, array: OpenArray, rows: Array, out: Array) -> None:
        """Copy stored rows into `out`, (n, row_bytes) uint8."""
        self._bring(array, rows)
        np.take(array.view, rows, axis=0, out=out, mode="clip")
