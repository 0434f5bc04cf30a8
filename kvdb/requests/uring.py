"""Reads by io_uring: a batch goes to the kernel in one call, and goes on there while Python does something else, or nothing.

Of the threads that wait at once one sleeps in the kernel, and takes the results of all; the others listen for a bell until it has
some. What the kernel has no room for is sent by whoever waits or submits, and where nobody does by a thread of our own; what is waited for
goes first.

An interrupt may end any of our calls between any two steps. What is put into the ring and what is taken from it is therefore written
down such that the next call can tell how far the last one came, and does the rest.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import queue
import threading
import time
import weakref
from collections import deque
from typing import ClassVar, Final, NamedTuple

import numpy as np

from kvdb import forks
from kvdb.errors import Stalled
from kvdb.requests.base import NAP_S, UNDER_WAY, Bells, Int64s, Requests, Ticket, check_maker, closed, stalled
from kvdb.requests.ring import Array, Ring

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

    def ticket(self, fds: int | Int64s, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object) -> Ticket:
        if self._closed:
            raise closed(Ticket(None, fds, offsets, sizes, addresses, keep).where())
        if self._queue is None:
            with self._beginning:
                if self._queue is None:
                    self._begin()
        return Ticket(self._queue, fds, offsets, sizes, addresses, keep)

    def send(self, ticket: Ticket) -> None:
        self._queue_of(ticket).submit(ticket)

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


class _Putting(NamedTuple):
    """What is being put into the ring: reads `some` of the batch whose entry in `waiting` is `entry`. `tail`: of the ring before."""

    tail: int
    entry: tuple[int, Int64s]
    some: Int64s
    rest: Int64s


class _Queue:
    """A ring and its batches, of one process. Both locks are never held while a read is waited for; who needs both takes `over` first.

    sending  lock of what is put into the ring, and of `waiting`: numbers of batches, with indices of their reads that were not sent
    over     lock of what is taken from it
    ring     None once it is closed
    ended    nothing is sent any more
    """

    def __init__(self, depth: int) -> None:
        self.ring: Ring | None = Ring(depth)
        self.depth = min(depth, self.ring.capacity)
        self.sending, self.over = threading.Lock(), threading.Lock()
        self.tickets: dict[int, Ticket] = {}
        self.waiting: deque[tuple[int, Int64s]] = deque()
        self.ended = False
        self._numbers = itertools.cycle(range(1 << 32))
        self._putting: _Putting | None = None
        self._someone_sleeps, self._bells = False, Bells()
        self._rest: queue.SimpleQueue[None] = (
            queue.SimpleQueue()
        )  # the one thing that a finalizer may wake a thread with
        self._feeder: threading.Thread | None = None

    # -- sending

    def submit(self, ticket: Ticket) -> None:
        with self.sending:
            if self.ended:
                raise closed(ticket.where())
            if ticket.left and not ticket.begun:
                number = next(number for number in self._numbers if number not in self.tickets)
                entry, add = (number, np.arange(ticket.left)), self.waiting.append
                try:
                    self.tickets[number] = ticket
                    UNDER_WAY.add(ticket)
                    ticket.begun = True  # nothing interrupts between this and what follows it
                    add(entry)
                except BaseException:
                    if not ticket.begun:
                        self.tickets.pop(number, None)
                        UNDER_WAY.discard(ticket)
                    raise
                self._send()

    def _send(self) -> None:
        """Under `sending`: give the kernel as much as there is room for."""
        if self.ring is None:
            return
        self._finish_putting(self.ring)
        while self.waiting and (room := self.depth - self.ring.in_flight) > 0:
            number, indices = entry = self.waiting[0]
            some, ticket = indices[:room], self.tickets[number]
            marks = some.astype(np.uint64) | np.uint64(number << 32)
            self._putting = _Putting(self.ring.tail, entry, some, indices[room:])
            self.ring.put(ticket.fds[some], ticket.offsets[some], ticket.sizes[some], ticket.addresses[some], marks)
            self._finish_putting(self.ring)
        self.ring.send()
        if self.waiting:
            self._have_fed()

    def _finish_putting(self, ring: Ring) -> None:
        """Under `sending`: what is in the ring waits no longer. Also of a call that was interrupted, wherever it was."""
        if self._putting is None:
            return
        tail, entry, some, rest = self._putting
        if ring.tail != tail and self.waiting and self.waiting[0] is entry:
            self.tickets[entry[0]].unsent -= len(some)
            if len(rest):
                self.waiting[0] = (entry[0], rest)
            else:
                self.waiting.popleft()
        self._putting = None

    def _push(self) -> None:
        if self.waiting or (self.ring is not None and self.ring.unsent):
            with self.sending:
                self._send()

    def _prefer(self, ticket: Ticket) -> None:
        """What is waited for goes before what was sent ahead."""
        with self.sending:
            if self.ring is not None:
                self._finish_putting(self.ring)
            self.waiting = deque(sorted(self.waiting, key=lambda rest: self.tickets[rest[0]] is not ticket))

    def _have_fed(self) -> None:
        """Under `sending`. Without a thread of our own the rest goes when somebody submits or waits."""
        if self._feeder is None:
            feeder = threading.Thread(target=self._feed, name="kvdb-feed", daemon=True)
            with contextlib.suppress(RuntimeError):  # the system has no more threads
                feeder.start()
                self._feeder = feeder
        if self._rest.empty():
            self._rest.put(None)

    def _feed(self) -> None:
        """In a thread of its own: send the rest when there is room, unless others do."""
        while True:
            self._rest.get()
            while self.waiting and not self.ended:
                if self._someone_sleeps or self._bells:
                    time.sleep(_NAP_S)
                else:
                    self._sleep(None, self.depth // 4, _NAP_S)
                    with contextlib.suppress(OSError):  # told to who waits
                        self._push()
            if self.ended:
                self._rest.put(None)  # for another feeder, where an interrupt kept us from knowing of the first
                return

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
        """Results are dropped once they are noted; to note some again changes nothing. Of reads of a thread that ended the kernel may
        cancel some: they go again.
        """
        marks, results = ring.peek()
        if not len(marks):
            return
        numbers, indices = marks >> np.uint64(32), (marks & np.uint64(0xFFFFFFFF)).astype(np.int64)
        again = (results == -errno.ECANCELED) & (not self.ended)
        over = ~again
        for number in np.unique(numbers[over]).tolist():
            mine = over & (numbers == number)
            self._note(number, indices[mine], results[mine])
        ring.drop(len(marks))
        if again.any():
            self._send_again(numbers[again], indices[again])
        self._bells.ring()

    def _send_again(self, numbers: Array, indices: Int64s) -> None:
        """What an interrupt keeps from going again is never over: its memory is kept."""
        with self.sending:
            for number in np.unique(numbers).tolist():
                mine = indices[numbers == number]
                self.tickets[number].unsent += len(mine)
                self.waiting.append((number, mine))
            self._have_fed()

    def _note(self, number: int, at: Int64s, results: Int64s | int) -> None:
        """Under `over`: reads of a batch are over."""
        ticket = self.tickets.get(number)
        if ticket is None:
            return  # noted before
        ticket.results[at] = results
        ticket.pending[at] = False
        ticket.left = int(np.count_nonzero(ticket.pending))
        if not ticket.left:
            UNDER_WAY.discard(ticket)
            ticket.keep = None
            self.tickets.pop(number, None)

    def _follow_or_sleep(self, ticket: Ticket, timeout_s: float | None) -> None:
        """Until there may be more results of a batch, or a nap or `timeout_s` have gone by."""
        with self.over:
            if not ticket.left:
                return
            bell = self._bells.hang() if self._someone_sleeps else None
        if bell is not None:
            self._bells.listen(bell, timeout_s)
            return
        in_flight = ticket.left - ticket.unsent
        self._sleep(ticket, min(in_flight, self.depth // 4) if self.waiting else in_flight, timeout_s)

    def _sleep(self, ticket: Ticket | None, count: int, timeout_s: float | None) -> None:
        """Sleep in the kernel for `count` results, or a nap, or `timeout_s`; not at all if someone does already, or if nothing of `ticket`
        is left, whose results another thread may have taken since the caller looked, nor if the kernel has nothing. Then take what came.
        """
        mine = False
        try:
            with self.over:
                self._look()
                ring = self.ring
                if self._someone_sleeps or ring is None or (ticket is not None and not ticket.left):
                    return
                # Nothing would wake it: what came just now made room for what waits to be sent.
                if self.waiting and not ring.in_flight:
                    return
                self._someone_sleeps = mine = True
            nap_s = _NAP_S if count > 1 or ring.unsent else NAP_S
            ring.sleep(max(1, count), nap_s if timeout_s is None else min(timeout_s, nap_s))
        finally:
            if mine:
                self._someone_sleeps = False
                with self.over:
                    self._look()
                    self._bells.ring()

    # -- the end

    def end(self) -> None:
        """Send nothing more. Waits for nothing and takes no lock: a finalizer may call it."""
        self.ended = True
        self._rest.put(None)

    def close(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self.end()
        with self.over, self.sending:
            if self.ring is not None:
                self._finish_putting(self.ring)
            while self.waiting:
                number, indices = self.waiting[0]
                if number in self.tickets:
                    self.tickets[number].unsent -= len(indices)
                self._note(number, indices, -errno.ECANCELED)
                self.waiting.popleft()
            self._bells.ring()
        try:
            for ticket in list(self.tickets.values()):
                self.wait(ticket, max(0.0, deadline - time.monotonic()))
        except Stalled:
            pass  # its memory stays referenced
        with self.over, self.sending:
            self.ring = None
            self._bells.ring()
        if self._feeder is not None:
            self._feeder.join(max(0.0, deadline - time.monotonic()))
