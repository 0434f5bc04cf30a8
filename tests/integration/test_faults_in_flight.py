"""What goes wrong while a generation reads ends that generation with a typed error, leaves nothing behind, and the store is fine."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_healthy, held, skip_where_refused
from tiny_models import greedy, prompt, stock, tiny
from torch import Tensor, nn

from kvdb import KVDB, files
from kvdb.errors import Damaged, InvalidInput, Stalled
from kvdb.readers import READERS
from kvdb.requests import REQUESTS
from kvdb.runtime import KVDBCache, attach
from kvdb.segments import SegmentWriter

pytestmark = pytest.mark.usefixtures("single_thread")
every_reader = pytest.mark.parametrize("read_mode", READERS)
every_rule = pytest.mark.parametrize("rule", [{"exact": True}, {"budget": 0.2}], ids=lambda rule: next(iter(rule)))
TOKENS = 1500


@contextlib.contextmanager
def prepared(path: Path, read_mode: str, rule: dict[str, Any]) -> Iterator[tuple[nn.Module, Tensor, KVDB, Any]]:
    """A stored prompt, to be read by what nobody has read it with; checked afterwards."""
    skip_where_refused(READERS[read_mode], path.parent)
    model, ids = tiny(), prompt(TOKENS)
    with KVDB.open(path) as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids), name="n")
    with KVDB.open(path, read_mode=read_mode) as db:
        with attach(model, db, prefetch=True, **rule) as kv:
            yield model, ids, db, kv
        if db.host is not None:
            assert not any(pool.table._pins.any() for pool in db.host._pools.values())
        assert_healthy(db)


def fails(model: nn.Module, ids: Tensor, cache: KVDBCache, *errors: type[BaseException]) -> BaseException:
    """The error of a generation; after it, the cache takes part in nothing any more."""
    with pytest.raises(errors) as caught:
        greedy(model, ids, cache, 4)
    with pytest.raises(InvalidInput, match=r"failed half-way|expected a longer one"):
        greedy(model, ids, cache, 4)
    cache.close()
    return caught.value


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes every way to read a file end in an error of the device, until `monkeypatch.undo`."""

    def make(number: int) -> None:
        def fail(*_: object) -> Any:
            raise OSError(number, os.strerror(number))

        for call in ("preadv", "populate"):
            monkeypatch.setattr(files, call, fail)
        for kind in REQUESTS.values():

            def wait(self: Any, *args: Any, real: Any = kind.wait) -> Any:
                return np.full_like(real(self, *args), -number)

            monkeypatch.setattr(kind, "wait", wait)

    return make


@every_reader
@every_rule
def test_a_device_that_fails(
    tmp_path: Path,
    read_mode: str,
    rule: dict[str, Any],
    failing: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with prepared(tmp_path / "s", read_mode, rule) as (model, ids, db, kv):
        expected = greedy(model, ids, kv.cache(ids), 6)
        for pool in () if db.host is None else db.host._pools.values():
            for key in list(pool.table._maps):
                pool.table.drop(key)  # what the tier has would not be read again
        before = held()
        cache = kv.cache(ids)
        failing(errno.EIO)
        error = fails(model, ids, cache, Damaged, OSError)
        assert "Input/output error" in str(error)
        monkeypatch.undo()
        del cache, error
        assert held() == before
        assert torch.equal(greedy(model, ids, kv.cache(ids), 6), expected)


@every_reader
@every_rule
def test_a_file_that_is_cut_under_a_generation(tmp_path: Path, read_mode: str, rule: dict[str, Any]) -> None:
    """Before any of it was read: what was touched in a map cannot be guarded."""
    skip_where_refused(READERS[read_mode], tmp_path)
    model, ids, other = tiny(), prompt(TOKENS), prompt(300, seed=3)
    with KVDB.open(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids), name="n")
    with KVDB.open(tmp_path / "s", read_mode=read_mode) as db, attach(model, db, prefetch=True, **rule) as kv:
        cache = kv.cache(ids)
        (shard,) = (tmp_path / "s" / "chunks").glob("*.kv0/c.*")
        os.truncate(shard, shard.stat().st_size // 4)
        assert str(shard) in str(fails(model, ids, cache, Damaged))
        assert torch.equal(greedy(model, other, kv.cache(other), 6), stock(model, other, 6))
        assert {problem.kind for problem in db.check()} != set()


@every_reader
@every_rule
def test_a_generation_that_is_cancelled(
    tmp_path: Path, read_mode: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, between two reads."""
    with prepared(tmp_path / "s", read_mode, rule) as (model, ids, _, kv):
        expected = greedy(model, ids, kv.cache(ids), 6)
        before = held()
        cache, calls = kv.cache(ids), 0
        reader = type(cache._reader)
        real = reader._check

        def cancelled(self: Any, *args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt
            real(self, *args)

        monkeypatch.setattr(reader, "_check", cancelled)
        fails(model, ids, cache, KeyboardInterrupt)
        monkeypatch.undo()
        del cache
        assert held() == before
        assert torch.equal(greedy(model, ids, kv.cache(ids), 6), expected)


@every_rule
def test_a_device_that_does_not_answer(tmp_path: Path, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than the reader's deadline: then the generation ends, and when it answers again others go on."""
    skip_where_refused(READERS["direct"], tmp_path)
    model, ids = tiny(), prompt(TOKENS)
    with KVDB.open(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids), name="n")
        expected = greedy(model, ids, kv.cache(ids), 6) if "exact" in rule else None
    with (
        KVDB.open(tmp_path / "s", read_mode="direct", read_deadline_s=2) as db,
        attach(model, db, **rule) as kv,
    ):
        cache = kv.cache(ids)
        answers = threading.Event()
        for kind in REQUESTS.values():

            def wait(self: Any, ticket: Any, timeout_s: float | None = None, real: Any = kind.wait) -> Any:
                if not answers.wait(timeout_s):
                    raise Stalled("a device: 1 read is not over, expected it; try again")
                return real(self, ticket, timeout_s)

            monkeypatch.setattr(kind, "wait", wait)
            monkeypatch.setattr(
                kind, "done", lambda self, ticket, real=kind.done: answers.is_set() and real(self, ticket)
            )
        fails(model, ids, cache, Stalled)
        answers.set()
        again = greedy(model, ids, kv.cache(ids), 6)
        assert expected is None or torch.equal(again, expected)
        assert_healthy(db)


def test_an_error_on_the_writing_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the prefill it writes for; what was stored before is there, and nothing half-written is."""
    with prepared(tmp_path / "s", "mmap", {"exact": True}) as (model, ids, db, kv):
        longer = torch.cat((ids, prompt(2500, seed=9)), 1)
        stored, before, calls = db.info()["segments"], held(), 0
        real = SegmentWriter.append

        def fail(self: SegmentWriter, *args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("not in the plan")
            real(self, *args)

        monkeypatch.setattr(SegmentWriter, "append", fail)
        with pytest.raises(RuntimeError, match="not in the plan"):
            kv.cache(longer)
        monkeypatch.undo()
        assert held()[1] == before[1]
        assert db.info()["segments"] == stored
        assert torch.equal(greedy(model, longer, kv.cache(longer), 4), stock(model, longer, 4))
