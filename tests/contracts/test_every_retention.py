"""What the contract of retention policies says, for every member of the table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb import Sequence
from kvdb.retention import RETENTION, Retention

every_policy = pytest.mark.parametrize("policy", RETENTION.values(), ids=RETENTION)


def sequences() -> st.SearchStrategy[list[Sequence]]:
    """Sequences with few distinct times, so that ties occur. Shrinks to none."""
    times = st.integers(-2, 2).map(float)
    one = st.builds(
        Sequence,
        key=st.integers(0, 2**32).map("{:032x}".format),
        name=st.none() | st.just("n"),
        identity=st.just(""),
        tokens=st.just(1),
        fidelity=st.just("exact"),
        spans=st.just(()),
        created=times,
        last_used=times,
        model=st.just(""),
    )
    return st.lists(one, unique_by=lambda s: s.key)


@every_policy
def test_a_policy_is_in_the_table_under_its_name(policy: Retention) -> None:
    assert RETENTION[policy.name] is policy


@every_policy
@given(found=sequences())
def test_exactly_the_unnamed_may_go_each_once(policy: Retention, found: list[Sequence]) -> None:
    before = list(found)
    order = policy.order(found)
    assert sorted(s.key for s in order) == sorted(s.key for s in found if s.name is None)
    assert found == before


@every_policy
@given(found=sequences(), random=st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_how_sequences_were_listed(
    policy: Retention, found: list[Sequence], random: object
) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert policy.order(shuffled) == policy.order(found)


@every_policy
def test_nothing_goes_from_an_empty_store(policy: Retention) -> None:
    assert policy.order([]) == []


@given(found=sequences())
def test_lru_never_keeps_an_older_use_before_a_newer_one(found: list[Sequence]) -> None:
    used = [s.last_used for s in RETENTION["lru"].order(found)]
    assert used == sorted(used)
