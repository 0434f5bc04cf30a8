"""Attention over any split of the keys, merged, is attention over all of them.

The oracle is dense softmax attention in float64. Tolerance, for values of magnitude at most V and e = machine epsilon:
a score is a sum of d products, so its error is at most s = d * e32 * scale * |q||k|, and a weight's relative error
2s + (n + 2) * e32 for n keys; a weight or an output rounded to the dtype costs e each, and so does each of the three
roundings of a merge. A merge also weighs parts by log-sum-exps of magnitude L <= scale * |q||k| + log n, each rounded
(L * e32) a few times. torch's CPU kernel takes exponentials of half-precision scores only as exactly as the dtype needs (off by up
to 6e-5 relative, measured): e more for those. Each of these moves the output by at most V times as much, or 2V for a weight between two parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdb.runtime.tiles import Partial, _attend_plain, attend, attend_one, merge

Array = np.ndarray[Any, np.dtype[np.float64]]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dense(q: Array, k: Array, v: Array, scale: float, *, causal: bool = False) -> tuple[Array, Array]:
    """Softmax attention and its log-sum-exp, one query at a time."""
    heads, group, queries, _ = q.shape
    out, lse = np.empty(q.shape), np.empty(q.shape[:3])
    for h in range(heads):
        for g in range(group):
            for i in range(queries):
                seen = slice(0, i + 1) if causal else slice(None)
                scores = k[h, seen] @ q[h, g, i] * scale
                top = scores.max()
                weights = np.exp(scores - top)
                out[h, g, i] = weights @ v[h, seen] / weights.sum()
                lse[h, g, i] = top + np.log(weights.sum())
    return out, lse


def tolerances(q: Array, k: Array, v: Array, scale: float, dtype: torch.dtype, parts: int) -> tuple[float, float]:
    """Of the output, and of the log-sum-exp; derived above."""
    e32, e = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    norms = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() * scale
    score = q.shape[-1] * e32 * norms
    weight = 2 * score + (k.shape[1] + 2) * e32 + (e if e > e32 else 0.0)
    of_lse = weight + 4 * parts * e32 * (1 + norms + np.log(k.shape[1]))
    return np.abs(v).max() * (2 * of_lse + (2 + 3 * parts) * e), of_lse


def drawn(
    seed: int, heads: int, group: int, queries: int, tokens: int, dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, group, queries, dim), (heads, tokens, dim), (heads, tokens, dim))
    return [(2 * torch.randn(shape, generator=g)).to(dtype) for shape in shapes]


def exact(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def assert_close(found: Partial, q: Any, k: Any, v: Any, scale: float, *, parts: int, causal: bool = False) -> None:
    arrays = exact(q), exact(k), exact(v)
    out, lse = dense(*arrays, scale, causal=causal)
    of_out, of_lse = tolerances(*arrays, scale, q.dtype, parts)
    assert found.out.dtype in (q.dtype, torch.float32)
    assert found.lse.dtype == torch.float32
    assert np.abs(exact(found.out) - out).max() <= of_out
    assert np.abs(exact(found.lse) - lse).max() <= of_lse


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.sampled_from((1, 8, 24, 64)))
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)


@given(shapes, st.lists(st.integers(1, 40), min_size=1, max_size=6), seeds, dtypes)
def test_parts_of_any_split_merge_to_dense_attention(
    shape: tuple[int, int, int, int], lengths: list[int], seed: int, dtype: torch.dtype
) -> None:
    heads, group, queries, dim = shape
    q, k, v = drawn(seed, heads, group, queries, sum(lengths), dim, dtype)
    scale = dim**-0.5
    k_parts, v_parts = k.split(lengths, 1), v.split(lengths, 1)
    parts = [attend(q, a, b, scale=scale) for a, b in zip(k_parts, v_parts, strict=True)]
    assert_close(merge(parts), q, k, v, scale, parts=len(parts))
    folded = parts[0]
    for part in parts[1:]:
        folded = merge([folded, part])
    assert_close(folded, q, k, v, scale, parts=len(parts))


@given(shapes, seeds, dtypes)
def test_a_causal_query_sees_itself_and_what_is_before_it(
    shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype
) -> None:
    heads, group, queries, dim = shape
    q, k, v = drawn(seed, heads, group, queries, queries, dim, dtype)
    found = attend(q, k, v, scale=dim**-0.5, causal=True)
    assert_close(found, q, k, v, dim**-0.5, parts=1, causal=True)


@given(shapes, st.integers(1, 40), seeds, dtypes)
def test_a_block_after_older_tokens_equals_the_end_of_one_causal_pass(
    shape: tuple[int, int, int, int], older: int, seed: int, dtype: torch.dtype
) -> None:
    heads, group, queries, dim = shape
    q, k, v = drawn(seed, heads, group, older + queries, older + queries, dim, dtype)
    block, scale = q[:, :, older:], dim**-0.5
    found = merge([
        attend(block, k[:, :older], v[:, :older], scale=scale),
        attend(block, k[:, older:], v[:, older:], scale=scale, causal=True),
    ])  # fmt: skip
    arrays = exact(q), exact(k), exact(v)
    out, lse = dense(*arrays, scale, causal=True)
    of_out, of_lse = tolerances(*arrays, scale, dtype, 2)
    assert np.abs(exact(found.out) - out[:, :, older:]).max() <= of_out
    assert np.abs(exact(found.lse) - lse[:, :, older:]).max() <= of_lse


@given(shapes, st.integers(1, 40), seeds, st.booleans())
def test_plain_matrix_products_agree_with_dense_attention(
    shape: tuple[int, int, int, int], tokens: int, seed: int, causal: bool
) -> None:
    heads, group, queries, dim = shape
    q, k, v = drawn(seed, heads, group, queries, queries if causal else tokens, dim, torch.float32)
    found = _attend_plain(q, k, v, scale=dim**-0.5, causal=causal)
    assert_close(found, q, k, v, dim**-0.5, parts=1, causal=causal)


@given(shapes, st.lists(st.integers(1, 40), min_size=1, max_size=3), seeds, dtypes)
def test_one_query_over_several_parts_agrees_with_dense_attention(
    shape: tuple[int, int, int, int], lengths: list[int], seed: int, dtype: torch.dtype
) -> None:
    heads, group, _, dim = shape
    q, k, v = drawn(seed, heads, group, 1, sum(lengths), dim, dtype)
    parts = list(zip(k.split(lengths, 1), v.split(lengths, 1), strict=True))
    found = attend_one(q[:, :, 0], parts)
    arrays = exact(q), exact(k), exact(v)
    out, _ = dense(*arrays, 1.0)
    assert found.dtype == dtype
    assert np.abs(exact(found) - out[:, :, 0]).max() <= tolerances(*arrays, 1.0, dtype, len(parts))[0]


@given(shapes, st.lists(st.integers(1, 40), min_size=2, max_size=4), seeds, dtypes)
def test_what_lies_beside_counts_as_the_keys_it_comes_from(
    shape: tuple[int, int, int, int], lengths: list[int], seed: int, dtype: torch.dtype
) -> None:
    heads, group, _, dim = shape
    q, k, v = drawn(seed, heads, group, 1, sum(lengths), dim, dtype)
    *parts, (far_k, far_v) = zip(k.split(lengths, 1), v.split(lengths, 1), strict=True)
    found = attend_one(q[:, :, 0], parts, attend(q, far_k, far_v, scale=1.0))
    arrays = exact(q), exact(k), exact(v)
    out, _ = dense(*arrays, 1.0)
    assert found.dtype == dtype
    assert np.abs(exact(found) - out[:, :, 0]).max() <= tolerances(*arrays, 1.0, dtype, len(lengths))[0]
    nothing = Partial(torch.zeros(heads, group, 1, dim), torch.full((heads, group, 1), -torch.inf))
    pair = list(zip(k.split(lengths, 1), v.split(lengths, 1), strict=True))
    tolerance = tolerances(*arrays, 1.0, dtype, len(lengths) + 1)[0]
    assert (attend_one(q[:, :, 0], pair, nothing) - attend_one(q[:, :, 0], pair)).abs().max() <= tolerance


@pytest.mark.parametrize("far", [-300.0, 300.0])
def test_parts_of_very_different_weight_merge_without_overflow(far: float) -> None:
    """exp(300) is infinite in float32: the merge must never take it."""
    q = torch.ones(1, 1, 1, 1)
    near_k, near_v = torch.zeros(1, 2, 1), torch.full((1, 2, 1), 5.0)
    far_k, far_v = torch.full((1, 3, 1), far), torch.full((1, 3, 1), 7.0)
    parts = [attend(q, near_k, near_v, scale=1.0), attend(q, far_k, far_v, scale=1.0)]
    for merged in (merge(parts), merge([*parts, parts[1]])):
        assert abs(merged.out.item() - (7.0 if far > 0 else 5.0)) <= 4 * 7.0 * torch.finfo(torch.float32).eps
        assert torch.isfinite(merged.lse).all()


def test_a_single_part_is_returned_as_it_is() -> None:
    part = Partial(torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1))
    assert merge([part]) is part


def test_the_tolerance_catches_a_merge_that_forgets_one_key() -> None:
    """The bound is tight enough to fail: one key of forty is missing."""
    q, k, v = drawn(0, 2, 2, 3, 40, 24, torch.float32)
    found = attend(q, k[:, 1:], v[:, 1:], scale=24**-0.5)
    with pytest.raises(AssertionError):
        assert_close(found, q, k, v, 24**-0.5, parts=1)
