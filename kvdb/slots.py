"""Which rows of which files are in which slots: the bookkeeping of a cache, without its memory.

A slot is a number; what lies there (host memory, a device's) is its owner's business. A call costs a few NumPy calls and
a few nanoseconds a row, whatever the number of rows: a decoding step asks for 100 to 40 000 of them, thirty times.

A slot is pinned while someone reads or fills it, and is then neither evicted nor handed out again, even if its row was dropped. Rows
go in batches, those of lowest score first, so that scores are computed once in many calls. Not thread-safe: its owner locks.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

import numpy as np

from kvdb.replacement import Replacement, Uses

Array = np.ndarray[Any, np.dtype[Any]]

NONE: Final = -1
"""Where a row has no slot, and in the column `key` of a slot without a row."""
BATCH: Final = 32
"""Slots are made free for at least one in so many: scoring all of them then costs little for each."""
SAMPLE: Final = 1 << 17
"""Most slots of which scores are computed at a time, drawn at random where there are more, unless more than one in BATCH of so many must go."""
HALF_LIFE: Final = 4.0
"""In uses of as many rows as there are slots."""


class SlotTable:
    """Slots of one kind. Rows are numbers below `count` inside a file, named by anything hashable that tells its content from any other."""

    def __init__(self, policy: Replacement) -> None:
        self.policy = policy
        self.hits = self.misses = self.admitted = self.evicted = 0  # rows
        self.in_service = 0
        self._now, self._next_id = 0, 0
        self._chance = np.random.default_rng(0)
        self._maps: dict[Hashable, Array] = {}  # key -> (count,) int32: slot of each row
        self._ids: dict[Hashable, int] = {}
        self._keys: dict[int, Hashable] = {}
        self._held: dict[int, int] = {}  # id -> slots
        self._key, self._row = np.empty(0, np.int64), np.empty(0, np.int64)
        self._pins, self._used_at = np.empty(0, np.int32), np.empty(0, np.int64)
        self._count, self._weight = np.empty(0), np.empty(0)
        self._serves = np.empty(0, bool)
        self._free = np.empty(0, np.int64)  # the first `free` of them, to be taken from the end
        self.free = 0

    def add(self, start: int, stop: int) -> None:
        """Put slots [start, stop), which are not in service, into service."""
        if stop > len(self._key):
            size = max(stop, 2 * len(self._key))
            for name, empty in (
                ("_key", NONE),
                ("_row", 0),
                ("_pins", 0),
                ("_used_at", 0),
                ("_count", 0),
                ("_weight", 0),
            ):
                setattr(self, name, _grown(getattr(self, name), size, empty))
            self._serves, self._free = _grown(self._serves, size, False), _grown(self._free, size, 0)
        assert not self._serves[start:stop].any()
        self._serves[start:stop] = True
        self.in_service += stop - start
        self._put_back(np.arange(start, stop))

    def remove(self, start: int, stop: int) -> bool:
        """Take slots out of service, their rows evicted. False, and nothing happens, where one of them is pinned."""
        if self._pins[start:stop].any():
            return False
        slots = np.arange(start, stop)
        held = slots[self._key[slots] != NONE]
        self._unmap(held)
        self.evicted += len(held)
        kept = self._free[: self.free]
        kept = kept[(kept < start) | (kept >= stop)]
        self._free[: len(kept)] = kept
        self.free = len(kept)
        self._serves[start:stop] = False
        self.in_service -= stop - start
        return True

    def find(self, key: Hashable, rows: Array) -> Array:
        """(n,) int64: the slot of each row, or NONE. Changes nothing."""
        found = self._maps.get(key)
        if found is None:
            return np.full(len(rows), NONE, np.int64)
        return found.take(rows).astype(np.int64)

    def lookup(self, key: Hashable, rows: Array) -> Array:
        """As `find`, and counts as a use: what is found is pinned until `release`. Rows may repeat."""
        slots = self.find(key, rows)
        self._now += len(rows)
        found = slots if key in self._maps and slots.min(initial=0) >= 0 else slots[slots >= 0]
        self.hits += len(found)
        self.misses += len(rows) - len(found)
        if len(found):
            self._pins[found] += 1  # a slot that is there twice counts once, here and in `release`
            self._used_at[found] = self._now
            self._count[found] += 1
        return slots

    def admit(self, key: Hashable, rows: Array, count: int) -> Array:
        """Give slots to rows that have none, each once; others are evicted for them where there is no room.

        rows     (n,) int64, ascending
        count    rows of the whole file
        returns  (n,) int64, pinned until `release`; NONE for the last ones where the slots that are not pinned do not suffice. Rows that
                 follow each other have slots that do, as far as possible
        """
        if len(rows) > self.free:
            self._evict(len(rows) - self.free)
        n = min(len(rows), self.free)
        slots = np.full(len(rows), NONE, np.int64)
        if n:
            self.free -= n
            taken = np.sort(self._free[self.free : self.free + n])
            slots[:n] = taken
            number = self._id(key, count)
            self._held[number] += n
            self._maps[key][rows[:n]] = taken
            self._key[taken], self._row[taken], self._pins[taken] = number, rows[:n], 1
            self._used_at[taken], self._count[taken], self._weight[taken] = self._now, 1, 0
            self.admitted += n
        return slots

    def pin(self, slots: Array) -> None:
        """Once more, until one more `release`."""
        self._pins[slots] += 1

    def release(self, slots: Array) -> None:
        """Take back what `lookup`, `admit` or `pin` did to slots, given as they were there: a slot that is there twice counts once."""
        self._pins[slots] -= 1
        over = slots[(self._pins[slots] == 0) & (self._key[slots] == NONE)]
        if len(over):
            self._put_back(np.unique(over))

    def weigh(self, key: Hashable, rows: Array, weights: Array) -> None:
        """Say what rows are worth, in addition to what was said before; of rows without a slot it is forgotten. Rows do not repeat."""
        slots = self.find(key, rows)
        held = slots >= 0
        self._weight[slots[held]] += weights[held]

    def forget(self, key: Hashable, rows: Array) -> None:
        """Take rows out; pinned slots serve again once they are released."""
        slots = self.find(key, rows)
        self._take_out(np.unique(slots[slots >= 0]))

    def drop(self, key: Hashable) -> None:
        """Take out all rows of a file, as `forget`."""
        found = self._maps.get(key)
        if found is not None:
            self._take_out(found[found >= 0].astype(np.int64))

    def _take_out(self, slots: Array) -> None:
        if len(slots):
            self._unmap(slots)
            self._put_back(slots[self._pins[slots] == 0])

    def _evict(self, at_least: int) -> None:
        """Make slots free, as far as they are not pinned."""
        drawn = np.arange(len(self._key))
        if len(drawn) > SAMPLE and at_least <= SAMPLE // BATCH:
            drawn = np.unique(self._chance.integers(0, len(drawn), SAMPLE))
        candidates = drawn[(self._pins[drawn] == 0) & (self._key[drawn] != NONE)]
        if len(candidates) < at_least:
            candidates = np.flatnonzero((self._pins == 0) & (self._key != NONE))
        n = min(max(at_least, min(self.in_service, SAMPLE) // BATCH), len(candidates))
        if n < len(candidates):
            uses = Uses(self._used_at[candidates], self._count[candidates], self._weight[candidates])
            scores = self.policy.scores(uses, self._now, HALF_LIFE * self.in_service)
            candidates = candidates[np.argpartition(scores, n - 1)[:n]] if n else candidates[:0]
        if n:
            self._unmap(candidates)
            self._put_back(candidates)
            self.evicted += n

    def _put_back(self, slots: Array) -> None:
        self._free[self.free : self.free + len(slots)] = np.sort(slots)[::-1]
        self.free += len(slots)

    def _unmap(self, slots: Array) -> None:
        numbers = self._key[slots]
        for number, n in zip(*(a.tolist() for a in np.unique(numbers, return_counts=True)), strict=True):
            key = self._keys[number]
            self._maps[key][self._row[slots[numbers == number]]] = NONE
            self._held[number] -= n
            if not self._held[number]:  # the map of a file of which nothing is here would be all it leaves
                del self._maps[key], self._ids[key], self._keys[number], self._held[number]
        self._key[slots] = NONE

    def _id(self, key: Hashable, count: int) -> int:
        if key not in self._ids:
            self._ids[key], self._keys[self._next_id], self._held[self._next_id] = self._next_id, key, 0
            self._maps[key] = np.full(count, NONE, np.int32)
            self._next_id += 1
        return self._ids[key]


def _grown(column: Array, size: int, empty: float) -> Array:
    grown = np.full(size, empty, column.dtype)
    grown[: len(column)] = column
    return grown
