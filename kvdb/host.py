"""The host tier: rows of sealed files in memory of our own, up to a budget; one for all readers and threads of a store handle.

For files that are read with O_DIRECT, which the system does not cache. Rows of one size have a pool, made of slabs that all pools
take out of one budget: a pool grows while there is any, takes slabs from the largest pool while it has less than its
share, and otherwise evicts rows of its own, as its policy says.

    lease   which slots rows of one file or several are in; those that are in none are given one and read there, those that someone else is reading are
            waited for. What was leased stays where it is until it is released.

Beside the budget a read may need memory of its own while it lasts: for the blocks around rows that do not begin and end with one, and
for rows for which there is no slot, all being leased, or a row being larger than the budget. Locks are held for
bookkeeping only, never while waiting for a device.

What a finalizer calls (`release`, `drop`, `retire`) comes from the garbage collector, at any allocation, also from inside a call of ours
that holds the lock: it is put down for whoever takes the lock next. An interrupt may end a call between any two steps: what is written
down of the pools is then not to be trusted, and they are begun anew. Leases keep what they have; its memory is beside the budget until
they are released.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np

from kvdb import files, forks
from kvdb.arrivals import Arrival, FileRows, RowFile
from kvdb.errors import InvalidInput
from kvdb.replacement import REPLACEMENT
from kvdb.requests import Requests, best_requests
from kvdb.slabs import Pool, private_pages

Array = np.ndarray[Any, np.dtype[Any]]

_PIECE_ROWS: Final = 256
"""Most that is asked for, and waited for, at a time: what came first can be used while the rest is under way."""
_PIECE_BYTES: Final = 32 << 20


class Part(NamedTuple):
    """Some of the rows of a lease.

    memory  (m, row_bytes) uint8
    which   (k,) int64: which rows of `memory` they are
    places  (k,) int64: which of the leased rows they are
    """

    memory: Array
    which: Array
    places: Array


@dataclass(eq=False, slots=True, kw_only=True)
class Lease:
    """Rows of files, one file after the other, and where they are, or will be.

    slots     (n,) int64: slots of `pool`, -1 for a row that has none and is read into memory of its own
    own       (n,) int64: which row of that memory; as `slots` where there is none
    numbers   (n,) int64: the arrival a row is waited for with, 0 for none
    arrivals  of those that are waited for, in the order they were asked for
    fetched   bytes that were asked of the files for this lease
    released  or put down for it; whoever drops one that is not, has it put down in `later`
    """

    wanted: Sequence[FileRows]
    pool: Pool
    slots: Array
    own: Array
    numbers: Array
    arrivals: list[Arrival]
    later: deque[Lease | RowFile]
    fetched: int = 0
    released: bool = False

    def __del__(self) -> None:
        if not getattr(self, "released", True):  # absent where an interrupt came while this was made
            self.later.append(self)

    @property
    def pooled(self) -> bool:
        """Whether all rows have a slot."""
        return bool(self.slots.min(initial=0) >= 0)


class HostTier:
    """Thread-safe. A child of fork starts with an empty one.

    policy  a name of `kvdb.replacement.REPLACEMENT`
    """

    def __init__(self, budget_bytes: int, policy: str = "lru") -> None:
        if policy not in REPLACEMENT:
            raise InvalidInput(f"host tier: policy {policy!r}, expected one of {sorted(REPLACEMENT)}")
        self.budget_bytes, self.policy = budget_bytes, policy
        self._begin()
        forks.watch(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[int, Pool] = {}
        self._arrivals: dict[int, Arrival] = {}
        self._last = 0
        self._requests: Requests | None = None
        self._later: deque[Lease | RowFile] = deque()  # to be released or dropped
        self._retired: deque[RowFile] = deque()
        self._writing = False

    def after_fork(self) -> None:
        self._begin()

    # -- leasing

    def lease(self, wanted: Sequence[FileRows], *, only_slots: bool = False) -> Lease:
        """Give rows a place, begin to read those that are not there in one batch, and pin all of them until `release`.

        wanted      of one file or several, each once, all with rows of one size
        only_slots  rows for which there is no slot are left alone: for one that is not waited for
        raises      OSError where the system refuses to read
        """
        self._reap()
        with self._lock:
            self._catch_up()
            pool = self._pool(wanted[0].file.row_bytes)
            assert all(file.row_bytes == pool.row_bytes for file, _ in wanted)
            self._writing = True
            found = [pool.table.lookup(file.key, rows) for file, rows in wanted]
            begun = self._begin_missing(pool, wanted, found)
            slots = found[0] if len(found) == 1 else np.concatenate(found)
            numbers = np.zeros(len(slots), np.int64)
            if self._arrivals:
                np.copyto(numbers, pool.arrival[slots], where=slots >= 0)
            waited = [self._arrivals[number] for number in sorted({*numbers[numbers > 0].tolist()})]
            lease = Lease(
                wanted=wanted, pool=pool, slots=slots, own=slots, numbers=numbers, arrivals=waited, later=self._later
            )
            self._writing = False
        try:
            self._submit(lease, begun)
            if not (lease.pooled or only_slots):
                self._submit(lease, self._begin_private(lease))
        except BaseException:
            self.release(lease)
            raise
        return lease

    def wait(self, lease: Lease, timeout_s: float) -> None:
        """Have all rows of a lease where they are to be.

        raises  OSError or Damaged for a row that could not be read, Stalled after `timeout_s`: others can still be read
        """
        deadline = time.monotonic() + timeout_s
        for arrival in lease.arrivals:
            self._wait(lease, arrival, deadline, timeout_s)

    def parts(self, lease: Lease, timeout_s: float) -> Iterator[Part]:
        """Rows as they come: first those that are there, then what is waited for. Otherwise as `wait`."""
        deadline = time.monotonic() + timeout_s
        places = np.flatnonzero(lease.numbers == 0)
        if len(places):
            yield Part(lease.pool.view, lease.slots[places], places)
        for arrival in lease.arrivals:
            self._wait(lease, arrival, deadline, timeout_s)
            places = np.flatnonzero(lease.numbers == arrival.number)
            yield Part(arrival.memory, (lease.own if arrival.pool is None else lease.slots)[places], places)

    def release(self, lease: Lease) -> None:
        """Let the rows of a lease be evicted; again is fine. Takes no lock that its thread may hold."""
        self._later.append(lease)
        self._catch_up_if_free()

    def absent_bytes(self, file: RowFile) -> int:
        """Bytes of the rows of a file that are not here."""
        with self._lock:
            self._catch_up()
            held = self._pool(file.row_bytes).table.find(file.key, np.arange(file.rows)) >= 0
        return (file.rows - int(np.count_nonzero(held))) * file.row_bytes

    def forget(self, file: RowFile, rows: Array) -> None:
        """Have rows read anew when they are asked for next."""
        with self._lock:
            self._catch_up()
            self._writing = True
            self._pool(file.row_bytes).table.forget(file.key, rows)
            self._writing = False

    def drop(self, file: RowFile) -> None:
        """All rows of a file, which nobody will ask for again. Takes no lock that its thread may hold."""
        self._later.append(file)
        self._catch_up_if_free()

    def weigh(self, file: RowFile, rows: Array, weights: Array) -> None:
        """Say what rows are worth, for a policy that looks at it: (n,) each, rows not repeated."""
        with self._lock:
            self._catch_up()
            self._writing = True
            self._pool(file.row_bytes).table.weigh(file.key, rows, weights)
            self._writing = False

    def retire(self, file: RowFile) -> bool:
        """Nobody reads a file any more. Returns whether its descriptor is still read through: then it is closed here, later. Takes no lock
        that its thread may hold.
        """
        busy = any(file in arrival.files for arrival in list(self._arrivals.values()))
        if busy:
            self._retired.append(file)
        return busy

    # -- figures

    def stats(self) -> dict[str, int | str]:
        """Rows since the beginning: found, not found, taken in, evicted. Bytes now: of slabs in use, and most that they may be."""
        with self._lock:
            self._catch_up()
            tables = [pool.table for pool in self._pools.values()]
            return {
                "hits": sum(table.hits for table in tables),
                "misses": sum(table.misses for table in tables),
                "admitted": sum(table.admitted for table in tables),
                "evicted": sum(table.evicted for table in tables),
                "bytes": self.used_bytes,
                "budget_bytes": self.budget_bytes,
                "policy": self.policy,
            }

    @property
    def used_bytes(self) -> int:
        return sum(pool.used_bytes for pool in self._pools.values())

    def close(self, timeout_s: float = 1.0) -> None:
        """Give everything back but what a device still writes to; closing twice is fine. Nothing may be leased."""
        requests, self._requests = self._requests, None
        if requests is not None:
            requests.close(timeout_s)
            self._requests = requests
            self._reap()
        with self._lock:
            self._catch_up()
        self._begin()

    # -- what was put down or interrupted

    def _catch_up(self) -> None:
        """Under the lock, before anything is looked up: what was put down while somebody held it, and what an interrupt left."""
        if self._writing:
            self._pools = {}
            self._writing = False
        while self._later:
            self._writing = True
            given = self._later.popleft()
            if isinstance(given, RowFile):
                self._pool(given.row_bytes).table.drop(given.key)
            elif not given.released:
                given.released = True
                if self._is_ours(given.pool):
                    given.pool.table.release(given.slots if given.pooled else given.slots[given.slots >= 0])
            self._writing = False
        for _ in range(len(self._retired)):
            file = self._retired.popleft()
            if any(file in arrival.files for arrival in self._arrivals.values()):
                self._retired.append(file)
            else:
                files.close(file.fd)

    def _catch_up_if_free(self) -> None:
        """Where the lock is taken, and be it by our own thread, whoever takes it next does it."""
        if not self._lock.locked():
            with self._lock:
                self._catch_up()

    def _is_ours(self, pool: Pool) -> bool:
        """Not one from before an interrupt or a fork."""
        return self._pools.get(pool.row_bytes) is pool

    # -- room

    def _pool(self, row_bytes: int) -> Pool:
        pool = self._pools.get(row_bytes)
        if pool is None:
            pool = self._pools[row_bytes] = Pool(row_bytes, self.budget_bytes, REPLACEMENT[self.policy])
        return pool

    def _make_room(self, pool: Pool, rows: int) -> None:
        """Give a pool slabs until it has free slots for so many rows, as far as it may have more."""
        share = self.budget_bytes // len(self._pools)
        while pool.table.free < rows and pool.can_grow:
            if self.used_bytes + pool.slab_bytes > self.budget_bytes:
                below = not pool.used_bytes or pool.used_bytes + pool.slab_bytes <= share
                if not (below and self._take_slabs(pool)):
                    return
            pool.grow()

    def _take_slabs(self, pool: Pool) -> bool:
        """Make room for a slab of `pool` at the expense of others, the largest first. False where too much of them is leased."""
        while self.used_bytes + pool.slab_bytes > self.budget_bytes:
            others = sorted(
                (p for p in self._pools.values() if p is not pool), key=lambda p: p.used_bytes, reverse=True
            )
            if not any(other.shrink() for other in others):
                return False
        return True

    # -- arrivals

    def _begin_missing(self, pool: Pool, wanted: Sequence[FileRows], found: list[Array]) -> list[Arrival]:
        """Give slots to rows that have none, as far as there are any, and put them into `found`. The caller holds the lock."""
        lacking = _lacking(wanted, found)
        if not lacking:
            return []
        self._make_room(pool, sum(len(each.rows) for each in lacking))
        begun, taken = [], []
        for number, file, rows, places, inverse in lacking:
            given = pool.table.admit(file.key, rows, file.rows)
            found[number][places] = given[inverse]
            begun.append(FileRows(file, rows[given >= 0]))
            taken.append(given[given >= 0])
        slots = np.concatenate(taken)
        pool.table.pin(slots)  # for the arrivals, beside the pins of the lease
        arrivals = self._pieces(begun, slots, pool.view, pool)
        for arrival in arrivals:
            pool.arrival[arrival.slots] = arrival.number
        return arrivals

    def _begin_private(self, lease: Lease) -> list[Arrival]:
        """Memory of their own for the rows of a lease that have no slot."""
        starts = np.cumsum([0, *(len(rows) for _, rows in lease.wanted)])
        lacking = _lacking(lease.wanted, [lease.slots[start:stop] for start, stop in pairwise(starts)])
        own, count, row_bytes = lease.slots.copy(), 0, lease.pool.row_bytes
        for number, _, rows, places, inverse in lacking:
            own[starts[number] + places] = count + inverse
            count += len(rows)
        memory = np.frombuffer(private_pages(count * row_bytes), np.uint8)[: count * row_bytes].reshape(-1, row_bytes)
        with self._lock:
            begun = self._pieces([FileRows(each.file, each.rows) for each in lacking], np.arange(count), memory, None)
        alone = lease.slots < 0
        lease.own, lease.numbers[alone] = own, begun[0].number + own[alone] // len(begun[0].rows)
        return begun

    def _pieces(self, wanted: list[FileRows], slots: Array, memory: Array, pool: Pool | None) -> list[Arrival]:
        """Arrivals, not sent yet, all but the last of as many rows. The caller holds the lock."""
        files, rows = tuple(file for file, _ in wanted), np.concatenate([rows for _, rows in wanted])
        of = np.repeat(np.arange(len(files)), [len(rows) for _, rows in wanted])
        piece = max(1, min(_PIECE_ROWS, _PIECE_BYTES // files[0].row_bytes))
        begun = []
        for at in range(0, len(rows), piece):
            some = slice(at, at + piece)
            self._last += 1
            arrival = Arrival(self._last, files, of[some], rows[some], slots[some], memory, pool)
            self._arrivals[self._last] = arrival
            begun.append(arrival)
        return begun

    def _submit(self, lease: Lease, begun: list[Arrival]) -> None:
        """Send arrivals on their way. What cannot be sent has failed; what an interrupt keeps from that is sent by who waits for it."""
        waited = {arrival.number for arrival in lease.arrivals}
        lease.arrivals += [arrival for arrival in begun if arrival.number not in waited]
        try:
            for arrival in begun:
                self._send(arrival)
                lease.fetched += arrival.asked_bytes
        except BaseException as trouble:
            for arrival in begun:
                self._fail_unsent(arrival, trouble)
            raise

    def _send(self, arrival: Arrival) -> None:
        with arrival.lock:
            if not (arrival.over or arrival.sent):
                arrival.send(self._sending())

    def _fail_unsent(self, arrival: Arrival, trouble: BaseException) -> None:
        """Where reads may have gone off the arrival stays, and its slots pinned, until they are over."""
        number = trouble.errno if isinstance(trouble, OSError) else None
        with arrival.lock:
            if not (arrival.over or arrival.sent):
                self._end(arrival, arrival.fail(number or errno.EIO))

    def _sending(self) -> Requests:
        with self._lock:
            if self._requests is None:
                self._requests = best_requests()
            return self._requests

    def _wait(self, lease: Lease, arrival: Arrival, deadline: float, timeout_s: float) -> None:
        if not (arrival.over or arrival.sent):
            try:
                self._send(arrival)
            except BaseException as trouble:
                self._fail_unsent(arrival, trouble)
                raise
        if not arrival.over:
            self._settle(arrival, min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
        arrival.expect(lease.wanted)

    def _settle(self, arrival: Arrival, timeout_s: float) -> None:
        """Take what has come of one that was sent.

        raises  Stalled where not all has
        """
        assert arrival.ticket is not None
        results = self._sending().wait(arrival.ticket, timeout_s)
        with arrival.lock:
            if not arrival.over:
                self._end(arrival, arrival.take(results))

    def _end(self, arrival: Arrival, there: Array) -> None:
        """The caller holds the arrival's lock.

        there  (n,) of bool: which rows have come
        """
        with self._lock:
            self._catch_up()
            self._writing = True
            pool = arrival.pool
            if pool is not None and self._is_ours(pool):
                pool.arrival[arrival.slots] = 0
                for number, file in enumerate(() if there.all() else arrival.files):
                    pool.table.forget(file.key, arrival.rows[~there & (arrival.of == number)])
                pool.table.release(arrival.slots)
            self._arrivals.pop(arrival.number, None)
            arrival.end()
            self._writing = False
            self._catch_up()

    def _reap(self) -> None:
        """Take what has come for nobody in particular, and send what an interrupt kept from it. What fails is told to who waits."""
        for arrival in list(self._arrivals.values()) if self._arrivals else ():
            if arrival.lock.locked():
                continue
            try:
                if not arrival.sent:
                    self._send(arrival)
                elif arrival.ticket is not None and self._sending().done(arrival.ticket):
                    self._settle(arrival, 0.0)
            except (OSError, RuntimeError, MemoryError, InvalidInput) as trouble:
                self._fail_unsent(arrival, trouble)


class _Lacking(NamedTuple):
    """Rows of a lease that are nowhere.

    number   which of the wanted they are of
    rows     (m,) int64, ascending, each once
    places   (n,) int64: where they were asked for, among the rows of that file
    inverse  (n,) int64: which of `rows` is asked for there
    """

    number: int
    file: RowFile
    rows: Array
    places: Array
    inverse: Array


def _lacking(wanted: Sequence[FileRows], found: list[Array]) -> list[_Lacking]:
    """Of each file that has any. found: for each of the wanted (n,) int64, below 0 for rows that have no slot."""
    lacking = []
    for number, ((file, rows), slots) in enumerate(zip(wanted, found, strict=True)):
        places = np.flatnonzero(slots < 0)
        if len(places):
            each, inverse = np.unique(rows[places], return_inverse=True)
            lacking.append(_Lacking(number, file, each, places, inverse))
    return lacking
