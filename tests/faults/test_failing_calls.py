"""Every effect on the file system of a commit fails once, or from then on: the store is none the worse.

For the Nth effect, for every N: the caller gets StorageFull or the OSError, nothing new is visible, earlier sequences read
back, the same handle commits as soon as the disk works again, and after reopening nothing is left over.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import pytest
from helpers import SMALL, Array, assert_healthy, assert_reads_back, extend, identity, token_list

from kvdb import KVDB, Geometry, LayerGroup
from kvdb.catalog import Transaction
from kvdb.errors import KVDBError, StorageFull

EFFECTS = {
    "write_all": "pwrite",
    "fsync": "fsync",
    "rename": "rename",
    "open_excl, fsync_dir, lock": "open",
    "mkdir": "mkdir",
    "truncate": "ftruncate",
}
ODD = Geometry(
    dtype="float16",
    chunk_tokens=16,
    groups=(LayerGroup(layers=(0, 2), kv_heads=2, head_dim=8), LayerGroup(layers=(1,), kv_heads=1, head_dim=5)),
)
OLD, NEW = token_list(70), token_list(70).copy()
NEW[40:] += 1


class Plan:
    """Fails the Nth effect, and all later ones if `lasting`."""

    def __init__(self, at: int, number: int, *, lasting: bool) -> None:
        self.at, self.number, self.lasting = at, number, lasting
        self.seen: Counter[str] = Counter()
        self.failed: list[str] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in EFFECTS.values():
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield

    def _wrapped(self, name: str, real: object) -> object:
        def effect(*arguments: object, **options: object) -> object:
            now = self.seen.total()
            self.seen[name] += 1
            if now == self.at or (self.lasting and now > self.at):
                self.failed.append(name)
                raise OSError(self.number, os.strerror(self.number))
            return real(*arguments, **options)  # type: ignore[operator]

        return effect


def sequences_of(db: KVDB) -> list[tuple[str, int]]:
    return [(s.key, s.tokens) for s in db.sequences()]


def holds(db: KVDB, tokens: Array, count: int) -> None:
    match = db.match(identity(), tokens)
    assert match.tokens == count
    assert_reads_back(db, tokens, match.spans)


@pytest.mark.parametrize(
    ("number", "lasting"),
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False)],
    ids=["ENOSPC once", "ENOSPC lasting", "EIO once"],
)
def test_a_failing_call_costs_only_the_commit_it_failed_in(tmp_path: Path, number: int, lasting: bool) -> None:
    failed: Counter[str] = Counter()
    with KVDB.open(tmp_path / "base") as db:
        extend(db, OLD, geometry=ODD, name="old")
        before = sequences_of(db)
    for at in range(1_000):
        path = Path(shutil.copytree(tmp_path / "base", tmp_path / f"{at}"))
        with KVDB.open(path) as db:
            plan = Plan(at, number, lasting=lasting)
            error: Exception | None = None
            try:
                with plan.active():
                    extend(db, NEW, geometry=ODD)
            except (KVDBError, OSError) as e:
                error = e
            if error is None:
                assert not plan.failed
                break
            assert isinstance(error, OSError)
            assert isinstance(error, StorageFull) == (number == errno.ENOSPC), error
            failed[plan.failed[0]] += 1
            assert sequences_of(db) == before
            holds(db, NEW, 40)
            holds(db, OLD, 70)
            assert {problem.kind for problem in db.check()} <= {"orphan"}
            extend(db, NEW, geometry=ODD, name="new")
            holds(db, NEW, 70)
        with KVDB.open(path) as db:
            assert_healthy(db)
            assert os.listdir(path / "tmp") == []
            holds(db, NEW, 70)
    assert set(failed) == set(EFFECTS.values())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_a_failing_call_during_creation_leaves_a_place_to_create_a_store(tmp_path: Path, number: int) -> None:
    for at in range(1_000):
        plan = Plan(at, number, lasting=True)
        try:
            with plan.active():
                KVDB.open(tmp_path / f"{at}").close()
        except OSError:
            assert plan.failed
        else:
            break
        with KVDB.open(tmp_path / f"{at}") as db:
            extend(db, OLD)
            assert_healthy(db)
        assert os.listdir(tmp_path / f"{at}" / "tmp") == []
    assert at > 10


@pytest.mark.parametrize("error", [lmdb.MapFullError("full"), lmdb.DiskError("disk")], ids=["map full", "disk"])
def test_a_full_catalog_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: lmdb.Error) -> None:
    def full(*_: object) -> None:
        raise error

    with KVDB.open(tmp_path / "s") as db:
        with monkeypatch.context() as patch:
            patch.setattr(Transaction, "_put", full)
            with pytest.raises(StorageFull, match="nothing was committed"):
                extend(db, OLD)
        assert db.match(identity(), OLD).tokens == 0
        extend(db, OLD)
        assert_healthy(db)


@pytest.mark.parametrize("effect", ["rename", "fsync"])
def test_an_error_that_is_swallowed_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effect: str) -> None:
    """A planted bug: the engine goes on as if a failed rename had worked, or as if no fsync were needed."""
    if effect == "rename":
        monkeypatch.setattr("kvdb.files.rename", lambda source, target: None)
        with KVDB.open(tmp_path / "s") as db:
            extend(db, OLD, geometry=SMALL)
            assert {problem.kind for problem in db.check()} >= {"metadata"}
    else:
        monkeypatch.setattr("kvdb.files.fsync", lambda fd, path: None)
        with pytest.raises(AssertionError):
            test_a_failing_call_costs_only_the_commit_it_failed_in(tmp_path, errno.EIO, False)
