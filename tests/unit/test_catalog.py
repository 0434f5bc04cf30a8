"""The catalog: typed entries with a digest each, one environment per path, a transaction or nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lmdb
import pytest
from helpers import assert_reads_back, extend, finish, identity, opened, python, token_list, write_segment

from kvdb import KVDB
from kvdb.catalog import Catalog
from kvdb.entries import spans_of
from kvdb.environment import TABLES
from kvdb.errors import Damaged, PrefixDeleted, SequenceNotFound, StoreError
from kvdb.repair import repair


def rewrite(path: Path, table: str, change: int, *, only: bytes | None = None) -> None:
    """Flip a bit of byte `change` in every entry of a table, or in one, as a failing disk might."""
    env = lmdb.open(str(path / "catalog"), max_dbs=len(TABLES))
    db = env.open_db(table.encode(), dupsort=table == "tree")
    with env.begin(write=True, db=db) as txn:
        entries = [(key, value) for key, value in txn.cursor() if only in (None, key)]
        assert entries
        for key, value in entries:
            txn.delete(key, value)
        for key, value in entries:
            flipped = bytearray(value)
            flipped[change] ^= 4
            txn.put(key, bytes(flipped))
    env.close()


@pytest.mark.parametrize("table", ["identities", "segments", "tokens", "tree", "sequences", "names"])
@pytest.mark.parametrize("byte", [0, 7, 8, -1])
def test_a_changed_entry_is_damage_and_found_by_check(tmp_path: Path, table: str, byte: int) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, token_list(40), name="a")
    rewrite(tmp_path / "s", table, byte)
    with KVDB.open(tmp_path / "s", "r") as db:
        assert "damaged-entry" in {problem.kind for problem in db.check()}
        with pytest.raises(Damaged, match=f"catalog table {table}"):
            _use_everything(db)


def _use_everything(db: KVDB) -> None:
    match = db.match(identity("other"), token_list(41))
    match = db.match(identity(), token_list(40))
    db.segments(match.spans)
    db.tokens(match.spans)
    db.sequences()
    db.sequence("a")
    db.identity(identity().digest().hex())


@pytest.mark.parametrize("table", ["uses", "moved", "unsynced", "meta"])
def test_a_changed_entry_that_readers_never_ask_for_is_found_by_check_and_mended(tmp_path: Path, table: str) -> None:
    tokens = token_list(96)
    with KVDB.open(tmp_path / "s", durability="relaxed") as db:
        extend(db, tokens[:32])
        extend(db, tokens[:64])
        assert db.compact() == 1
        extend(db, tokens)
        shutil.copytree(tmp_path / "s", tmp_path / "copy")  # as a crash leaves it: not synced
    rewrite(tmp_path / "copy", table, 9)
    with KVDB.open(tmp_path / "copy", "r") as db:
        assert f"catalog table {table}" in {problem.loc for problem in db.check()}
    assert repair(tmp_path / "copy", apply=True).remaining == []
    with opened(tmp_path / "copy") as db:
        assert db.match(identity(), tokens).tokens == 96


@pytest.mark.parametrize("key", ["counters", "clock", "limits", "next expiry", "totals:names", "totals:tree"])
def test_damaged_facts_about_the_store_stop_no_reader(tmp_path: Path, key: str) -> None:
    with opened(tmp_path / "s") as db:
        db.set_size_cap("1GB")
        stored = extend(db, token_list(40), name="a")
        db.put_sequence(stored.last, 40, name="b", ttl_s=1000)
    rewrite(tmp_path / "s", "meta", 9, only=key.encode())
    with KVDB.open(tmp_path / "s", "a") as db:
        assert "damaged-entry" in {problem.kind for problem in db.check()}
        assert_reads_back(db, token_list(40), db.match(identity(), token_list(40)).spans)
    assert repair(tmp_path / "s", apply=True).remaining == []
    with opened(tmp_path / "s", "r") as db:
        assert {s.name for s in db.sequences()} == {"a", "b"}


def test_an_entry_moved_to_another_key_is_damage(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, token_list(40))
        extend(db, token_list(40, seed=1))
    env = lmdb.open(str(tmp_path / "s" / "catalog"), max_dbs=len(TABLES))
    with env.begin(write=True, db=env.open_db(b"segments")) as txn:
        (a, first), (b, second) = list(txn.cursor())
        txn.put(a, second)
        txn.put(b, first)
    env.close()
    unlike = pytest.raises(Damaged, match=f"entry {a.hex()}: xxh3 is")
    with KVDB.open(tmp_path / "s", "r") as db, db.catalog.begin() as view, unlike:
        view.segments()


def delete_and_fail(db: KVDB, key: str) -> None:
    with db.catalog.begin(write=True) as txn:
        txn.remove_sequence(txn.sequence(key))
        raise ZeroDivisionError


def test_a_listing_that_misses_an_entry_is_damage(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, token_list(40))
        extend(db, token_list(40, seed=1))
    env = lmdb.open(str(tmp_path / "s" / "catalog"), max_dbs=len(TABLES))
    with env.begin(write=True) as txn, txn.cursor(db=env.open_db(b"sequences", txn=txn)) as cursor:
        assert cursor.first()
        cursor.delete()
    env.close()
    with KVDB.open(tmp_path / "s", "r") as db, pytest.raises(Damaged, match=r"1 entries, root .*expected 2"):
        db.sequences()


def test_what_a_failing_transaction_wrote_is_gone(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        stored = extend(db, token_list(40))
        with pytest.raises(ZeroDivisionError):
            delete_and_fail(db, stored.key)
        assert [s.key for s in db.sequences()] == [stored.key]


def test_two_handles_in_one_process_see_the_same_store(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as one, opened(tmp_path / "s") as two, opened(tmp_path / "s", "r") as three:
        key = extend(one, token_list(40)).key
        assert [s.key for s in two.sequences()] == [s.key for s in three.sequences()] == [key]


def test_a_writing_handle_cannot_join_a_reading_one(tmp_path: Path) -> None:
    with opened(tmp_path / "s"):
        pass
    with opened(tmp_path / "s", "r"), pytest.raises(StoreError, match="read-only in this process"):
        KVDB.open(tmp_path / "s", "r+")
    with opened(tmp_path / "s", "r+"):
        pass


def test_a_closed_catalog_says_so(tmp_path: Path) -> None:
    db = KVDB.open(tmp_path / "s")
    db.close()
    db.close()
    with pytest.raises(StoreError, match="closed"):
        db.sequences()


def test_a_forked_handle_opens_the_catalog_anew_and_both_go_on(tmp_path: Path) -> None:
    code = """
import os, sys
from helpers import KVDB, extend, token_list
with KVDB.open(sys.argv[1]) as db:
    extend(db, token_list(40))
    child = os.fork()
    if child == 0:
        extend(db, token_list(40, 1))
        os._exit(len(db.sequences()))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    extend(db, token_list(40, 2))
    print(len(db.sequences()))
"""
    assert finish(python(code, str(tmp_path / "s"))).split() == ["2", "3"]


def test_the_catalog_is_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with opened(tmp_path / "s"):
            pass
    finally:
        os.umask(before)
    for path in (tmp_path / "s").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_catalog_is_a_typed_error(tmp_path: Path) -> None:
    with opened(tmp_path / "s"):
        pass
    (tmp_path / "s" / "catalog" / "data.mdb").write_bytes(b"not lmdb" * 4096)
    with pytest.raises((Damaged, StoreError), match="catalog"):
        Catalog(tmp_path / "s" / "catalog", readonly=True)


def test_a_name_moves_to_its_newest_sequence(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        first = extend(db, token_list(40), name="n").key
        second = extend(db, token_list(40, seed=1), name="n").key
        assert db.sequence("n").key == second
        assert {s.name: s.tokens for s in db.sequences()} == {None: 40, "n": 40}
        with pytest.raises(SequenceNotFound):
            db.sequence(first)  # it goes on without its name, under another key
        assert db.match(identity(), token_list(40)).tokens == 40


def test_one_token_list_may_have_several_names(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        for name in ("old", "new"):
            extend(db, token_list(40), name=name)
        assert db.sequence("old").spans == db.sequence("new").spans
        assert db.info()["segments"] == 1
        db.delete("old")
        assert db.sequence("new").tokens == db.match(identity(), token_list(40)).tokens == 40


def test_a_key_is_found_by_its_beginning_when_that_is_unique(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        key = extend(db, token_list(40)).key
        assert db.sequence(key[:4]).key == key
        with pytest.raises(SequenceNotFound):
            db.sequence(key[:3])


def test_spans_end_where_the_tokens_end(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        stored = extend(db, token_list(100), segment_tokens=48)
        with db.catalog.begin() as txn:
            path = txn.path(stored.last.info.segment)
        assert [info.start for info in path] == [0, 48, 96]
        for tokens in range(101):
            spans = spans_of(path, tokens)
            assert sum(s.stop - s.start for s in spans) == tokens
            assert len(spans) == -(-tokens // 48)


def test_a_segment_whose_parent_is_gone_is_not_published(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        tokens = token_list(40)
        first = extend(db, tokens[:32])
        writer = write_segment(db, tokens, start=32, parent=first.last.info.segment)
        db.delete(first.key)
        with pytest.raises(PrefixDeleted, match="deleted or evicted"):
            db.commit(writer, tokens[32:])
        assert db.match(identity(), tokens).tokens == 0
    with opened(tmp_path / "s") as db:
        assert db.info()["segments"] == 0
