"""Of a stored prefix as many tokens are computed again as are estimated to take the least time, and none where that is not known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb.runtime.costs import LEAST_GAIN_S, LOOK_AGAIN, Choice, Costs, Prospect, Rate

GRAIN = 16


def costs(reading: float | None = None, computing: float | None = None) -> Costs:
    """Seconds a byte, seconds a token."""
    made = Costs(None)
    if reading is not None:
        made.reading.note(1000, 1000 * reading)
    if computing is not None:
        made.computing.note(10, 10 * computing)
    return made


def whole(tokens: int, nbytes: int, *, storable: bool = True) -> Prospect:
    """A prefix that cannot be split."""
    return Prospect(tokens, 1, np.array([float(nbytes)]), GRAIN, storable)


def even(tokens: int, nbytes: int, *, rows: int = 1, storable: bool = True, room: int | None = None) -> Prospect:
    """Of `rows` rows together so many bytes, which are equally many for each token."""
    return Prospect(tokens, rows, nbytes * (1 - np.arange(0, tokens, GRAIN) / tokens), GRAIN, storable, room)


@pytest.mark.parametrize(
    ("reading", "computing", "loads"), [(1e-9, 1e-3, True), (1e-6, 1e-5, False), (None, 1e-5, True), (1e-6, None, True)]
)
def test_what_takes_less_time_is_done(reading: float | None, computing: float | None, loads: bool) -> None:
    choice = costs(reading, computing).choose(whole(2000, 50 << 20))
    assert choice.tokens == (0 if loads else 2000)
    if reading is None or computing is None:
        assert "not known" in choice.why
    else:
        assert (
            choice.why
            == f"50 MiB take {(50 << 20) * reading:.2f} s to read, 2,000 tokens {2000 * computing:.2f} s to compute"
        )


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_asked_for_is_done(recompute: bool) -> None:
    asked = Costs(recompute)
    asked.reading.note(1, 1 - recompute)
    asked.computing.note(1, recompute)
    assert asked.choose(even(100, 100)).tokens == (100 if recompute else 0)
    assert asked.choose(even(0, 0)).tokens == 0  # there is nothing to compute again


def test_a_split_is_told_in_words() -> None:
    choice = costs(1e-7, 1e-3).choose(even(3200, 40 << 20))
    assert choice == (
        1824,
        "the first 1,824 of 3,200 tokens are computed while 17 MiB are read: 1.82 s for 3.20 s",
    )


@given(
    tokens=st.integers(1, 3000),
    rows=st.integers(1, 3),
    read_s=st.floats(0.01, 20),
    compute_s=st.floats(0.01, 20),
    present=st.floats(0, 1),
    share=st.none() | st.floats(0, 1.2),
    storable=st.booleans(),
)
def test_nothing_else_takes_less_time(
    tokens: int, rows: int, read_s: float, compute_s: float, present: float, share: float | None, storable: bool
) -> None:
    """Against every way there is, one after the other. read_s, compute_s: all of it; the first `present` of the tokens are in memory, and `share` of
    the bytes has room there."""
    nbytes, in_memory = 1000 * tokens, int(present * tokens)

    def missing(computed: int) -> int:
        return 1000 * (tokens - max(computed, in_memory))

    splits = range(0, tokens, GRAIN)
    room = None if share is None else int(share * nbytes)
    absent = np.array([float(missing(computed)) for computed in splits])
    choice = costs(read_s / nbytes, compute_s / tokens / rows).choose(
        Prospect(tokens, rows, absent, GRAIN, storable, room)
    )

    def takes(computed: int) -> float:
        if computed == tokens:
            return compute_s
        late = 0 if room is None else max(0, missing(computed) - room)
        beside = (missing(computed) - late) / nbytes * read_s
        return max(compute_s * computed / tokens, beside) + late / nbytes * read_s

    load = missing(0) / nbytes * read_s
    pure = min(load, compute_s) if storable else load
    least = min(map(takes, splits))
    allowed: Callable[[float], bool] = lambda seconds: takes(choice.tokens) <= seconds + 1e-6  # noqa: E731
    if 0 < choice.tokens < tokens:
        assert allowed(least)
        assert allowed(pure - LEAST_GAIN_S)
        assert choice.tokens % GRAIN == 0
    else:
        assert storable or choice.tokens == 0
        assert least >= pure - LEAST_GAIN_S - 1e-6
        assert choice.tokens == 0 or load >= compute_s + LEAST_GAIN_S - 1e-6
        assert choice.tokens == tokens or not storable or load <= compute_s + LEAST_GAIN_S + 1e-6


def test_where_all_bytes_are_alike_it_is_where_both_take_as_long() -> None:
    """KVPR's formula: n r / (c + r) tokens."""
    tokens, read, compute = 100_000, 2e-3, 6e-3  # seconds a token
    chosen = costs(read / 4096, compute).choose(even(tokens, 4096 * tokens)).tokens
    assert abs(chosen - tokens * read / (read + compute)) <= GRAIN


def test_what_is_in_memory_already_is_not_computed() -> None:
    """The first half of a prefix, say, that others share: computing it saves nothing before all of it is computed."""
    absent = np.array([float(1000 * min(1600 - s, 800)) for s in range(0, 1600, GRAIN)])
    assert (
        costs(1e-5, 1e-2).choose(Prospect(1600, 1, absent, GRAIN, True)).tokens == 0
    )  # 8 s to read, 8 s to compute half
    assert costs(1e-5, 2e-3).choose(Prospect(1600, 1, absent, GRAIN, False)).tokens > 800


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


def test_what_cannot_be_stored_is_not_computed_whole() -> None:
    known = costs(1e-3, 1e-4)
    assert known.choose(whole(1000, 10_000)).tokens == 1000
    assert known.choose(whole(1000, 10_000, storable=False)) == (0, "what is computed again could not be stored")
    assert 0 < known.choose(even(1000, 10_000, storable=False)).tokens < 1000


def test_reading_is_looked_at_again_after_a_while() -> None:
    known = costs(1e-3, 1e-4)
    loads = [known.choose(whole(100, 1000)).tokens == 0 for _ in range(2 * LOOK_AGAIN + 2)]
    assert loads == [False] * LOOK_AGAIN + [True] + [False] * LOOK_AGAIN + [True]


def test_a_split_looks_at_reading_itself() -> None:
    known, split = costs(1e-3, 1e-3), even(3200, 3200)
    assert all(0 < known.choose(split).tokens < 3200 for _ in range(2 * LOOK_AGAIN + 2))
    for _ in range(LOOK_AGAIN):
        assert known.choose(whole(100, 1000)).tokens == 100
    known.choose(split)
    assert known.choose(whole(100, 1000)).tokens == 100  # the ninth, but not in a row


def test_a_small_gain_is_left() -> None:
    known = costs(1e-3, 1e-6)
    assert known.choose(whole(500, 500)).tokens == 0
    assert known.choose(whole(502, 502)).tokens == 502
    alike = costs(1e-3, 1e-3)  # half the time at best
    assert alike.choose(even(960, 960)).tokens == 0
    assert alike.choose(even(1024, 1024)) == Choice(
        512, "the first 512 of 1,024 tokens are computed while 0 MiB are read: 0.51 s for 1.02 s"
    )
