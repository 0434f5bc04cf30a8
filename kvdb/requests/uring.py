"""Reads by io_uring: a batch goes to the kernel in one call, and goes on there while Python does something else, or nothing.

Of the threads that wait at once one sleeps in the kernel, and takes the results of all; the others sleep on a condition until it has
some. What the kernel has no room for is sent by whoever waits or submits, and where nobody does by a thread of our own; what is waited for
goes first.
"""

from __future__ import annotations

import errno
import itertools
import threading
import time
import weakref
from collections import deque
from typing import ClassVar, Final

import numpy as np

from kvdb import forks
from kvdb.errors import Stalled
from kvdb.requests.base import UNDER_WAY, Int64s, Requests, Ticket, check_maker, closed, stalled
from kvdb.requests.ring import Ring

DEPTH: Final = 256
"""What a device takes at once is bounded (256 here), and who sends it more waits in the kernel until the rest is through: 45 ms for 2000
reads of 8 KiB on a virtual disk, at a depth of 4096. Batches of 2000 at 128 took 1.4 to 1.6 times as long as at 256, with two busy
processors."""
_NAP_S: Final = 0.002
"""Most that one sleep in the kernel lasts: what is over is known to other threads so much later."""


class Uring(Requests):
    """io_uring, by system calls.

    depth   reads that the kernel has at once
    raises  Unsupported, and why, where there is no io_uring
    """

    name: ClassVar[str] = "io_uring"

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth, self._closed = depth, False
        self._begin()
        forks.watch(self)

    def _begin(self) -> None:
        self._queue: _Queue | None = _Queue(self._depth)
        self._end = weakref.finalize(self, self._queue.end)
        self._end.atexit = False
        self._beginning = threading.Lock()

    def after_fork(self) -> None:
        """The ring is the parent's, and so are the results in it."""
        if self._queue is not None:
            UNDER_WAY.difference_update(self._queue.tickets.values())
            self._end.detach()
            self._queue.ring = None
        self._queue = None
        self._beginning = threading.Lock()

    def submit(self, fd: int, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object) -> Ticket:
        if self._closed:
            raise closed(f"descriptor {fd}")
        if self._queue is None:
            with self._beginning:
                if self._queue is None:
                    self._begin()
        assert self._queue is not None
        return self._queue.submit(fd, offsets, sizes, addresses, keep)

    def done(self, ticket: Ticket) -> bool:
        return self._queue_of(ticket).done(ticket)

    def wait(self, ticket: Ticket, timeout_s: float | None = None) -> Int64s:
        return self._queue_of(ticket).wait(ticket, timeout_s)

    def _queue_of(self, ticket: Ticket) -> _Queue:
        check_maker(ticket, self._queue)
        assert self._queue is not None
        return self._queue

    def close(self, timeout_s: float = 1.0) -> None:
        self._closed = True
        if self._queue is not None:
            self._queue.close(timeout_s)


class _Queue:
    """A ring and its batches, of one process. Both locks are never held while a read is waited for; who needs both takes `over` first.

    sending    lock of what is put into the ring, and of `waiting`: numbers of batches, with indices of their reads that were not sent
    over       lock of what is taken from it
    sent, taken  reads so far, each written under its lock
    ring       None once it is closed
    ended      nothing is sent any more
    """

    def __init__(self, depth: int) -> None:
        self.ring: Ring | None = Ring(depth)
        self.depth = min(depth, self.ring.capacity)
        self.sending, self.over = threading.Lock(), threading.Condition(threading.Lock())
        self.tickets: dict[int, Ticket] = {}
        self.waiting: deque[tuple[int, Int64s]] = deque()
        self.sent, self.taken = 0, 0
        self.ended = False
        self._numbers = itertools.cycle(range(1 << 32))
        self._someone_sleeps, self._followers = False, 0
        self._rest = threading.Event()
        self._feeder: threading.Thread | None = None

    # -- sending

    def submit(self, fd: int, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object) -> Ticket:
        ticket = Ticket(self, fd, offsets, sizes, addresses, keep)
        with self.sending:
            if self.ended:
                raise closed(ticket.where())
            if ticket.left:
                number = next(number for number in self._numbers if number not in self.tickets)
                self.tickets[number] = ticket
                UNDER_WAY.add(ticket)
                self.waiting.append((number, np.arange(ticket.left)))
                self._send()
        return ticket

    def _send(self) -> None:
        """Under `sending`: give the kernel as much as there is room for."""
        if self.ring is None:
            return
        while self.waiting and (room := self.depth - (self.sent - self.taken)):
            number, indices = self.waiting.popleft()
            some, rest = indices[:room], indices[room:]
            if len(rest):
                self.waiting.appendleft((number, rest))
            ticket, marks = self.tickets[number], some.astype(np.uint64) | np.uint64(number << 32)
            self.ring.put(ticket.fd, ticket.offsets[some], ticket.sizes[some], ticket.addresses[some], marks)
            self.sent += len(some)
            ticket.unsent -= len(some)
        self.ring.send()
        if self.waiting:
            self._have_fed()

    def _push(self) -> None:
        if self.waiting or (self.ring is not None and self.ring.unsent):
            with self.sending:
                self._send()

    def _prefer(self, ticket: Ticket) -> None:
        """What is waited for goes before what was sent ahead."""
        with self.sending:
            self.waiting = deque(sorted(self.waiting, key=lambda rest: self.tickets[rest[0]] is not ticket))

    def _have_fed(self) -> None:
        """Under `sending`."""
        if self._feeder is None:
            self._feeder = threading.Thread(target=self._feed, name="kvdb-feed", daemon=True)
            self._feeder.start()
        self._rest.set()

    def _feed(self) -> None:
        """In a thread of its own: send the rest when there is room, unless others do."""
        while self._rest.wait() and not self.ended:
            self._rest.clear()
            while self.waiting:
                if self._someone_sleeps or self._followers:
                    time.sleep(_NAP_S)
                else:
                    self._sleep(self.depth // 4, _NAP_S)
                    self._push()

    # -- what is over

    def done(self, ticket: Ticket) -> bool:
        if ticket.left:
            with self.over:
                self._look()
            self._push()
        return not ticket.left

    def wait(self, ticket: Ticket, timeout_s: float | None) -> Int64s:
        began = time.monotonic()
        if ticket.unsent:
            self._prefer(ticket)
        while True:
            with self.over:
                self._look()
                if not ticket.left:
                    return ticket.results
            self._push()
            waited_s = time.monotonic() - began
            if self.ring is None or (timeout_s is not None and waited_s >= timeout_s):
                raise stalled(ticket, waited_s)
            self._follow_or_sleep(ticket, None if timeout_s is None else timeout_s - waited_s)

    def _look(self) -> None:
        """Under `over`: take results, unless a thread sleeps until there are more than are now."""
        if not self._someone_sleeps and self.ring is not None:
            self._take(self.ring)

    def _take(self, ring: Ring) -> None:
        """Of reads of a thread that ended the kernel may cancel some: they go again."""
        marks, results = ring.take()
        if not len(marks):
            return
        numbers, indices = marks >> np.uint64(32), (marks & np.uint64(0xFFFFFFFF)).astype(np.int64)
        if (numbers == numbers[0]).all():
            self._settle(int(numbers[0]), indices, results)
        else:
            for number in np.unique(numbers).tolist():
                mine = numbers == number
                self._settle(number, indices[mine], results[mine])
        self.taken += len(marks)
        self.over.notify_all()

    def _settle(self, number: int, at: Int64s, results: Int64s) -> None:
        again = results == -errno.ECANCELED
        if again.any() and not self.ended:
            with self.sending:
                self.tickets[number].unsent += int(again.sum())
                self.waiting.append((number, at[again]))
                self._have_fed()
            at, results = at[~again], results[~again]
        self._note(number, at, results)

    def _note(self, number: int, at: Int64s, results: Int64s | int) -> None:
        """Under `over`: reads of a batch are over."""
        ticket = self.tickets[number]
        ticket.results[at] = results
        ticket.left -= len(at)
        if not ticket.left:
            del self.tickets[number]
            UNDER_WAY.discard(ticket)
            ticket.keep = None

    def _follow_or_sleep(self, ticket: Ticket, timeout_s: float | None) -> None:
        """Until there may be more results of a batch, or `timeout_s` have gone by."""
        with self.over:
            if not ticket.left:
                return
            if self._someone_sleeps:
                self._followers += 1
                try:
                    self.over.wait(timeout_s)
                finally:
                    self._followers -= 1
                return
        in_flight = ticket.left - ticket.unsent
        self._sleep(min(in_flight, self.depth // 4) if self.waiting else in_flight, timeout_s)

    def _sleep(self, count: int, timeout_s: float | None) -> None:
        """Sleep in the kernel for `count` results, or a nap, or `timeout_s`, or not at all if someone does already; then take them."""
        with self.over:
            ring = self.ring
            if self._someone_sleeps or ring is None:
                return
            self._someone_sleeps = True
        if count > 1 or ring.unsent:
            timeout_s = _NAP_S if timeout_s is None else min(timeout_s, _NAP_S)
        try:
            ring.sleep(max(1, count), timeout_s)
        finally:
            with self.over:
                self._someone_sleeps = False
                self._look()
                self.over.notify_all()

    # -- the end

    def end(self) -> None:
        """Send nothing more. Waits for nothing."""
        self.ended = True
        self._rest.set()

    def close(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self.over, self.sending:
            self.end()
            while self.waiting:
                number, indices = self.waiting.popleft()
                self.tickets[number].unsent -= len(indices)
                self._note(number, indices, -errno.ECANCELED)
            self.over.notify_all()
        try:
            for ticket in list(self.tickets.values()):
                self.wait(ticket, max(0.0, deadline - time.monotonic()))
        except Stalled:
            pass  # its memory stays referenced
        with self.over, self.sending:
            self.ring = None
            self.over.notify_all()
        if self._feeder is not None:
            self._feeder.join(max(0.0, deadline - time.monotonic()))
