"""Reading records past the page cache: many reads in flight at once, into a host tier of our own.

Only shards that are sealed are read like that. What is still being written goes through the page cache, as its writer does; compressed
blocks are read as by every reader. A read takes what the tier has, asks for all the rest together, and waits for it no longer than its
deadline: after that it is Stalled, and other records can still be read.

Rows are compared with their digests when they come, whoever asked for them; one that does not match does not stay in the tier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from kvdb import files
from kvdb.arrivals import FileRows, RowFile
from kvdb.errors import Damaged, OutOfMemory
from kvdb.host import HostTier, Lease
from kvdb.positioned import PreadReader
from kvdb.reader import Array, Lending, Located, OpenArray, Verified
from kvdb.segments import Segment


class DirectReader(PreadReader):
    """tier        shared by the readers of a store handle; None: a small one of its own, for reading through files once
    deadline_s  how long a read waits for the device
    """

    name: ClassVar[str] = "direct"
    OWN_BYTES: ClassVar[int] = 64 << 20
    DEADLINE_S: ClassVar[float] = 30.0

    def __init__(
        self,
        verify: str = "first",
        verified: Verified | None = None,
        *,
        tier: HostTier | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        super().__init__(verify, verified)
        self._tier, self._owns_tier = tier or HostTier(self.OWN_BYTES), tier is None
        self._deadline_s = deadline_s
        self._direct: dict[OpenArray, RowFile] = {}
        self._lease: Lease | None = None  # of what is lent

    # -- what is open

    def _array(self, segment: Segment, group: int) -> OpenArray:
        known = (segment.info.segment, group) in self._open
        array = super()._array(segment, group)
        if not known and segment.seals is not None and array.unpacked is None:
            try:
                align = files.make_direct(array.fd, array.path)
            except BaseException:
                self._release(self._open.pop((segment.info.segment, group)))
                raise
            self._direct[array] = RowFile(
                key=files.content_of(array.fd),
                fd=array.fd,
                row_bytes=array.row,
                rows=len(array.info.geometry.groups[group].layers) * array.layer_records,
                align=align,
                segment=array.info.segment,
                where=f"segment {array.info.segment}, file {array.path}",
                path=array.path,
            )
        return array

    def _release(self, array: OpenArray) -> None:
        file = self._direct.pop(array, None)
        if file is not None:
            self._give_back()
            if self._tier.retire(file):
                array.fd = files.duplicate(array.fd)  # to be closed in its place
        super()._release(array)

    def forget(self, segment: str) -> None:
        for array, file in self._direct.items():
            if array.info.segment == segment:
                self._tier.drop(file)
        super().forget(segment)

    def close(self) -> None:
        super().close()
        if self._owns_tier:
            self._tier.close()

    # -- reading

    def _parts(self, located: list[Located]) -> Iterator[Lending]:
        """What is not read past the page cache, while the rest arrives, and then that."""
        direct = [each for each in located if each.array in self._direct]
        lease = self._ask([self._rows_of(each) for each in direct]) if direct else None
        yield from super()._parts([each for each in located if each.array not in self._direct])
        if lease is not None:
            numbers = np.concatenate([each.of for each in direct])
            for memory, which, places in self._tier.parts(lease, self._deadline_s):
                shown = memory.view()
                shown.flags.writeable = False
                yield Lending(shown, which, numbers[places])

    def _rows_of(self, located: Located) -> FileRows:
        return FileRows(self._direct[located.array], located.rows)

    def _absent(self, array: OpenArray) -> int:
        file = self._direct.get(array)
        return super()._absent(array) if file is None else self._tier.absent_bytes(file)

    def _begin(self, located: list[Located]) -> None:
        """What is lent stays good. Records for which the tier has no room are left alone."""
        by_size: dict[int, list[FileRows]] = {}  # codecs differ by segment
        for each in located:
            if each.array in self._direct:
                by_size.setdefault(each.array.row, []).append(self._rows_of(each))
        for direct in by_size.values():
            # What the system refuses now it may refuse who reads these records, and is told then.
            with contextlib.suppress(OSError, OutOfMemory):
                lease = self._tier.lease(direct, only_slots=True)
                self.bytes_fetched += lease.fetched
                self._tier.release(lease)

    def weigh(self, segment: Segment, layer: int, records: Array, weights: Array) -> None:
        array, rows = self._locate(segment, layer, records)
        if array in self._direct:
            self._tier.weigh(self._direct[array], rows, weights)

    def _ask(self, wanted: Sequence[FileRows]) -> Lease:
        self._give_back()
        self._lease = self._tier.lease(wanted)
        self.bytes_fetched += self._lease.fetched
        return self._lease

    def _give_back(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._tier.release(lease)

    @contextlib.contextmanager
    def _leased(self, array: OpenArray, rows: Array) -> Iterator[Lease]:
        """For what is copied before anybody else uses this reader."""
        lease = self._ask([FileRows(self._direct[array], rows)])
        try:
            self._tier.wait(lease, self._deadline_s)
            yield lease
        finally:
            self._give_back()

    def _fetch_planes(self, array: OpenArray, rows: Array, out: Array) -> None:
        if array not in self._direct:
            super()._fetch_planes(array, rows, out)
            return
        with self._leased(array, rows) as lease:
            halves = out.reshape(2, len(rows), -1)
            if lease.pooled:
                planes = lease.pool.view.view(out.dtype).reshape(-1, halves.shape[2])
                numbers = np.concatenate((2 * lease.slots, 2 * lease.slots + 1))
                np.take(planes, numbers, axis=0, out=halves.reshape(len(numbers), -1), mode="clip")
                return
            for memory, which, places in self._tier.parts(lease, self._deadline_s):
                halves[:, places] = memory[which].view(out.dtype).reshape(len(which), 2, -1).swapaxes(0, 1)

    def _fetch_rows(self, array: OpenArray, rows: Array, out: Array) -> None:
        if array not in self._direct:
            super()._fetch_rows(array, rows, out)
            return
        with self._leased(array, rows) as lease:
            if lease.pooled:
                np.take(lease.pool.view, lease.slots, axis=0, out=out, mode="clip")
                return
            for memory, which, places in self._tier.parts(lease, self._deadline_s):
                out[places] = memory[which]

    def _fetch_coded(self, array: OpenArray, rows: Array) -> tuple[Array, Array]:
        """Where they are in the tier, if all are; these stay there until this reader is used again."""
        if array not in self._direct:
            return super()._fetch_coded(array, rows)
        lease = self._ask([FileRows(self._direct[array], rows)])
        self._tier.wait(lease, self._deadline_s)
        if lease.pooled:
            shown = lease.pool.view.view()
            shown.flags.writeable = False
            return shown, lease.slots
        stored = np.empty((len(rows), array.row), np.uint8)
        for memory, which, places in self._tier.parts(lease, self._deadline_s):
            stored[places] = memory[which]
        return stored, np.arange(len(rows))

    def _check(self, array: OpenArray, rows: Array, stored: Callable[[int], Any]) -> None:
        try:
            super()._check(array, rows, stored)
        except Damaged:
            if array in self._direct:
                self._tier.forget(self._direct[array], rows)
            raise
