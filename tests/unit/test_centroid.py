"""Attention over what was read, merged with the estimate of what was not.

- Where all keys of each record are equal, whatever the values, it is dense attention over everything.
- In general it is attention in which each of the best unread records is one token: mean key, mean value, the weight of all its
  tokens. The oracle is NumPy in float64, token by token.
- A record never weighs more than in truth.

Keys and means are rounded to the dtype they are stored in; the oracle is given the rounded ones, so that only float32 arithmetic
is left: sums of n products of magnitude at most |q||k| for n keys or dimensions, and log-sum-exps of that size.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdb.abstracts import Centroid
from kvdb.errors import InvalidInput
from kvdb.runtime.selection import Budget, CentroidSelector, Forced, Plan, Resident, Scores
from kvdb.runtime.selection.mean import SURE
from kvdb.runtime.tiles import Partial, attend_one

CT = 16
FORCED = Forced.of(CT)
Array = np.ndarray[Any, np.dtype[Any]]

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(7, 20), st.sampled_from((1, 8, 64)))
"""KV heads, query heads of each, chunks, dimensions."""
dtypes = st.sampled_from(["float32", "bfloat16", "float16"])


class Case(NamedTuple):
    """q (kv_heads, group, dim); k, v (kv_heads, chunks, tokens, dim), tail_k, tail_v (kv_heads, 3, dim): of the dtype."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tail_k: torch.Tensor
    tail_v: torch.Tensor


def case(shape: tuple[int, int, int, int], seed: int, dtype: str, *, equal: bool = False) -> Case:
    heads, group, chunks, dim = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, group, dim, generator=g) * dim**-0.5
    k = 2 * torch.randn(heads, chunks, 1 if equal else CT, dim, generator=g)
    others = [torch.randn(size, generator=g) for size in ((heads, chunks, CT, dim), (heads, 3, dim), (heads, 3, dim))]
    kind = getattr(torch, dtype)
    return Case(*(t.to(kind) for t in (q, k.expand(-1, -1, CT, -1), *others)))


def resident_of(selector: CentroidSelector, c: Case, dtype: str) -> tuple[Resident, Array]:
    """What the selector keeps, and the stored means (2, chunks, kv_heads, dim)."""
    abstract, (_, chunks, _, dim) = Centroid(), c.k.shape
    stored = abstract.build(c.k.float().numpy(), chunks * CT, dtype, c.v.float().numpy())
    means = abstract.load(stored, dim, dtype)
    return selector.prepare({"centroid": means}, CT, dim), means


def plan_of(scores: Scores, seed: int, *, each: bool) -> Plan:
    """What a budget of seven records chooses, or as many for each KV head as chance says."""
    if not each:
        return Budget.of(7 * CT).plan(
            scores, 7, FORCED, torch.zeros(scores.lse.shape[:2]), lambda chunks: pytest.fail("a budget reads nothing")
        )
    heads, _, chunks = scores.lse.shape
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(chunks, generator=g) for _ in range(heads)])
    return Plan(order, torch.randint(1, chunks + 1, (heads,), generator=g), 0)


def merged(c: Case, selector: CentroidSelector, resident: Resident, scores: Scores, plan: Plan) -> torch.Tensor:
    """Attention as the runtime computes it, a KV head at a time."""
    found, out = selector.estimate(c.q.float(), resident, scores, plan), []
    read = plan.read(c.k.shape[1])
    for head in range(len(c.q)):
        this = slice(head, head + 1)
        parts = [(each[head][read[head]].flatten(0, 1)[None] for each in (c.k, c.v)), (c.tail_k[this], c.tail_v[this])]
        beside = None if found is None else Partial(found.out[this, :, None], found.lse[this, :, None])
        out.append(attend_one(c.q[this], [tuple(part) for part in parts], beside))  # type: ignore[misc]
    return torch.cat(out).double()


def by_numpy(c: Case, plan: Plan, stand_ins: list[tuple[int, int, Array, Array]]) -> Array:
    """Softmax attention over what is read, the tail, and tokens that stand for `CT` others: (head, chunk, key, value)."""
    q, k, v, tail_k, tail_v = (t.double().numpy() for t in c)
    read, out = plan.read(k.shape[1]).numpy(), np.empty(q.shape)
    for head, group in np.ndindex(q.shape[:2]):
        keys = [*k[head, read[head]].reshape(-1, k.shape[-1]), *tail_k[head]]
        values = [*v[head, read[head]].reshape(-1, v.shape[-1]), *tail_v[head]]
        logits = [float(q[head, group] @ key) for key in keys]
        for of, _, key, value in stand_ins:
            if of == head:
                logits.append(float(q[head, group] @ key) + math.log(CT))
                values.append(value)
        weights = np.exp(np.array(logits) - max(logits))
        out[head, group] = weights @ np.array(values) / weights.sum()
    return out


def slack(c: Case) -> float:
    """Weights, products and roundings of the output to the dtype; see `test_tiles`."""
    e32, e = torch.finfo(torch.float32).eps, torch.finfo(c.q.dtype).eps
    norms = float(c.q.double().norm(dim=-1).max() * c.k.double().norm(dim=-1).max())
    size = 1 + norms + math.log(c.k.shape[1] * CT)
    weight = (2 * c.q.shape[-1] * norms + 8 * size + c.k.shape[1] * CT) * e32
    return float(c.v.abs().max()) * (2 * weight + 12 * (e if e > e32 else e32))


@given(shapes, seeds, dtypes, st.booleans())
def test_with_equal_keys_in_every_record_it_is_dense_attention(
    shape: tuple[int, int, int, int], seed: int, dtype: str, each: bool
) -> None:
    c, selector = case(shape, seed, dtype, equal=True), CentroidSelector(estimated=1.0)
    resident, means = resident_of(selector, c, dtype)
    scores = selector.score(c.q.float(), resident, 7)
    plan = plan_of(scores, seed, each=each)
    everything = Plan(torch.arange(shape[2]).expand(shape[0], -1), None, 0)
    found, dense = merged(c, selector, resident, scores, plan).numpy(), by_numpy(c, everything, [])
    rounded = np.abs(means[1].swapaxes(0, 1) - c.v.double().mean(2).numpy()).max()  # of the stored mean of values
    assert np.abs(found - dense).max() <= slack(c) + rounded


@given(shapes, seeds, dtypes, st.booleans(), st.sampled_from([0.1, 0.232, 0.5, 1.0]))
def test_it_is_attention_to_one_token_for_each_of_the_best_unread_records(
    shape: tuple[int, int, int, int], seed: int, dtype: str, each: bool, estimated: float
) -> None:
    c, selector = case(shape, seed, dtype), CentroidSelector(estimated=estimated)
    heads, _, chunks, dim = shape
    resident, means = resident_of(selector, c, dtype)
    scores = selector.score(c.q.float(), resident, 7)
    plan = plan_of(scores, seed, each=each)
    read, share = plan.read(chunks).numpy(), torch.softmax(scores.lse, -1).sum(1).numpy()
    stand_ins = []
    for head in range(heads):
        best = [chunk for chunk in np.argsort(-share[head]) if not read[head, chunk]][: math.ceil(estimated * chunks)]
        stand_ins += [(head, int(chunk), *means[:, chunk, head].astype(np.float64)) for chunk in best]
    expected = by_numpy(c, plan, stand_ins)  # type: ignore[arg-type]
    assert np.abs(merged(c, selector, resident, scores, plan).numpy() - expected).max() <= slack(c)
    found = selector.estimate(c.q.float(), resident, scores, plan)
    most = max(sum(head == of for of, *_ in stand_ins) for head in range(heads))
    assert (0 if found is None else found.bytes_read) == heads * most * dim * 4


@given(shapes, seeds)
def test_a_record_never_weighs_more_than_in_truth(shape: tuple[int, int, int, int], seed: int) -> None:
    c, selector = case(shape, seed, "float32"), CentroidSelector()
    scores = selector.score(c.q, resident_of(selector, c, "float32")[0], 7)
    true = torch.logsumexp(torch.einsum("hgd,hctd->hgct", c.q.double(), c.k.double()), -1)
    assert (scores.lse.double() <= true + 1e-4).all()


def test_what_is_left_out_is_missed() -> None:
    """So the properties above can fail."""
    c = case((2, 2, 20, 64), 0, "float32", equal=True)
    none, all_ = CentroidSelector(estimated=0.0), CentroidSelector(estimated=1.0)
    resident, _ = resident_of(all_, c, "float32")
    scores = all_.score(c.q, resident, 7)
    plan = plan_of(scores, 0, each=False)
    assert none.estimate(c.q, resident, scores, plan) is None
    found = [merged(c, selector, resident, scores, plan) for selector in (none, all_)]
    assert (found[0] - found[1]).abs().max() > 30 * slack(c)


@pytest.mark.parametrize("plane", ["k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_record_of_which_nothing_is_known_is_read_first_and_never_estimated(plane: str, bad: float) -> None:
    c, selector = case((1, 2, 12, 8), 0, "float32"), CentroidSelector(estimated=1.0)
    vectors = {"k": c.k, "v": c.v}[plane]
    clean, _ = resident_of(selector, c, "float32")
    vectors[0, 5, 3, 1] = bad
    resident, _ = resident_of(selector, c, "float32")
    scores = selector.score(c.q, resident, 7)
    assert (scores.lse[..., 5] == SURE).all()
    assert (scores.lse.argmax(-1) == 5).all()
    others = Plan(torch.tensor([[0, 8, 9, 10, 11]]), None, 5)
    known = Plan(torch.tensor([[0, 5, 8, 9, 10, 11]]), None, 6)
    found = selector.estimate(c.q, resident, scores, others)
    expected = selector.estimate(c.q, clean, selector.score(c.q, clean, 7), known)
    assert found is not None
    assert expected is not None
    assert torch.allclose(found.out, expected.out, atol=1e-6)
    assert torch.allclose(found.lse, expected.lse, atol=1e-6)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, math.inf])
def test_what_is_no_share_is_refused(wrong: float) -> None:
    with pytest.raises(InvalidInput, match=f"estimated is {wrong}, expected a share between 0 and 1"):
        CentroidSelector(estimated=wrong)
