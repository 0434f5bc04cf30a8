"""Reads by threads, one system call each: for systems without io_uring."""

from __future__ import annotations

import errno
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import ClassVar, Final

from kvdb import files, forks
from kvdb.errors import Stalled
from kvdb.requests.base import UNDER_WAY, Bells, Int64s, Requests, Ticket, check_maker, closed, stalled

DEPTH: Final = 32


class _Pool:
    """Threads and what they are to do: those of one process, replaced as a whole in a child.

    todo     a batch and whose turn its next read is, once for each thread that should help with it; None ends all threads
    helpers  how many times a thread should help or does, under `over`
    closed   what is not read yet is not to be read
    """

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[tuple[Ticket, Iterator[int]] | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.over, self.bells = threading.Lock(), Bells()
        self.tickets: set[Ticket] = set()
        self.helpers, self.closed = 0, False

    def work(self) -> None:
        while (task := self.todo.get()) is not None:
            self._help(*task)
            del task  # or the memory of the last batch would be kept
        self.todo.put(None)  # for the next one; an interrupt may have kept us from knowing how many there are

    def _help(self, ticket: Ticket, turns: Iterator[int]) -> None:
        count = 0
        for index in itertools.takewhile(len(ticket.results).__gt__, turns):
            ticket.results[index] = -errno.ECANCELED if self.closed else _read(ticket, index)
            count += 1
        with self.over:
            self.helpers -= 1
            ticket.left -= count
            if not ticket.left:
                self.tickets.discard(ticket)
                UNDER_WAY.discard(ticket)
                ticket.keep = None
                self.bells.ring()

    def end(self) -> None:
        self.closed = True
        self.todo.put(None)


def _read(ticket: Ticket, index: int) -> int:
    try:
        return files.read_to(
            int(ticket.fds[index]), int(ticket.addresses[index]), int(ticket.sizes[index]), int(ticket.offsets[index])
        )
    except OSError as error:
        return -(error.errno or errno.EIO)


class Threads(Requests):
    """A pool of threads, begun when there is something to read.

    They are daemons: one that a device never answers must not keep the process from its end.

    depth  reads at once
    """

    name: ClassVar[str] = "threads"

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        self._begin()
        forks.watch(self)

    def _begin(self) -> None:
        self._pool = _Pool()
        self._starting = threading.Lock()
        self._end = weakref.finalize(self, self._pool.end)
        self._end.atexit = False

    def after_fork(self) -> None:
        """The threads are the parent's."""
        UNDER_WAY.difference_update(self._pool.tickets)
        was_closed = self._pool.closed
        self._end.detach()
        self._begin()
        self._pool.closed = was_closed

    def ticket(self, fds: int | Int64s, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object) -> Ticket:
        return Ticket(self._pool, fds, offsets, sizes, addresses, keep)

    def send(self, ticket: Ticket) -> None:
        check_maker(ticket, self._pool)
        pool = self._pool
        with self._starting:
            if pool.closed:
                raise closed(ticket.where())
            if not ticket.left or ticket.begun:
                return
            helpers, task = min(ticket.left, self._depth), (ticket, itertools.count())
            self._start(min(pool.helpers + helpers, self._depth))
            try:
                with pool.over:
                    pool.helpers += helpers
                UNDER_WAY.add(ticket)
                pool.tickets.add(ticket)
                put = pool.todo.put
                ticket.begun = True  # nothing interrupts between this and what follows it
                put(task)
            except BaseException:
                if not ticket.begun:
                    UNDER_WAY.discard(ticket)
                    pool.tickets.discard(ticket)
                raise
            for _ in range(helpers - 1):
                put(task)

    def _start(self, count: int) -> None:
        """Have at least so many threads, or as many as the system lets us have: one that waits for a device helps with nothing else.

        raises  RuntimeError where there are none
        """
        threads = self._pool.threads
        while len(threads) < count:
            thread = threading.Thread(target=self._pool.work, name="kvdb-read", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not threads:
                    raise
                return
            threads.append(thread)

    def done(self, ticket: Ticket) -> bool:
        check_maker(ticket, self._pool)
        return not ticket.left

    def wait(self, ticket: Ticket, timeout_s: float | None = None) -> Int64s:
        check_maker(ticket, self._pool)
        began, pool = time.monotonic(), self._pool
        while True:
            with pool.over:
                if not ticket.left:
                    return ticket.results
                bell = pool.bells.hang()
            waited_s = time.monotonic() - began
            if timeout_s is not None and waited_s >= timeout_s:
                raise stalled(ticket, waited_s)
            pool.bells.listen(bell, None if timeout_s is None else timeout_s - waited_s)

    def close(self, timeout_s: float = 1.0) -> None:
        deadline = time.monotonic() + timeout_s
        with self._starting:
            self._end()
        try:
            for ticket in list(self._pool.tickets):
                self.wait(ticket, max(0.0, deadline - time.monotonic()))
        except Stalled:
            pass  # its memory stays referenced
        for thread in self._pool.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
