"""What the contract of replacement policies says, for every member of the table, on its own and in a table of slots."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb.replacement import REPLACEMENT, Replacement, Uses
from kvdb.slots import BATCH, HALF_LIFE, NONE, SlotTable

every_policy = pytest.mark.parametrize("policy", REPLACEMENT.values(), ids=REPLACEMENT)
NOW = 10**9


@st.composite
def uses(draw: st.DrawFn) -> Uses:
    """Of 1 to 20 rows, with ties. Shrinks to one that was used once, now."""
    n = draw(st.integers(1, 20))

    def column(values: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=n, max_size=n)))

    used_at = NOW - column(st.integers(0, 5) | st.integers(0, NOW)).astype(np.int64)
    times = column(st.integers(1, 4) | st.integers(1, 10**12)).astype(np.float64)
    return Uses(used_at, times, column(st.just(0.0) | st.floats(0, 1e9)))


half_lives = st.floats(1e-3, 1e9)


@every_policy
def test_a_policy_is_in_the_table_under_its_name(policy: Replacement) -> None:
    assert REPLACEMENT[policy.name] is policy


@every_policy
@given(some=uses(), half_life=half_lives)
def test_scores_are_finite_numbers_that_depend_on_nothing_else(
    policy: Replacement, some: Uses, half_life: float
) -> None:
    before = [column.copy() for column in some]
    scores = policy.scores(some, NOW, half_life)
    assert scores.shape == some.used_at.shape
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    assert all(map(np.array_equal, some, before))
    assert np.array_equal(policy.scores(some, NOW, half_life), scores)


@every_policy
@given(some=uses(), half_life=half_lives, later=st.integers(0, 1000), data=st.data())
def test_a_row_used_later_is_never_worth_less(
    policy: Replacement, some: Uses, half_life: float, later: int, data: st.DataObject
) -> None:
    one = data.draw(st.integers(0, len(some.used_at) - 1))
    twin = Uses(*(np.append(column, column[one]) for column in some))
    twin.used_at[-1] = min(NOW, twin.used_at[-1] + later)
    scores = policy.scores(twin, NOW, half_life)
    assert scores[-1] >= scores[one]
    if twin.used_at[-1] - twin.used_at[one] > 1e-3 * half_life:
        assert scores[-1] > scores[one]


@every_policy
@given(data=st.data())
def test_the_table_evicts_the_lowest_of_what_is_not_pinned(policy: Replacement, data: st.DataObject) -> None:
    """Against a dict of what was done to each row."""
    slots = 2 * BATCH + 3
    table, known, now = SlotTable(policy), {}, 0
    table.add(0, slots)
    pinned: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        rows = sorted(data.draw(st.sets(st.integers(0, 4 * slots), min_size=1, max_size=slots // 3)))
        found = table.lookup("a", np.array(rows))
        now += len(rows)
        for row, slot in zip(rows, found.tolist(), strict=True):
            assert (slot != NONE) == (row in known)
            if row in known:
                known[row] = [now, known[row][1] + 1, known[row][2]]
        missing = [row for row in rows if row not in known]
        busy = set(pinned) | set(rows)
        candidates = [row for row in known if row not in busy]
        columns = np.array([known[row] for row in candidates]).reshape(-1, 3).T
        scores = policy.scores(Uses(columns[0].astype(np.int64), columns[1], columns[2]), now, HALF_LIFE * slots)
        worth = dict(zip(candidates, scores.tolist(), strict=True))
        given_slots = table.admit("a", np.array(missing, np.int64), 10 * slots)
        for row, slot in zip(missing, given_slots.tolist(), strict=True):
            if slot != NONE:
                known[row] = [now, 1, 0.0]
        left = {row for row in known if table.find("a", np.array([row]))[0] != NONE}
        gone = set(known) - left
        assert not gone & busy
        assert max((worth[row] for row in gone), default=-np.inf) <= min(
            (worth[row] for row in candidates if row not in gone), default=np.inf
        )
        known = {row: known[row] for row in left}
        weights = {row: data.draw(st.sampled_from([0.0, 0.5, 3.0])) for row in rows}
        table.weigh("a", np.array(rows), np.array([*weights.values()]))
        for row in rows:
            if row in known:
                known[row][2] += weights[row]
        table.release(np.concatenate((found[found >= 0], given_slots[given_slots >= 0])))
        for row in [row for row in known if row not in pinned][: data.draw(st.integers(0, 2))]:
            pinned[row] = int(table.find("a", np.array([row]))[0])
            table.pin(np.array([pinned[row]]))


def scores_of(name: str, *rows: tuple[int, float, float]) -> list[float]:
    """rows: (used_at, times, weight)"""
    columns = np.array(rows).T
    found: list[float] = (
        REPLACEMENT[name].scores(Uses(columns[0].astype(np.int64), columns[1], columns[2]), 100, 10.0).tolist()
    )
    return found


def test_lru_looks_at_the_last_use_alone() -> None:
    old, new = scores_of("lru", (1, 1000, 5.0), (2, 1, 0.0))
    assert old < new


def test_lfu_forgets_half_of_the_uses_with_every_half_life() -> None:
    often, seldom, late = scores_of("lfu", (80, 8, 0.0), (100, 3, 0.0), (100, 1, 0.0))
    assert seldom > late
    assert 2**often == pytest.approx(2.0)  # 8 uses, two half-lives ago
    assert late < often < seldom


def test_importance_counts_rows_of_which_nothing_was_said_as_the_average() -> None:
    light, heavy, unsaid = scores_of("importance", (100, 1, 1.0), (100, 1, 3.0), (100, 1, 0.0))
    assert light < unsaid < heavy
    assert 2**unsaid == pytest.approx(2.0)
    old, new = scores_of("importance", (1, 9, 0.0), (2, 1, 0.0))
    assert old < new
