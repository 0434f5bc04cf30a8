"""A process is killed before every effect of a commit and a delete, and in the middle of every write.

What was acknowledged is there, bit for bit; what was not is wholly there or wholly absent; the next process that opens the
store for writing finds nothing left over. (A kill cannot show a missing fsync: power cuts are another harness.)
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers import Array, assert_healthy, assert_reads_back, extend, finish, identity, opened, python, token_list

from kvdb import KVDB
from kvdb.segments import Segment, SegmentWriter

OLD, NEW, GONE = token_list(40), token_list(90, 1), token_list(50, 2)

HARNESS = """
import os, shutil, signal, sys
from pathlib import Path
from helpers import *

root, what = Path(sys.argv[1]), sys.argv[2]
OLD, NEW, GONE = token_list(40), token_list(90, 1), token_list(50, 2)

def arm(at):
    count = [0]
    def wrapped(name, real):
        def effect(*arguments, **options):
            count[0] += 1
            if count[0] == at:
                if name == "pwrite":  # torn: half of it arrives
                    fd, data, offset = arguments
                    real(fd, memoryview(data)[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return effect
    for name in ("pwrite", "fsync", "rename", "open", "mkdir", "ftruncate", "unlink", "rmdir", "link", "chmod"):
        setattr(os, name, wrapped(name, getattr(os, name)))

def life(path, at):
    acks = open(path.with_suffix(".acks"), "a", buffering=1)
    if what == "create":
        arm(at)
        KVDB.open(path).close()
        acks.write("created\\n")
        return
    shutil.copytree(root / "base", path)
    with KVDB.open(path) as db:
        acks.write("old\\n")
        arm(at)
        extend(db, NEW, name="new", segment_tokens=48)
        acks.write("new\\n")
        db.delete("gone")
        acks.write("deleted\\n")

def make_base():
    with KVDB.open(root / "base") as db:
        extend(db, OLD, name="old")
        extend(db, GONE, name="gone")

maker = os.fork()  # this process itself never opens a store: what it forks may
if maker == 0:
    make_base()
    os._exit(0)
os.waitpid(maker, 0)
for at in range(1, 1000):
    child = os.fork()
    if child == 0:
        life(root / f"{at}", at)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(at)
"""


def holds(db: KVDB, tokens: Array) -> bool:
    match = db.match(identity(), tokens)
    assert_reads_back(db, tokens, match.spans)
    return match.tokens == len(tokens)


def judge(path: Path) -> None:
    acknowledged = path.with_suffix(".acks").read_text().split()
    with opened(path) as db:
        names = {s.name for s in db.sequences()}
        assert "old" in names
        assert holds(db, OLD)
        if "new" in acknowledged:
            assert "new" in names
        if "new" in names:
            assert holds(db, NEW)
        if "deleted" in acknowledged:
            assert "gone" not in names
        assert holds(db, GONE) == ("gone" in names)
        assert os.listdir(path / "tmp") == []


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Stores as killed writers left them, one per effect."""
    root = tmp_path_factory.mktemp("killed")
    points = int(finish(python(HARNESS, str(root), "commit"), timeout_s=120))
    assert points > 50
    return [root / f"{at}" for at in range(1, points + 1)]


def copy_of(path: Path, target: Path) -> Path:
    shutil.copytree(path, target, symlinks=True)
    shutil.copy(path.with_suffix(".acks"), target.with_suffix(".acks"))
    return target


def test_a_killed_writer_loses_nothing_acknowledged_and_leaves_nothing(killed: list[Path], tmp_path: Path) -> None:
    for at, path in enumerate(killed):
        judge(copy_of(path, tmp_path / f"{at}"))


def test_a_store_left_by_a_killed_writer_takes_the_next_commit(killed: list[Path], tmp_path: Path) -> None:
    for at, path in enumerate(killed[::5]):
        with opened(copy_of(path, tmp_path / f"{at}")) as db:
            extend(db, NEW, name="again")
            assert holds(db, NEW)


def test_a_killed_creation_can_be_repeated(tmp_path: Path) -> None:
    points = int(finish(python(HARNESS, str(tmp_path), "create"), timeout_s=60))
    assert points > 10
    for at in range(1, points + 1):
        with opened(tmp_path / f"{at}") as db:
            assert db.sequences() == []
            assert os.listdir(tmp_path / f"{at}" / "tmp") == []


def test_the_judge_sees_that_sweeping_was_skipped(
    killed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvdb.folder.sweep", lambda root, catalog: None)
    seen = 0
    for at, path in enumerate(killed):
        try:
            judge(copy_of(path, tmp_path / f"{at}"))
        except AssertionError:
            seen += 1
    assert seen > 10


def test_the_judge_sees_entries_committed_before_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentWriter, "publish", lambda self, chunks: Segment(self.info, chunks))
    with KVDB.open(tmp_path / "s") as db:
        extend(db, OLD)
        with pytest.raises(AssertionError):
            assert_healthy(db)
