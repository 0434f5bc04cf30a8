"""Clusters of keys, and attention over what was read merged with the estimate of what was not.

- Every token whose key and value are finite is a member of one cluster, of as many tokens as a record has.
- Keys that lie together come into one cluster, wherever they stand in the text.
- Attention is that in which every unread token has the mean key and the mean value of its cluster. The oracle is NumPy in float64, token
  by token; it is given the means as they are stored, so that only float32 arithmetic is left, and what 16-bit products round away.
- Rows make sense where rows beside them are missing or are others': a token has one owner, or none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdb.abstracts import Centroid, Sketch
from kvdb.abstracts.centroid import BLOCK_TOKENS, NOBODY, unpack
from kvdb.abstracts.centroid_build import cluster, cluster_in_numpy
from kvdb.runtime.selection import Budget, CentroidSelector, Forced, Plan, Resident, Scores, centroid_sums
from kvdb.runtime.selection.centroid import Clusters
from kvdb.runtime.selection.centroid_sums import of_unread
from kvdb.runtime.selection.loops import can_compile
from kvdb.runtime.selection.sketch import Sketches
from kvdb.runtime.selection.sketch_scores import boxes_off_by
from kvdb.runtime.tiles import Partial, attend_one

CT = 16
FORCED = Forced.of(CT)
Array = np.ndarray[Any, np.dtype[Any]]

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(7, 20), st.sampled_from((1, 8, 64)))
"""KV heads, query heads of each, chunks, dimensions."""


class Case(NamedTuple):
    """q (kv_heads, group, dim); k, v (kv_heads, chunks, tokens, dim), tail_k, tail_v (kv_heads, 3, dim): float32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tail_k: torch.Tensor
    tail_v: torch.Tensor


def case(shape: tuple[int, int, int, int], seed: int) -> Case:
    heads, group, chunks, dim = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, group, dim, generator=g) * dim**-0.5
    k = 2 * torch.randn(heads, chunks, CT, dim, generator=g)
    return Case(
        q, k, *(torch.randn(size, generator=g) for size in ((heads, chunks, CT, dim), (heads, 3, dim), (heads, 3, dim)))
    )


def built(c: Case) -> Array:
    """Rows (chunks, kv_heads, row_bytes)."""
    return Centroid().build(c.k.numpy(), c.k.shape[1] * CT, "float32", c.v.numpy())[0]


def resident_of(c: Case, rows: Array | None = None) -> Resident:
    selector, (_, chunks, _, dim) = CentroidSelector(), c.k.shape
    sketch = Sketch().build(c.k.numpy(), chunks * CT, "float32")[: 1 + selector.bits]
    return selector.prepare({"sketch": sketch, "centroid": (built(c) if rows is None else rows)[None]}, CT, dim)


def clusters_of(resident: Resident) -> Clusters:
    return Clusters(*resident[len(Sketches._fields) :])


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


def merged(c: Case, resident: Resident, plan: Plan) -> torch.Tensor:
    """Attention as the runtime computes it, a KV head at a time."""
    selector, out = CentroidSelector(), []
    found = selector.estimate(c.q, resident, selector.score(c.q, resident, 7), plan)
    read = plan.read(c.k.shape[1])
    for head in range(len(c.q)):
        this = slice(head, head + 1)
        parts = [(each[head][read[head]].flatten(0, 1)[None] for each in (c.k, c.v)), (c.tail_k[this], c.tail_v[this])]
        beside = None if found is None else Partial(found.out[this, :, None], found.lse[this, :, None])
        out.append(attend_one(c.q[this], [tuple(part) for part in parts], beside))  # type: ignore[misc]
    return torch.cat(out).double()


def by_numpy(c: Case, plan: Plan, kept: Clusters) -> Array:
    """Softmax attention over what is read, the tail, and every unread token as its cluster's mean key and value."""
    q, k, v, tail_k, tail_v = (t.double().numpy() for t in c)
    mean_k, mean_v = (
        (kept.keys * kept.key_scales[..., None]).numpy(),
        (kept.values * kept.value_scales[..., None]).numpy(),
    )
    read, out = plan.read(k.shape[1]).numpy(), np.empty(q.shape)
    for head, group in np.ndindex(q.shape[:2]):
        owners = kept.owners[head].numpy()[~read[head]].ravel()
        owners = owners[owners >= 0]
        keys = np.concatenate([k[head, read[head]].reshape(-1, k.shape[-1]), tail_k[head], mean_k[head, owners]])
        values = np.concatenate([v[head, read[head]].reshape(-1, v.shape[-1]), tail_v[head], mean_v[head, owners]])
        logits = keys @ q[head, group]
        weights = np.exp(logits - logits.max())
        out[head, group] = weights @ values / weights.sum()
    return out


def slack(c: Case, kept: Clusters) -> float:
    """Weights, products and roundings of the output; see `test_tiles`. A logit that is off by x moves weights by a factor exp(x)."""
    e32 = torch.finfo(torch.float32).eps
    norms = float(c.q.double().norm(dim=-1).max() * c.k.double().norm(dim=-1).max())
    size = 1 + norms + math.log(c.k.shape[1] * CT)
    weight = (2 * c.q.shape[-1] * norms + 8 * size + c.k.shape[1] * CT) * e32
    return float(c.v.abs().max()) * (
        2 * weight + 12 * e32 + 2 * math.expm1(float(boxes_off_by(c.q, kept.key_scales).max()))
    )


@given(shapes, seeds, st.booleans())
def test_unread_tokens_count_as_the_means_of_their_clusters(
    shape: tuple[int, int, int, int], seed: int, each: bool
) -> None:
    c, selector = case(shape, seed), CentroidSelector()
    resident = resident_of(c)
    plan = plan_of(selector.score(c.q, resident, 7), seed, each=each)
    kept = clusters_of(resident)
    assert np.abs(merged(c, resident, plan).numpy() - by_numpy(c, plan, kept)).max() <= slack(c, kept)


@given(shapes, seeds, st.booleans())
def test_compiled_loops_and_torch_agree(shape: tuple[int, int, int, int], seed: int, each: bool) -> None:
    c, selector = case(shape, seed), CentroidSelector()
    kept = clusters_of(resident_of(c))
    plan = plan_of(selector.score(c.q, resident_of(c), 7), seed, each=each)
    logits = torch.bmm(c.q, kept.keys.float().transpose(1, 2)) * kept.key_scales[:, None]
    asked = (logits, kept.owners, kept.sizes, plan.chunks, plan.counts, kept.values, kept.value_scales)
    assert can_compile(logits)
    compiled = of_unread(*asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(centroid_sums, "can_compile", lambda of: False)
        in_torch = of_unread(*asked)
    assert (compiled is None) == (in_torch is None)
    if compiled is not None and in_torch is not None:
        size = float(logits.abs().max()) + math.log(shape[2] * CT)
        tolerance = 16 * torch.finfo(torch.float32).eps * (shape[2] + size)
        assert torch.allclose(compiled[1], in_torch[1], atol=tolerance, rtol=0)
        assert (compiled[0] - in_torch[0]).abs().max() <= tolerance * float(c.v.abs().max())


@given(shapes, seeds)
def test_where_everything_is_read_nothing_is_estimated(shape: tuple[int, int, int, int], seed: int) -> None:
    c, selector = case(shape, seed), CentroidSelector()
    resident = resident_of(c)
    everything = Plan(torch.arange(shape[2]).expand(shape[0], -1), None, 0)
    assert selector.estimate(c.q, resident, selector.score(c.q, resident, 7), everything) is None


@given(
    heads=st.integers(1, 2),
    ct=st.sampled_from([1, 7, 16]),
    tokens=st.integers(1, 300),
    dim=st.sampled_from([1, 8]),
    seed=seeds,
)
def test_every_token_is_in_one_cluster(heads: int, ct: int, tokens: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chunks = -(-tokens // ct)
    keys = rng.integers(-2, 3, (heads, chunks, ct, dim)).astype(np.float32)  # many are equal
    bad = rng.random((heads, chunks * ct)) < 0.05
    values = rng.normal(size=keys.shape).astype(np.float32)
    values.reshape(heads, -1, dim)[bad] = np.nan
    rows = Centroid().build(keys, tokens, "float32", values)
    found = unpack(rows[0], dim)
    for head in range(heads):
        members = found.members[:, head]
        inside = members != NOBODY
        places = (members + ct * np.arange(chunks)[:, None])[inside]
        assert sorted(places.tolist()) == np.flatnonzero(~bad[head, :tokens]).tolist()
        own = inside.sum(1)
        assert (own[:-1][own[1:] > 0] == ct).all()  # all but the last are full
        for row in np.flatnonzero(own):
            at = members[row][inside[row]] + ct * row
            for vectors, mean, scale in (
                (keys, found.keys, found.key_scales),
                (values, found.values, found.value_scales),
            ):
                true = vectors[head].reshape(-1, dim)[at].astype(np.float64).mean(0)
                assert np.abs(mean[row, head] * np.float64(scale[row, head]) - true).max() <= np.abs(true).max() * (
                    0.5 / 127 + 1e-5
                )


def test_blocks_share_no_clusters() -> None:
    rng = np.random.default_rng(0)
    chunks = 2 * BLOCK_TOKENS // CT + 3
    keys = rng.normal(size=(1, chunks, CT, 8)).astype(np.float32)
    members = unpack(Centroid().build(keys, chunks * CT - 5, "float32", keys)[0], 8).members[:, 0]
    row, _ = np.nonzero(members != NOBODY)
    places = members[members != NOBODY] + CT * row
    assert (places // BLOCK_TOKENS == row * CT // BLOCK_TOKENS).all()
    assert len(set(places.tolist())) == chunks * CT - 5


def test_keys_that_lie_together_come_into_one_cluster() -> None:
    """Sixteen directions, tokens of which follow each other in turn: contiguous records hold one of each."""
    rng = np.random.default_rng(1)
    kinds = np.arange(1024) % 16
    keys = (10 * rng.normal(size=(16, 32))[kinds] + rng.normal(size=(1024, 32)) / 10).astype(np.float32)
    order, *means = cluster(keys, -keys, np.arange(1024), 16)
    assert all(len(set(kinds[members])) == 1 for members in order.reshape(-1, 16))
    in_order, by_numpy = np.arange(1024), np.empty((2, 64, 32), np.float32)
    cluster_in_numpy(keys, -keys, in_order, 16, *by_numpy)
    assert np.array_equal(order, in_order)
    assert np.allclose(means, by_numpy, rtol=1e-5, atol=1e-5)


@given(shapes, seeds, st.data())
def test_rows_of_others_leave_every_token_one_owner_or_none(
    shape: tuple[int, int, int, int], seed: int, data: st.DataObject
) -> None:
    """After a merge of segments, the last rows of one are the first of another; a span may end inside a block."""
    c, other = case(shape, seed), case(shape, seed + 1)
    rows, chunks = built(c).copy(), shape[2]
    first = data.draw(st.integers(1, chunks - 1))
    rows[first:] = built(other)[: chunks - first]
    kept = clusters_of(resident_of(c, rows))
    owners = kept.owners.flatten(1).numpy()
    assert ((owners >= -1) & (owners < chunks)).all()
    for head in range(shape[0]):
        assert np.array_equal(np.bincount(owners[head][owners[head] >= 0], minlength=chunks), kept.sizes[head].numpy())
    plan = plan_of(CentroidSelector().score(c.q, resident_of(c, rows), 7), seed, each=True)
    assert np.abs(merged(c, resident_of(c, rows), plan).numpy() - by_numpy(c, plan, kept)).max() <= slack(c, kept)


@pytest.mark.parametrize("plane", ["k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_token_of_which_nothing_is_known_is_in_no_cluster(plane: str, bad: float) -> None:
    c = case((1, 2, 12, 8), 0)
    {"k": c.k, "v": c.v}[plane][0, 5, 3, 1] = bad
    kept = clusters_of(resident_of(c))
    assert (kept.owners[0] < 0).nonzero().tolist() == [[5, 3]]
    assert kept.sizes.sum() == 12 * CT - 1


def test_parts_cut_between_blocks_join_to_the_whole() -> None:
    selector, step = CentroidSelector(), BLOCK_TOKENS // CT
    c = case((2, 3, 2 * step + 5, 8), 0)
    rows = built(c)
    cut = [Case(c.q, c.k[:, part], c.v[:, part], c.tail_k, c.tail_v) for part in (slice(0, step), slice(step, None))]
    joined = selector.join([resident_of(part) for part in cut])
    for one, other in zip(joined, resident_of(c, rows), strict=True):
        assert torch.equal(one, other)
