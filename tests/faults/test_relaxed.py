"""durability="relaxed": commits are seen at once and wait for no disk; a loss of power takes what was not synced, and leaves a
store in which nothing is wrong.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import vfs
from faults.tally import Tally, counts, seen
from faults.vfs import CATALOG, Disk, File, Vfs
from faults.workload import (
    BRANCH,
    CLOSE,
    CODED,
    CREATE,
    DRAFT,
    EVERYTHING,
    GEOMETRY,
    LAST,
    NEXT,
    TRUNK,
    TURN,
    Life,
    Step,
    Violation,
    abstracts,
    compact,
    delete,
    evict,
    possible,
    reads_back,
    recode,
    repeatable,
    store,
    store_coded,
)
from helpers import Array, assert_reads_back, extend, finish, flip, identity, opened, python, token_list

from kvdb import KVDB, files, repair
from kvdb.environment import Environment
from kvdb.errors import Damaged, KVDBError
from kvdb.files import Moment
from kvdb.transaction import Transaction


def relaxed(path: Path, **options: Any) -> KVDB:
    return KVDB.open(path, durability="relaxed", **options)


def reboot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "moment", lambda: Moment(files.now(), "another boot", 1.0))


# -- what a commit does, and what it leaves to `sync` and `close`

LOOK = """
import sys
from helpers import *
with KVDB.open(sys.argv[1], "r") as db:
    found, _ = db.find(identity(), token_list(100))
    assert_reads_back(db, token_list(100), found.spans)
    print(found.tokens)
"""


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Inodes that were forced to disk."""
    inodes: set[int] = set()
    real = os.fsync

    def fsync(fd: int) -> None:
        inodes.add(os.fstat(fd).st_ino)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return inodes


@pytest.mark.parametrize("force", [KVDB.sync, KVDB.close])
def test_relaxed_commits_are_seen_at_once_and_forced_when_asked(
    tmp_path: Path, synced: set[int], force: Callable[[KVDB], None]
) -> None:
    with relaxed(tmp_path / "s") as db:
        synced.clear()
        extend(db, token_list(100), segment_tokens=48)
        assert synced == set()
        assert finish(python(LOOK, str(tmp_path / "s"))) == "100\n"
        force(db)
    chunks = tmp_path / "s" / "chunks"
    stored = [chunks, *(p for p in chunks.rglob("*") if p != chunks / "zarr.json")]
    assert {p.name for p in stored if p.stat().st_ino not in synced} == set()
    with opened(tmp_path / "s") as db, db.catalog.begin() as txn:
        assert txn.unsynced() == {}


def test_a_killed_process_loses_nothing_it_committed_relaxed(tmp_path: Path) -> None:
    process = python(
        "import os, signal, sys\nfrom helpers import *\n"
        "db = KVDB.open(sys.argv[1], durability='relaxed')\n"
        "extend(db, token_list(100), segment_tokens=48)\n"
        "os.kill(os.getpid(), signal.SIGKILL)",
        str(tmp_path / "s"),
    )
    process.communicate()
    with opened(tmp_path / "s") as db:
        assert_reads_back(db, token_list(100), db.find(identity(), token_list(100))[0].spans)


def test_a_durable_commit_makes_durable_what_it_builds_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = token_list(96), token_list(130, 1), token_list(48, 2)
    second[:96] = first
    with relaxed(tmp_path / "s") as loose, KVDB.open(tmp_path / "s") as firm:
        extend(loose, first, segment_tokens=48)
        extend(firm, second, segment_tokens=48)
        extend(loose, third)
        with firm.catalog.begin() as txn:
            waiting = list(txn.unsynced())
        assert [s.info.segment for s in firm.find(identity(), third)[1]] == waiting
        shutil.copytree(tmp_path / "s", tmp_path / "after")
    for array in (tmp_path / "after" / "chunks").glob(f"{waiting[0]}.*"):
        shutil.rmtree(array)
    reboot(monkeypatch)
    with opened(tmp_path / "after") as db:
        assert_reads_back(db, second, db.find(identity(), second)[0].spans)
        assert db.match(identity(), third).tokens == 0


def test_a_durable_handle_is_durable_beside_a_relaxed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced = []
    monkeypatch.setattr(Environment, "sync", lambda env: forced.append(env))
    with relaxed(tmp_path / "s") as loose, KVDB.open(tmp_path / "s") as firm:
        extend(loose, token_list(48))
        assert forced == []
        extend(firm, token_list(48, 1))
        assert forced != []
        assert loose.check() == []


@pytest.mark.parametrize("damage", ["flipped", "gone", "empty"])
def test_after_a_reboot_what_is_not_whole_is_dropped_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    kept, lost, built_on_lost = token_list(100), token_list(48, 1), token_list(100, 2)
    built_on_lost[:48] = lost
    with relaxed(tmp_path / "s") as db:
        extend(db, kept, name="kept")
        extend(db, lost, name="lost")
        extend(db, built_on_lost, name="built on lost")
        (segment,) = db.segments(db.sequence("lost").spans)
        shutil.copytree(tmp_path / "s", tmp_path / "after")
    folder = tmp_path / "after" / "chunks" / f"{segment.info.segment}.kv0"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "empty":
        (folder / "c.0.0.0.0.0").write_bytes(b"")
    else:
        flip(folder / "c.0.0.0.0.0", 100)
    reboot(monkeypatch)
    with KVDB.open(tmp_path / "after", "r") as db:  # changes nothing, and is told
        assert_reads_back(db, kept, db.sequence("kept").spans)
        with pytest.raises(Damaged, match=segment.info.segment):
            assert_reads_back(db, lost, db.sequence("lost").spans)
    with opened(tmp_path / "after") as db:
        assert [s.name for s in db.sequences()] == ["kept"]
        assert_reads_back(db, kept, db.sequence("kept").spans)
        extend(db, built_on_lost, name="again")


# -- every state that a loss of power may leave, by the model of vfs.py

SYNC = Step("sync", lambda life: life.db.sync(), lambda s: [s])
SCRIPT = (
    CREATE,
    store("trunk", TRUNK, name="trunk"),
    SYNC,
    store("branch", BRANCH),
    store("turn", TURN, name="chat"),
    delete("trunk"),
    SYNC,
    store("draft", DRAFT, name="draft"),
    store_coded("coded", CODED, "planes"),
    compact("chat"),
    abstracts("chat", "box", "sketch"),
    abstracts("chat", "sketch"),
    recode("chat", "int4"),
    evict(),
    store("last", LAST, name="last"),
    CLOSE,
)


class RelaxedDisk(Disk):
    """Once `relax` was played, a loss of power may undo the last commit of the catalog, until the next commit or `force`."""

    def __init__(self) -> None:
        super().__init__()
        self._may_undo, self._before = False, None

    def relax(self) -> None:
        self._may_undo = True

    def force(self) -> None:
        self._before = None

    def commit(self, data: bytes) -> None:
        if self._may_undo:
            self._before = self._catalog().writes
        super().commit(data)

    def cut_power(self, target: Path, rng: random.Random) -> None:
        if self._before is not None and rng.random() < 0.5:
            self._catalog().writes = self._before
        super().cut_power(target, rng)

    def _catalog(self) -> File:
        file = self.at(CATALOG)
        assert isinstance(file, File)
        return file


class RelaxedLife(Life):
    def __init__(self, path: Path, journal: Vfs) -> None:
        super().__init__(path, journal.acknowledge)
        self._journal = journal

    @property
    def db(self) -> KVDB:
        if self._db is None:
            self._db = relaxed(self.path, grace_s=0)
            self._journal._happens("relax")
        return self._db


def lived(root: Path, patch: pytest.MonkeyPatch) -> Vfs:
    root.mkdir()
    patch.setattr(vfs, "Disk", RelaxedDisk)
    journal, force = Vfs(root), Environment.sync

    def sync(env: Environment) -> None:
        force(env)
        journal._notice_commit()
        journal._happens("force")

    patch.setattr(Environment, "sync", sync)
    with repeatable(), journal.active():
        RelaxedLife(root / "s", journal).live(SCRIPT)
    assert [line.split()[0] for _, line in journal.acks] == ["done"] * len(SCRIPT)
    return journal


def cut(journal: Vfs, target: Path, seed: int) -> Violation | None:
    """What is wrong with one store that a loss of power may leave."""
    rng = random.Random(seed)
    acks = journal.crash(rng.randint(0, len(journal.journal)), target, rng, power=True)
    try:
        judge(target / "s", acks)
    except Violation as violation:
        return violation
    finally:
        shutil.rmtree(target)
    return None


def judge(path: Path, acks: list[str]) -> None:
    """Nothing is wrong, whatever is there is what was stored, and what was synced is there unless it was taken away.

    raises  Violation
    """
    synced = max((i for i, step in enumerate(SCRIPT[: len(acks)]) if step in (SYNC, CLOSE)), default=-1) + 1
    states = possible(acks[:synced], SCRIPT[:synced])  # they differ in unnamed sequences only
    named = {(held.name, held.tokens) for state in states for held in state if held.name is not None}
    taken = {"trunk"} if len(acks) >= 5 else set()
    try:
        with KVDB.open(path) as db:
            if problems := db.check():
                raise Violation("torn", str(problems[0]))
            for sequence in db.sequences():
                _is_one_of(EVERYTHING, db, sequence.spans)
            for name, data in named:
                if name not in taken and db.tokens(db.sequence(name).spans).tobytes() != data:
                    raise Violation("lost", f"{name} was synced")
            extend(db, NEXT, name="next", geometry=GEOMETRY)
            assert_reads_back(db, NEXT, db.sequence("next").spans)
    except (KVDBError, OSError, AssertionError) as error:
        if isinstance(error, Violation):
            raise
        raise Violation("lost" if "not in the store" in str(error) else "unusable", str(error)) from error


def _is_one_of(stored: tuple[Array, ...], db: KVDB, spans: Any) -> None:
    tokens = db.tokens(spans)
    if not any(whole[: len(tokens)].tobytes() == tokens.tobytes() for whole in stored):
        raise Violation("torn", f"{len(tokens)} tokens that nobody stored")
    reads_back(db, tokens, spans)


def test_no_loss_of_power_leaves_a_relaxed_store_inconsistent(
    scratch: Path, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = lived(scratch / "life", monkeypatch)
    reboot(monkeypatch)
    for seed in range(counts(2_000)):
        tally.add(f"seed {seed}", cut(journal, scratch / f"cut{seed}", seed))
    tally.assert_clean()


def _nothing_fsynced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "fsync_trees", lambda *_, **__: None)


def _entries_come_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transaction, "takes_away", False)


def _nothing_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(repair, "drop_lost", lambda path, catalog: None)


def _recoded_like_any_commit(patch: pytest.MonkeyPatch) -> None:
    """What is stored anew waits for no disk, though what was on it goes."""
    commit = KVDB.commit

    def relaxed_commit(self: KVDB, *arguments: Any, durable: bool | None = None, **options: Any) -> Any:
        return commit(self, *arguments, **options)

    patch.setattr(KVDB, "commit", relaxed_commit)


@pytest.mark.parametrize("plant", [_nothing_fsynced, _entries_come_back, _nothing_dropped, _recoded_like_any_commit])
def test_losses_of_power_show(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    journal = lived(scratch / "life", monkeypatch)
    reboot(monkeypatch)
    assert seen(cut(journal, scratch / f"cut{seed}", seed) for seed in range(500))
