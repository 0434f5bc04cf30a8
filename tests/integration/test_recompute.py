"""Whether a stored prefix is loaded or computed again changes time, and nothing else. Of computing a part of it: `test_split.py`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import opened
from tiny_models import greedy, prompt, tiny

from kvdb import files
from kvdb.reader import Reader
from kvdb.runtime import Attachment, attach

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.usefixtures("unsplit")
def test_a_prefix_on_a_slow_disk_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once both are known: first it is loaded, which shows how slow that is."""
    model, ids = tiny("llama"), prompt(3000)
    with opened(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids[:, :2400]))
        expected = greedy(model, ids, kv.cache(ids), 6)
        real = Reader._check

        def slow(self: Reader, *args: Any) -> None:
            time.sleep(0.05)
            real(self, *args)

        monkeypatch.setattr(Reader, "_check", slow)
        monkeypatch.setattr("kvdb.runtime.costs.LEAST_GAIN_S", 0.0)
        monkeypatch.setattr(files, "resident_pages", lambda _, offset, count: torch.zeros(count, dtype=bool).numpy())
        reused = []
        for start in (2400, 2500):  # longer each time: what follows the prefix is prefilled
            longer = torch.cat((ids[:, :start], prompt(300, seed=start)), 1)
            cache = kv.cache(longer)
            reused.append((cache.metrics.reused_tokens > 0, cache.stats()["reuse"]))
        assert [loaded for loaded, _ in reused] == [True, False], reused
        assert "to read" in reused[1][1]
        monkeypatch.undo()
        assert torch.equal(greedy(model, ids, kv.cache(ids), 6), expected)


@pytest.mark.parametrize("recompute", [True, False])
def test_it_can_be_asked_for(tmp_path: Path, recompute: bool) -> None:
    model, ids = tiny("llama"), prompt(1300)
    with opened(tmp_path / "s") as db:
        with attach(model, db, exact=True) as kv:
            expected = greedy(model, ids, kv.cache(ids), 6)
            stored = db.info()["segments"]
        with attach(model, db, exact=True, recompute=recompute) as kv:
            cache = kv.cache(ids)
            assert cache.metrics.reused_tokens == (0 if recompute else 1299)
            assert torch.equal(greedy(model, ids, cache, 6), expected)
        assert db.info()["segments"] == stored  # what is computed again is stored once


@pytest.fixture
def unsplit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attachment, "_most_split", lambda self, prefixes: 0)


@pytest.mark.usefixtures("unsplit")
@pytest.mark.parametrize("where", ["readonly", "capped"])
def test_what_could_not_be_stored_is_loaded(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: all of it would stay in memory, or push something out."""
    model, ids = tiny("llama"), prompt(1300)
    with opened(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        kv.cache(ids)
        if where == "capped":
            db.set_size_cap("1GiB")
    monkeypatch.setattr("kvdb.runtime.costs.Rate.seconds", lambda self, units: units)  # a byte takes as long as a token
    monkeypatch.setattr("kvdb.runtime.history.History.absent_bytes", lambda self, starts: np.full(len(starts), 2.0**30))
    with opened(tmp_path / "s", "r" if where == "readonly" else "a") as db, attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == 1299
        assert cache.stats()["reuse"] == "what is computed again could not be stored"
    with opened(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        db.set_size_cap("unlimited")
        assert kv.cache(ids).metrics.reused_tokens == 0  # and otherwise it would be
