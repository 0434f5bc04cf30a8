"""Peers that died or were stopped do not wedge a store: locks and reader slots of the dead are free, the stopped are told about."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import assert_reads_back, extend, finish, identity, opened, python, token_list, write_segment

from kvdb import KVDB
from kvdb.errors import StoreLocked

HOLDING = {
    "the write lock": "db.catalog.locked()",
    "a write transaction": "db.catalog.begin(write=True)",
}
WRITER = """
import sys, time
from helpers import *
db = KVDB.open(sys.argv[1])
extend(db, token_list(100), name="theirs")
writer = write_segment(db, token_list(100, 1))
with {holding}:
    print("holding", flush=True)
    sys.stdin.readline()
db.commit(writer, token_list(100, 1))
db.close()
"""


@contextlib.contextmanager
def holder(path: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds something of the store, until it reads a line."""
    process = python(code, str(path))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("what", HOLDING)
def test_a_killed_writer_leaves_its_lock_to_the_next(tmp_path: Path, what: str) -> None:
    with KVDB.open(tmp_path / "s", lock_timeout_s=1) as db:
        with holder(tmp_path / "s", WRITER.format(holding=HOLDING[what])) as process:
            process.kill()
            process.wait()
        extend(db, token_list(100, 2), name="mine")
        assert_reads_back(db, token_list(100), db.sequence("theirs").spans)
    with opened(tmp_path / "s") as db:
        assert [s.name for s in db.sequences()] == ["theirs", "mine"]
        assert list((tmp_path / "s" / "tmp").iterdir()) == []


@pytest.mark.parametrize("what", HOLDING)
def test_a_stopped_writer_is_told_about_and_goes_on_when_it_may(tmp_path: Path, what: str) -> None:
    with KVDB.open(tmp_path / "s", lock_timeout_s=0.2) as db:
        with holder(tmp_path / "s", WRITER.format(holding=HOLDING[what])) as process:
            process.send_signal(signal.SIGSTOP)
            for write in (
                lambda: extend(db, token_list(100, 2)),
                lambda: db.delete("theirs"),
                lambda: db.evict(0),
                lambda: db.pin("theirs"),
                lambda: write_segment(db, token_list(100, 2)),
            ):
                with pytest.raises(StoreLocked, match=r"write\.lock: in use for 0\.2 s"):
                    write()
            assert_reads_back(db, token_list(100), db.sequence("theirs").spans)
            process.send_signal(signal.SIGCONT)
            finish_line(process)
        extend(db, token_list(100, 2), name="mine")
        assert db.match(identity(), token_list(100, 1)).tokens == 100
        assert db.check() == []


def finish_line(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    process.wait(60)


def test_a_stopped_writer_keeps_nobody_from_opening_to_read(tmp_path: Path) -> None:
    with opened(tmp_path / "s"):
        pass
    with holder(tmp_path / "s", WRITER.format(holding=HOLDING["a write transaction"])) as process:
        process.send_signal(signal.SIGSTOP)
        with KVDB.open(tmp_path / "s", "r", lock_timeout_s=0.2) as db:
            assert_reads_back(db, token_list(100), db.sequence("theirs").spans)


READERS = """
import os, signal, sys, time
from helpers import *
path, count = sys.argv[1], int(sys.argv[2])
inside, tell = os.pipe()
children = []
for _ in range(count):
    children.append(os.fork())
    if children[-1] == 0:
        with KVDB.open(path, "r") as db, db.catalog.begin() as txn:
            txn.sequences()
            os.write(tell, b".")
            time.sleep(600)
for _ in range(count):
    os.read(inside, 1)
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print("killed")
"""


def churn(db: KVDB, rounds: int) -> int:
    """Store and delete again and again; returns the pages the catalog has used so far."""
    for seed in range(rounds):
        extend(db, token_list(100, seed), segment_tokens=48, name="here")
        db.delete("here")
        db.evict(0)
    return int(db.catalog._environment().env.info()["last_pgno"])


def slots(db: KVDB) -> int:
    return str(db.catalog._environment().env.readers()).count("\n") - 1


def test_slots_of_killed_readers_are_reclaimed_and_keep_no_pages(scratch: Path) -> None:
    with opened(scratch / "alone") as alone:
        expected = churn(alone, 25)
    with opened(scratch / "s") as db:
        extend(db, token_list(100), name="before")
        assert finish(python(READERS, str(scratch / "s"), "50")) == "killed\n"
        assert slots(db) >= 50
        used = churn(db, 25)
        assert slots(db) <= 1
        assert used <= expected + 16  # what `before` takes
