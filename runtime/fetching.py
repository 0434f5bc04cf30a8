"""Bringing stored records into memory on a thread of its own, while the model computes.

For what attention is sure to ask for: who asks later finds it in the host tier, the page cache or ours. Nothing depends on it: what fails here
is told to who reads. It ends when all is there, when it is stopped, or with the process, after the piece it is at. The thread has a reader of its
own, as readers are not thread-safe, and closes it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from kvdb import forks
from kvdb.reader import Reader, Wanted
from kvdb.runtime.timeline import Timeline
from kvdb.segments import Segment

_PIECE_BYTES: Final = 4 << 20
"""What is waited for at once, while as much is on its way: so much is brought in vain after a stop."""


class Run(NamedTuple):
    """Records [start, stop) of one layer in a segment, counted as in `Wanted`."""

    segment: Segment
    layer: int
    start: int
    stop: int


class Fetching:
    """At most one thread at a time.

    fetched, seconds  bytes that were not in memory and have been brought, and how long that took so far
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline, self._stopped = timeline, False
        self._thread: threading.Thread | None = None
        self.fetched, self.seconds = 0, 0.0
        forks.watch(self)

    def after_fork(self) -> None:
        self._thread = None

    def begin(self, reader: Reader, runs: Sequence[Run], record_bytes: int, room: int | None) -> None:
        """Bring records of runs, in their order, and return at once. Where there can be no thread, nothing is brought.

        reader        nobody else's; closed when all is done
        record_bytes  of each record
        room          most bytes to bring: more would push out what came first before it is asked for; None: all
        """
        self.stop()
        self._stopped = False
        thread = threading.Thread(
            target=self._bring, args=(reader, runs, record_bytes, room), name="kvdb-fetch", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the system has no more of them
            reader.close()
            return
        self._thread = thread

    def stop(self) -> None:
        """Return when nothing is brought any more."""
        self.let_go()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def let_go(self) -> None:
        """As `stop`, for a finalizer: waits for nothing."""
        self._stopped = True

    def _bring(self, reader: Reader, runs: Sequence[Run], record_bytes: int, room: int | None) -> None:
        with contextlib.closing(reader), contextlib.suppress(Exception):
            pieces = _pieces(runs, max(1, _PIECE_BYTES // record_bytes), None if room is None else room // record_bytes)
            before: tuple[Run, int] | None = None
            for piece in pieces:
                if self._stopped:
                    return
                asked = self._ask(reader, piece)
                if before is not None:
                    self._await(reader, *before, record_bytes)
                before = piece, asked
            if before is not None and not self._stopped:
                self._await(reader, *before, record_bytes)

    def _ask(self, reader: Reader, piece: Run) -> int:
        """Bytes of it that were not in memory, as far as readers know that ask ahead."""
        started, fetched = time.perf_counter(), reader.bytes_fetched
        reader.expect(piece.layer, [_wanted(piece)])
        self.seconds += time.perf_counter() - started
        return reader.bytes_fetched - fetched

    def _await(self, reader: Reader, piece: Run, asked: int, record_bytes: int) -> None:
        """Have a piece in memory that was asked for."""
        started, fetched = time.perf_counter(), reader.bytes_fetched
        with self._timeline.span("fetch", piece.layer) as span:
            for _ in reader.lend(piece.layer, [_wanted(piece)]):
                pass
            span.bytes = (piece.stop - piece.start) * record_bytes
        self.seconds += time.perf_counter() - started
        self.fetched += asked or reader.bytes_fetched - fetched


def _wanted(piece: Run) -> Wanted:
    return Wanted(piece.segment, np.arange(piece.start, piece.stop))


def _pieces(runs: Sequence[Run], most: int, room: int | None) -> Iterator[Run]:
    """Runs of at most so many records each, and of `room` in all."""
    left = sum(run.stop - run.start for run in runs) if room is None else room
    for run in runs:
        for start in range(run.start, run.stop, most):
            stop = min(start + most, run.stop, start + left)
            if stop == start:
                return
            left -= stop - start
            yield run._replace(start=start, stop=stop)
