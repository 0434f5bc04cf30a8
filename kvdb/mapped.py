"""Reading through a map of the file: the page cache is the host tier.

MADV_RANDOM stops read-ahead (which amplified cold reads 61 times); WILLNEED on records that are not in the page cache makes the kernel
fetch them together, while the caller does something else. On the first touch pages are brought in by a call that can fail, so that a
device error or a cut file is an error and not a SIGBUS (after that, a file cut behind our back still is one).
"""

from __future__ import annotations

import mmap as _mmap
from collections.abc import Iterator
from typing import ClassVar, Final

import numpy as np

from kvdb import files
from kvdb.errors import Damaged
from kvdb.reader import Array, Lending, Located, OpenArray, Reader, Verified

_READ_AHEAD: Final = 128 << 10
"""Most that one WILLNEED surely brings: Linux cuts it to the device's read-ahead, and under MADV_RANDOM the rest would come
page by page (3 to 16 MB/s instead of 580 to 740 for 16 MiB in a row, on a virtual disk)."""
_PAGES_BETWEEN: Final = 64
"""Pages of a map to a row, up to which to ask for all of them is cheaper than to ask for each row: 20 ns a page, a microsecond a question."""


class MmapReader(Reader):
    name: ClassVar[str] = "mmap"
    DOUBTS: ClassVar[int] = 256
    """So many reads after one that found pages gone, residence is no longer taken for granted."""

    def __init__(self, verify: str = "first", verified: Verified | None = None) -> None:
        super().__init__(verify, verified)
        self._faults, self._doubts = files.major_faults(), 0

    @property
    def loses(self) -> bool:
        return self._doubts > 0

    def _prepare(self, array: OpenArray, payload_bytes: int) -> None:
        array.base = files.mmap(array.fd, payload_bytes)
        array.base.madvise(_mmap.MADV_RANDOM)
        array.show(np.frombuffer(array.base, np.uint8))
        array.seen, array.told = np.zeros(len(array.view), bool), files.tells_residence(array.fd)

    def _bring(self, array: OpenArray, rows: Array) -> None:
        if array.base is None:
            super()._bring(array, rows)
            return
        wanted, gone = self._start(array, rows)
        self._finish(array, wanted, gone)

    def _absent(self, array: OpenArray) -> int:
        if array.base is None or not array.told:
            return super()._absent(array)
        pages = files.resident_pages(array.base, 0, -(-len(array.base) // _mmap.PAGESIZE))
        return int(np.count_nonzero(~pages)) * _mmap.PAGESIZE

    def _begin(self, located: list[Located]) -> None:
        for each in located:
            if each.array.base is not None:
                self._start(each.array, each.rows)

    def _parts(self, located: list[Located]) -> Iterator[Lending]:
        begun = [(each, *self._start(each.array, each.rows)) for each in located if each.array.base is not None]
        late = []
        for (array, rows, first), wanted, gone in begun:
            self._finish(array, wanted[~gone], gone[~gone])
            if not gone.any():
                yield Lending(array.view, rows, np.arange(first, first + len(rows)))
                continue
            arriving = np.isin(rows, wanted[gone])
            there = np.flatnonzero(~arriving)
            if len(there):
                yield Lending(array.view, rows[there], first + there)
            late.append((array, rows[arriving], first + np.flatnonzero(arriving), wanted[gone]))
        yield from super()._parts([each for each in located if each.array.base is None])
        for array, rows, of, awaited in late:
            self._finish(array, awaited, np.ones(len(awaited), bool))
            yield Lending(array.view, rows, of)

    def _start(self, array: OpenArray, rows: Array) -> tuple[Array, Array]:
        """Have the kernel fetch all cold pages together, without waiting for them.

        What was brought once is there until the kernel needs the memory. Then it must be read page by page, which shows as major page
        faults of this thread: from there on the kernel is asked before each read what it still has.
        returns  (n,) rows that must be looked after, ascending, and (n,) of bool: those that were not in memory
        """
        assert array.base is not None
        if files.major_faults() != self._faults:
            self._doubts = self.DOUBTS
        wanted = np.unique(rows) if self._doubts else np.unique(rows[~array.seen[rows]])
        if not len(wanted):
            return wanted, np.zeros(0, bool)
        gone = ~_resident(array, wanted)
        for start, stop in _runs(wanted[gone], array.row):
            self.bytes_fetched += stop - start
            for at in range(start, stop, _READ_AHEAD):
                files.will_need(array.base, at, min(_READ_AHEAD, stop - at))
        if self._doubts:
            self._doubts = self.DOUBTS if gone.any() else self._doubts - 1
        self._faults = files.major_faults()
        return wanted, gone

    def _finish(self, array: OpenArray, wanted: Array, gone: Array) -> None:
        """Wait for pages where an error can be told: of rows that were gone, and of rows never touched before."""
        assert array.base is not None
        touched = wanted[gone | ~array.seen[wanted]]
        if not len(touched):
            return
        if files.major_faults() != self._faults:
            self._doubts = self.DOUBTS
        for start, stop in _runs(touched, array.row):
            try:
                files.populate(array.base, start, stop - start)
            except OSError as e:
                raise Damaged(
                    f"segment {array.info.segment}, file {array.path}, offset {start}: {e.strerror}, expected {stop - start} "
                    "bytes; the file was cut or its device fails: run 'kvdb verify'",
                    segment=array.info.segment,
                ) from e
        array.seen[wanted] = True
        self._faults = files.major_faults()


def _resident(array: OpenArray, rows: Array) -> Array:
    """Which rows, ascending, are in memory: (n,) of bool. One question for all of them, unless they lie far apart."""
    assert array.base is not None
    if not array.told:
        return np.zeros(len(rows), bool)
    first, last = rows * array.row // _mmap.PAGESIZE, ((rows + 1) * array.row - 1) // _mmap.PAGESIZE
    start, count = int(first[0]), int(last[-1] - first[0]) + 1
    if count > _PAGES_BETWEEN * len(rows) and len(rows) > 1:
        half = len(rows) // 2
        return np.concatenate((_resident(array, rows[:half]), _resident(array, rows[half:])))
    pages = files.resident_pages(array.base, start * _mmap.PAGESIZE, count)
    missing = np.concatenate(([0], np.cumsum(~pages)))
    found: Array = missing[last - start + 1] == missing[first - start]
    return found


def _runs(rows: Array, row: int) -> list[tuple[int, int]]:
    """Bytes of rows, ascending, that lie one after the other: from the beginning of a page to the end of the last row."""
    if not len(rows):
        return []
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts, stops = (
        rows[np.concatenate(([0], breaks))] * row,
        (rows[np.concatenate((breaks - 1, [len(rows) - 1]))] + 1) * row,
    )
    return list(zip((starts - starts % _mmap.PAGESIZE).tolist(), stops.tolist(), strict=True))
