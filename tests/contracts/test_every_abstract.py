"""What the contract of abstracts says, for every member; and for boxes, that they bound every query's score.

The bound is exact arithmetic's: ub = sum_d max(q_d lo_d, q_d hi_d) >= q.k for every key k of the record. Here q and k are
multiples of 2^-6 below 2^6 in magnitude, so every product and every sum of 80 of them is exact in float64 and `<=` is
meant literally.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, HEAD_DIMS, Array, finite_kv, seeds

from kvdb.abstracts import ABSTRACTS, Abstract
from kvdb.format import as_float32, from_float32

every_abstract = pytest.mark.parametrize("abstract", ABSTRACTS.values(), ids=ABSTRACTS)


@st.composite
def keys_and_tokens(draw: st.DrawFn) -> tuple[Array, int]:
    """Keys as a writer hands them over, padding full of zeros. Shrinks to one token of one head of one dimension."""
    heads, dim = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from(HEAD_DIMS))
    chunk_tokens, tokens = draw(st.sampled_from([1, 7, 16])), draw(st.integers(1, 40))
    chunks = -(-tokens // chunk_tokens)
    rng = np.random.default_rng(draw(seeds()))
    keys = np.zeros((heads, chunks * chunk_tokens, dim), np.float32)
    keys[:, :tokens] = rng.integers(-127, 128, (heads, tokens, dim)).astype(np.float32) / 64
    if draw(st.booleans()):
        keys[:, :tokens] = abs(keys[:, :tokens]) + 1  # away from the zeros of the padding
    return keys.reshape(heads, chunks, chunk_tokens, dim), tokens


@every_abstract
def test_an_abstract_is_in_the_table_under_its_name(abstract: Abstract) -> None:
    assert ABSTRACTS[abstract.name] is abstract
    assert abstract.name.isascii()
    assert abstract.name.isalpha()
    assert abstract.name != "kv"


@every_abstract
@given(given_keys=keys_and_tokens())
def test_an_abstract_has_its_declared_shape_and_leaves_the_keys_alone(
    abstract: Abstract, given_keys: tuple[Array, int]
) -> None:
    keys, tokens = given_keys
    before = keys.copy()
    built = abstract.build(keys, tokens)
    heads, chunks, _, dim = keys.shape
    assert built.shape == (chunks, heads, abstract.parts, dim)
    assert built.dtype == np.float32
    assert np.array_equal(keys, before)


@every_abstract
@given(given_keys=keys_and_tokens(), noise=st.sampled_from([-1e30, 0.0, 1e30]))
def test_padding_never_shows_in_an_abstract(abstract: Abstract, given_keys: tuple[Array, int], noise: float) -> None:
    keys, tokens = given_keys
    heads, chunks, chunk_tokens, dim = keys.shape
    noisy = keys.reshape(heads, chunks * chunk_tokens, dim).copy()
    noisy[:, tokens:] = noise
    assert np.array_equal(abstract.build(keys, tokens), abstract.build(noisy.reshape(keys.shape), tokens))


@every_abstract
@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds())
def test_storing_an_abstract_rounds_nothing(abstract: Abstract, dtype: str, seed: int) -> None:
    keys = as_float32(finite_kv(seed, (2, 3, 16, 8), dtype), dtype)
    built = abstract.build(keys, 41)
    assert np.array_equal(as_float32(from_float32(built, dtype), dtype), built)


@every_abstract
@given(given_keys=keys_and_tokens(), at=st.integers(0, 39))
def test_an_abstract_is_the_same_however_appends_were_cut(
    abstract: Abstract, given_keys: tuple[Array, int], at: int
) -> None:
    keys, tokens = given_keys
    chunk_tokens = keys.shape[2]
    cut = min(at // chunk_tokens, (tokens - 1) // chunk_tokens)
    parts = [abstract.build(keys[:, cut:], tokens - cut * chunk_tokens)]
    if cut:
        parts.insert(0, abstract.build(keys[:, :cut], cut * chunk_tokens))
    assert np.array_equal(np.concatenate(parts), abstract.build(keys, tokens))


@given(given_keys=keys_and_tokens(), seed=seeds())
def test_a_box_bounds_the_score_of_every_key(given_keys: tuple[Array, int], seed: int) -> None:
    keys, tokens = given_keys
    heads, _, chunk_tokens, dim = keys.shape
    box = ABSTRACTS["box"].build(keys, tokens).astype(np.float64)
    query = np.random.default_rng(seed).integers(-4096, 4097, (heads, dim)) / 64
    for token in range(tokens):
        chunk, at = divmod(token, chunk_tokens)
        for head in range(heads):
            low, high = box[chunk, head]
            bound = np.maximum(query[head] * low, query[head] * high).sum()
            assert query[head] @ keys[head, chunk, at].astype(np.float64) <= bound


@given(given_keys=keys_and_tokens())
def test_a_box_is_tight_along_every_axis(given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    heads, chunks, chunk_tokens, dim = keys.shape
    box = ABSTRACTS["box"].build(keys, tokens)
    flat = keys.reshape(heads, chunks * chunk_tokens, dim)
    for chunk in range(chunks):
        part = flat[:, chunk * chunk_tokens : min(tokens, (chunk + 1) * chunk_tokens)]
        for corner in (0, 1):
            assert (box[chunk, :, corner, None] == part).any(axis=1).all()
