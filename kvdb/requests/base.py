"""What every way to have many reads in flight does: a batch of reads goes off at once, and is waited for with an end.

Memory that a read may still write to is never given back: `keep` is referenced until the last read of its batch is over, longer
than its ticket and its `Requests`. A device that never answers costs that memory, and no more.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Final

import numpy as np

from kvdb.errors import InvalidInput, Stalled

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Ticket:
    """A batch of reads that was submitted. Who submitted it hands it to `done` and `wait`; only members look inside.

    left     how many reads are not over
    unsent   how many of them were not even sent
    results  (n,) int64, bytes read or -errno, of those that are
    """

    __slots__ = ("__weakref__", "addresses", "fd", "keep", "left", "maker", "offsets", "results", "sizes", "unsent")

    def __init__(self, maker: object, fd: int, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object) -> None:
        self.maker, self.fd, self.keep = maker, fd, keep
        self.offsets, self.sizes, self.addresses = offsets, sizes, addresses
        if not len(offsets) == len(sizes) == len(addresses):
            raise InvalidInput(
                f"reads: {len(offsets)} offsets, {len(sizes)} sizes and {len(addresses)} addresses, expected as many of each; "
                "give one of each for a read"
            )
        self.left = self.unsent = len(offsets)
        self.results: Int64s = np.zeros(self.left, np.int64)

    def where(self) -> str:
        """What is read, for a message."""
        try:
            return os.readlink(f"/proc/self/fd/{self.fd}")
        except OSError:
            return f"descriptor {self.fd}"


UNDER_WAY: Final[set[Ticket]] = set()
"""Batches with reads that are not over. What is never over stays: to write into memory of another use is worse than to lose it."""


class Requests(ABC):
    """Reads in flight. Any thread may submit, and wait for what another one submitted.

    A child of fork has none of its parent's reads under way: it submits its own.
    """

    name: ClassVar[str]

    @abstractmethod
    def submit(self, fd: int, offsets: Int64s, sizes: Int64s, addresses: Int64s, keep: object) -> Ticket:
        """Send reads on their way. Waits for none of them, nor for room: what the queue does not take now goes when reads before it are
        over.

        fd         open for reading until the reads are over, without O_NONBLOCK, which may make a read fail with EAGAIN
        offsets    (n,) int64, 0 or more: bytes into the file. As `sizes` and `addresses`, not to be changed before the reads are over
        sizes      (n,) int64, 0 or more and less than 2 GiB each: bytes
        addresses  (n,) int64: where in memory the bytes go; as the file demands it (O_DIRECT: whole blocks at whole blocks)
        keep       what owns that memory; referenced until the reads are over
        raises     InvalidInput where the arrays differ in length, or after `close`; in a child of fork Unsupported, as when made
        """

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
