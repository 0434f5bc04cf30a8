"""A stored prefix is computed again where that is known to take less time, and not otherwise."""

from __future__ import annotations

import pytest

from kvdb.runtime.costs import LOOK_AGAIN, Costs, Rate


@pytest.mark.parametrize(
    ("reading", "computing", "loads"), [(1e-9, 1e-3, True), (1e-6, 1e-5, False), (None, 1e-5, True), (1e-6, None, True)]
)
def test_what_takes_less_time_is_done(reading: float | None, computing: float | None, loads: bool) -> None:
    costs = Costs(None)
    if reading is not None:
        costs.reading.note(1000, 1000 * reading)
    if computing is not None:
        costs.computing.note(10, 10 * computing)
    choice = costs.choose(2000, 50 << 20)
    assert choice.load == loads
    if reading is None or computing is None:
        assert "not known" in choice.why
    else:
        assert (
            choice.why
            == f"50 MiB take {(50 << 20) * reading:.2f} s to read, 2,000 tokens {2000 * computing:.2f} s to compute"
        )


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_asked_for_is_done(recompute: bool) -> None:
    costs = Costs(recompute)
    costs.reading.note(1, 1 - recompute)
    costs.computing.note(1, recompute)
    assert costs.choose(100, 100).load != recompute
    assert costs.choose(0, 0).load  # there is nothing to compute again


def test_the_latest_measurement_counts_most() -> None:
    rate = Rate()
    assert rate.seconds(1) is None
    rate.note(0, 5)
    assert rate.seconds(1) is None  # nothing was done in that time
    for _ in range(20):
        rate.note(10, 10)
    assert rate.seconds(1) == pytest.approx(1)
    for _ in range(3):
        rate.note(10, 50)
    assert 4 < (rate.seconds(1) or 0) < 5


def test_what_cannot_be_stored_is_not_computed_again() -> None:
    costs = Costs(None)
    costs.reading.note(1000, 1)
    costs.computing.note(10, 0.001)
    assert not costs.choose(100, 1000).load
    assert costs.choose(100, 1000, storable=False) == (True, "what is computed again could not be stored")


def test_reading_is_looked_at_again_after_a_while() -> None:
    costs = Costs(None)
    costs.reading.note(1000, 1)
    costs.computing.note(10, 0.001)
    loads = [costs.choose(100, 1000).load for _ in range(2 * LOOK_AGAIN + 2)]
    assert loads == [False] * LOOK_AGAIN + [True] + [False] * LOOK_AGAIN + [True]


def test_a_small_gain_is_left() -> None:
    costs = Costs(None)
    costs.reading.note(1000, 1)
    costs.computing.note(1000, 0.001)
    assert costs.choose(500, 500).load
    assert not costs.choose(502, 502).load
