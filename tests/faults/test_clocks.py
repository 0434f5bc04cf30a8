"""Clocks may lie: a wall clock that jumps, stops or runs backwards costs no KV before its time and crashes nothing.

Store time goes by the seconds since boot, which nobody sets; only across a reboot does it ask the wall clock. So the judge is
the order in which things were really used, and the seconds that really passed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_healthy, assert_reads_back, extend, identity, opened, token_list

from kvdb import KVDB
from kvdb.errors import SequenceNotFound
from kvdb.files import Moment

YEARS = 10 * 365.25 * 86_400


class Clock:
    """A machine whose wall clock does what it wants, while `pass_` lets real seconds go by."""

    def __init__(self) -> None:
        self.boots, self.uptime, self.offset, self.frozen = 0, 50.0, 1.7e9, False
        self.stood = 0.0

    def pass_(self, seconds: float) -> None:
        self.uptime += seconds
        self.stood += seconds if self.frozen else 0

    def jump(self, seconds: float) -> None:
        self.offset += seconds

    def reboot(self) -> None:
        self.offset += self.uptime
        self.boots, self.uptime = self.boots + 1, 5.0

    def wall(self) -> float:
        return self.offset + self.uptime - self.stood

    def moment(self) -> Moment:
        return Moment(self.wall(), f"boot {self.boots}", self.uptime)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("kvdb.files.moment", clock.moment)
    monkeypatch.setattr("kvdb.files.now", clock.wall)
    return clock


def freeze(clock: Clock) -> None:
    clock.frozen = True


LIES: dict[str, Callable[[Clock], None]] = {
    "ten years on": lambda clock: clock.jump(YEARS),
    "ten years back": lambda clock: clock.jump(-YEARS),
    "before 1970": lambda clock: clock.jump(-60 * YEARS),
    "frozen": freeze,
    "a second back": lambda clock: clock.jump(-1),
    "rebooted": lambda clock: clock.reboot(),
    "rebooted, ten years back": lambda clock: (clock.reboot(), clock.jump(-YEARS))[0],
    "rebooted, frozen": lambda clock: (clock.reboot(), freeze(clock))[0],
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("reopen", [False, True])
def test_eviction_goes_by_the_real_order_of_use(tmp_path: Path, clock: Clock, lie: str, reopen: bool) -> None:
    rng = np.random.default_rng(0)
    order: list[str] = []
    db = KVDB.open(tmp_path / "s")
    for step in range(12):
        if step % 2:
            key = order[int(rng.integers(len(order)))]
            db.touch(db.sequence(key).spans)
            order.append(order.pop(order.index(key)))
        else:
            order.append(extend(db, token_list(40, step)).key)
        clock.pass_(1)
        if step % 3 == 1:
            LIES[lie](clock)
            if reopen:
                db.close()
                db = KVDB.open(tmp_path / "s")
    gone = []
    while db.sequences():
        gone += [s.key for s in db.evict(db.info()["disk_bytes"] - 1)]
        LIES[lie](clock)
    assert gone == order
    assert_healthy(db)
    db.close()


def test_the_judge_of_the_order_sees_a_store_that_trusts_the_wall(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvdb.transaction.Transaction.now", lambda self: clock.wall())
    with pytest.raises(AssertionError):
        test_eviction_goes_by_the_real_order_of_use(tmp_path, clock, "ten years back", reopen=False)


@pytest.mark.parametrize("lie", ["ten years on", "ten years back", "before 1970", "frozen", "a second back"])
def test_a_time_to_live_counts_real_seconds(tmp_path: Path, clock: Clock, lie: str) -> None:
    with opened(tmp_path / "s") as db, opened(tmp_path / "s") as other:
        stored = extend(db, token_list(40))
        db.put_sequence(stored.last, 40, name="n", ttl_s=100, replaces=stored.key)
        for _ in range(9):
            clock.pass_(10)
            LIES[lie](clock)
            for each in (db, other):
                each.gc()
                assert each.sequence("n").tokens == 40
        clock.pass_(11)
        with pytest.raises(SequenceNotFound, match="expired"):
            other.sequence("n")
        other.gc()
        assert db.sequences() == []


def test_across_a_reboot_the_wall_clock_counts_only_forward(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path / "s") as db:
        stored = extend(db, token_list(40))
        db.put_sequence(stored.last, 40, name="n", ttl_s=100, replaces=stored.key)
    clock.reboot()
    clock.jump(-YEARS)
    with opened(tmp_path / "s") as db:
        db.gc()
        assert db.sequence("n").tokens == 40
    clock.pass_(90)
    with opened(tmp_path / "s") as db:
        assert db.sequence("n").tokens == 40
        db.gc()
    clock.reboot()
    clock.jump(200)  # off for a while
    with opened(tmp_path / "s") as db:
        assert db.sequences() == []


def test_store_time_never_goes_back(tmp_path: Path, clock: Clock) -> None:
    rng, times = np.random.default_rng(1), []
    for step in range(40):
        with KVDB.open(tmp_path / "s") as db:
            key = extend(db, token_list(20, step)).key
            times.append(next(s for s in db.sequences() if s.key == key).created)
        list(LIES.values())[int(rng.integers(len(LIES)))](clock)
    assert times == sorted(set(times))


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_the_wait_in_the_trash_at_worst(tmp_path: Path, clock: Clock, lie: str) -> None:
    with KVDB.open(tmp_path / "s", grace_s=60) as db:
        kept = extend(db, token_list(40, 1))
        db.delete(extend(db, token_list(40)).key)
        LIES[lie](clock)
        extend(db, token_list(40, 2))
        db.gc()
        assert os.listdir(tmp_path / "s" / "trash") == []
        assert_reads_back(db, token_list(40, 1), db.sequence(kept.key).spans)
        assert_healthy(db)


@pytest.mark.parametrize("lie", LIES)
def test_nothing_that_is_used_or_named_suffers_from_a_lie(tmp_path: Path, clock: Clock, lie: str) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, token_list(40), name="named")
        extend(db, token_list(40, 1))
    for _ in range(3):
        LIES[lie](clock)
        with opened(tmp_path / "s") as db:
            db.gc()
            assert_reads_back(db, token_list(40), db.sequence("named").spans)
            assert db.match(identity(), token_list(40, 1)).tokens == 40
