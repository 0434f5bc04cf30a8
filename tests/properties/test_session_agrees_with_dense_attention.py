"""A session over a store answers as the stock model does, whatever part of its prompt was stored before.

The sentences:
- a prompt reuses exactly its longest common beginning with what is stored, but never its last token;
- greedy output in exact mode is that of `generate` with transformers' own DynamicCache, fresh, partly reused, saved,
  loaded and continued, in a batch, with either reader, and read-only;
- what was computed under a budget is never reused by an exact session.

The oracle of reuse is a list of stored token lists; the oracle of output is the stock run. The model is random and tiny: two
layers, four query heads on two KV heads, head_dim 16, vocabulary 128.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_healthy, opened, tree_bytes
from tiny_models import (
    VOCABULARY,
    answer,
    greedy,
    one_thread,
    prompt,
    rounding,
    stock,
    stock_answer,
    tiny,
)
from torch import Tensor, nn

from kvdb import EXACT, KVDB
from kvdb.errors import InvalidInput
from kvdb.runtime import attach
from kvdb.runtime.history import History, Part

STOPS = (333, 1040, 1047, 1500)
"""Where the stored base sequence was saved: its segments end inside a chunk, on the grid, and seven tokens later."""
LONG = 1400  # selection starts at 1024 tokens


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny()


@pytest.fixture(scope="module")
def slack(model: nn.Module) -> float:
    """How far the logits of two correct runs may be apart."""
    return rounding(model, tiny().double(), STOPS[-1])


@pytest.fixture(scope="module")
def base(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A store that holds one sequence in four segments, and its tokens. Copy it, do not write to it."""
    path, tokens = tmp_path_factory.mktemp("base") / "a.kvdb", prompt(STOPS[-1] + 1, seed=1)
    with opened(path) as db, attach(model, db, exact=True) as kv:
        for stop in STOPS:
            kv.cache(tokens[:, : stop + 1])
        assert db.info()["segments"] == len(STOPS)
    return path, tokens[0, :-1].tolist()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[KVDB]:
    with opened(tmp_path / "a.kvdb") as store:
        yield store


@pytest.fixture
def copied(base: tuple[Path, list[int]], tmp_path: Path) -> tuple[Path, list[int]]:
    path, tokens = base
    shutil.copytree(path, tmp_path / "copy.kvdb")
    return tmp_path / "copy.kvdb", tokens


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def drawn_prompt(rng: np.random.Generator, stored: list[list[int]]) -> Tensor:
    """The first N tokens of something stored, then 0 to 40 others; N anywhere, often just beside an edge."""
    parent = stored[rng.integers(len(stored))]
    edges = [e + d for e in (0, 16, 1024, *STOPS) for d in (-1, 0, 1, 7)]
    shared = int(rng.choice(edges)) if rng.random() < 0.3 else int(rng.integers(len(parent) + 1))
    shared = min(max(shared, 0), len(parent))
    suffix = rng.integers(VOCABULARY, size=int(rng.integers(1 if shared == 0 else 0, 41))).tolist()
    return torch.tensor([parent[:shared] + suffix])


READINGS = [("a", "mmap")] * 6 + [("a", "pread")] * 3 + [("r", "mmap")]


@pytest.mark.parametrize("seed", range(len(READINGS)), ids=[f"{i}-{m}-{r}" for i, (m, r) in enumerate(READINGS)])
def test_a_prompt_reuses_exactly_what_is_stored_of_it_and_answers_the_same(
    model: nn.Module, slack: float, copied: tuple[Path, list[int]], seed: int
) -> None:
    """Twenty random prompts each: 200 in all. What one stored, the next may reuse."""
    path, tokens = copied
    mode, read_mode = READINGS[seed]
    stored = [tokens]
    rng = np.random.default_rng(seed)
    with KVDB.open(path, mode, read_mode=read_mode) as db:  # type: ignore[arg-type]
        for case in range(20):
            ids = drawn_prompt(rng, stored)
            known = ids[0, :-1].tolist()
            expected = max(common(known, each) for each in stored)
            with attach(model, db, exact=True) as kv:
                assert kv.match(ids[:, :-1]).tokens == expected if len(known) else True
                cache = kv.cache(ids)
                assert cache.metrics.reused_tokens == expected, f"case {case}"
                assert cache.metrics.prefill_tokens == len(known) - expected
                found = answer(model, ids, cache)
            right = stock_answer(model, ids)
            where = f"case {case}: {len(known)} tokens, {expected} reused"
            assert torch.equal(found.tokens, right.tokens), where
            assert (found.logits - right.logits).abs().max() <= slack, where
            if mode != "r":
                stored.append(known)
        assert_healthy(db)


def test_read_only_nothing_changes_on_disk(model: nn.Module, copied: tuple[Path, list[int]]) -> None:
    path, tokens = copied
    before = {k: v for k, v in tree_bytes(path).items() if "lock" not in k}
    ids = torch.tensor([[*tokens[:1203], 5, 6, 7]])
    with KVDB.open(path, "r") as db, attach(model, db, exact=True) as kv:
        for _ in range(2):  # what the first prefilled stayed in its memory
            cache = kv.cache(ids)
            assert cache.metrics.reused_tokens == 1203 + (tokens[1203] == 5)
            assert torch.equal(greedy(model, ids, cache), stock(model, ids))
        assert db.check() == []
    assert {k: v for k, v in tree_bytes(path).items() if "lock" not in k} == before


@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
@pytest.mark.parametrize("reopened", [False, True], ids=["loaded in place", "loaded after reopening"])
def test_a_saved_conversation_goes_on_turn_by_turn(
    model: nn.Module, tmp_path: Path, read_mode: str, reopened: bool
) -> None:
    """Each turn: the user's tokens, the model's answer, save, load. The stock model starts over every time."""
    ids = prompt(701, seed=2)
    path = tmp_path / "a.kvdb"
    for turn in range(4):
        with opened(path, read_mode=read_mode) as db, attach(model, db, exact=True) as kv:
            cache = kv.load("talk") if turn else kv.cache(ids)
            if turn:
                assert cache.length == ids.shape[1] - turn_tokens - 1  # noqa: F821 - the last sampled token is not stored
                assert cache.metrics.prefill_tokens == 0
            answer = greedy(model, ids, cache, 21)
            kv.save(cache, name="talk")
            if not reopened:
                cache = kv.load("talk")
                more = torch.cat((ids, answer), 1)
                assert torch.equal(greedy(model, more, cache, 3), stock(model, more, 3))
        assert torch.equal(answer, stock(model, ids, 21))
        turn_tokens = 30 + turn
        ids = torch.cat((ids, answer, prompt(turn_tokens, seed=50 + turn)), 1)


def test_a_cache_saved_midway_can_be_continued_itself(model: nn.Module, db: KVDB) -> None:
    """Saving moves the tail to disk under a running generation."""
    ids = prompt(77, seed=3)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        for step in (1, 2, 15, 16, 17):
            answer = greedy(model, ids, cache, step)
            kv.save(cache, name=f"after {ids.shape[1]}")
            assert torch.equal(answer, stock(model, ids, step))
            ids = torch.cat((ids, answer), 1)


def test_generation_past_a_whole_block_streams_it_to_the_store(model: nn.Module, db: KVDB) -> None:
    """The tail moves to disk at 1 024 tokens, in the middle of decoding."""
    ids = prompt(5, seed=4)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        answer = greedy(model, ids, cache, 1100)
        assert cache.rows[0].sealed_chunks * 16 >= 1024
        assert cache.length == 5 + 1100 - 1
    assert torch.equal(answer, stock(model, ids, 1100))


def test_a_batch_reuses_the_minimum_of_its_rows_and_answers_the_same(
    model: nn.Module, copied: tuple[Path, list[int]]
) -> None:
    path, tokens = copied
    rng = np.random.default_rng(7)
    for shared in ((1203, 37), (1049, 1100), (0, 900), (1209, 1209)):
        rows = [tokens[:n] + rng.integers(VOCABULARY, size=1210 - n).tolist() for n in shared]
        ids = torch.tensor(rows)
        expected = min(common(row[:-1], tokens) for row in rows)
        shutil.rmtree(path.parent / "batch.kvdb", ignore_errors=True)
        shutil.copytree(path, path.parent / "batch.kvdb")
        with opened(path.parent / "batch.kvdb") as db, attach(model, db, exact=True) as kv:
            cache = kv.cache(ids)
            assert cache.metrics.reused_tokens == expected
            answer = greedy(model, ids, cache)
            assert torch.equal(answer, stock(model, ids))
            assert len(kv.save(cache, name="both")) == 2
            for row in range(2):
                alone = torch.cat((ids, answer), 1)[row : row + 1]
                loaded = kv.load(f"both#{row}")
                assert loaded.length == alone.shape[1] - 1
                assert torch.equal(greedy(model, alone, loaded, 3), stock(model, alone, 3))


def test_two_rows_that_are_equal_are_stored_once(model: nn.Module, db: KVDB) -> None:
    ids = prompt(1100, seed=8).repeat(2, 1)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        assert torch.equal(greedy(model, ids, cache), stock(model, ids))
        one = db.info()["tokens"]
    assert one < 2 * 1099


@pytest.mark.parametrize("budget", [1.0, 10_000])
def test_a_budget_of_everything_answers_as_dense_attention(model: nn.Module, db: KVDB, budget: float | int) -> None:
    ids = prompt(LONG, seed=5)
    with attach(model, db, budget=budget) as kv:
        cache = kv.cache(ids)
        assert torch.equal(greedy(model, ids, cache, 16), stock(model, ids, 16))
        assert cache.stats()["kv_bytes_read_share"] > 0.9
        kv.save(cache, name="all")
    assert db.sequence("all").fidelity == EXACT


def test_a_short_history_is_attended_to_densely_under_any_budget(model: nn.Module, db: KVDB) -> None:
    ids = prompt(900, seed=6)
    with attach(model, db, budget=0.01) as kv:
        cache = kv.cache(ids)
        assert torch.equal(greedy(model, ids, cache), stock(model, ids))
        kv.save(cache, name="short")
    assert db.sequence("short").fidelity == EXACT


@pytest.mark.parametrize("length", [LONG, LONG + 1, 1409, 1425])  # the approximate part starts anywhere in a chunk
def test_what_was_computed_under_a_budget_is_never_served_as_exact(model: nn.Module, db: KVDB, length: int) -> None:
    ids = prompt(length, seed=9)
    with attach(model, db, budget=0.2) as kv:
        cache = kv.cache(ids)
        answer = greedy(model, ids, cache, 40)
        assert 0.0 < cache.stats()["kv_bytes_read_share"] < 0.3
        kv.save(cache, name="approximate")
    longer = torch.cat((ids, answer), 1)
    assert db.sequence("approximate").fidelity == "budget=0.2"
    with attach(model, db, exact=True) as kv:
        miss = kv.match(longer)
        assert miss.tokens == length - 1  # the prefill was dense
        assert "not with fidelity 'exact'" in miss.reason
        with pytest.raises(InvalidInput, match=r"fidelity is 'budget=0\.2'"):
            kv.load("approximate")
        exact_cache = kv.cache(longer)
        assert exact_cache.metrics.reused_tokens == length - 1
        assert torch.equal(greedy(model, longer, exact_cache), stock(model, longer))
    with attach(model, db, budget=0.2, fidelity="any") as kv:
        assert kv.match(longer).tokens == length + 39
        assert kv.cache(longer).metrics.reused_tokens == length + 39
        assert kv.load("approximate").length == length + 39


def test_exact_tokens_after_approximate_ones_are_not_exact(model: nn.Module, db: KVDB) -> None:
    """They were computed from approximate keys and values."""
    ids = prompt(LONG, seed=10)
    with attach(model, db, budget=0.2) as kv:
        cache = kv.cache(ids)
        ids = torch.cat((ids, greedy(model, ids, cache, 40)), 1)
        kv.save(cache, name="approximate")
    with attach(model, db, exact=True, fidelity="any") as kv:
        cache = kv.load("approximate")
        ids = torch.cat((ids, greedy(model, ids, cache, 40)), 1)
        kv.save(cache, name="continued")
    assert db.sequence("continued").fidelity != EXACT
    with attach(model, db, exact=True) as kv:
        assert kv.match(ids).tokens == LONG - 1


def test_a_new_session_recomputes_exactly_what_was_approximate_and_both_are_kept(model: nn.Module, db: KVDB) -> None:
    ids = prompt(LONG, seed=11)
    with attach(model, db, budget=0.2) as kv:
        cache = kv.cache(ids)
        ids = torch.cat((ids, greedy(model, ids, cache, 40)), 1)
        kv.save(cache, name="approximate")
    with attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids), name="exact")
    with attach(model, db, exact=True) as kv:
        assert kv.match(ids).tokens == ids.shape[1] - 1
        assert torch.equal(greedy(model, ids, kv.load("exact")), stock(model, ids))
    assert {s.name: s.fidelity for s in db.sequences() if s.name} == {"approximate": "budget=0.2", "exact": EXACT}


def _one_chunk_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of the chunks asked for is read in place of the first one of all."""
    real = History._gather

    def wrong(self: History, parts: list[Part], layer: int, chunks: np.ndarray) -> tuple[Tensor, Tensor]:
        return real(self, parts, layer, np.where(chunks == 0, chunks.max(), chunks))

    monkeypatch.setattr(History, "_gather", wrong)


def _tail_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix is restored without the started chunk at its end, and its place is filled with zeros."""
    real = History.last_tokens

    def wrong(self: History, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        k, v = real(self, layer, start, stop)
        return torch.zeros_like(k), torch.zeros_like(v)

    monkeypatch.setattr(History, "last_tokens", wrong)


def _heads_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = History._gather

    def wrong(self: History, parts: list[Part], layer: int, chunks: np.ndarray) -> tuple[Tensor, Tensor]:
        k, v = real(self, parts, layer, chunks)
        return k.flip(0), v.flip(0)

    monkeypatch.setattr(History, "_gather", wrong)


@pytest.mark.parametrize("plant", [_one_chunk_late, _tail_forgotten, _heads_swapped])
def test_this_harness_notices_a_planted_bug(
    model: nn.Module,
    slack: float,
    copied: tuple[Path, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[..., None],
) -> None:
    path, tokens = copied
    plant(monkeypatch)
    with KVDB.open(path, "r") as db, attach(model, db, exact=True) as kv:
        for shared in (200, 700, 1203):
            ids = torch.tensor([[*tokens[:shared], 1, 2]])
            off = (answer(model, ids, kv.cache(ids)).logits - stock_answer(model, ids).logits).abs().max()
            assert off > 10 * slack
        assert db.check() == []
