"""The table of slots does what a dict of rows would: every row is where it was put until it is evicted, and what is pinned stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvdb.replacement import REPLACEMENT
from kvdb.slots import BATCH, NONE, SlotTable

SLAB, SLABS, ROWS = 5, 4, 30
KEYS = ("a", "b", (1, 2, 3))


class Slots(RuleBasedStateMachine):
    """Shrinks to few calls on one file."""

    @initialize(policy=st.sampled_from(sorted(REPLACEMENT)))
    def begin(self, policy: str) -> None:
        self.table = SlotTable(REPLACEMENT[policy])
        self.where: dict[tuple[object, int], int] = {}
        self.pins: dict[int, int] = {}
        self.slabs: set[int] = set()
        self.leases: list[list[int]] = []
        self.counts = {"hits": 0, "misses": 0, "admitted": 0, "evicted": 0}

    def _gone(self, found: set[int]) -> set[int]:
        """Rows that the table evicted: away from the model too. Returns their slots."""
        gone = {place: slot for place, slot in self.where.items() if slot not in found}
        for place, slot in gone.items():
            assert not self.pins.get(slot), "a pinned row was evicted"
            del self.where[place]
        self.counts["evicted"] += len(gone)
        return set(gone.values())

    def _held(self) -> set[int]:
        """Slots that the table says rows are in; each row in one."""
        rows = [self.table.find(key, np.arange(ROWS)).tolist() for key in KEYS]
        held = [slot for each in rows for slot in each if slot != NONE]
        assert len(set(held)) == len(held), "two rows in one slot"
        return set(held)

    @rule(slab=st.integers(0, SLABS - 1))
    def add(self, slab: int) -> None:
        if slab not in self.slabs:
            self.table.add(slab * SLAB, (slab + 1) * SLAB)
            self.slabs.add(slab)

    @rule(slab=st.integers(0, SLABS - 1))
    def remove(self, slab: int) -> None:
        if slab in self.slabs:
            slots = range(slab * SLAB, (slab + 1) * SLAB)
            removed = self.table.remove(slots.start, slots.stop)
            assert removed == (not any(self.pins.get(slot) for slot in slots))
            if removed:
                assert self._gone(self._held()) <= set(slots)
                self.slabs.discard(slab)

    @rule(key=st.sampled_from(KEYS), rows=st.lists(st.integers(0, ROWS - 1), max_size=12))
    def ask(self, key: object, rows: list[int]) -> None:
        """As a reader does: what is there is pinned, the rest admitted as far as there is room."""
        found = self.table.lookup(key, np.array(rows, np.int64)).tolist()
        assert found == [self.where.get((key, row), NONE) for row in rows]
        lease = {slot for slot in found if slot != NONE}
        for slot in lease:
            self.pins[slot] = self.pins.get(slot, 0) + 1
        hits = sum(slot != NONE for slot in found)
        self.counts["hits"] += hits
        self.counts["misses"] += len(rows) - hits
        missing = sorted({row for row, slot in zip(rows, found, strict=True) if slot == NONE})
        free = len(self.slabs) * SLAB - len(set(self.where.values()) | {s for s, n in self.pins.items() if n})
        unpinned = sum(not self.pins.get(slot) for slot in self.where.values())
        given = self.table.admit(key, np.array(missing, np.int64), ROWS).tolist()
        new = [slot for slot in given if slot != NONE]
        assert len(new) == min(len(missing), free + unpinned), "room was not used, or made up"
        assert given[: len(new)] == new
        gone = self._gone(self._held() - set(new))
        assert len(gone) <= max(len(new) - free, len(self.slabs) * SLAB // BATCH, 0)
        for row, slot in zip(missing, new, strict=False):
            assert slot // SLAB in self.slabs
            assert not self.pins.get(slot)
            self.where[key, row], self.pins[slot] = slot, 1
        self.counts["admitted"] += len(new)
        self.leases += [sorted(lease), new]

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), twice=st.booleans())
    def release(self, data: st.DataObject, twice: bool) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.table.release(np.array(lease + lease if twice else lease, np.int64))  # a row that was asked for twice
        for slot in lease:
            self.pins[slot] -= 1

    @rule(key=st.sampled_from(KEYS), rows=st.sets(st.integers(0, ROWS - 1), max_size=6))
    def weigh(self, key: object, rows: set[int]) -> None:
        self.table.weigh(key, np.array(sorted(rows), np.int64), np.ones(len(rows)))

    @rule(key=st.sampled_from(KEYS), rows=st.lists(st.integers(0, ROWS - 1), max_size=6))
    def forget(self, key: object, rows: list[int]) -> None:
        self.table.forget(key, np.array(rows, np.int64))
        for row in rows:
            self.where.pop((key, row), None)

    @rule(key=st.sampled_from(KEYS))
    def drop(self, key: object) -> None:
        self.table.drop(key)
        self.where = {place: slot for place, slot in self.where.items() if place[0] != key}

    @invariant()
    def it_holds_what_the_dict_holds(self) -> None:
        for key in KEYS:
            expected = [self.where.get((key, row), NONE) for row in range(ROWS)]
            assert self.table.find(key, np.arange(ROWS)).tolist() == expected
        taken = set(self.where.values()) | {slot for slot, count in self.pins.items() if count}
        assert self.table.in_service == len(self.slabs) * SLAB
        assert self.table.free == self.table.in_service - len(taken)
        free = self.table._free[: self.table.free].tolist()
        assert len(set(free)) == len(free)
        assert not set(free) & taken
        assert {slot // SLAB for slot in free} <= self.slabs
        assert {name: getattr(self.table, name) for name in self.counts} == self.counts


Slots.TestCase.settings = settings(stateful_step_count=40)
test_it_agrees_with_a_dict = Slots.TestCase


def table(slots: int, policy: str = "lru") -> SlotTable:
    found = SlotTable(REPLACEMENT[policy])
    found.add(0, slots)
    return found


def rows(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def put(into: SlotTable, key: str, *numbers: int) -> list[int]:
    slots = into.admit(key, rows(*numbers), 1000)
    into.release(slots[slots >= 0])
    return slots.tolist()


def test_rows_that_follow_each_other_have_slots_that_do() -> None:
    full = table(64)
    slots = put(full, "a", *range(64))
    assert slots == list(range(64))
    assert np.diff(put(full, "b", *range(20))).tolist() == [1] * 19  # where the oldest were, which came together


def test_a_batch_goes_at_a_time() -> None:
    full = table(10 * BATCH)
    put(full, "a", *range(10 * BATCH))
    put(full, "b", 0)
    assert (full.evicted, full.free) == (10, 9)


def test_the_least_recently_used_go_first() -> None:
    full = table(4)
    for row in range(4):
        full.lookup("a", rows(row))
        put(full, "a", row)
    full.release(full.lookup("a", rows(0, 2)))
    put(full, "a", 10, 11)
    assert (full.find("a", rows(0, 1, 2, 3)) != NONE).tolist() == [True, False, True, False]


def test_many_slots_are_scored_by_a_sample_and_the_oldest_still_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvdb.slots.SAMPLE", 1 << 10)
    full = table(16 << 10)
    for first in range(0, 16 << 10, 1 << 10):
        full.lookup("a", rows(*range(first, first + (1 << 10))))
        full.release(full.admit("a", np.arange(first, first + (1 << 10)), 32 << 10))
    for row in range(2000):
        put(full, "b", row % 1000) if full.find("b", rows(row % 1000))[0] == NONE else None
    evicted = np.flatnonzero(full.find("a", np.arange(16 << 10)) == NONE)
    assert 900 < len(evicted) < 1100
    assert np.median(evicted) < 1 << 10
    assert evicted.max() < 4 << 10


def test_a_file_of_which_nothing_is_left_leaves_nothing() -> None:
    few = table(8)
    for number in range(100):
        few.release(few.admit(number, np.arange(8), 1000))
    assert (len(few._maps), len(few._ids), len(few._keys), len(few._held)) == (1, 1, 1, 1)
