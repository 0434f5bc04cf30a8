"""A plan holds the sink, the recent window and the best of the rest, each once; where it stops is as its rule says; what it
leaves unread is estimated, or proven.

The oracle of a plan is NumPy in float64: softmax per query head over records and tail, mean over the group, sorted. The oracle of covered mass
is the sum of exponentials over every token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdb.errors import InvalidInput
from kvdb.runtime.selection import (
    BoxSelector,
    Budget,
    Certified,
    Forced,
    Mass,
    Plan,
    Scores,
    StopRule,
    Threshold,
    covered_mass,
)
from kvdb.runtime.selection.base import SURE
from kvdb.runtime.selection.largest import largest

FORCED = Forced.of(16)

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(FORCED.sink + FORCED.recent + 1, 60))


def scores_of(shape: tuple[int, int, int], seed: int, width: float = 3.0) -> torch.Tensor:
    return width * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scored(lse: torch.Tensor, ceiling: torch.Tensor | None = None) -> Scores:
    return Scores(lse, ceiling, lse.shape[0] * lse.shape[2], 0)


def unread(_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("read before the plan was made")


def no_tail(lse: torch.Tensor) -> torch.Tensor:
    return lse.new_full(lse.shape[:2], -math.inf)


def plan(lse: torch.Tensor, take: int, tail: torch.Tensor | None = None) -> Plan:
    return Budget.of(None).plan(scored(lse), take, FORCED, no_tail(lse) if tail is None else tail, unread)


def tails(shape: tuple[int, int, int], seed: int, width: float, *, some: bool) -> torch.Tensor:
    """Log-sum-exps of newest tokens, (kv_heads, group)."""
    return scores_of((*shape[:2], 1), seed + 1, width)[..., 0] if some else torch.full(shape[:2], -math.inf)


def group_shares(lse: torch.Tensor, tail: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Estimated share of each record and, last, of the tail: (kv_heads, chunks + 1)."""
    logits = np.concatenate((lse.double().numpy(), tail.double().numpy()[..., None]), -1)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    shares: np.ndarray[Any, np.dtype[np.float64]] = (e / e.sum(-1, keepdims=True)).mean(1)
    return shares


@pytest.mark.parametrize(("chunk_tokens", "sink", "recent"), [(16, 1, 1), (32, 1, 1), (64, 1, 1), (8, 2, 2)])
def test_sink_and_recent_window_are_whole_chunks(chunk_tokens: int, sink: int, recent: int) -> None:
    """16 tokens each."""
    assert Forced.of(chunk_tokens) == (sink, recent)


@given(shapes, st.integers(0, 80), seeds)
def test_a_plan_holds_what_is_forced_and_nothing_twice(shape: tuple[int, int, int], take: int, seed: int) -> None:
    heads, _, chunks = shape
    chosen = plan(scores_of(shape, seed), take)
    expected = max(min(take, chunks), FORCED.sink + FORCED.recent)
    assert chosen.chunks.shape == (heads, expected)
    assert chosen.chunks.dtype == torch.int64
    forced = {*range(FORCED.sink), *range(chunks - FORCED.recent, chunks)}
    for row in chosen.chunks.tolist():
        assert len(set(row)) == len(row)
        assert forced <= set(row) <= set(range(chunks))
        assert set(row[: chosen.forced]) == forced


@given(shapes, st.integers(0, 80), st.booleans(), seeds)
def test_the_free_part_of_a_plan_is_the_top_by_share(
    shape: tuple[int, int, int], take: int, tail: bool, seed: int
) -> None:
    scores, tail_lse = scores_of(shape, seed), tails(shape, seed, 6.0, some=tail)
    chosen = plan(scores, take, tail_lse)
    free = chosen.chunks.shape[1] - chosen.forced
    shares = group_shares(scores, tail_lse)[:, FORCED.sink : shape[2] - FORCED.recent]
    for row, mine in zip(chosen.chunks[:, chosen.forced :].tolist(), shares, strict=True):
        best = np.sort(mine)[::-1][:free]
        found = np.sort(mine[np.array(row, int) - FORCED.sink])[::-1]
        # Equal but for swaps of records whose shares are equal in float32: each is a sum of `group` rounded terms.
        assert np.allclose(found, best, rtol=64 * np.finfo(np.float32).eps, atol=0)


def test_a_query_head_that_looks_at_the_newest_tokens_has_less_of_a_say() -> None:
    """Two heads of a group want different records; one of them spends nearly all of its attention on the tail."""
    lse = torch.zeros(1, 2, 40)
    lse[0, 0, 10], lse[0, 1, 20] = 5.0, 6.0
    want = FORCED.sink + FORCED.recent + 1
    assert plan(lse, want).chunks[0, -1] == 20
    assert plan(lse, want, torch.tensor([[-math.inf, 12.0]])).chunks[0, -1] == 10


def test_a_later_plan_does_not_change_an_earlier_one() -> None:
    shape = (2, 3, 40)
    first = plan(scores_of(shape, 1), 12)
    kept = first.chunks.clone()
    plan(scores_of(shape, 2), 12)
    assert torch.equal(first.chunks, kept)


@given(st.integers(1, 4), st.integers(1, 200) | st.integers(1000, 5000), st.data())
def test_the_largest_of_each_row_are_found(rows: int, n: int, data: st.DataObject) -> None:
    k, seed = data.draw(st.integers(0, n)), data.draw(seeds)
    values = scores_of((rows, 1, n + 1), seed)[:, 0, 1:].round(decimals=1)  # with many that are equal, and rows apart
    values *= 10.0 ** data.draw(st.integers(-40, 38))  # to where numbers are subnormal, or infinite
    found = largest(values, k)
    assert found.shape == (rows, k)
    for row, indices in zip(values.numpy(), found.numpy(), strict=True):
        assert (np.diff(indices) > 0).all()
        assert np.array_equal(np.sort(row[indices]), np.sort(row)[n - k :])


@pytest.mark.parametrize("n", [100, 5000])
def test_what_is_no_number_is_larger_than_any(n: int) -> None:
    values = torch.linspace(-1, 1, n)[None].clone()
    values[0, [3, 7]] = torch.tensor([math.nan, -math.nan])
    values[0, 5] = math.inf
    assert set(largest(values, 4)[0].tolist()) == {3, 5, 7, n - 1}
    assert largest(-values.nan_to_num(), n)[0].tolist() == list(range(n))
    if n > 1024:  # of equal ones the first, whatever their sign
        assert largest(torch.tensor([[-0.0, 0.0] * n]), 3)[0].tolist() == [0, 1, 2]


def record_lse(logits: torch.Tensor) -> torch.Tensor:
    """(kv_heads, group, chunks, chunk_tokens) -> true log-sum-exp per record."""
    return torch.logsumexp(logits, -1)


def chosen_lse(lse: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    return lse.gather(2, chunks[:, None].expand(-1, lse.shape[1], -1))


@given(shapes, st.integers(0, 40), st.floats(0.1, 8.0), seeds)
def test_covered_mass_is_true_where_scores_are(shape: tuple[int, int, int], take: int, width: float, seed: int) -> None:
    """With the true log-sum-exp of each record for a score, covered mass is 1 - unread mass."""
    g = torch.Generator().manual_seed(seed)
    logits = width * torch.randn((*shape, 16), generator=g)
    tail = width * torch.randn((*shape[:2], 5), generator=g)
    true = record_lse(logits)
    chosen = plan(true, take)
    found = covered_mass(scored(true), chosen, chosen_lse(true, chosen.chunks), torch.logsumexp(tail, -1)).item()
    every = logits.double().numpy()
    top = max(every.max(), tail.max().item())
    record = np.exp(every - top).sum(-1)  # [kv_heads, group, chunks]
    total = record.sum(-1) + np.exp(tail.double().numpy() - top).sum(-1)
    read = np.take_along_axis(record, chosen.chunks.numpy()[:, None].repeat(shape[1], 1), 2).sum(-1)
    unread = (record.sum(-1) - read) / total
    # sigmoid moves by a quarter of its argument's error: two log-sum-exps, and a shift of two more, of size L
    slack = 8 * np.finfo(np.float32).eps * (true.abs().max().item() + math.log(shape[2]) + 1)
    assert abs(found - (1 - unread).mean()) <= slack
    assert 0.0 <= found <= 1.0


@given(shapes, st.integers(0, 80), st.floats(0.0, 50.0), seeds)
def test_covered_mass_is_a_share_whatever_the_scores(
    shape: tuple[int, int, int], take: int, width: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = width * torch.randn(shape, generator=g)
    chosen = plan(scores, take)
    true = width * torch.randn((*shape[:2], chosen.chunks.shape[1]), generator=g)
    found = covered_mass(scored(scores), chosen, true, width * torch.randn(shape[:2], generator=g)).item()
    assert 0.0 <= found <= 1.0


def test_nothing_unread_is_all_covered() -> None:
    scores = scores_of((2, 2, 20), 0)
    chosen = plan(scores, 20)
    assert covered_mass(scored(scores), chosen, chosen_lse(scores, chosen.chunks), torch.zeros(2, 2)).item() == 1.0


@pytest.mark.parametrize(
    ("given_budget", "share", "tokens"),
    [(None, 0.1, 2048), (0.25, 0.25, None), (1.0, 1.0, None), (512, 1.0, 512), (1, 1.0, 1)],
)
def test_a_float_budget_is_a_share_and_an_int_budget_tokens(
    given_budget: float | int | None, share: float, tokens: int | None
) -> None:
    assert Budget.of(given_budget) == Budget(share, tokens)


@pytest.mark.parametrize("wrong", [0, -1, 0.0, -0.1, 1.5, math.nan, math.inf, True, "0.1", [0.1]])
def test_an_impossible_budget_is_refused_with_its_value(wrong: Any) -> None:
    with pytest.raises(InvalidInput, match="budget") as info:
        Budget.of(wrong)
    assert str(wrong).strip("'") in str(info.value)


@given(st.floats(0.001, 1.0), st.integers(0, 5000), st.sampled_from((16, 32)))
def test_a_budget_is_never_exceeded(share: float, chunks: int, chunk_tokens: int) -> None:
    assert Budget.of(share).look_at(chunks, chunk_tokens) <= share * chunks
    tokens = max(1, int(share * 4000))
    assert Budget.of(tokens).look_at(chunks, chunk_tokens) * chunk_tokens <= tokens
    both = Budget.of(None).look_at(chunks, chunk_tokens)
    assert both <= 0.1 * chunks
    assert both * chunk_tokens <= 2048


def test_different_rules_have_different_fidelities() -> None:
    rules: list[StopRule] = [Budget.of(b) for b in (None, 0.1, 0.2, 1.0, 1, 2048, 512)]
    rules += [
        Mass.of(0.9),
        Mass.of(0.95),
        Certified.of(0.95),
        Certified.of(0.05),
        Threshold.of(0.05),
        Threshold.of(0.9),
    ]
    assert len({rule.fidelity for rule in rules}) == len(rules)


@pytest.mark.parametrize("wrong", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf, True, "0.1", None])
@pytest.mark.parametrize(("rule", "name"), [(Threshold, "threshold"), (Mass, "mass"), (Certified, "certified")])
def test_an_impossible_share_is_refused_with_its_value(rule: Any, name: str, wrong: Any) -> None:
    with pytest.raises(InvalidInput, match=f"{name}: .*{str(wrong).strip()}"):
        rule.of(wrong)


# -- top-p


@given(shapes, st.floats(0.01, 0.99), st.floats(0.1, 8.0), st.booleans(), seeds)
def test_top_p_reads_as_many_as_reach_the_share_and_no_more(
    shape: tuple[int, int, int], share: float, width: float, tail: bool, seed: int
) -> None:
    lse = scores_of(shape, seed, width)
    tail_lse = tails(shape, seed, width, some=tail)
    chosen = Mass.of(share).plan(scored(lse), 1, FORCED, tail_lse, unread)
    assert chosen.counts is not None
    assert chosen.chunks.shape[1] == chosen.counts.max()
    shares = group_shares(lse, tail_lse)
    slack = 64 * np.finfo(np.float32).eps * shape[2]
    for head, count in enumerate(chosen.counts.tolist()):
        row = chosen.chunks[head, :count].numpy()
        assert len(set(row.tolist())) == count
        assert set(range(FORCED.sink)) | set(range(shape[2] - FORCED.recent, shape[2])) <= set(row.tolist())
        missing = 1 - shares[head, -1] - shares[head][row].sum()
        assert missing <= 1 - share + slack
        last = shares[head][row[-1]]
        assert count == chosen.forced or missing + last >= 1 - share - slack  # one fewer would not have done


# -- a threshold


@given(shapes, st.floats(0.001, 0.5), st.floats(0.1, 8.0), st.booleans(), seeds)
def test_a_threshold_reads_every_record_above_it_and_none_below(
    shape: tuple[int, int, int], share: float, width: float, tail: bool, seed: int
) -> None:
    lse, tail_lse = scores_of(shape, seed, width), tails(shape, seed, width, some=tail)
    chosen = Threshold.of(share).plan(scored(lse), 1, FORCED, tail_lse, unread)
    assert chosen.counts is not None
    assert chosen.chunks.shape[1] == chosen.counts.max()
    assert chosen.records <= shape[0] * (chosen.forced + 1 / share)
    shares = group_shares(lse, tail_lse)[:, :-1]
    shares[:, : FORCED.sink] = shares[:, shape[2] - FORCED.recent :] = 1.0  # always read
    slack = 64 * np.finfo(np.float32).eps
    for head, read in enumerate(chosen.read(shape[2]).numpy()):
        assert (shares[head][read] >= share * (1 - slack)).all()
        assert (shares[head][~read] < share * (1 + slack)).all()


# -- what must be read, whatever the rule


@pytest.mark.parametrize(
    "rule", [Budget.of(0.5), Threshold.of(0.2), Mass.of(0.5), Certified.of(0.5)], ids=lambda r: r.fidelity
)
@pytest.mark.parametrize("unknown", [[7], [0], [3, 11, 12, 39], [*range(5, 20)]], ids=len)
def test_records_of_which_nothing_is_known_are_read_and_the_others_as_if_they_were_not_there(
    rule: StopRule, unknown: list[int]
) -> None:
    lse = torch.full((1, 2, 40), -8.0)
    lse[..., 25:28] = 5.0
    without = rule.plan(scored(lse, lse + 0.1), 20, FORCED, torch.zeros(1, 2), lambda chunks: chosen_lse(lse, chunks))
    lse[..., unknown] = SURE
    ceiling = (lse + 0.1).masked_fill(lse == SURE, math.inf)
    chosen = rule.plan(
        scored(lse, ceiling), 20, FORCED, torch.zeros(1, 2), lambda chunks: chosen_lse(-lse.abs(), chunks)
    )
    assert chosen.read(40)[0, unknown].all()
    assert set(chosen.chunks[0, : chosen.forced].tolist()) == {0, 39}
    if rule != Budget.of(0.5) or len(unknown) < 10:
        assert (chosen.read(40) >= without.read(40)).all() or isinstance(rule, Budget | Certified)


@pytest.mark.parametrize(
    "rule", [Budget.of(0.5), Threshold.of(0.2), Mass.of(0.5), Certified.of(0.5)], ids=lambda r: r.fidelity
)
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_a_history_shorter_than_what_is_forced_is_read_once(rule: StopRule, chunks: int) -> None:
    lse = torch.zeros(2, 2, chunks)
    chosen = rule.plan(scored(lse, lse), chunks, Forced(2, 2), torch.zeros(2, 2), lambda at: chosen_lse(lse, at))
    assert chosen.chunks.sort(-1).values.tolist() == [[*range(chunks)]] * 2
    assert chosen.forced == chunks


def test_a_threshold_that_is_next_to_nothing_reads_everything() -> None:
    rule = Threshold.of(1e-310)
    assert rule.look_at(500, 16) == 499
    lse = scores_of((1, 2, 40), 0)
    assert rule.plan(scored(lse), 39, FORCED, torch.zeros(1, 2), unread).records == 40


# -- a certificate


def honest(shape: tuple[int, int, int], seed: int, width: float, loose: float) -> tuple[Scores, torch.Tensor]:
    """Scores with true ceilings that lie up to `loose` nats above the truth, and the truth."""
    g = torch.Generator().manual_seed(seed)
    true = width * torch.randn(shape, generator=g)
    estimate = true + loose * (torch.rand(shape, generator=g) - 0.5)
    return scored(estimate, true + loose * torch.rand(shape, generator=g)), true


@given(shapes, st.floats(0.001, 0.5), st.floats(0.1, 20.0), st.floats(0.0, 10.0), st.booleans(), seeds)
def test_the_true_unread_mass_never_exceeds_the_certificate_nor_epsilon(
    shape: tuple[int, int, int], epsilon: float, width: float, loose: float, tail: bool, seed: int
) -> None:
    scores, true = honest(shape, seed, width, loose)
    tail_lse = tails(shape, seed, width, some=tail)
    chosen = Certified.of(epsilon).plan(scores, 1, FORCED, tail_lse, lambda chunks: chosen_lse(true, chunks))
    assert chosen.unread_mass is not None
    e = np.exp(true.double().numpy() - true.max().item())
    total = e.sum(-1) + np.exp(tail_lse.double().numpy() - true.max().item())
    read = np.take_along_axis(e, chosen.chunks.numpy()[:, None].repeat(shape[1], 1), 2).sum(-1)
    unread_share = (e.sum(-1) - read) / total
    assert (unread_share <= chosen.unread_mass.double().numpy() + 1e-12).all()
    whole = chosen.chunks.shape[1] == shape[2]
    assert whole or (chosen.unread_mass <= epsilon).all()
    if whole:
        assert (chosen.unread_mass == 0).all()


def test_a_certificate_costs_less_where_attention_is_sharp_and_bounds_are_tight() -> None:
    read = []
    for loose in (0.1, 3.0, 12.0):
        scores, true = honest((1, 2, 200), 0, 5.0, loose)
        read.append(
            Certified.of(0.05)
            .plan(scores, 1, Forced(1, 4), no_tail(true), lambda c, true=true: chosen_lse(true, c))
            .records
        )
    assert read[0] < read[1] < read[2]
    assert read[0] < 100


def test_false_bounds_would_be_seen() -> None:
    """So the property above can fail."""
    scores, true = honest((1, 1, 60), 1, 1.0, 0.0)
    assert scores.ceiling is not None
    false = scored(scores.lse, scores.ceiling - 3)
    chosen = Certified.of(0.1).plan(false, 1, FORCED, no_tail(true), lambda chunks: chosen_lse(true, chunks))
    assert chosen.unread_mass is not None
    e = torch.exp(true.double())
    share = 1 - chosen_lse(true, chosen.chunks).double().exp().sum(-1) / e.sum(-1)
    assert (share > chosen.unread_mass).any()


def test_the_box_score_moves_from_the_centre_to_the_bound_as_beta_grows() -> None:
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(7, 2, 16, 8, generator=g)  # [chunks, heads, tokens, dim]
    box = torch.stack((keys.amin(2), keys.amax(2)), 2)
    q = torch.randn(2, 3, 8, generator=g)
    selectors = [BoxSelector(beta=beta) for beta in (0.0, 0.5, 1.0)]
    centre, half, bound = (each.score(q, each.prepare({"box": box.numpy()}, 16, 8), 1).lse for each in selectors)
    atol = 16 * torch.finfo(torch.float32).eps * (q.abs().sum(-1).max() * keys.abs().max()).item()
    expected = torch.einsum("hgd,chd->hgc", q, (box[:, :, 0] + box[:, :, 1]) / 2)
    assert torch.allclose(centre, expected, rtol=0, atol=atol)
    assert (centre <= half).all()
    assert (half <= bound).all()
