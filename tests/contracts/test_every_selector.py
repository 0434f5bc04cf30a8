"""What holds for every selector in the table.

Scores are finite and of the promised shape; what a selector keeps in memory can be made in parts; where everything is looked at
closely, a record's score does not depend on which others are there; a record of which nothing is known scores `SURE`; proven
ceilings are never below the truth, and who proves nothing says so; what is read is not estimated.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb.abstracts import ABSTRACTS
from kvdb.errors import InvalidInput, Unsupported
from kvdb.runtime.selection import (
    SELECTORS,
    BoxSelector,
    MeanSelector,
    Plan,
    Resident,
    Selector,
    SketchSelector,
)
from kvdb.runtime.selection.base import SURE
from kvdb.runtime.selection.shares import UNKNOWN_SHARE, shares
from kvdb.runtime.selection.sketch import RANGE, Sketches
from kvdb.runtime.selection.sketch_scores import boxes_off_by, joined, of_codes, of_open_boxes, off_by

CT = 16
WAYS: dict[str, Selector] = {
    "box": BoxSelector(),
    "box, the bound itself": BoxSelector(beta=1.0),
    "sketch with ranges": SketchSelector(margin=math.inf, opened=0.4),
    **{f"sketch of {bits} bits": SketchSelector(bits=bits, margin=math.inf) for bits in (1, 2, 3, 4)},
    "mean": MeanSelector(),
}
"""Each looks at every record in the same way, and keeps of each what follows from it alone."""

every_selector = pytest.mark.parametrize("selector", [kind() for kind in SELECTORS.values()], ids=list(SELECTORS))
every_way = pytest.mark.parametrize("selector", WAYS.values(), ids=WAYS)
every_proof = pytest.mark.parametrize(
    "selector", [w for w in WAYS.values() if w.proves], ids=[n for n, w in WAYS.items() if w.proves]
)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.sampled_from((1, 8, 64)))
seeds = st.integers(0, 2**32 - 1)

Array = np.ndarray


def keys_and_query(size: tuple[int, int, int, int], seed: int) -> tuple[Array, torch.Tensor]:
    """Keys (kv_heads, chunks, chunk_tokens, dim) and a scaled query (kv_heads, group, dim)."""
    heads, group, chunks, dim = size
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.standard_normal((heads, 1, 1, dim)))
    keys = (rng.standard_normal((heads, chunks, CT, dim)) * 3 * spread).astype(np.float32)
    return keys, torch.from_numpy((rng.standard_normal((heads, group, dim)) * dim**-0.5).astype(np.float32))


def resident_of(selector: Selector, keys: Array, values: Array | None = None) -> Resident:
    """values  as keys; None: any"""
    _, chunks, ct, dim = keys.shape
    values = keys[:, :, ::-1].copy() if values is None else values
    stored = {}
    for name, planes in selector.abstracts.items():
        kind = ABSTRACTS[name]
        stored[name] = kind.load(kind.build(keys, chunks * ct, "float32", values)[:planes], dim, "float32")
    return selector.prepare(stored, ct, dim)


def rounding(keys: Array, q: torch.Tensor) -> float:
    """Error of a product sum of 2 * dim terms in float32, in any order, each made of a few rounded ones; and of exponentials,
    their sum and its logarithm."""
    dim, eps = keys.shape[-1], float(np.finfo(np.float32).eps)
    products = 8 * dim * 2 * float(np.abs(keys).max()) * float(q.abs().sum(-1).max())
    return eps * (products + 2 * CT + math.log(CT))


def true_lse(keys: Array, q: torch.Tensor) -> Array:
    logits = np.einsum("hgd,hctd->hgct", q.double().numpy(), keys.astype(np.float64))
    top = logits.max(-1, keepdims=True)
    lse: Array = (np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top)[..., 0]
    return lse


def test_the_table_names_its_members() -> None:
    assert SELECTORS
    for name, kind in SELECTORS.items():
        assert kind.name == name
        assert set(kind().abstracts) <= set(ABSTRACTS)


@every_selector
@given(size=sizes, seed=seeds, take=st.integers(1, 12), scale=st.sampled_from([0.0, 1e-30, 1.0, 1e15]))
def test_scores_are_finite_and_one_per_query_head_and_record(
    selector: Selector, size: tuple[int, int, int, int], seed: int, take: int, scale: float
) -> None:
    keys, q = keys_and_query(size, seed)
    heads, group, chunks, _ = size
    resident = resident_of(selector, keys * np.float32(scale))
    for ceilings in (False, True) if selector.proves else (False,):
        scores = selector.score(q, resident, take, ceilings=ceilings)
        assert scores.lse.dtype == torch.float32
        assert scores.lse.shape == (heads, group, chunks)
        assert torch.isfinite(scores.lse).all()
        assert (scores.ceiling is not None) == ceilings
        assert scores.evaluated >= heads * chunks
        assert scores.bytes_read > 0


@every_way
@given(size=sizes, cut=st.integers(1, 6), seed=seeds)
def test_resident_forms_of_parts_join_to_the_form_of_the_whole(
    selector: Selector, size: tuple[int, int, int, int], cut: int, seed: int
) -> None:
    """A history extends what is resident chunk by chunk."""
    keys, _ = keys_and_query(size, seed)
    parts = [resident_of(selector, part) for part in (keys[:, :cut], keys[:, cut:]) if part.shape[1]]
    for together, whole in zip(selector.join(parts), resident_of(selector, keys), strict=True):
        assert torch.equal(together, whole)


@every_way
@given(size=sizes, seed=seeds)
def test_a_record_scores_the_same_whatever_records_are_beside_it(
    selector: Selector, size: tuple[int, int, int, int], seed: int
) -> None:
    keys, q = keys_and_query(size, seed)
    resident = resident_of(selector, keys)
    together = selector.score(q, resident, 1, ceilings=selector.proves)
    for chunk in range(size[2]):
        alone = selector.score(q, resident_of(selector, keys[:, chunk : chunk + 1]), 1, ceilings=selector.proves)
        assert (alone.lse[..., 0] - together.lse[..., chunk]).abs().max() <= rounding(keys, q)
        if alone.ceiling is None or together.ceiling is None:
            assert not selector.proves
            continue
        assert (alone.ceiling[..., 0] - together.ceiling[..., chunk]).abs().max() <= rounding(keys, q)


@every_selector
def test_a_record_that_holds_the_querys_own_direction_scores_highest(selector: Selector) -> None:
    keys, q = keys_and_query((2, 1, 10, 64), 0)
    keys *= 0.1
    keys[:, 6] += 20 * q.numpy() / np.linalg.norm(q.numpy(), axis=-1, keepdims=True)
    assert (selector.score(q, resident_of(selector, keys), 2).lse.argmax(-1) == 6).all()


@every_selector
def test_who_proves_nothing_says_so(selector: Selector) -> None:
    keys, q = keys_and_query((2, 2, 5, 8), 0)
    if selector.proves:
        pytest.skip("it does")
    with pytest.raises(Unsupported, match=f"selector '{selector.name}': upper bounds were asked for, expected"):
        selector.score(q, resident_of(selector, keys), 2, ceilings=True)


@every_selector
@given(size=sizes, seed=seeds, counts=st.none() | st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_an_estimate_is_of_unread_records_and_none_where_all_are_read(
    selector: Selector, size: tuple[int, int, int, int], seed: int, counts: list[int] | None
) -> None:
    keys, q = keys_and_query(size, seed)
    heads, group, chunks, dim = size
    resident = resident_of(selector, keys)
    scores = selector.score(q, resident, 1)
    order = torch.arange(chunks).expand(heads, -1)
    n = chunks // 2 if counts is None else chunks
    plan = Plan(order[:, :n], None if counts is None else torch.tensor(counts[:heads]).clamp(max=chunks), 0)
    everything = Plan(order, None, 0)
    assert selector.estimate(q, resident, scores, everything) is None
    assert plan.read(chunks).sum() == plan.records
    found = selector.estimate(q, resident, scores, plan)
    if found is None:
        return
    assert (found.out.shape, found.lse.shape) == ((heads, group, dim), (heads, group))
    assert found.out.dtype == found.lse.dtype == torch.float32
    assert torch.isfinite(found.out).all()
    assert found.bytes_read > 0
    nothing_left = plan.read(chunks).all(1)
    assert (found.lse[nothing_left] == -math.inf).all()
    assert not found.out[nothing_left].any()


@every_proof
@given(size=sizes, seed=seeds, shrunk=st.booleans())
def test_a_ceiling_is_never_below_the_truth(
    selector: Selector, size: tuple[int, int, int, int], seed: int, shrunk: bool
) -> None:
    keys, q = keys_and_query(size, seed)
    if shrunk:  # boxes without width in some dimensions
        keys[..., ::2] = keys[:, :, :1, ::2]
    scores = selector.score(q, resident_of(selector, keys), 1, ceilings=True)
    assert scores.ceiling is not None
    assert (true_lse(keys, q) <= scores.ceiling.double().numpy() + rounding(keys, q)).all()


@given(size=sizes, seed=seeds, bits=st.integers(1, 4))
def test_compiled_scores_agree_with_torch(size: tuple[int, int, int, int], seed: int, bits: int) -> None:
    keys, q = keys_and_query(size, seed)
    keys[0, -1, 0, 0] = np.inf  # an unknown record
    resident = resident_of(SketchSelector(bits=bits), keys)
    heads, chunks = keys.shape[:2]
    keys[0, -1, 0, 0] = 0
    corners = torch.cat((q, -q), -1)
    rows = torch.arange(chunks).repeat(heads, 1).flip(1)
    runs = torch.arange(0, -(-chunks // 2), 2).repeat(heads, 1)  # every other pair

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        boxes, scales = resident[:2]
        around = q.new_ones(heads, q.shape[1], -(-chunks // 2))
        return of_codes(q, resident[:4], rows, bits), of_open_boxes(corners, boxes, scales, runs, 2, around)

    compiled = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvdb.runtime.selection.sketch_scores._compiled", lambda *_: None)
        plain = both()
    known = resident[1].masked_fill(resident[1].isinf(), 0)
    allowed = off_by(q, known).gather(2, rows[:, None].expand(-1, q.shape[1], -1))
    assert ((compiled[0] - plain[0]).abs() <= allowed + rounding(keys, q)).all()
    ranked = boxes_off_by(corners, known).amax(-1, keepdim=True)  # closed runs are moved by a mean of such errors
    assert ((compiled[1] - plain[1]).abs() <= ranked + rounding(keys, q)).all()


def test_more_bits_are_nearer_to_the_truth_and_prove_more() -> None:
    keys, q = keys_and_query((2, 3, 40, 64), 0)
    true = true_lse(keys, q)
    errors, slacks = [], []
    for bits in (1, 2, 3, 4):
        selector = SketchSelector(bits=bits)
        scores = selector.score(q, resident_of(selector, keys), 1, ceilings=True)
        assert scores.ceiling is not None
        errors.append(np.abs(scores.lse.numpy() - true).mean())
        slacks.append((scores.ceiling.numpy() - true).mean())
    assert errors == sorted(errors, reverse=True)
    assert slacks == sorted(slacks, reverse=True)
    assert errors[3] < errors[0] / 6
    assert slacks[3] < slacks[0] / 4


def test_a_cascade_finds_what_looking_at_everything_finds_for_a_part_of_the_reads() -> None:
    keys, q = keys_and_query((2, 3, 400, 64), 0)
    keys += 3 * keys[:, :, :1]  # as in a text: tokens that stand together are alike
    whole, part = SketchSelector(margin=math.inf), SketchSelector(margin=4.0, least=1)
    resident = resident_of(whole, keys)
    everything, some = whole.score(q, resident, 20), part.score(q, resident, 20)
    best = torch.softmax(everything.lse, -1).sum(1).topk(20).indices
    found = torch.softmax(some.lse, -1).sum(1).topk(20).indices
    common = sum(len(set(a) & set(b)) for a, b in zip(best.tolist(), found.tolist(), strict=True))
    assert common >= 0.8 * best.numel()
    assert some.bytes_read < 0.6 * everything.bytes_read


@given(chunks=st.integers(20, 90), seed=seeds, opened=st.floats(0.1, 1))
def test_a_pyramid_scores_what_it_opens_as_no_pyramid_does(chunks: int, seed: int, opened: float) -> None:
    keys, q = keys_and_query((2, 3, chunks, 8), seed)
    flat, pyramid = SketchSelector(margin=1, least=1), SketchSelector(margin=1, least=1, opened=opened)
    resident = Sketches(*resident_of(pyramid, keys))
    coarse, scored, read = flat._coarse(q, Sketches(*resident_of(flat, keys)), 2)
    some, fewer, less = pyramid._coarse(q, resident, 2)
    ranges = -(-chunks // RANGE)
    wide = max(math.ceil(opened * ranges), 1)
    if wide >= ranges:
        assert torch.equal(some, coarse)
        assert (fewer, less) == (scored, read)
        return
    assert fewer == 2 * (ranges + wide * RANGE)
    assert torch.isfinite(some).all()
    same = (some == coarse).all(1)
    by_range = torch.nn.functional.pad(same, (0, -chunks % RANGE), value=True).unflatten(1, (-1, RANGE)).all(2)
    assert (by_range.sum(1) >= wide).all()


def test_the_box_of_a_range_is_around_the_boxes_of_its_records() -> None:
    keys, _ = keys_and_query((2, 1, 21, 16), 0)
    keys[1, 9, 2, 3] = np.nan
    kept = SketchSelector(opened=0.5).prepare(
        {"sketch": ABSTRACTS["sketch"].build(keys, 21 * CT, "float32")[:4]}, CT, 16
    )
    assert kept.range_boxes.shape == (2, 3, 32)
    for head, part in np.ndindex(2, 3):
        own = keys[head, part * RANGE : (part + 1) * RANGE].reshape(-1, 16)
        if np.isnan(own).any():
            assert kept.range_scales[head, part].isinf()
            continue
        scale = kept.range_scales[head, part].item()
        lo, hi = (kept.range_boxes[head, part].float() * scale).split(16)
        step = 1.6 * abs(own).max() / 127  # half a step of its own, and one of its records'
        assert np.allclose(lo, own.min(0), atol=step, rtol=0)
        assert np.allclose(hi, own.max(0), atol=step, rtol=0)


CASCADES = {
    "boxes, then codes": SketchSelector(margin=1.0, least=1),
    "ranges, boxes, then codes": SketchSelector(margin=1.0, least=1, opened=0.3),
}


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@settings(max_examples=25)
@pytest.mark.parametrize("selector", [*WAYS.values(), *CASCADES.values()], ids=[*WAYS, *CASCADES])
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 80), st.sampled_from((1, 8, 64))),
    holes=st.integers(1, 80),
    hole=st.sampled_from((math.nan, math.inf, -math.inf)),
    seed=seeds,
)
def test_a_record_of_which_nothing_is_known_says_so_exactly(
    selector: Selector, size: tuple[int, int, int, int], holes: int, hole: float, seed: int, compiled: bool
) -> None:
    """However many there are, more than a cascade looks at closely among them; the others say something."""
    keys, q = keys_and_query(size, seed)
    rng = np.random.default_rng(seed)
    for head, chunk in rng.integers(0, (size[0], size[2]), (holes, 2)):
        keys[head, chunk, rng.integers(CT), rng.integers(size[3])] = hole
    unknown = torch.from_numpy(~np.isfinite(keys).all((2, 3)))[:, None].expand(-1, size[1], -1)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr("kvdb.runtime.selection.sketch_scores._compiled", lambda *_: None)
        scores = selector.score(q, resident_of(selector, keys), 1, ceilings=selector.proves)
        cascade = selector.score(q, resident_of(selector, keys), 1)
    for lse in (scores.lse, cascade.lse):
        assert (lse[unknown] == SURE).all()
        assert torch.isfinite(lse).all()
    assert (scores.lse[~unknown] < SURE).all()
    others = cascade.lse[~unknown]
    assert ((others < 0.9 * SURE) | (others == SURE)).all()  # of a range that is not opened nobody is known
    if scores.ceiling is not None:
        assert (scores.ceiling[unknown] == math.inf).all()
        assert torch.isfinite(scores.ceiling[~unknown]).all()


def test_marks_of_closed_ranges_move_nobody_elses_score() -> None:
    """More ranges hold an unknown record than are opened: what is looked at closely has marks for scores of its box."""
    keys, q = keys_and_query((1, 2, 400, 8), 0)
    selector = SketchSelector(margin=4, least=1, opened=0.3)
    before = selector.score(q, resident_of(selector, keys), 10).lse
    keys[0, ::16, 2, 3] = np.nan
    after = selector.score(q, resident_of(selector, keys), 10).lse
    assert (after == SURE).sum() > 2 * 25
    clean = torch.arange(400) // RANGE % 2 == 1
    assert (after - before)[..., clean].abs().max() < 100 < SURE


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 90)),
    width=st.sampled_from((0.0, 1.0, 30.0)),
    unknown=st.sampled_from((0.0, 0.2, 1.0)),
    seed=seeds,
)
def test_compiled_shares_and_joined_scores_agree_with_torch(
    shape: tuple[int, int, int], width: float, unknown: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    heads, group, chunks = shape
    coarse, tail = width * torch.randn(shape, generator=g), width * torch.randn(shape[:2], generator=g)
    coarse[(torch.rand(shape, generator=g) < unknown)] = SURE
    rows = torch.stack([torch.randperm(chunks, generator=g)[: chunks // 2 + 1] for _ in range(heads)])
    lse = width * torch.randn(heads, group, rows.shape[1], generator=g)
    lse[(torch.rand(lse.shape, generator=g) < unknown)] = SURE

    def both() -> tuple[torch.Tensor, ...]:
        return shares(coarse, tail), shares(coarse), joined(coarse.clone(), rows, lse)

    compiled = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvdb.runtime.selection.loops._numba_works", lambda: False)
        plain = both()
    eps = torch.finfo(torch.float32).eps
    for ours, theirs in zip(compiled[:2], plain[:2], strict=True):
        # an exponent of 87 or less is rounded twice, and each share is one of a sum of `chunks` terms
        assert torch.allclose(ours, theirs, rtol=(2 * 87 + chunks) * eps, atol=2.0**-125)
        assert torch.equal(ours >= UNKNOWN_SHARE, theirs >= UNKNOWN_SHARE)
    assert torch.equal(compiled[2] == SURE, plain[2] == SURE)
    assert torch.allclose(compiled[2], plain[2], rtol=eps, atol=2 * chunks * eps * 10 * width)


def test_with_a_small_beta_the_box_score_is_no_bound() -> None:
    """So a ceiling can be too low."""
    keys, q = keys_and_query((1, 1, 1, 64), 0)
    score = BoxSelector(beta=0.0).score(q, resident_of(BoxSelector(), keys), 1).lse.item()
    assert true_lse(keys, q).item() > score + rounding(keys, q)


@pytest.mark.parametrize("size", [0.0, 1e-8, 1.0])
def test_a_query_that_sees_no_difference_gets_scores_all_the_same(size: float) -> None:
    """The mean of equal numbers may be rounded below all of them."""
    keys, q = keys_and_query((1, 2, 700, 8), 0)
    q[:, 1] *= size
    for margin in (40.0, 50.0, 60.0):
        selector = SketchSelector(margin=margin, least=1)
        assert torch.isfinite(selector.score(q, resident_of(selector, keys), 10).lse).all()


def test_a_hole_leaves_the_scores_of_other_ranges_where_they_are() -> None:
    keys, q = keys_and_query((1, 2, 400, 8), 0)
    selector = SketchSelector(margin=1, least=1, opened=0.3)
    before = selector.score(q, resident_of(selector, keys), 10).lse
    keys[0, 100, 2, 3] = np.nan
    after = selector.score(q, resident_of(selector, keys), 10).lse
    assert (before.median(-1).values - after.median(-1).values).abs().max() < 1


def test_codes_of_other_planes_are_refused() -> None:
    keys, q = keys_and_query((1, 1, 4, 8), 0)
    resident = resident_of(SketchSelector(bits=1), keys)
    with pytest.raises(InvalidInput, match="codes of 1 planes, expected 4"):
        SketchSelector(bits=4).score(q, resident, 1)


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"margin": 0}, {"least": 0}, {"opened": 0.0}, {"beta": -1.0}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=f"selector 'sketch': .*{next(iter(wrong))}"):
        SketchSelector(**wrong)  # type: ignore[arg-type]
