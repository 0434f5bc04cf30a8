"""Rows on their way from files into memory: what was asked of the device, and what came of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kvdb.errors import Damaged
from kvdb.extents import Extents, around, exactly
from kvdb.requests import Requests, Ticket
from kvdb.slabs import Pool, private_pages

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(eq=False, slots=True, kw_only=True)
class RowFile:
    """A sealed file of rows, open with O_DIRECT.

    key      what tells its content from any other's
    rows     how many it has
    align    bytes that offsets, sizes and addresses of reads must be multiples of
    segment  whose file it is
    where    names segment and file, for messages
    """

    key: tuple[int, int, int]
    fd: int
    row_bytes: int
    rows: int
    align: int
    segment: str
    where: str
    path: Path


class FileRows(NamedTuple):
    """Rows of a file, (n,) int64; they may repeat."""

    file: RowFile
    rows: Array


@dataclass(eq=False, slots=True)
class Arrival:
    """Some rows of files, each to its place in `memory`: one batch for the device.

    number  from 1 on, in a tier
    files   whose rows are of one size
    of      (n,) int64, ascending: which of the files each row is in
    rows    (n,) int64, of each file ascending, none twice
    slots   (n,) int64: which row of `memory` each goes to
    memory  (m, row_bytes) uint8, C-contiguous from a page on
    pool    whose `memory` is, with slots that are pinned until this is over; None: memory of one lease
    lock    of who sends it or takes what has come; not held while that is waited for
    asked_bytes  of the files
    failed  once it is over, of rows that are not there: (which file, row) -> (offset, bytes that came of the read with it, or -errno)
    """

    number: int
    files: tuple[RowFile, ...]
    of: Array
    rows: Array
    slots: Array
    memory: Array
    pool: Pool | None
    over: bool = False
    failed: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ticket: Ticket | None = None
    _extents: Extents | None = None
    _bounce: Array | None = None
    asked_bytes: int = 0

    @property
    def sent(self) -> bool:
        """Whether the device may write into `memory`, until this is over."""
        return self.ticket is not None and self.ticket.begun

    def send(self, requests: Requests) -> None:
        """Ask for all rows. After one that failed `sent` tells whether they may come; if not, it may be called again."""
        if self.ticket is None:
            self._prepare(requests)
        assert self.ticket is not None
        requests.send(self.ticket)

    @property
    def row_bytes(self) -> int:
        return self.files[0].row_bytes

    def _prepare(self, requests: Requests) -> None:
        row, align = self.row_bytes, max(file.align for file in self.files)
        if row % align:
            asked = around(self.of, self.rows, row, align)
            ends = np.cumsum(asked.sizes)
            self._bounce = np.frombuffer(private_pages(int(ends[-1])), np.uint8)
            addresses = self._bounce.ctypes.data + ends - asked.sizes
        else:
            asked = exactly(self.of, self.rows, self.slots, row)
            addresses = self.memory.ctypes.data + self.slots[asked.first] * row
        self._extents = asked
        keep = self.memory if self._bounce is None else self._bounce
        self.asked_bytes = int(asked.sizes.sum())
        fds = np.array([file.fd for file in self.files])[self.of[asked.first]]
        self.ticket = requests.ticket(fds, asked.offsets, asked.sizes, addresses, keep)

    def take(self, results: Array) -> Array:
        """Put what came where it belongs, and note what did not: returns which of the rows are there, (n,) of bool. The same
        if called again, as after an interrupt.

        results  (m,) int64: what `Requests.wait` says of the reads
        """
        asked, row = self._extents, self.row_bytes
        assert asked is not None
        there: Array = results[asked.of] >= asked.at + row
        if self._bounce is not None and there.any():
            starts = (np.cumsum(asked.sizes) - asked.sizes)[asked.of] + asked.at
            windows = np.lib.stride_tricks.as_strided(self._bounce, (len(self._bounce) - row + 1, row), (1, 1))
            self.memory[self.slots[there]] = windows[starts[there]]
        for i in np.flatnonzero(~there).tolist():
            found = int(results[asked.of[i]])
            self.failed[int(self.of[i]), int(self.rows[i])] = (
                int(asked.offsets[asked.of[i]]) if found < 0 else int(self.rows[i]) * row,
                found if found < 0 else max(0, found - int(asked.at[i])),
            )
        return there

    def end(self) -> None:
        """Nothing more comes."""
        self.over = True
        self._extents = self._bounce = None

    def fail(self, number: int) -> Array:
        """Nothing came, for the reason that an errno says; returns as `take`."""
        every = zip(self.of.tolist(), self.rows.tolist(), strict=True)
        self.failed = {(of, row): (row * self.row_bytes, -number) for of, row in every}
        return np.zeros(len(self.rows), bool)

    def expect(self, wanted: Sequence[FileRows]) -> None:
        """raises  OSError or Damaged where one of the wanted rows is among those that are not there"""
        if not self.failed:
            return
        keys = [file.key for file in self.files]
        for file, rows in wanted:
            of = keys.index(file.key) if file.key in keys else -1
            for row in rows.tolist():
                if (of, row) in self.failed:
                    self._tell(file, *self.failed[of, row])

    @staticmethod
    def _tell(file: RowFile, offset: int, found: int) -> NoReturn:
        if found < 0:
            raise OSError(-found, os.strerror(-found), str(file.path))
        raise Damaged(
            f"{file.where}: {found} bytes at {offset}, expected {file.row_bytes}; run 'kvdb verify'",
            segment=file.segment,
        )
