"""What a path leads to may change while a store is open: nothing that was acknowledged goes to another store, or is lost with it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers import assert_reads_back, extend, flip, identity, opened, read_kv, token_list

from kvdb import KVDB
from kvdb.errors import Damaged, InvalidInput, StoreError, StoreLocked
from kvdb.repair import repair

TOKENS = token_list(100)


def test_a_relative_path_means_the_same_store_after_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        KVDB.open(tmp_path / name / "kv").close()
    monkeypatch.chdir(tmp_path / "a")
    with KVDB.open(Path("kv")) as db:
        monkeypatch.chdir(tmp_path / "b")
        extend(db, TOKENS, name="one")
    with opened(tmp_path / "a" / "kv") as db:
        assert_reads_back(db, TOKENS, db.sequence("one").spans)
    with opened(tmp_path / "b" / "kv") as db:
        assert db.sequences() == []


def test_a_store_put_in_the_place_of_an_open_one_is_not_mistaken_for_it(tmp_path: Path) -> None:
    with KVDB.open(tmp_path / "kv") as db:
        extend(db, TOKENS, name="old")
        with opened(tmp_path / "new"):
            pass
        os.rename(tmp_path / "kv", tmp_path / "kv.old")
        os.rename(tmp_path / "new", tmp_path / "kv")
        with pytest.raises(StoreError, match="replaced while it is open"):
            KVDB.open(tmp_path / "kv")
        with pytest.raises((StoreError, FileNotFoundError)):  # its workspace went with the folder
            extend(db, token_list(50, 1))
    with opened(tmp_path / "kv") as db:
        assert db.sequences() == []
    with opened(tmp_path / "kv.old") as db:
        assert db.sequence("old").tokens == 100


def test_a_store_that_is_open_keeps_its_catalog_even_without_a_header(tmp_path: Path) -> None:
    with KVDB.open(tmp_path / "s") as db:
        extend(db, TOKENS, name="one")
        (tmp_path / "s" / "kvdb.json").unlink()
        with pytest.raises(StoreLocked):
            repair(tmp_path / "s", apply=True)
        extend(db, token_list(60, 2), name="two")
    assert repair(tmp_path / "s", apply=True).remaining == []
    with opened(tmp_path / "s") as db:
        assert {s.name for s in db.sequences()} == {"one", "two"}


def test_a_rebuild_keeps_a_name_where_it_was_moved_to(tmp_path: Path) -> None:
    with KVDB.open(tmp_path / "s") as db:
        extend(db, TOKENS[:40], name="chat")
        (stale,) = (tmp_path / "s" / "names").iterdir()
        said = stale.read_bytes()
        extend(db, TOKENS, name="chat")
    stale.write_bytes(said)  # as a kill after the commit would leave it
    assert repair(tmp_path / "s", apply=True, rebuild=True).remaining == []
    with opened(tmp_path / "s") as db:
        assert db.sequence("chat").tokens == 100


def test_what_was_verified_is_a_file_and_not_its_name(tmp_path: Path) -> None:
    with KVDB.open(tmp_path / "s", grace_s=0) as db:
        extend(db, TOKENS, name="one")
        db.export_sequence("one", tmp_path / "one.zip")

        def read() -> None:
            reader = db.reader()
            try:
                (segment,) = db.segments(db.sequence("one").spans)
                read_kv(reader, segment, 0, 100)
            finally:
                reader.close()

        read()
        db.delete("one")
        db.import_sequence(tmp_path / "one.zip")
        (segment,) = db.segments(db.sequence("one").spans)
        flip(tmp_path / "s" / "chunks" / f"{segment.info.segment}.kv0" / "c.0.0.0.0.0", 3)
        with pytest.raises(Damaged, match="layer 0, chunk 0"):
            read()


def test_a_value_that_could_not_be_read_back_does_not_get_in(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        last = extend(db, TOKENS, name="one").last
        for wrong in (lambda: db.pin("one", 1), lambda: db.put_sequence(last, 100, name="two", model=None)):  # type: ignore[arg-type]
            with pytest.raises(InvalidInput):
                wrong()
        assert [s.name for s in db.sequences()] == ["one"]
        assert db.match(identity(), TOKENS).tokens == 100


def test_an_import_takes_no_pinned_name(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as db:
        extend(db, token_list(40, 3), name="report")
        db.export_sequence("report", tmp_path / "report.zip")
    with opened(tmp_path / "b") as db:
        extend(db, TOKENS, name="report")
        db.pin("report")
        with pytest.raises(InvalidInput, match="pinned"):
            db.import_sequence(tmp_path / "report.zip")
        assert db.sequence("report").tokens == 100
        db.import_sequence(tmp_path / "report.zip", name="another")


def test_a_backup_by_copying_opens_beside_the_original(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, TOKENS, name="one")
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    with opened(tmp_path / "s") as one, opened(tmp_path / "copy") as other:
        extend(other, token_list(30, 4), name="two")
        assert len(one.sequences()) == 1
