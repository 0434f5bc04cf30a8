"""Reading ahead is kept up where it gains, and only there."""

from __future__ import annotations

import pytest
import torch

from kvdb.runtime.prefetch import Prefetch
from kvdb.runtime.selection import Plan


def steps(prefetch: Prefetch, count: int, *, with_it: float, without: float, fetched: int = 1) -> list[bool]:
    """Steps that take so many seconds each way: which of them read ahead."""
    ways = []
    for _ in range(count):
        prefetch.begin_step()
        ways.append(prefetch.active)
        prefetch.end_step(with_it if prefetch.active else without, fetched)
    return ways


@pytest.mark.parametrize("gains", [True, False])
def test_the_faster_way_is_kept_and_looked_at_again(gains: bool) -> None:
    prefetch = Prefetch(None)
    with_it, without = (1.0, 2.0) if gains else (2.0, 1.0)
    ways = steps(prefetch, 1 + 24 + 100, with_it=with_it, without=without)
    assert not ways[0]  # nothing is known yet
    assert sum(ways[1:25]) == 12
    assert set(ways[25:]) == {gains}
    assert "a step takes" in prefetch.stats()["why"]
    later = steps(prefetch, 1000, with_it=without, without=with_it)  # now it is the other way round
    assert later[440:940] == [not gains] * 500


def test_nothing_is_read_ahead_while_everything_is_in_memory() -> None:
    prefetch = Prefetch(None)
    assert not any(steps(prefetch, 100, with_it=1, without=2, fetched=0))
    assert prefetch.stats()["why"] == "what was read was in memory"
    assert any(steps(prefetch, 60, with_it=1, without=2))
    assert not any(steps(prefetch, 60, with_it=1, without=2, fetched=0)[8:])
    assert any(steps(prefetch, 10, with_it=1, without=2))  # and compared anew


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_asked_for_is_done(wanted: bool) -> None:
    prefetch = Prefetch(wanted)
    assert set(steps(prefetch, 50, with_it=3, without=2, fetched=0)) == {wanted}
    prefetch.give_up("a reason")
    assert not any(steps(prefetch, 50, with_it=1, without=2))
    assert prefetch.stats()["why"] == "a reason"


def test_hits_are_counted_by_layer() -> None:
    prefetch = Prefetch(True)
    prefetch.begin_step()
    prefetch.expect(3, Plan(torch.tensor([[0, 5, 2], [0, 1, 7]]), torch.tensor([2, 3]), 1))
    prefetch.chosen(3, Plan(torch.tensor([[0, 2], [0, 7]]), None, 1), 8)  # 2 was beyond what the first head expected
    prefetch.chosen(4, Plan(torch.tensor([[0]]), None, 1), 8)  # nobody had expected anything
    assert prefetch.stats()["layers"] == {"3": {"expected": 5, "chosen": 4, "hit_rate": 3 / 4}}
    prefetch.expect(3, Plan(torch.tensor([[0]]), None, 1))
    prefetch.begin_step()  # a step that failed leaves nothing for the next one
    prefetch.chosen(3, Plan(torch.tensor([[0]]), None, 1), 8)
    assert prefetch.stats()["layers"]["3"]["chosen"] == 4
