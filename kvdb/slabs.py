"""Memory for rows of one size: address space for as many as may ever be there, and real memory slab by slab.

All rows of a pool lie in one array, whatever slabs they are in, so that a slot's number is its place. What a slab takes is counted in
whole pages. Giving a slab back gives its pages back to the system; those that it shares with a neighbour stay.
"""

from __future__ import annotations

import contextlib
import math
import mmap as _mmap
from typing import Any, Final

import numpy as np

from kvdb.errors import OutOfMemory
from kvdb.replacement import Replacement
from kvdb.slots import SlotTable

Array = np.ndarray[Any, np.dtype[Any]]

SLAB_BYTES: Final = 2 << 20
"""Most that a slab takes, but for one row that is larger."""
_SHARE: Final = 32
"""Slabs that the budget is cut into at least, so that several row sizes find room in a small one."""
_HUGE: Final = getattr(_mmap, "MADV_HUGEPAGE", None)
"""A device that reads into memory must find each of its pages, and new ones must be made: on one of 2 MiB that is done once. Records of
64 KiB came twice as fast, of 256 KiB 1.8 times (io_uring, a virtual disk)."""
_NOT_HUGE: Final = getattr(_mmap, "MADV_NOHUGEPAGE", None)
_RESERVE_NOTHING: Final = getattr(_mmap, "MAP_NORESERVE", 0)


def private_pages(size: int) -> _mmap.mmap:
    """New memory that begins at a page and belongs to nobody else; it costs something once it is written to.

    raises  OutOfMemory
    """
    try:
        return _mmap.mmap(-1, max(size, 1), flags=_mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS | _RESERVE_NOTHING)
    except (OSError, OverflowError) as e:
        raise OutOfMemory(f"{size} bytes of memory: {e}, expected room for them; free some memory") from e


class Pool:
    """Slots of `row_bytes` each, in slabs that are taken out of a budget and given back.

    view     (slots, row_bytes) uint8, page-aligned; what lies in a slot that holds nothing is undefined
    arrival  (slots,) int64: the arrival that fills a slot, 0 for none
    """

    def __init__(self, row_bytes: int, budget_bytes: int, policy: Replacement) -> None:
        self.row_bytes, self.table = row_bytes, SlotTable(policy)
        page = _mmap.PAGESIZE
        most = min(SLAB_BYTES, budget_bytes // _SHARE)
        step = page // math.gcd(row_bytes, page)  # so many rows end with a page
        rows = max(1, most // row_bytes)
        self.slab_slots = rows // step * step or rows
        shared = 0 if self.slab_slots % step == 0 else page
        self.slab_bytes = -(-self.slab_slots * row_bytes // page) * page + shared
        slabs = budget_bytes // self.slab_bytes
        size = slabs * self.slab_slots * row_bytes
        self._base = private_pages(size)
        self.view = np.frombuffer(self._base, np.uint8)[:size].reshape(-1, row_bytes)
        self.arrival = np.zeros(1, np.int64)
        self._idle = list(range(slabs))[::-1]
        self._busy: list[int] = []

    @property
    def used_bytes(self) -> int:
        return len(self._busy) * self.slab_bytes

    @property
    def can_grow(self) -> bool:
        return bool(self._idle)

    def grow(self) -> None:
        """Take a slab into use."""
        slab = self._idle.pop()
        self._busy.append(slab)
        start, stop = slab * self.slab_slots, (slab + 1) * self.slab_slots
        if stop > len(self.arrival):
            self.arrival = np.concatenate((self.arrival, np.zeros(max(stop, 2 * len(self.arrival)), np.int64)))
        self._advise(_HUGE, start, stop)
        self.table.add(start, stop)

    def shrink(self) -> bool:
        """Give a slab back, its rows evicted: the first one without a pinned slot. False where every slab has one."""
        for slab in self._busy:
            start, stop = slab * self.slab_slots, (slab + 1) * self.slab_slots
            if self.table.remove(start, stop):
                self._busy.remove(slab)
                self._idle.append(slab)
                self._advise(_NOT_HUGE, start, stop)
                self._advise(_mmap.MADV_DONTNEED, start, stop)
                return True
        return False

    def _advise(self, advice: int | None, start: int, stop: int) -> None:
        """On the pages that lie wholly in slots [start, stop)."""
        page = _mmap.PAGESIZE
        first, last = -(-start * self.row_bytes // page) * page, stop * self.row_bytes // page * page
        if advice is not None and first < last:
            with contextlib.suppress(OSError):  # a system without huge pages
                self._base.madvise(advice, first, last - first)
