"""What the contract of retention policies says, for every member of the table."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb.retention import RETENTION, Leaf, Retention

every_policy = pytest.mark.parametrize("policy", RETENTION.values(), ids=RETENTION)


def leaves() -> st.SearchStrategy[Leaf]:
    """Leaves with few distinct times and hits, so that ties occur. Shrinks to one that was never used."""
    return st.builds(
        Leaf,
        segment=st.integers(0, 2**32).map("{:032x}".format),
        last_used=st.integers(-2, 2).map(float),
        hits=st.integers(0, 3),
        start=st.integers(0, 4).map(lambda chunk: 16 * chunk),
        tokens=st.integers(1, 64),
        disk_bytes=st.integers(0, 2**40),
    )


@every_policy
def test_a_policy_is_in_the_table_under_its_name(policy: Retention) -> None:
    assert RETENTION[policy.name] is policy


@every_policy
@given(some=st.lists(leaves(), min_size=1))
def test_ranks_are_numbers_of_one_length_so_that_any_two_leaves_compare(policy: Retention, some: list[Leaf]) -> None:
    ranks = [policy.rank(leaf) for leaf in some]
    assert len({len(rank) for rank in ranks}) == 1
    assert not any(math.isnan(number) for rank in ranks for number in rank)


@every_policy
@given(leaf=leaves(), others=st.lists(leaves()))
def test_a_rank_is_the_leafs_own_whatever_was_ranked_before(policy: Retention, leaf: Leaf, others: list[Leaf]) -> None:
    first = policy.rank(leaf)
    for other in others:
        policy.rank(other)
    assert policy.rank(leaf) == first


@given(a=leaves(), b=leaves())
def test_lru_never_keeps_an_older_use_before_a_newer_one(a: Leaf, b: Leaf) -> None:
    rank = RETENTION["lru"].rank
    assert (rank(a) < rank(b)) == (a.last_used < b.last_used)
