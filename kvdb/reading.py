"""How a store handle reads: the way, the host tier where it reads past the page cache, and the readers it hands out.

With read_mode "auto" the way is chosen when the store is opened, and again when a reader is asked for and what fitted into memory fits no more: the
store has grown, or others have taken the memory. Nothing leads back: a host tier has the memory that one would have to ask for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvdb import forks
from kvdb.available import available_bytes
from kvdb.calibration import Way, way_to_read
from kvdb.direct import DirectReader
from kvdb.host import HostTier
from kvdb.options import AUTO, Options
from kvdb.reader import Reader, Verified
from kvdb.readers import READERS

HOST_SHARE: Final = 4
"""The host tier takes one in so many bytes of what memory is available, where nobody says how many."""


class Reading:
    """Thread-safe.

    chunks        where shards lie
    stored_bytes  what all of them take, now
    """

    def __init__(self, chunks: Path, options: Options, stored_bytes: Callable[[], int]) -> None:
        self._chunks, self._options, self._stored_bytes = chunks, options, stored_bytes
        self._verified = Verified()
        self._choosing = threading.Lock()
        self.host: HostTier | None = None
        self.way = Way(options.read_mode, "asked for", fits=False)
        self._take(way_to_read(chunks, stored_bytes()) if options.read_mode == AUTO else self.way)
        forks.watch(self)

    def after_fork(self) -> None:
        self._choosing = threading.Lock()

    def _take(self, way: Way) -> None:
        if way.name == DirectReader.name and self.host is None:
            budget = self._options.host_budget
            self.host = HostTier(
                available_bytes() // HOST_SHARE if budget is None else budget, self._options.host_policy
            )
        self.way = way

    def _look_again(self) -> None:
        with self._choosing:
            if self.way.fits and (stored := self._stored_bytes()) > available_bytes():
                self._take(way_to_read(self._chunks, stored))

    def reader(self) -> Reader:
        """For one thread; close it after use."""
        if self.way.fits:
            self._look_again()
        if self.host is not None:
            deadline_s = self._options.read_deadline_s
            return DirectReader(self._options.verify, self._verified, tier=self.host, deadline_s=deadline_s)
        return READERS[self.way.name](self._options.verify, self._verified)

    def close(self) -> None:
        if self.host is not None:
            self.host.close()
