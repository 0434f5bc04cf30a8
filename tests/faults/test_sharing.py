"""Readers, writers, an evictor and a compactor of one store, at once: nobody reads what was never stored, and writers never
wait for readers.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faults.crowd import READERS, crowd
from faults.tally import NIGHTLY, Tally
from helpers import assert_reads_back, extend, finish, identity, opened, python, token_list

from kvdb import KVDB, files
from kvdb.errors import Damaged

SECONDS = 600 if NIGHTLY else 60


@pytest.mark.slow
def test_a_crowd_reads_only_what_was_stored(scratch: Path, tally: Tally) -> None:
    seen = crowd(scratch / "s", SECONDS)
    counts = ", ".join(f"{n} {what}" for what, n in sorted(seen.items()))
    tally.name, tally.points = f"{tally.name} ({READERS} readers, {SECONDS} s: {counts})", seen["reads"]
    assert [what for what in seen if what.startswith(("torn", "untyped"))] == []
    for what in ("reads", "misses", "looked again", "snapshots", "writes", "evictions", "deletions", "merged segments"):
        assert seen[what] > 0, f"a crowd without {what} shows nothing"
    with opened(scratch / "s"):
        pass


@pytest.mark.parametrize("plant", ["changed in place", "unlink before commit"])
def test_a_crowd_shows(scratch: Path, plant: str) -> None:
    assert any(what.startswith("torn") for what in crowd(scratch / "s", 4, plant=plant))


HOLD = """
import sys
from helpers import KVDB
with KVDB.open(sys.argv[1], "r") as db, db.catalog.begin() as txn:
    before = txn.sequences()
    print("holding", flush=True)
    sys.stdin.readline()
    assert txn.sequences() == before
    print(len(before))
"""


def test_a_long_snapshot_holds_no_writer_up_and_stays_what_it_was(tmp_path: Path) -> None:
    with KVDB.open(tmp_path / "s", lock_timeout_s=0.5) as db:
        extend(db, token_list(40), name="first")
        reader = python(HOLD, str(tmp_path / "s"))
        assert reader.stdout is not None
        assert reader.stdout.readline() == "holding\n"
        for seed in range(1, 30):
            extend(db, token_list(40, seed), name=f"n{seed}")
        db.delete("first")
        db.compact()
        db.evict(0, named=True)
        assert db.sequences() == []
        assert reader.stdin is not None
        reader.stdin.write("\n")
        assert finish(reader) == "1\n"
    with opened(tmp_path / "s"):
        pass


def test_what_a_reader_has_open_stays_readable_whatever_happens_to_the_store(tmp_path: Path) -> None:
    tokens = token_list(100)
    with KVDB.open(tmp_path / "s", grace_s=0) as db:
        extend(db, tokens, segment_tokens=48, name="gone")
        found, segments = db.find(identity(), tokens)
        reader = db.reader()
        for segment in segments:
            reader.open(segment)
        db.delete("gone")
        assert list((tmp_path / "s" / "trash").iterdir()) == []
        out = np.empty((2, 2, 16, 8), np.uint16)
        for segment in segments:
            reader.read(segment, 0, np.arange(2), out)
            reader.abstract(segment, "box", 0)
        reader.close()
        late = db.reader()
        with pytest.raises(Damaged, match="No such file"):
            late.open(segments[0])
        assert not db.holds(found.spans)
        assert db.find(identity(), tokens)[0].tokens == 0


@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_a_reader_that_was_on_its_way_finds_what_was_deleted_within_the_grace_period(
    tmp_path: Path, read_mode: str
) -> None:
    tokens = token_list(100)
    with KVDB.open(tmp_path / "s", grace_s=3600, read_mode=read_mode) as db:
        extend(db, tokens, segment_tokens=48)
        _, segments = db.find(identity(), tokens)
        half_way = db.reader()
        half_way.open(segments[0])
        db.evict(0)
        for reader in (half_way, db.reader()):
            out = np.empty((2, 2, 16, 8), np.uint16)
            for segment in segments:
                reader.open(segment)
                reader.read(segment, 0, np.arange(2), out)
            reader.close()
        assert db.gc() > 0
        with pytest.raises(Damaged, match="No such file"):
            db.reader().open(segments[0])
        assert db.check() == []


def test_an_array_that_is_moved_while_its_files_are_opened_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = token_list(100)
    with KVDB.open(tmp_path / "s", grace_s=3600) as db:
        extend(db, tokens)
        _, (segment,) = db.find(identity(), tokens)
        calls = iter(range(100))
        real = files.open_read

        def open_read(path: Path) -> int:
            fd = real(path)
            if next(calls) == 1:  # the abstract's file is open, its metadata is not
                db.evict(0)
            return fd

        monkeypatch.setattr(files, "open_read", open_read)
        reader = db.reader()
        reader.open(segment)
        assert len(reader.abstract(segment, "box", 2)) == segment.info.chunks
        assert db.sequences() == []  # it was evicted meanwhile
        reader.close()


def test_threads_share_a_handle(tmp_path: Path) -> None:
    """Each writes and reads its own, some of it the same as others', all of them from their first call on at once."""
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for seed in (100, number, number + 8, 101):
            tokens = token_list(100, seed)
            extend(db, tokens, segment_tokens=48, name=f"n{seed}")
            assert_reads_back(db, tokens, db.sequence(f"n{seed}").spans)
            db.touch(db.sequence(f"n{seed}").spans)

    with opened(tmp_path / "s") as db:
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, number) for number in range(8)]:
                done.result()
        assert {s.name for s in db.sequences() if s.name} == {f"n{seed}" for seed in (100, 101, *range(16))}
        assert len(list((tmp_path / "s" / "tmp").iterdir())) == 1
