"""Other abstracts for stored segments: exactly those that were asked for, made of the stored keys, beside KV that stays put."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers import (
    TWO_GROUPS,
    assert_abstracts_follow,
    assert_healthy,
    assert_reads_back,
    extend,
    flip,
    identity,
    opened,
    token_list,
    tree_bytes,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries

from kvdb import KVDB, Geometry, compact, files, summarise
from kvdb import repair as repairing
from kvdb.abstracts import ABSTRACTS
from kvdb.errors import Damaged, InvalidInput, ReadOnly, SequenceNotFound, StorageFull, StoreError
from kvdb.repair import repair
from kvdb.segments import Segment

TOKENS = token_list(200)
FORK = np.concatenate((TOKENS[:100], token_list(40, 9)))
SHARD = "c.0.0.0.0.0"
CHOICES = [(), ("box",), ("sketch",), ("box", "sketch")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def stored(db: KVDB, *, name: str | None = "n", abstracts: tuple[str, ...] = ("box",)) -> str:
    """A sequence in four segments of two groups, with slots to spare; returns its key."""
    return extend(db, TOKENS, name=name, geometry=TWO_GROUPS, segment_tokens=64, spare=2, abstracts=abstracts).key


def segments(db: KVDB, name: str = "n") -> list[Segment]:
    return db.segments(db.sequence(name).spans)


def abstracts(db: KVDB, name: str = "n") -> set[tuple[str, ...]]:
    return {segment.info.abstracts for segment in segments(db, name)}


def kv_files(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a KV array: its inode, its bytes."""
    return {str(p): (p.stat().st_ino, p.read_bytes()) for p in (path / "chunks").glob("*.kv*/*")}


def arrays(path: Path) -> set[str]:
    """Kinds of arrays in chunks/."""
    return {p.name.partition(".")[2].rstrip("0123456789") for p in (path / "chunks").iterdir() if p.is_dir()}


# -- what is asked for is there


@pytest.mark.parametrize(("before", "after"), list(product(CHOICES, CHOICES)))
def test_every_segment_has_exactly_the_abstracts_asked_for_and_kv_stays_where_it_is(
    path: Path, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    with KVDB.open(path, grace_s=0) as db:
        stored(db, abstracts=before)
        kv, written = kv_files(path), db.info()["bytes_written"]
        assert db.set_abstracts("n", after[::-1]) == (0 if before == after else 4)
        assert abstracts(db) == {after}
        assert arrays(path) == {"kv", *after}
        assert kv_files(path) == kv
        info = db.info()
        assert info["disk_bytes"] == sum(files.tree_bytes(p) for p in (path / "chunks").iterdir() if p.is_dir())
        assert (info["bytes_written"] > written) == (not set(after) <= set(before))
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        assert_healthy(db)
        again = info["bytes_written"]
        assert db.set_abstracts("n", after) == 0
        assert db.info()["bytes_written"] == again
        assert sorted(os.listdir(path / "tmp")) == [db.own_workspace().name]
        assert os.listdir(db.own_workspace()) == ["lock"]


@given(geometries(chunk_tokens=None, max_layers=3), st.data())
def test_abstracts_made_block_by_block_are_those_of_all_keys_at_once(
    tmp_path_factory: pytest.TempPathFactory, geometry: Geometry, data: st.DataObject
) -> None:
    count, spare = data.draw(st.integers(1, 4 * geometry.chunk_tokens)), data.draw(st.integers(0, 2))
    tokens = token_list(count)
    with opened(tmp_path_factory.mktemp("blocks") / "s") as db, pytest.MonkeyPatch.context() as patch:
        patch.setattr(summarise, "_BLOCK_BYTES", data.draw(st.sampled_from([1, 5_000, 1 << 20])))
        extend(db, tokens, name="n", geometry=geometry, spare=spare)
        assert db.set_abstracts("n", ABSTRACTS) == 1
        assert abstracts(db) == {tuple(sorted(ABSTRACTS))}
        assert_reads_back(db, tokens, db.sequence("n").spans)


def test_what_sequences_share_changes_for_all_of_them_and_no_more_than_that(path: Path) -> None:
    with opened(path) as db:
        stored(db)
        extend(db, FORK, name="fork", geometry=TWO_GROUPS)
        extend(db, token_list(30, 3), name="other", geometry=TWO_GROUPS)
        pinned = extend(db, TOKENS[:150], geometry=TWO_GROUPS).key
        db.pin(pinned)
        before = {s.key: s.root for s in db.sequences()}
        assert db.set_abstracts("n", ["sketch"]) == 4
        assert [s.info.abstracts for s in segments(db, "fork")] == [("sketch",), ("sketch",), ("box",)]
        assert abstracts(db, "other") == {("box",)}
        changed = {s.key for s in db.sequences() if s.root != before[s.key]}
        assert changed == before.keys() - {db.sequence("other").key}
        assert db.sequence(pinned).pinned
        assert db.set_abstracts(None, ("box", "sketch")) == 6
        for name, tokens in (("n", TOKENS), ("fork", FORK), (pinned, TOKENS[:150])):
            assert abstracts(db, name) == {("box", "sketch")}
            assert_reads_back(db, tokens, db.sequence(name).spans)


def test_what_is_stored_later_begins_with_abstracts_of_its_own(path: Path) -> None:
    longer = np.concatenate((TOKENS, token_list(20, 5)))
    with opened(path) as db:
        stored(db)
        db.set_abstracts("n", ())
        extend(db, longer, name="n", geometry=TWO_GROUPS)
        assert [s.info.abstracts for s in segments(db)] == [(), (), (), ("box",)]
        assert db.set_abstracts("n", ("box",)) == 3
        assert_reads_back(db, longer, db.sequence("n").spans)


# -- damage


def shorten(folder: Path) -> None:
    os.truncate(folder / SHARD, 5)


def unread(folder: Path) -> None:
    (folder / "zarr.json").write_text("{")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda folder: flip(folder / SHARD, 9),
    "a short file": shorten,
    "no file": lambda folder: (folder / SHARD).unlink(),
    "metadata that is none": unread,
    "no array": shutil.rmtree,
    "a link": lambda folder: ((folder / SHARD).unlink(), (folder / SHARD).symlink_to("/dev/zero"))[0],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("wanted", [("box",), ("box", "sketch"), ("sketch",), ()])
def test_a_damaged_abstract_is_made_anew_or_goes(path: Path, damage: str, wanted: tuple[str, ...]) -> None:
    with KVDB.open(path) as db:
        stored(db)
        before = segments(db)[1]
        DAMAGE[damage](path / "chunks" / f"{before.info.segment}.box1")
        assert db.check()
        assert db.set_abstracts("n", wanted) == (1 if wanted == ("box",) else 4)
        assert_healthy(db)
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        if "box" in wanted:
            assert before.seals is not None
            assert before.seals.items() <= (segments(db)[1].seals or {}).items()  # they are what they were


def test_a_reader_that_saw_the_damage_reads_what_was_made_anew(path: Path) -> None:
    with opened(path) as db:
        stored(db)
        before = segments(db)[1]
        DAMAGE["a flipped bit"](path / "chunks" / f"{before.info.segment}.box0")
        reader = db.reader()
        with pytest.raises(Damaged):
            reader.abstract(before, "box", 0)
        assert db.set_abstracts("n", ("box",)) == 1
        assert np.isfinite(reader.abstract(segments(db)[1], "box", 0)).all()
        reader.close()


def test_a_lost_abstract_of_a_segment_that_waits_for_the_disk_is_made_anew(path: Path) -> None:
    with KVDB.open(path, durability="relaxed") as relaxed, KVDB.open(path) as db:
        stored(relaxed)
        shutil.rmtree(path / "chunks" / f"{segments(db)[1].info.segment}.box1")
        assert db.set_abstracts("n", ("box",)) == 1
        assert_healthy(db)


def test_one_damaged_sequence_keeps_no_other_from_its_abstracts(path: Path) -> None:
    with KVDB.open(path) as db:
        stored(db)
        for i in range(3):
            extend(db, token_list(40, 20 + i), name=f"other {i}")
        shard = path / "chunks" / f"{segments(db, 'other 1')[0].info.segment}.kv0" / SHARD
        flip(shard, 3)
        with pytest.raises(Damaged, match="kvdb repair"):
            db.set_abstracts(None, ("sketch",))
        assert abstracts(db, "other 1") == {("box",)}
        assert [abstracts(db, name) for name in ("n", "other 0", "other 2")] == [{("sketch",)}] * 3


def test_a_sequence_whose_root_is_wrong_is_not_made_right(path: Path) -> None:
    with KVDB.open(path) as db:
        key = stored(db)
        with db.write_transaction() as txn:
            wrong = msgspec.structs.replace(txn.sequence("n"), root="0" * 16)
            txn._put("sequences", bytes.fromhex(key), wrong)
        with pytest.raises(Damaged, match=r"sequence 'n': root .* run 'kvdb repair'"):
            db.set_abstracts("n", ("sketch",))
        assert {s.info.abstracts for s in db.segments(wrong.spans)} == {("box",)}


def test_descriptors_are_closed_when_a_file_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as db:
        stored(db, abstracts=())
        before = len(os.listdir("/proc/self/fd"))
        real = files.open_excl

        def full(target: Path) -> int:
            if "sketch1" in str(target):
                raise OSError(errno.EIO, "Input/output error")
            return real(target)

        with monkeypatch.context() as m:
            m.setattr(files, "open_excl", full)
            with pytest.raises(OSError, match="Input/output"):
                db.set_abstracts("n", ("box", "sketch"))
        assert len(os.listdir("/proc/self/fd")) == before


def test_damaged_keys_are_no_source(path: Path) -> None:
    with KVDB.open(path) as db:
        stored(db)
        shard = path / "chunks" / f"{segments(db)[2].info.segment}.kv0" / SHARD
        flip(shard, 3)
        before = tree_bytes(path / "chunks")
        with pytest.raises(Damaged, match=r"layer 0, chunk 0, head 0.*run 'kvdb repair'"):
            db.set_abstracts("n", ("box", "sketch"))
        assert tree_bytes(path / "chunks") == before
        assert os.listdir(db.own_workspace()) == ["lock"]
        assert abstracts(db) == {("box",)}
        flip(shard, 3)
        assert_healthy(db)


def test_what_a_drop_could_not_move_is_no_hindrance(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as db:
        stored(db)
        with monkeypatch.context() as m:
            m.setattr("kvdb.space.Space.dispose", lambda self, arrays: None)
            db.set_abstracts("n", ())
        assert {p.kind for p in db.check()} == {"orphan"}
        assert db.set_abstracts("n", ("box",)) == 4


# -- refusals


def test_what_cannot_be_is_refused_and_nothing_changes(path: Path) -> None:
    with opened(path) as db:
        stored(db)
        with pytest.raises(
            InvalidInput, match=r"abstracts: \['bag'\], expected some of \['box', 'centroid', 'mean', 'sketch'\]"
        ):
            db.set_abstracts("n", ("box", "bag"))
        with pytest.raises(SequenceNotFound):
            db.set_abstracts("other", ("box",))
        assert abstracts(db) == {("box",)}
    with opened(path, "r") as db, pytest.raises(ReadOnly):
        db.set_abstracts("n", ("sketch",))


@pytest.mark.parametrize("short_of", ["cap", "disk"])
def test_without_room_nothing_changes_and_dropping_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, short_of: str
) -> None:
    with opened(path) as db:
        stored(db)
        db.gc()
        kv = tree_bytes(path / "chunks")
        if short_of == "cap":
            db.set_size_cap(db.info()["used_bytes"] + (300 << 10))
        else:
            monkeypatch.setattr("kvdb.files.free_bytes", lambda path: 0)
        with pytest.raises(StorageFull, match="bytes short"):
            db.set_abstracts("n", ("sketch",))
        assert (abstracts(db), tree_bytes(path / "chunks")) == ({("box",)}, kv)
        assert os.listdir(db.own_workspace()) == ["lock"]
        assert db.set_abstracts("n", ()) == 4
        assert arrays(path) == {"kv"}


def test_room_is_made_by_evicting_but_never_what_is_changed(path: Path) -> None:
    with opened(path) as db:
        key = stored(db, name=None)
        for seed in range(3, 20):
            extend(db, token_list(64, seed), geometry=TWO_GROUPS)
        db.gc()
        db.set_size_cap(db.info()["used_bytes"])
        assert db.set_abstracts(key, ("box", "sketch")) == 4
        info = db.info()
        assert info["segments_evicted"] > 0
        assert info["used_bytes"] <= info["size_cap"]
        assert_reads_back(db, TOKENS, db.sequence(key).spans)


# -- interruptions


class Died(BaseException):
    pass


def die(*_: object, **__: object) -> None:
    raise Died


BEFORE = {
    "making": "kvdb.summarise._fill",
    "sealing": "kvdb.arrays.AbstractWriter.seal",
    "forcing to disk": "kvdb.files.fsync_trees",
    "the change of entries": "kvdb.transaction.Transaction.change_abstracts",
    "moving": "kvdb.files.rename",
    "after moving": "kvdb.files.fsync_dir",
    "the commit": "kvdb.transaction.Transaction.finish_writing",
}
AFTER = {"moving to the trash": "kvdb.space.Space.dispose", "keeping the cap": "kvdb.space.Space.enforce"}


@pytest.mark.parametrize("where", [*BEFORE, *AFTER])
@pytest.mark.parametrize("killed", [True, False])
def test_what_is_cut_short_has_happened_or_not(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str, killed: bool
) -> None:
    with opened(path) as db:
        stored(db)
    db = KVDB.open(path)
    with monkeypatch.context() as m:
        target = (BEFORE | AFTER)[where]
        if where == "moving to the trash":  # the second time: the first clears the way for what is moved in
            calls = iter([lambda *_: None, die])
            m.setattr(target, lambda *_: next(calls)())
        else:
            m.setattr(target, die)
        if killed:  # nobody tidies up
            m.setattr("kvdb.summarise._take_back", die)
            m.setattr("kvdb.files.remove_tree", die)
        with pytest.raises(Died):
            db.set_abstracts("n", ("sketch",))
    if killed:
        assert db._workspace_lock is not None
        os.close(db._workspace_lock)
        db._workspace = db._workspace_lock = None
    elif where != "moving to the trash":
        assert_healthy(db)
    db.close()
    with opened(path) as db:
        assert abstracts(db) == {("box",) if where in BEFORE else ("sketch",)}
        assert arrays(path) == {"kv", "box" if where in BEFORE else "sketch"}
        assert os.listdir(path / "tmp") == []
        assert_healthy(db)
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        assert db.set_abstracts("n", ("sketch",)) == (4 if where in BEFORE else 0)


# -- others at the same time


def meddling(monkeypatch: pytest.MonkeyPatch, meddle: Callable[[], object]) -> None:
    """While abstracts are made, once, after the keys of a segment were read, do something to the store."""
    real, left = summarise._fill, [meddle]

    def fill(*arguments: Any) -> None:
        real(*arguments)
        if left:
            left.pop()()

    monkeypatch.setattr(summarise, "_fill", fill)


@pytest.fixture
def other(path: Path) -> Iterator[KVDB]:
    with KVDB.open(path) as db:
        stored(db)
    with KVDB.open(path, grace_s=0) as db:
        yield db
        assert_healthy(db)


def test_segments_that_are_merged_meanwhile_are_changed_where_they_are_now(
    path: Path, other: KVDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(path) as db:
        meddling(monkeypatch, lambda: other.compact("n"))
        assert db.set_abstracts(db.sequence("n").key, ("sketch",)) == len(segments(db)) < 4
        assert abstracts(db) == {("sketch",)}
        assert_reads_back(db, TOKENS, db.sequence("n").spans)


def test_segments_that_are_deleted_meanwhile_stay_so(path: Path, other: KVDB, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as db:
        meddling(monkeypatch, lambda: other.delete("n"))
        assert db.set_abstracts("n", ("sketch",)) == 0
        assert (db.sequences(), arrays(path)) == ([], set())


@pytest.mark.parametrize("wanted", [(), ("box",), ("sketch",), ("box", "sketch")])
def test_of_two_who_change_the_same_abstracts_the_last_one_decides(
    path: Path, other: KVDB, monkeypatch: pytest.MonkeyPatch, wanted: tuple[str, ...]
) -> None:
    with opened(path) as db:
        meddling(monkeypatch, lambda: other.set_abstracts("n", wanted))
        assert db.set_abstracts("n", ("sketch",)) == (0 if wanted == ("sketch",) else 4)
        assert abstracts(db) == {("sketch",)}
        assert_reads_back(db, TOKENS, db.sequence("n").spans)


def test_a_writer_goes_on_while_abstracts_are_made(path: Path, other: KVDB, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = np.concatenate((TOKENS, token_list(30, 8)))
    with opened(path) as db, KVDB.open(path, lock_timeout_s=0) as writer:
        meddling(monkeypatch, lambda: extend(writer, longer, name="longer", geometry=TWO_GROUPS))
        assert db.set_abstracts("n", ("sketch",)) == 4
        assert [s.info.abstracts for s in segments(db, "longer")] == [("sketch",)] * 3 + [("box",)]
        assert_reads_back(db, longer, db.sequence("longer").spans)


def test_a_compaction_at_that_moment_leaves_segments_alone_that_are_of_different_kinds_now(
    path: Path, other: KVDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compact.plan

    def plan(*arguments: Any) -> list[str]:
        other.put_sequence(segments(other)[1], 100, name="begin")
        other.set_abstracts("begin", wanted)
        return real(*arguments)

    monkeypatch.setattr(compact, "plan", plan)
    with opened(path) as db:
        for wanted in (("box", "sketch"), ()):
            assert db.compact("n") == 0
            assert [s.info.abstracts for s in segments(db)] == [wanted, wanted, ("box",), ("box",)]
        assert_reads_back(db, TOKENS, db.sequence("n").spans)


def test_a_check_at_that_moment_looks_again(path: Path, other: KVDB, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdb import check

    real, left = check.check_files, [lambda: other.set_abstracts("n", ("sketch",))]

    def check_files(*arguments: Any) -> Any:
        if left:
            left.pop()()
        return real(*arguments)

    monkeypatch.setattr(check, "check_files", check_files)
    with KVDB.open(path) as db:
        assert db.check() == []
        assert left == []


def test_a_repair_leaves_alone_what_was_made_anew_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVDB.open(path) as db:
        stored(db)
        DAMAGE["a flipped bit"](path / "chunks" / f"{segments(db)[1].info.segment}.box0")
        real = repairing._mend

        def late(*arguments: Any) -> None:
            assert db.set_abstracts("n", ("box",)) == 1
            real(*arguments)

        monkeypatch.setattr(repairing, "_mend", late)
        assert repair(path, apply=True).remaining == []
        assert abstracts(db) == {("box",)}
        assert_reads_back(db, TOKENS, db.sequence("n").spans)


def test_an_export_at_that_moment_looks_again(path: Path, other: KVDB, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdb import portable

    real, left = portable._put, [lambda: other.set_abstracts("n", ("sketch",))]

    def put(*arguments: Any) -> None:
        if left:
            left.pop()()
        real(*arguments)

    monkeypatch.setattr(portable, "_put", put)
    with opened(path) as db, opened(path.with_name("b")) as target:
        db.export_sequence("n", path.with_name("n.zip"))
        target.import_sequence(path.with_name("n.zip"))
        assert abstracts(target) == {("sketch",)}
        assert_reads_back(target, TOKENS, target.sequence("n").spans)


# -- readers


def test_who_has_it_open_reads_on_and_who_comes_late_finds_it_for_a_while(path: Path) -> None:
    with KVDB.open(path, grace_s=3600) as db:
        stored(db)
        early, late, found = db.reader(), db.reader(), segments(db)
        for segment in found:
            early.open(segment)
        db.set_abstracts("n", ("sketch",))
        for reader in (early, late):
            for segment in found:
                assert_abstracts_follow(reader, segment)
        assert not db.agrees(found)
        assert db.agrees(segments(db))
        late.close()
        late = db.reader()
        db.gc()
        with pytest.raises(Damaged, match="box"):
            assert_abstracts_follow(late, found[0])
        for segment in found:
            assert_abstracts_follow(early, segment)
        db.set_abstracts("n", ("box",))
        assert_abstracts_follow(late, found[0])
        assert [s.seals for s in segments(db)] == [s.seals for s in found]
        assert not db.agrees(found)
        early.close()
        late.close()
        assert_healthy(db)


# -- without a catalog, and elsewhere


@pytest.mark.parametrize("wanted", CHOICES)
def test_a_catalog_made_anew_tells_the_abstracts_that_are_there(path: Path, wanted: tuple[str, ...]) -> None:
    with opened(path) as db:
        stored(db)
        db.set_abstracts("n", wanted)
        before = [(s.info, s.seals) for s in segments(db)]
    (path / "catalog" / "data.mdb").unlink()
    assert repair(path, apply=True).remaining == []
    with opened(path) as db:
        assert [(s.info, s.seals) for s in segments(db)] == before
        assert_reads_back(db, TOKENS, db.sequence("n").spans)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_catalog_made_anew_does_without_an_abstract_that_is_not_whole(path: Path, damage: str) -> None:
    with opened(path) as db:
        stored(db, abstracts=("box", "sketch"))
        hit = segments(db)[1].info.segment
    DAMAGE[damage](path / "chunks" / f"{hit}.box1")
    report = repair(path, apply=True, rebuild=True)
    assert (report.remaining, [a for a in report.actions if a.startswith("quarantine")]) == ([], [])
    aside = {p.name for p in (path / "quarantine").iterdir()} - {"catalog"}
    assert aside == {f"{hit}.box0"} | (set() if damage == "no array" else {f"{hit}.box1"})
    with opened(path) as db:
        assert [s.info.abstracts for s in segments(db)] == [("box", "sketch"), ("sketch",)] + [("box", "sketch")] * 2
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        assert db.set_abstracts("n", ("box",)) == 4


def test_an_export_is_the_same_kv_whatever_abstracts_either_side_has(path: Path) -> None:
    old, new = path.with_name("old.zip"), path.with_name("new.zip")
    with opened(path) as db:
        stored(db)
        db.export_sequence("n", old)
        db.set_abstracts("n", ("sketch",))
        db.export_sequence("n", new)
        assert db.import_sequence(old) == db.import_sequence(new) == db.sequence("n").key
        assert abstracts(db) == {("sketch",)}
        db.delete("n")
        db.import_sequence(old)
        assert abstracts(db) == {("box",)}
        assert_reads_back(db, TOKENS, db.match(identity(), TOKENS).spans)


@pytest.mark.parametrize("durability", ["commit", "relaxed"])
def test_a_relaxed_store_forces_what_makes_files_go(
    path: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    synced: list[str] = []
    with KVDB.open(path, durability=durability) as db:
        stored(db)
        monkeypatch.setattr("kvdb.environment.Environment.sync", lambda env: synced.append("catalog"))
        db.set_abstracts("n", ("box", "sketch"))
        assert synced == []
        db.set_abstracts("n", ("sketch",))
        assert synced == (["catalog"] if durability == "relaxed" else [])
        monkeypatch.undo()
        assert_healthy(db)


def test_a_closed_store_says_so(path: Path) -> None:
    with opened(path) as db:
        stored(db)
    with pytest.raises(StoreError, match="closed"):
        db.set_abstracts("n", ())
