"""Selectors and stop rules inside real sessions over a store: what they read, what they say of it, and what they need stored.

Models are tiny, random and sharpened (see `tiny_models`), with histories of some 1 500 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import opened, skip_where_refused
from tiny_models import greedy, prompt, tiny
from torch import Tensor

from kvdb import KVDB
from kvdb.abstracts import ABSTRACTS
from kvdb.errors import InvalidInput, Unsupported
from kvdb.readers import READERS
from kvdb.runtime import attach
from kvdb.runtime.selection import SELECTORS, CentroidSelector

pytestmark = pytest.mark.usefixtures("single_thread")
TOKENS = 1500
RULES: list[dict[str, Any]] = [{"budget": 0.2}, {"threshold": 0.02}, {"mass": 0.9}, {"certified": 0.2}]


def logits(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Of one step, in float64."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1].double()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))
@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_serves_every_rule_or_refuses_it_at_once(
    db: KVDB, architecture: str, selector: str, rule: dict[str, Any]
) -> None:
    model, ids = tiny(architecture), prompt(TOKENS)
    if "certified" in rule and not SELECTORS[selector].proves:
        with pytest.raises(Unsupported, match=rf"certified=0\.2: selector '{selector}' proves no bounds, expected one"):
            attach(model, db, selector=selector, **rule)
        return
    with attach(model, db, selector=selector, **rule) as kv:
        cache = kv.cache(ids)
        assert greedy(model, ids, cache, 16).shape == (1, 16)
        stats = cache.stats()
        assert 0 < stats["kv_bytes_read_share"] <= 1
        assert stats["ranges_evaluated"] > 0
        assert stats["abstract_bytes_read"] > 0
        if "certified" in rule:
            assert stats["unread_mass_bound"] <= rule["certified"]
        else:
            assert stats["unread_mass_bound"] is None
        kv.save(cache, name="answered")
        assert db.sequence("answered").fidelity == kv.rule.fidelity  # type: ignore[union-attr]
    names = {name for s in db.segments(db.sequence("answered").spans) for name in s.info.abstracts}
    assert names == set(SELECTORS[selector]().abstracts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("codec", ["raw", "int8", "int4;1=raw"])
@pytest.mark.parametrize("read_mode", READERS)
def test_attention_where_records_lie_is_that_over_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, codec: str, read_mode: str
) -> None:
    """In a history of several segments, the last of them still being written."""
    model, ids = tiny("llama", dtype=dtype), prompt(1500)
    skip_where_refused(READERS[read_mode], tmp_path)
    with opened(tmp_path / "s", read_mode=read_mode) as db:
        for rule in ({"budget": 0.2}, {"threshold": 0.01}, {"mass": 0.9}):
            found, covered = [], []
            for compiled in (True, False):
                if not compiled:
                    monkeypatch.setattr("kvdb.runtime.layers.can_compile", lambda q: False)
                with attach(model, db, codec=codec, fidelity="any", **rule) as kv:
                    kv.save(kv.cache(ids[:, :1100]))
                    cache = kv.cache(ids)
                    found.append(torch.stack([logits(model, cache, ids) for _ in range(3)]))
                    covered.append(cache.stats()["mass_covered_estimate"])
                monkeypatch.undo()
            near = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
            assert (found[0] - found[1]).abs().max() <= near * found[0].abs().max()
            assert covered[0] == pytest.approx(covered[1], abs=0.01)


def test_a_loop_that_keeps_gradients_decodes_as_one_that_does_not(db: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with attach(model, db, budget=0.2) as kv:
        expected = logits(model, kv.cache(ids), ids)
        found = model(input_ids=ids[:, -1:], past_key_values=kv.cache(ids)).logits[0, -1].double()
    assert torch.equal(found.detach(), expected)


def test_more_mass_and_less_doubt_cost_more_reads(db: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    shares = []
    for rule in ({"mass": 0.5}, {"mass": 0.9}, {"mass": 0.99}):
        with attach(model, db, selector="sketch", **rule) as kv:
            cache = kv.cache(ids)
            logits(model, cache, ids)
            shares.append(cache.stats()["kv_bytes_read_share"])
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] <= 1


@pytest.mark.parametrize("selector", ["box", "sketch"])
def test_a_tight_certificate_gives_the_dense_answer(db: KVDB, selector: str) -> None:
    """An epsilon of the softmax mass moves a head's output by at most 2 epsilon times the largest value."""
    model, ids = tiny("llama"), prompt(TOKENS)
    with attach(model, db, exact=True, selector=selector) as kv:
        dense = logits(model, kv.cache(ids), ids)
    with attach(model, db, certified=1e-6, selector=selector) as kv:
        cache = kv.cache(ids)
        found = logits(model, cache, ids)
        assert cache.stats()["unread_mass_bound"] <= 1e-6
    assert (found - dense).abs().max() <= 1e-4 * dense.abs().max()


@pytest.mark.parametrize(
    ("stored", "asked"), [("box", "sketch"), ("sketch", "box"), ("box", "centroid"), ("centroid", "mean")]
)
def test_an_abstract_that_is_not_stored_is_made_from_the_keys(tmp_path: Path, stored: str, asked: str) -> None:
    tokens = TOKENS // 16 * 16  # clusters of a started chunk are of others, too
    model, ids = tiny("llama"), prompt(tokens + 1)
    found = []
    for name, first in (("as asked", asked), ("another", stored)):
        with opened(tmp_path / name) as db:
            with attach(model, db, exact=True, selector=first) as kv:
                kv.cache(ids)
            with attach(model, db, budget=0.2, selector=asked) as kv:
                cache = kv.cache(ids)
                assert cache.metrics.reused_tokens == tokens
                found.append(logits(model, cache, ids))
    assert torch.equal(*found)


def test_a_selector_may_be_given_with_its_settings(db: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    found = {}
    for selector in ("centroid", CentroidSelector(), CentroidSelector(bits=1, margin=1, least=1)):
        with attach(model, db, budget=0.2, selector=selector) as kv:
            found[str(selector)] = logits(model, kv.cache(ids), ids)
    by_name, same, other = found.values()
    assert torch.equal(by_name, same)
    assert not torch.equal(by_name, other)


@pytest.mark.parametrize(("stored", "asked"), [("box", "sketch"), ("sketch", "box")])
def test_an_abstract_that_is_stored_later_is_read_and_not_made(
    db: KVDB, monkeypatch: pytest.MonkeyPatch, stored: str, asked: str
) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with attach(model, db, exact=True, selector=stored) as kv:
        kv.save(kv.cache(ids), name="n")
    with attach(model, db, budget=0.2, selector=asked) as kv:
        expected = logits(model, kv.cache(ids), ids)
    assert db.set_abstracts("n", (asked,)) > 0
    monkeypatch.setattr(type(ABSTRACTS[asked]), "build", None)
    with attach(model, db, budget=0.2, selector=asked) as kv:
        assert torch.equal(logits(model, kv.cache(ids), ids), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mass": 0.9, "budget": 0.1}, r"budget=0\.1 and mass=0\.9, expected one of them"),
        ({"certified": 0.1, "exact": True}, r"certified=0\.1 and exact=True, expected one of them"),
        ({"threshold": 0.0}, r"threshold: 0\.0, expected a share between 0 and 1"),
        ({"mass": 1.0}, r"mass: 1\.0, expected a share between 0 and 1"),
        ({"certified": 0}, r"certified: 0, expected a share between 0 and 1"),
        ({"selector": "bag"}, r"selector is 'bag', expected one of \['box', 'centroid', 'mean', 'sketch'\]"),
    ],
)
def test_rules_that_cannot_be_are_refused(db: KVDB, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        attach(tiny("llama"), db, **wrong)
