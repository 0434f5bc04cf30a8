"""Prefix keys: chained, so equal keys mean equal prefixes; listings: sorted like token lists; and where two lists part."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import Array, token_lists

from kvdb.identity import EXACT
from kvdb.prefix import BLOCK_TOKENS, LISTING_BYTES, block_keys, common_prefix, first_bytes, listed_tokens, listing

MINE, THEIRS = b"m" * 32, b"t" * 32


def test_keys_are_chained_blake2b_of_blocks_of_64_tokens() -> None:
    tokens = np.arange(130, dtype="<u4")
    key = hashlib.blake2b(b"kvdb prefix 1\0" + MINE, digest_size=16).digest()
    expected = [key]
    for block in (tokens[:64], tokens[64:128]):
        key = hashlib.blake2b(key + b"".join(int(t).to_bytes(4, "little") for t in block), digest_size=16).digest()
        expected.append(key)
    assert block_keys(MINE, tokens) == expected


@given(token_lists(0, 200))
def test_there_is_a_key_per_whole_block_and_one_for_none(tokens: Array) -> None:
    keys = block_keys(MINE, tokens)
    assert len(keys) == len(tokens) // BLOCK_TOKENS + 1
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {16}


@given(token_lists(0, 200), token_lists(0, 200))
def test_two_lists_share_a_key_exactly_where_their_blocks_are_equal(a: Array, b: Array) -> None:
    for k, (mine, theirs) in enumerate(zip(block_keys(MINE, a), block_keys(MINE, b), strict=False)):
        assert (mine == theirs) == (a[: k * 64].tolist() == b[: k * 64].tolist())


@given(token_lists(0, 130))
def test_two_identities_share_no_key(tokens: Array) -> None:
    assert not set(block_keys(MINE, tokens)) & set(block_keys(THEIRS, tokens))


@given(token_lists(0, 20), token_lists(0, 20), st.integers(0, 20))
def test_common_prefix_counts_leading_equal_tokens(a: Array, b: Array, shared: int) -> None:
    b = np.concatenate((a[:shared], b))
    n = common_prefix(a, b)
    assert a[:n].tolist() == b[:n].tolist()
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_a_listing_is_a_byte_for_its_fidelity_then_big_endian_tokens_then_padding() -> None:
    found = listing(1, np.array([1, 258], "<u4"))
    assert found == b"\1" + bytes([0, 0, 0, 1, 0, 0, 1, 2]) + b"\xff" * 4 * (BLOCK_TOKENS - 2)
    assert len(found) == LISTING_BYTES
    assert listed_tokens(found)[:3].tolist() == [1, 258, 2**32 - 1]


@given(token_lists(0, BLOCK_TOKENS), token_lists(0, BLOCK_TOKENS), st.integers(0, 255), st.integers(0, 255))
def test_listings_sort_by_first_byte_and_then_like_token_lists(a: Array, b: Array, first: int, other: int) -> None:
    longest = [2**32]  # a list that ends comes after those that go on
    lists = [first, *a.tolist(), *longest], [other, *b.tolist(), *longest]
    assert (listing(first, a) < listing(other, b)) == (lists[0] < lists[1])


@given(st.text(min_size=1, max_size=64))
def test_no_fidelity_but_exact_has_the_first_byte_of_exact(fidelity: str) -> None:
    written, *earlier = first_bytes(fidelity)
    if fidelity == EXACT:
        assert (written, earlier) == (1, [])
    else:
        assert 2 <= written <= 255
        assert earlier == [0]


@given(st.lists(token_lists(1, BLOCK_TOKENS), min_size=1, max_size=12), token_lists(1, BLOCK_TOKENS))
def test_the_longest_agreement_with_any_list_is_a_neighbour_in_the_order_of_listings(
    stored: list[Array], wanted: Array
) -> None:
    ordered = sorted(stored, key=lambda tokens: listing(1, tokens))
    place = sum(listing(1, tokens) < listing(1, wanted) for tokens in ordered)
    neighbours = ordered[max(0, place - 1) : place + 1]
    best = max(common_prefix(tokens, wanted) for tokens in stored)
    assert max(common_prefix(tokens, wanted) for tokens in neighbours) == best
