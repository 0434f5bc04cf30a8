"""What every way to have many reads in flight does: a batch of reads goes off at once, and is waited for with an end.

Memory that a read may still write to is never given back: `keep` is referenced until the last read of its batch is over, longer
than its ticket and its `Requests`. A device that never answers costs that memory, and no more.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final

import numpy as np

from kvdb.errors import InvalidInput, Stalled

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Ticket:
    """A batch of reads. Who made it hands it to `send`, `done` and `wait`; only members look inside, but for `begun`.

    begun    some of the reads may be on their way. False after a `send` that failed: none is, nor ever will be
    left     how many reads are not over
    pending  (n,) bool: which
    unsent   about how many of them were not even sent
    results  (n,) int64, bytes read or -errno, of those that are
    """

    __slots__ = (
        "__weakref__", "addresses", "begun", "fds", "keep", "left", "maker", "offsets", "pending", "results", "sizes", "unsent",
    )  # fmt: skip

    def __init__(
        self, maker: object, fds: int | Int64s, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object
    ) -> None:
        self.maker, self.keep = maker, keep
        self.offsets, self.sizes, self.addresses = offsets, sizes, addresses
        count = np.size(fds) if np.ndim(fds) else len(offsets)
        if not count == len(offsets) == len(sizes) == len(addresses):
            raise InvalidInput(
                f"reads: {count} descriptors, {len(offsets)} offsets, {len(sizes)} sizes and {len(addresses)} addresses, expected as many of "
                "each; give one of each for a read"
            )
        self.fds = np.broadcast_to(np.asarray(fds), count)
        self.left = self.unsent = len(offsets)
        self.results: Int64s = np.zeros(self.left, np.int64)
        self.pending = np.ones(self.left, bool)
        self.begun = False

    def where(self) -> str:
        """What is read, for a message: of several files one that is not over."""
        waiting = self.fds[self.pending] if self.pending.any() else self.fds
        fd = int(waiting[0]) if len(waiting) else -1
        try:
            return os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            return f"descriptor {fd}"


UNDER_WAY: Final[set[Ticket]] = set()
"""Batches with reads that are not over. What is never over stays: to write into memory of another use is worse than to lose it."""


NAP_S: Final = 0.05
"""Most that a thread sleeps before it looks again: what a lost wake-up may cost."""


class Bells:
    """Threads that wait for what others take. Not a threading.Condition: an interrupt inside its `with` may leave its lock held for ever,
    and one inside its `wait` lets go of a lock that another thread holds.

    Who waits hangs a bell up under the lock that guards what it waits for, lets go of that lock, and listens.
    """

    def __init__(self) -> None:
        self._hung: set[threading.Lock] = set()

    def __bool__(self) -> bool:
        return bool(self._hung)

    def hang(self) -> threading.Lock:
        bell = threading.Lock()
        bell.acquire()
        self._hung.add(bell)
        return bell

    def listen(self, bell: threading.Lock, timeout_s: float | None) -> None:
        """Until it rings, or a nap, or `timeout_s`."""
        try:
            bell.acquire(timeout=NAP_S if timeout_s is None else max(0.0, min(timeout_s, NAP_S)))
        finally:
            self._hung.discard(bell)

    def ring(self) -> None:
        """Under that lock."""
        while self._hung:
            self._hung.pop().release()


class Requests(ABC):
    """Reads in flight. Any thread may submit, and wait for what another one submitted.

    A child of fork has none of its parent's reads under way: it submits its own.
    """

    name: ClassVar[str]

    @abstractmethod
    def ticket(self, fds: int | Int64s, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object) -> Ticket:
        """A batch of reads, to be sent: who has it already when it is sent knows what may be on its way if sending fails.

        fds        one for all or (n,) int64, open for reading until the reads are over, without O_NONBLOCK, which may make a read fail with
                   EAGAIN
        offsets    (n,) int64, 0 or more: bytes into the file. As `sizes` and `addresses`, not to be changed before the reads are over
        sizes      (n,) int64, 0 or more and less than 2 GiB each: bytes
        addresses  (n,) int64: where in memory the bytes go; as the file demands it (O_DIRECT: whole blocks at whole blocks)
        keep       what owns that memory; referenced until the reads are over
        raises     InvalidInput where the arrays differ in length, or after `close`; in a child of fork Unsupported, as when made
        """

    @abstractmethod
    def send(self, ticket: Ticket) -> None:
        """Send the reads of a batch on their way, once. Waits for none of them, nor for room: what the queue does not take now goes when
        reads before it are over.

        raises  OSError or RuntimeError where the system refuses, InvalidInput after `close` or for a ticket of others. After any of
                them, and after an interrupt, `ticket.begun` tells whether reads may be on their way: then they are waited for as always
        """

    def submit(self, fds: int | Int64s, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object) -> Ticket:
        """`ticket`, then `send`: for memory that `keep` is all there is to know about."""
        ticket = self.ticket(fds, offsets, sizes, addresses, keep)
        self.send(ticket)
        return ticket

    @abstractmethod
    def done(self, ticket: Ticket) -> bool:
        """Whether all reads of a batch are over. Waits for nothing; may say no for a moment more while another thread waits."""

    @abstractmethod
    def wait(self, ticket: Ticket, timeout_s: float | None = None) -> Int64s:
        """Wait for the reads of a batch, and say how each went; again, if asked again.

        timeout_s  at most so long; None: as long as it takes. Other threads run meanwhile
        returns    (n,) int64: bytes read, fewer than asked for at the end of the file (and where a system call would read fewer), or
                   -errno. ECANCELED: closed before the read was sent
        raises     Stalled when some are not over by then: the ticket stays good, and their memory may still be written to.
                   InvalidInput for a ticket of another process or of other requests
        """

    @abstractmethod
    def close(self, timeout_s: float = 1.0) -> None:
        """Take no more, and wait for what is in flight, but not for longer than `timeout_s`; again is fine."""

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_maker(ticket: Ticket, maker: object) -> None:
    """raises  InvalidInput for a ticket that others gave"""
    if ticket.maker is not maker:
        raise InvalidInput(
            f"{ticket.where()}: a ticket of other requests, or of the process that this one was forked from, expected one that was "
            "given here; submit the reads again"
        )


def stalled(ticket: Ticket, timeout_s: float) -> Stalled:
    return Stalled(
        f"{ticket.where()}: {ticket.left} of {len(ticket.results)} reads are not over after {timeout_s:g} s, expected all to be; "
        "look at the device (dmesg), and try again"
    )


def closed(where: str) -> InvalidInput:
    return InvalidInput(f"{where}: the requests are closed, expected them to be open; make new ones")
