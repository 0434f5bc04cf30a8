"""Records go to the device the way that takes less time, and no step goes both ways."""

from __future__ import annotations

import pytest

from kvdb.runtime.comparison import KEPT, TURN, TURNS
from kvdb.runtime.transfers import Transfers

COMPARED = TURN * TURNS


def steps(
    transfers: Transfers, count: int, *, coded: float, decoded: float, comparable: bool = True, reads: int = 3
) -> list[bool]:
    """Steps that take so many seconds each way, with so many reads each: the way of each."""
    ways = []
    for _ in range(count):
        transfers.begin_step(comparable=comparable)
        way = {transfers.coded() for _ in range(reads)}
        assert len(way) <= 1
        transfers.end_step(coded if True in way else decoded)
        ways += way
    return ways


@pytest.mark.parametrize("better", [True, False])
def test_the_faster_way_is_kept_and_looked_at_again(better: bool) -> None:
    transfers = Transfers()
    fast, slow = 1.0, 2.0
    ways = steps(transfers, COMPARED + KEPT, coded=fast if better else slow, decoded=slow if better else fast)
    assert sum(ways[:COMPARED]) == COMPARED // 2
    assert set(ways[COMPARED:]) == {better}
    assert transfers.stats()["coded"] is better
    assert "1000.0 ms" in transfers.stats()["why"]
    assert "2000.0 ms" in transfers.stats()["why"]
    assert sum(steps(transfers, COMPARED, coded=1, decoded=1)) == COMPARED // 2


def test_records_go_coded_until_something_is_known() -> None:
    transfers = Transfers()
    assert set(steps(transfers, 50, coded=2, decoded=1, comparable=False)) == {True}
    assert transfers.stats() == {"coded": True, "why": "steps are compared"}


def test_steps_that_move_nothing_count_for_nothing() -> None:
    transfers = Transfers()
    ways = []
    for _ in range(COMPARED + 1):
        steps(transfers, 3, coded=0, decoded=9, reads=0)
        ways += steps(transfers, 1, coded=2, decoded=1)
    assert ways[-1] is False


def test_what_cannot_be_compared_ends_a_comparison_and_keeps_what_was_found() -> None:
    transfers = Transfers()
    steps(transfers, COMPARED - 1, coded=2, decoded=1)
    steps(transfers, 1, coded=2, decoded=1, comparable=False)
    assert sum(steps(transfers, COMPARED, coded=2, decoded=1)) == COMPARED // 2
    assert not any(steps(transfers, 5, coded=2, decoded=1))
    assert not any(steps(transfers, 5, coded=2, decoded=1, comparable=False))
    assert not any(steps(transfers, 5, coded=2, decoded=1))
