"""The first tokens of a stored prefix are computed again while the rest is read: that changes time, and nothing else."""

from __future__ import annotations

import gc
import importlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_healthy, flip, held, opened, skip_where_refused
from tiny_models import answer, greedy, prompt, rounding, stock_answer, tiny
from torch import Tensor

from kvdb import KVDB
from kvdb.codecs import CodecPlan
from kvdb.errors import Damaged
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.runtime import Attachment, KVDBCache, attach
from kvdb.runtime.costs import Rate
from kvdb.runtime.fetching import Fetching
from kvdb.runtime.history import History
from kvdb.runtime.layers import FullLayer

pytestmark = pytest.mark.usefixtures("single_thread")
TOKENS, MORE = 1610, 150
"""Of a prompt, of which more than a block of prefill is computed again; and what follows."""
every_reader = pytest.mark.parametrize("read_mode", READERS)


@pytest.fixture(autouse=True)
def nothing_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as is estimated, and no gain is too small."""

    def absent(self: History, starts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        ct = self.geometry.chunk_tokens
        return (self.sealed_chunks - starts) * ct * float(self.geometry.token_bytes)

    monkeypatch.setattr(History, "absent_bytes", absent)
    monkeypatch.setattr("kvdb.runtime.costs.LEAST_GAIN_S", 0.0)


def as_slow(kv: Attachment, computed: float = 0.7) -> Attachment:
    """Reading and computing take such times that this share of a prefix should be computed."""
    full = 1 - len(kv.windows) / len(kv.geometry.layers)
    kv._costs.reading, kv._costs.computing = Rate(), Rate()
    kv._costs.reading.note(kv.geometry.token_bytes * full, computed)
    kv._costs.computing.note(1, 1 - computed)
    return kv


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Path]:
    """A store that has all but the last token of prompts, under names."""

    def make(model: Any, *ids: Tensor) -> Path:
        with KVDB.open(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
            for number, each in enumerate(ids):
                kv.save(kv.cache(each), name=f"n{number}" if len(each) == 1 else f"b{number}")
        return tmp_path / "s"

    return make


@pytest.fixture
def located(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """Thread, layer and first chunk of what is asked of readers, as it comes."""
    found: list[tuple[str, int, int]] = []
    real = Reader._locate

    def locate(self: Reader, segment: Any, layer: int, records: Any) -> Any:
        if len(records):
            heads = segment.info.geometry.groups[segment.info.geometry.locate(layer)[0]].kv_heads
            chunk = segment.info.start // segment.info.geometry.chunk_tokens + int(records.min()) // heads
            found.append((threading.current_thread().name, layer, chunk))
        return real(self, segment, layer, records)

    monkeypatch.setattr(Reader, "_locate", locate)
    return found


@every_reader
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("more", [0, MORE])
def test_answers_are_those_of_dense_attention(
    stored: Callable[..., Path],
    located: list[tuple[str, int, int]],
    architecture: str,
    batch: int,
    read_mode: str,
    more: int,
) -> None:
    """And what is computed again is not read, but all the rest."""
    model, ids = tiny(architecture), prompt(TOKENS + more, batch=batch)
    path = stored(model, ids[:, :TOKENS])
    skip_where_refused(READERS[read_mode], path)
    expected = stock_answer(model, ids)
    with opened(path, read_mode=read_mode) as db, attach(model, db, exact=True) as kv:
        located.clear()
        cache = as_slow(kv).cache(ids)
        given = answer(model, ids, cache)
        stats, full = cache.stats(), set(cache._full_indices)
        bound = rounding(model, tiny(architecture, dtype=torch.float64), TOKENS + more)
        assert torch.equal(given.tokens, expected.tokens)
        assert (given.logits - expected.logits).abs().max() < bound
        assert (stats["reused_tokens"], stats["recomputed_tokens"]) == (TOKENS - 1, 1120)  # .7 of them, in whole chunks
        assert stats["reuse"].startswith("the first 1,120 of 1,609 tokens are computed while ")
        assert stats["prefill_tokens"] == more
        assert stats["stage_seconds"]["recompute"] > 0
        of_full = [(layer, chunk) for _, layer, chunk in located if layer in full]
        assert min(chunk for _, chunk in of_full) == 1120 // 16
        assert {layer for layer, _ in of_full} == full


@every_reader
def test_the_rest_is_there_when_it_is_asked_for(
    stored: Callable[..., Path], located: list[tuple[str, int, int]], read_mode: str
) -> None:
    """Layer after layer, all of it, once for all rows of a batch."""
    model, ids = tiny(num_hidden_layers=3), prompt(TOKENS + MORE)
    ids = torch.cat((ids, ids[:, :-1], prompt(1, seed=5)), 1).view(2, -1)  # rows that part at the last token
    path = stored(model, ids[:1, :TOKENS])
    skip_where_refused(READERS[read_mode], path)
    with opened(path, read_mode=read_mode) as db, attach(model, db, exact=True) as kv:
        shards = list((path / "chunks").glob("*.kv*/c.*"))
        assert len(shards) == 1
        located.clear()
        cache = as_slow(kv).cache(ids[:, :TOKENS])
        assert cache.fetching._thread is not None
        cache.fetching._thread.join(60)
        fetched = [(layer, chunk) for thread, layer, chunk in located if thread == "kvdb-fetch"]
        assert list(dict.fromkeys(fetched)) == [(layer, 70) for layer in range(3)]  # a piece each: they are small
        rest = 3 * 2 * (100 - 70) * 16 * 2 * 16 * 4  # layers, heads, tokens, K and V, bytes
        if read_mode != "mmap":  # there the page cache had it
            assert cache.fetching.fetched == rest
        before = cache._reader.bytes_fetched
        answer(model, ids[:, :TOKENS], cache)
        if read_mode != "pread":  # which cannot tell
            assert cache._reader.bytes_fetched == before


def test_what_has_no_room_in_memory_is_left_for_later(stored: Callable[..., Path]) -> None:
    model, ids = tiny(), prompt(TOKENS)
    path = stored(model, ids)
    skip_where_refused(READERS["direct"], path)
    expected, budget = stock_answer(model, ids), 64 << 10
    with KVDB.open(path, read_mode="direct", host_budget=budget) as db, attach(model, db, exact=True) as kv:
        cache = as_slow(kv, 0.5).cache(ids)
        assert 0 < cache.metrics.recomputed_tokens < TOKENS // 2 - 100  # the rest would have to wait for the disk
        assert cache.fetching._thread is not None
        cache.fetching._thread.join(60)
        assert cache.fetching.fetched <= budget
        assert torch.equal(answer(model, ids, cache).tokens, expected.tokens)
        assert_healthy(db)


def test_nothing_is_stored_twice_and_what_follows_is_stored(stored: Callable[..., Path]) -> None:
    model, ids = tiny("gemma3"), prompt(TOKENS + MORE)
    path = stored(model, ids[:, :TOKENS])
    with opened(path) as db:
        with attach(model, db, exact=True) as kv:
            before = db.info()["kv_bytes"]
            kv.save(as_slow(kv).cache(ids[:, :TOKENS]))
            after = db.info()["kv_bytes"]
            assert after == before
            cache = as_slow(kv).cache(ids)
            assert cache.metrics.recomputed_tokens
            kv.save(cache, name="longer")
            assert db.sequence("longer").tokens == TOKENS + MORE - 1
            first, *others = db.segments(db.sequence("longer").spans)
            assert (first.info.start, first.info.tokens) == (0, TOKENS - 1)
            assert sum(each.info.tokens for each in others) < MORE + 16
        with attach(model, db, exact=True, recompute=False) as kv:
            again = kv.cache(ids)
            assert (again.metrics.reused_tokens, again.metrics.recomputed_tokens) == (TOKENS + MORE - 1, 0)
            assert torch.equal(greedy(model, ids, again), stock_answer(model, ids, 8).tokens)


@pytest.mark.parametrize("where", ["readonly", "capped"])
def test_what_could_not_be_stored_is_split_all_the_same(stored: Callable[..., Path], where: str) -> None:
    model, ids = tiny(), prompt(TOKENS)
    path = stored(model, ids)
    with KVDB.open(path) as db:
        if where == "capped":
            db.set_size_cap("1GiB")
    with KVDB.open(path, "r" if where == "readonly" else "a") as db, attach(model, db, exact=True) as kv:
        segments = db.info()["segments"]
        cache = as_slow(kv).cache(ids)
        assert cache.metrics.recomputed_tokens == 1120
        assert torch.equal(answer(model, ids, cache).tokens, stock_answer(model, ids).tokens)
        cache = as_slow(kv, 1.0).cache(ids)  # computing takes no time: all chunks
        assert cache.metrics.recomputed_tokens == 1600
        assert db.info()["segments"] == segments


def test_where_attention_selects_nothing_is_split_and_nothing_stays_in_memory(stored: Callable[..., Path]) -> None:
    model, ids = tiny(), prompt(TOKENS + MORE)
    path = stored(model, ids[:, :TOKENS])
    with opened(path) as db, attach(model, db, budget=0.2) as kv:
        assert as_slow(kv).cache(ids[:, :TOKENS]).metrics.recomputed_tokens == 0  # a fifth of it is read
    with opened(path) as db, attach(model, db, budget=0.2) as kv:
        cache = as_slow(kv).cache(ids)
        layers = [layer for layer in cache.layers if isinstance(layer, FullLayer)]
        assert cache.metrics.recomputed_tokens == 1120
        of_all = sum(layer.recomputed.nbytes for layer in layers if layer.recomputed is not None)
        assert of_all == 1120 * cache.geometry.token_bytes
        assert cache.metrics.kv_bytes_resident_peak >= of_all
        given = answer(model, ids, cache, 6)
        assert [layer.recomputed for layer in layers] == [None] * len(layers)
    with opened(path) as db, attach(model, db, budget=0.2, recompute=False) as kv:
        loaded = answer(model, ids, kv.cache(ids), 6)
        bound = rounding(model, tiny(dtype=torch.float64), TOKENS + MORE)
        assert (loaded.logits[:, 0] - given.logits[:, 0]).abs().max() < bound
        assert torch.equal(loaded.tokens[:, 0], given.tokens[:, 0])


@pytest.mark.parametrize("codec", ["int8", "blosc"])
def test_what_is_not_stored_as_it_was_computed_is_not_split(stored: Callable[..., Path], codec: str) -> None:
    model, ids = tiny(), prompt(TOKENS)
    path = stored(model, ids)
    with opened(path) as db:
        db.recode("n0", CodecPlan.parse(codec))
        for cap in ("1TiB", "unlimited"):
            db.set_size_cap(cap)
            with attach(model, db, exact=True, fidelity="any") as kv:
                cache = as_slow(kv).cache(ids)
                assert cache.metrics.recomputed_tokens == 0
                assert cache.metrics.reused_tokens == (0 if cap == "unlimited" else TOKENS - 1)


def test_what_was_computed_after_a_selection_is_not_split(stored: Callable[..., Path]) -> None:
    """It is stored as it is, but dense attention would compute something else."""
    model, ids = tiny(), prompt(TOKENS)
    with opened(stored(model, ids)) as db:
        with attach(model, db, budget=0.2) as kv:
            cache = kv.cache(ids)
            longer = torch.cat((ids, greedy(model, ids, cache, 40)), 1)
            kv.save(cache, name="selected")
        with attach(model, db, exact=True, fidelity="any") as kv:
            db.set_size_cap("1TiB")  # or all of it would be computed
            cache = as_slow(kv).cache(longer)
            assert cache.metrics.reused_tokens > TOKENS + 16
            assert cache.metrics.recomputed_tokens == 0


def test_it_takes_no_more_than_a_share_of_memory(stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), prompt(TOKENS)
    path = stored(model, ids)
    with KVDB.open(path, "r") as db, attach(model, db, exact=True) as kv:
        module = importlib.import_module("kvdb.runtime.attach")  # the package has a function of that name
        monkeypatch.setattr(module, "available_bytes", lambda: 4 * 333 * kv.geometry.token_bytes)
        assert as_slow(kv).cache(ids).metrics.recomputed_tokens == 320


def test_damage_is_told_where_it_is_read(stored: Callable[..., Path]) -> None:
    model, ids = tiny(), prompt(TOKENS)
    path = stored(model, ids)
    (shard,) = (path / "chunks").glob("*.kv0/c.*")
    row = 2 * 16 * 16 * 4  # a record: K and V, tokens, head_dim, bytes
    with KVDB.open(path, "r") as db, attach(model, db, exact=True) as kv:
        flip(shard, 2 * 3 * row)  # layer 0, chunk 3: computed again
        assert torch.equal(greedy(model, ids, as_slow(kv).cache(ids), 4), stock_answer(model, ids).tokens)
    flip(shard, 2 * 3 * row)
    flip(shard, 2 * 90 * row)
    with KVDB.open(path, "r") as db, attach(model, db, exact=True) as kv:
        cache = as_slow(kv).cache(ids)
        with pytest.raises(Damaged, match=r"sequence n0: .*layer 0, chunk 90"):
            greedy(model, ids, cache, 4)
        cache.close()
    flip(shard, 2 * 90 * row)
    with opened(path):
        pass


@every_reader
def test_a_prefix_that_is_deleted_meanwhile(
    stored: Callable[..., Path], read_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the other thread has opened anything of it."""
    model, ids = tiny(), prompt(TOKENS + MORE)
    path = stored(model, ids[:, :TOKENS])
    skip_where_refused(READERS[read_mode], path)
    real = Fetching.begin
    with opened(path, read_mode=read_mode) as db, attach(model, db, exact=True) as kv:

        def begin(self: Fetching, *args: Any) -> None:
            db.delete("n0")
            real(self, *args)

        monkeypatch.setattr(Fetching, "begin", begin)
        kv.cache(ids[:, :300])  # with nothing to split
        cache = as_slow(kv).cache(ids[:, :TOKENS])
        assert cache.metrics.recomputed_tokens
        assert torch.equal(answer(model, ids[:, :TOKENS], cache).tokens, stock_answer(model, ids[:, :TOKENS]).tokens)


def interrupt_at(model: Any, call: int) -> Any:
    """Ctrl-C in the first layer of the `call`-th forward pass."""
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    return model.model.layers[0].register_forward_pre_hook(hook)


@every_reader
@pytest.mark.parametrize("call", [1, 2, 3], ids=["computing", "computing the second block", "prefilling what follows"])
def test_an_interrupt_leaves_nothing_behind(
    stored: Callable[..., Path], read_mode: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the other thread reads."""
    model, ids = tiny(), prompt(TOKENS + MORE)
    path = stored(model, ids[:, :TOKENS])
    skip_where_refused(READERS[read_mode], path)
    slow_reading(monkeypatch)
    with opened(path, read_mode=read_mode) as db, attach(model, db, exact=True, prefetch=False) as kv:
        as_slow(kv)
        before, segments = held(), db.info()["segments"]
        hook = interrupt_at(model, call)
        with pytest.raises(KeyboardInterrupt):
            kv.cache(ids)
        hook.remove()
        assert not [thread for thread in threading.enumerate() if thread.name == "kvdb-fetch"]
        assert not kv._caches
        assert held()[1] <= before[1]
        assert db.info()["segments"] == segments
        cache = as_slow(kv).cache(ids)
        assert torch.equal(answer(model, ids, cache).tokens, stock_answer(model, ids).tokens)
        cache.close()
        if db.host is not None:
            db.host._reap()  # what was on its way then
            db.host.stats()
            assert not any(pool.table._pins.any() for pool in db.host._pools.values())


def slow_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Fetching._await

    def slow(self: Fetching, *args: Any) -> None:
        time.sleep(0.05)
        real(self, *args)

    monkeypatch.setattr(Fetching, "_await", slow)
    monkeypatch.setattr("kvdb.runtime.fetching._PIECE_BYTES", 4096)


@pytest.mark.parametrize("how", ["dropped", "closed", "left"])
def test_the_thread_ends_with_its_cache(stored: Callable[..., Path], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), prompt(TOKENS)
    path = stored(model, ids)
    slow_reading(monkeypatch)
    with opened(path) as db:
        with attach(model, db, exact=True) as kv:
            before = held()
            cache: KVDBCache | None = as_slow(kv).cache(ids)
            assert cache is not None
            thread = cache.fetching._thread
            assert thread is not None
            assert thread.is_alive()
            if how == "closed":
                cache.close()
                assert not thread.is_alive()
            if how == "dropped":
                cache = None
                gc.collect()
                thread.join(5)
                assert not thread.is_alive()
            if how != "left":
                assert held() == before
        assert not thread.is_alive()


def test_a_trace_shows_both_at_once(stored: Callable[..., Path], tmp_path: Path) -> None:
    model, ids = tiny(), prompt(TOKENS)
    path = stored(model, ids)
    with KVDB.open(path) as db, attach(model, db, exact=True, trace=tmp_path / "t.json") as kv:
        cache = as_slow(kv).cache(ids)
        assert cache.fetching._thread is not None
        cache.fetching._thread.join(60)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    (recompute,) = [e for e in events if e["name"] == "recompute"]
    fetches = [e for e in events if e["name"] == "fetch"]
    assert [e["args"]["layer"] for e in fetches] == [0, 1]
    assert {e["tid"] for e in fetches} != {recompute["tid"]}
    within = [e for e in events if e["name"] == "step" and e["ts"] >= recompute["ts"]]
    assert len(within) == 2  # blocks of 1,024 tokens


def test_what_is_learned_leads_to_a_split(stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anybody setting rates: a disk that turns slow."""
    model = tiny(num_hidden_layers=4)
    path = stored(model, prompt(TOKENS))
    real, pause = Reader._check, [0.0]

    def check(self: Reader, array: Any, rows: Any, stored: Any) -> None:
        time.sleep(pause[0] * len(rows))
        real(self, array, rows, stored)

    monkeypatch.setattr(Reader, "_check", check)
    monkeypatch.setattr("kvdb.files.resident_pages", lambda _, offset, count: np.zeros(count, bool))
    with opened(path) as db, attach(model, db, exact=True) as kv:
        found = []
        for turn in range(4):
            if turn == 1:
                pause[0] = 2 * (kv._costs.computing.seconds(TOKENS) or 1.0) / (TOKENS / 16 * 4 * 2)
            ids = torch.cat((prompt(TOKENS)[:, :-1], prompt(100, seed=turn)), 1)
            cache = kv.cache(ids)
            found.append(cache.metrics.recomputed_tokens)
            assert torch.equal(answer(model, ids, cache).tokens, stock_answer(model, ids).tokens)
            cache.close()
    assert found[0] == 0, found
    assert found[1] < found[3], found  # the second time, nobody knows yet that it is slow
    assert TOKENS // 4 < found[3] < TOKENS - 1, found


@pytest.mark.parametrize("trouble", ["no thread", "no memory", "no descriptor"])
def test_where_a_split_cannot_be_had_the_prefix_is_read(
    stored: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    expected = stock_answer(model, ids)
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "kvdb-fetch":
            raise RuntimeError("can't start new thread")
        start(thread)

    def fails(error: Exception) -> Callable[..., Any]:
        def fail(*given: Any) -> Any:
            raise error

        return fail

    with opened(stored(model, ids)) as db, attach(model, db, exact=True) as kv:
        with monkeypatch.context() as planted:
            if trouble == "no thread":
                planted.setattr(threading.Thread, "start", refused)
            elif trouble == "no memory":
                planted.setattr("kvdb.runtime.layers.Recomputed.of", fails(MemoryError("no memory")))
            else:
                planted.setattr(Fetching, "begin", fails(OSError(24, "Too many open files")))
            cache = as_slow(kv).cache(ids)
        assert torch.equal(answer(model, ids, cache).tokens, expected.tokens)
        assert cache.stats()["recomputed_tokens"] == (1120 if trouble == "no thread" else 0)
        assert ("that failed: " in cache.stats()["reuse"]) == (trouble != "no thread")
        cache.close()
    assert "kvdb-fetch" not in [thread.name for thread in threading.enumerate()]
