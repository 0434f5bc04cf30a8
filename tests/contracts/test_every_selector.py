"""What holds for every selector in the table.

Scores are finite, of the promised shape, per record (a record's score does not depend on which others are there), and with
its bound switched on the box selector is never below the score of any key.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdb.abstracts import ABSTRACTS
from kvdb.geometry import div_ceil
from kvdb.runtime.selection import SELECTORS, BoxSelector, Selector

every_selector = pytest.mark.parametrize("selector", [kind() for kind in SELECTORS.values()], ids=list(SELECTORS))
sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 100), st.sampled_from((1, 8, 64)))
seeds = st.integers(0, 2**32 - 1)


def keys_and_query(size: tuple[int, int, int, int], seed: int) -> tuple[np.ndarray, torch.Tensor]:
    """Keys (kv_heads, tokens, dim) and a scaled query (kv_heads, group, dim)."""
    heads, group, tokens, dim = size
    rng = np.random.default_rng(seed)
    keys = (rng.standard_normal((heads, tokens, dim)) * 3).astype(np.float32)
    return keys, torch.from_numpy((rng.standard_normal((heads, group, dim)) * dim**-0.5).astype(np.float32))


def abstract_of(selector: Selector, keys: np.ndarray, chunk_tokens: int = 16) -> torch.Tensor:
    heads, tokens, dim = keys.shape
    chunks = div_ceil(tokens, chunk_tokens)
    padded = np.zeros((heads, chunks * chunk_tokens, dim), np.float32)
    padded[:, :tokens] = keys
    by_chunk = padded.reshape(heads, chunks, chunk_tokens, dim)
    return torch.from_numpy(ABSTRACTS[selector.abstract].build(by_chunk, tokens))


def rounding(keys: np.ndarray, q: torch.Tensor) -> float:
    """Error of a product sum of 2 * dim terms in float32, in any order."""
    dim = keys.shape[-1]
    return 2 * dim * np.finfo(np.float32).eps * 2 * float(np.abs(keys).max()) * float(q.abs().sum(-1).max())


def test_the_table_names_its_members() -> None:
    assert SELECTORS
    for name, kind in SELECTORS.items():
        assert kind.name == name
        assert kind.abstract in ABSTRACTS


@every_selector
@given(size=sizes, seed=seeds)
def test_scores_are_finite_and_one_per_query_head_and_record(
    selector: Selector, size: tuple[int, int, int, int], seed: int
) -> None:
    keys, q = keys_and_query(size, seed)
    resident = selector.prepare(abstract_of(selector, keys))
    assert resident.dtype == torch.float32
    assert resident.shape[0] == size[0]
    assert resident.shape[-1] == div_ceil(size[2], 16)
    scores = selector.score(q, resident)
    assert scores.dtype == torch.float32
    assert scores.shape == (size[0], size[1], div_ceil(size[2], 16))
    assert torch.isfinite(scores).all()


@every_selector
@given(size=sizes, cut=st.integers(0, 6), seed=seeds)
def test_resident_forms_of_parts_join_to_the_form_of_the_whole(
    selector: Selector, size: tuple[int, int, int, int], cut: int, seed: int
) -> None:
    """A history extends its resident abstract chunk by chunk."""
    keys, _ = keys_and_query(size, seed)
    abstract = abstract_of(selector, keys)
    parts = [selector.prepare(part) for part in (abstract[:cut], abstract[cut:]) if len(part)]
    assert torch.equal(torch.cat(parts, -1), selector.prepare(abstract))


@every_selector
@given(size=sizes, seed=seeds)
def test_a_record_scores_the_same_whatever_records_are_beside_it(
    selector: Selector, size: tuple[int, int, int, int], seed: int
) -> None:
    keys, q = keys_and_query(size, seed)
    resident = selector.prepare(abstract_of(selector, keys))
    together = selector.score(q, resident)
    for chunk in range(resident.shape[-1]):
        alone = selector.score(q, resident[..., chunk : chunk + 1].contiguous())
        assert (alone[..., 0] - together[..., chunk]).abs().max() <= rounding(keys, q)


@every_selector
def test_a_record_that_holds_the_querys_own_direction_scores_highest(selector: Selector) -> None:
    keys, q = keys_and_query((2, 1, 160, 64), 0)
    keys *= 0.1
    keys[:, 96:112] += 20 * q.numpy() / np.linalg.norm(q.numpy(), axis=-1, keepdims=True)
    scores = selector.score(q, selector.prepare(abstract_of(selector, keys)))
    assert (scores.argmax(-1) == 6).all()


@given(size=sizes, seed=seeds)
def test_with_beta_one_the_box_score_is_an_upper_bound_of_every_key(size: tuple[int, int, int, int], seed: int) -> None:
    selector = BoxSelector(beta=1.0)
    keys, q = keys_and_query(size, seed)
    bounds = selector.score(q, selector.prepare(abstract_of(selector, keys))).double().numpy()
    true = np.einsum("hgd,htd->hgt", q.double().numpy(), keys.astype(np.float64))
    of_each_key = bounds.repeat(16, axis=-1)[..., : size[2]]
    assert (true <= of_each_key + rounding(keys, q)).all()


def test_with_a_small_beta_the_box_score_is_no_bound() -> None:
    """So the test above can fail."""
    selector = BoxSelector(beta=0.0)
    keys, q = keys_and_query((1, 1, 16, 64), 0)
    score = selector.score(q, selector.prepare(abstract_of(selector, keys))).item()
    assert (q[0].numpy() @ keys[0].T).max() > score + rounding(keys, q)
