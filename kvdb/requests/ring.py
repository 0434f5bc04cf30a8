"""io_uring by system calls: a queue of reads and a queue of their results, shared with the kernel. Knows no batches and takes no lock.

Numbers and layouts are those of linux/io_uring.h. One thread at a time may `put` and `send`, one at a time may `peek` and `drop`, any
may `sleep`. The kernel reads what was put inside our own call, so that order needs no care; what it writes it may write from another
processor, and only on x86 are two plain loads never swapped: elsewhere there is no ring.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import weakref
from typing import Any, Final

import numpy as np

from kvdb.errors import Unsupported

Array = np.ndarray[Any, np.dtype[Any]]

SETUP: Final = 425
ENTER: Final = 426
SETUP_CQSIZE: Final = 1 << 3
SETUP_CLAMP: Final = 1 << 4
ENTER_GETEVENTS: Final = 1 << 0
ENTER_EXT_ARG: Final = 1 << 3
FEATURES: Final = {1 << 0: "SINGLE_MMAP", 1 << 1: "NODROP", 1 << 8: "EXT_ARG"}
"""What we use; Linux 5.11 has all of them."""
AT_RINGS: Final = 0
AT_SQES: Final = 0x10000000
OP_READ: Final = 22

SQE: Final = np.dtype(
    {
        "names": ["opcode", "fd", "off", "addr", "len", "user_data"],
        "formats": ["u1", "i4", "u8", "u8", "u4", "u8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": 64,
    }
)
CQE: Final = np.dtype([("user_data", "u8"), ("res", "i4"), ("flags", "u4")])
_U32 = ctypes.c_uint32


class Offsets(ctypes.Structure):
    """Where in the shared memory the parts of a queue are; of the submissions (struct io_sqring_offsets) or, by its second names, of
    the completions (struct io_cqring_offsets)."""

    _fields_ = (
        ("head", _U32),
        ("tail", _U32),
        ("ring_mask", _U32),
        ("ring_entries", _U32),
        ("flags_or_overflow", _U32),
        ("dropped_or_cqes", _U32),
        ("array_or_flags", _U32),
        ("resv1", _U32),
        ("resv2", ctypes.c_uint64),
    )


class Params(ctypes.Structure):
    """struct io_uring_params"""

    _fields_ = (
        ("sq_entries", _U32),
        ("cq_entries", _U32),
        ("flags", _U32),
        ("sq_thread_cpu", _U32),
        ("sq_thread_idle", _U32),
        ("features", _U32),
        ("wq_fd", _U32),
        ("resv", _U32 * 3),
        ("sq_off", Offsets),
        ("cq_off", Offsets),
    )


class Timespec(ctypes.Structure):
    """struct __kernel_timespec"""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class GetEvents(ctypes.Structure):
    """struct io_uring_getevents_arg"""

    _fields_ = (("sigmask", ctypes.c_uint64), ("sigmask_sz", _U32), ("pad", _U32), ("ts", ctypes.c_uint64))


_SYSCALL: Final = ctypes.CDLL(None, use_errno=True).syscall
_SYSCALL.restype = ctypes.c_long
_SYSCALL.argtypes = (ctypes.c_long, *[ctypes.c_ulong] * 6)
"""Releases the interpreter's lock, as all of ctypes."""


class Ring:
    """Room for `entries` reads to be put, and for as many results as reads may be in flight, which is twice that.

    raises  Unsupported, and why, where the system has no io_uring or does not let us have it
    """

    def __init__(self, entries: int) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            raise Unsupported(f"io_uring: a machine of type {platform.machine()}, expected x86_64; read with threads")
        params = Params(flags=SETUP_CLAMP)
        fd = _SYSCALL(SETUP, entries, ctypes.addressof(params), 0, 0, 0, 0)
        if fd < 0:
            why = os.strerror(ctypes.get_errno())
            raise Unsupported(
                f"io_uring: {why}, expected a kernel that has it and lets this process use it; read with threads"
            )
        weakref.finalize(self, os.close, fd).atexit = False
        if missing := [name for bit, name in FEATURES.items() if not params.features & bit]:
            raise Unsupported(
                f"io_uring: without {', '.join(missing)}, expected Linux 5.11 or later; read with threads"
            )
        self._fd = fd
        self.capacity = int(params.sq_entries)
        sq, cq = params.sq_off, params.cq_off
        size = max(sq.array_or_flags + 4 * params.sq_entries, cq.dropped_or_cqes + CQE.itemsize * params.cq_entries)
        rings = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=AT_RINGS)
        entries_ = mmap.mmap(
            fd, SQE.itemsize * self.capacity, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=AT_SQES
        )

        def number(offset: int) -> Array:
            return np.ndarray(1, np.uint32, rings, offset)

        self._sq_head, self._sq_tail = number(sq.head), number(sq.tail)
        self._cq_head, self._cq_tail = number(cq.head), number(cq.tail)
        self._sqes = np.ndarray(self.capacity, SQE, entries_)
        self._cqes = np.ndarray(params.cq_entries, CQE, rings, cq.dropped_or_cqes)
        self._sqes["opcode"] = OP_READ
        np.ndarray(self.capacity, np.uint32, rings, sq.array_or_flags)[:] = np.arange(self.capacity)

    @property
    def unsent(self) -> int:
        """How many reads were put and the kernel has not taken."""
        return (int(self._sq_tail[0]) - int(self._sq_head[0])) & 0xFFFFFFFF

    @property
    def tail(self) -> int:
        """Where the next read is put: what tells whether a `put` that was interrupted took place."""
        return int(self._sq_tail[0])

    @property
    def in_flight(self) -> int:
        """How many reads were put whose results were not dropped."""
        return (int(self._sq_tail[0]) - int(self._cq_head[0])) & 0xFFFFFFFF

    def put(self, fds: Array, offsets: Array, sizes: Array, addresses: Array, marks: Array) -> None:
        """Queue reads; no more than there is room for: `capacity - unsent`. All of them or, where it fails, none.

        marks  (n,) uint64, which come back with the results
        """
        start, count = int(self._sq_tail[0]), len(marks)
        at = start % self.capacity
        first = min(count, self.capacity - at)
        for here, which in (
            (self._sqes[at : at + first], slice(first)),
            (self._sqes[: count - first], slice(first, count)),
        ):
            if len(here):
                here["fd"], here["off"], here["len"] = fds[which], offsets[which], sizes[which]
                here["addr"], here["user_data"] = addresses[which], marks[which]
        self._sq_tail[0] = (start + count) & 0xFFFFFFFF

    def send(self) -> None:
        """Let the kernel take what was put. Where it has no room for all now (`unsent`), send again later.

        raises  OSError where the system refuses
        """
        while unsent := self.unsent:
            taken = _SYSCALL(ENTER, self._fd, unsent, 0, 0, 0, 0)
            if taken < 0 and ctypes.get_errno() not in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "io_uring_enter")
            if taken <= 0:
                return

    def sleep(self, count: int, timeout_s: float | None) -> None:
        """Wait until `count` results more are there than were dropped, at most so long; a signal may end it earlier."""
        flags, argument = ENTER_GETEVENTS | ENTER_EXT_ARG, GetEvents()
        if timeout_s is not None:
            span = Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
            argument.ts = ctypes.addressof(span)
        found = _SYSCALL(ENTER, self._fd, 0, count, flags, ctypes.addressof(argument), ctypes.sizeof(argument))
        if found < 0 and ctypes.get_errno() not in (errno.ETIME, errno.EINTR, errno.EAGAIN, errno.EBUSY):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "io_uring_enter")

    def peek(self) -> tuple[Array, Array]:
        """The marks and results, (n,) uint64 and int32, of reads that are over; again and again, until they are dropped."""
        head, tail = int(self._cq_head[0]), int(self._cq_tail[0])
        at, count = head % len(self._cqes), (tail - head) & 0xFFFFFFFF
        found = self._cqes[at : at + count]
        if len(found) < count:
            found = np.concatenate((found, self._cqes[: count - len(found)]))
        return found["user_data"].copy(), found["res"].copy()

    def drop(self, count: int) -> None:
        """Make room: the first `count` results were noted."""
        self._cq_head[0] = (int(self._cq_head[0]) + count) & 0xFFFFFFFF
