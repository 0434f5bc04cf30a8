"""Room: the cap and the floor hold, what goes goes in order, what is protected stays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    Array,
    assert_healthy,
    assert_reads_back,
    extend,
    flip,
    identity,
    opened,
    token_list,
    write_segment,
)

from kvdb import KVDB
from kvdb.errors import InvalidInput, SequenceNotFound, StorageFull
from kvdb.files import Moment
from kvdb.repair import repair

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets store time go on."""
    clock = [1000.0]
    monkeypatch.setattr("kvdb.files.moment", lambda: Moment(clock[0], "boot", clock[0]))

    def wait(seconds: float) -> None:
        clock[0] += seconds

    return wait


def occupied(path: Path) -> int:
    """What the folder takes, as `du` says it: the oracle of the cap."""
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in (".", *names))
    return sum(os.lstat(each).st_blocks * 512 for each in found)


def fill(db: KVDB, count: int, first: int = 0) -> list[str]:
    return [extend(db, token_list(40, seed)).key for seed in range(first, first + count)]


def keys(db: KVDB) -> set[str]:
    return {s.key for s in db.sequences()}


# -- the cap


@pytest.mark.parametrize("seed", range(4))
def test_the_folder_stays_under_the_cap_after_every_operation(path: Path, seed: int) -> None:
    rng, cap = np.random.default_rng(seed), 1400 * KIB
    writers, files = [], iter(range(1000))
    db = KVDB.open(path, size_cap=cap, min_free=0, grace_s=3600)
    exported = path.parent / "one.zip"
    db.export_sequence(extend(db, token_list(500, 99), name="kept").key, exported)
    for _ in range(80):
        with contextlib.suppress(StorageFull):  # writers in flight may hold all the room there is
            match rng.integers(10):
                case 0 | 1 | 2 | 3:
                    extend(
                        db,
                        token_list(int(rng.integers(1, 600)), next(files)),
                        segment_tokens=int(rng.integers(2, 30)) * 16,
                    )
                case 4:
                    shared = token_list(500, 99)[: int(rng.integers(1, 500))]
                    extend(db, np.concatenate((shared, token_list(20, next(files)))))
                case 5:
                    unnamed = [s for s in db.sequences() if s.name is None]
                    for s in unnamed[:2]:
                        db.delete(s.key)
                case 6:
                    writers.append(write_segment(db, token_list(100, next(files))))
                case 7:
                    while writers:
                        writers.pop().discard()
                case 8:
                    db.compact()
                case 9:
                    db.import_sequence(exported, name="kept")
                    db.close()
                    writers.clear()
                    db = KVDB.open(path, min_free=0, grace_s=3600)
        assert occupied(path) <= cap
        assert db.info()["used_bytes"] <= cap
    assert db.info()["segments_evicted"] > 0
    assert_reads_back(db, token_list(500, 99), db.sequence("kept").spans)
    assert_healthy(db)
    db.close()


def test_used_bytes_is_what_the_folder_takes(path: Path) -> None:
    with opened(path, "a") as db:
        extend(db, token_list(300), name="n", segment_tokens=64)
        db.delete(extend(db, token_list(40, 1)).key)  # in the trash now
        assert db.info()["used_bytes"] == occupied(path)
        writer = write_segment(db, token_list(40, 2), spare=100)
        assert db.info()["used_bytes"] > occupied(path)  # what is promised to the writer counts already
        writer.discard()


def test_quarantine_counts_until_somebody_empties_it(path: Path) -> None:
    with opened(path) as db:
        segment = extend(db, token_list(2000)).last.info.segment
    flip(path / "chunks" / f"{segment}.kv0" / "c.0.0.0.0.0", 0)
    repair(path, apply=True)
    with opened(path) as db:
        assert db.info()["disk_bytes"] == 0
        assert db.info()["used_bytes"] == occupied(path) > 2000 * 100


def test_the_cap_is_the_stores_and_holds_for_every_handle(path: Path) -> None:
    with opened(path) as db, opened(path) as other:
        fill(db, 40)
        db.set_size_cap(1000 * KIB)
        assert occupied(path) <= 1000 * KIB
        before = keys(db)
        fill(other, 40, 100)
        assert occupied(path) <= 1000 * KIB
        assert not before & keys(db)
    with opened(path) as db:
        assert db.info()["size_cap"] == 1000 * KIB
        db.set_size_cap("unlimited")
        fill(db, 60, 200)
        assert len(keys(db)) > 60


def test_opening_keeps_a_cap_that_was_broken_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path, "a") as db:
        fill(db, 40)
        with monkeypatch.context() as m:
            m.setattr("kvdb.space.Space.enforce", lambda self, keep=None: None)
            db.set_size_cap(1000 * KIB)
    assert occupied(path) > 1000 * KIB
    with opened(path):
        assert occupied(path) <= 1000 * KIB


@pytest.mark.parametrize("bug", ["used_bytes", "evict"])
def test_the_judge_of_the_cap_can_fail(path: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    if bug == "used_bytes":
        monkeypatch.setattr("kvdb.space.Space.used_bytes", lambda self: 0)
    else:
        monkeypatch.setattr("kvdb.space.Space.enforce", lambda self, keep=None: None)
        monkeypatch.setattr("kvdb.space.Space.make_room", lambda self, need, keep=None: None)
    with opened(path) as db:
        db.set_size_cap(1000 * KIB)
        fill(db, 40)
        assert occupied(path) > 1000 * KIB


def test_what_does_not_fit_is_refused_with_figures_and_costs_nothing_protected(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(500), name="kept")
        db.set_size_cap(900 * KIB)
        with pytest.raises(StorageFull) as caught:
            write_segment(db, token_list(4000, 1))
        for part in (
            str(path),
            f"size_cap {900 * KIB}",
            "bytes used",
            "wanted",
            "short",
            "delete sequences or raise the cap",
        ):
            assert part in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert os.listdir(db.own_workspace()) == ["lock"]
        assert_reads_back(db, token_list(500), db.sequence("kept").spans)
        extend(db, token_list(40, 1))  # what does fit is taken


# -- the floor


def test_a_floor_of_free_space_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, floor = 4 * MIB, 3 * MIB
    monkeypatch.setattr("kvdb.files.free_bytes", lambda _: disk - occupied(path))
    with KVDB.open(path, min_free=floor) as db:
        extend(db, token_list(300, 1), name="kept")
        for seed in range(2, 40):
            extend(db, token_list(300, seed))
            assert disk - occupied(path) >= floor
        assert_reads_back(db, token_list(300, 1), db.sequence("kept").spans)
        assert_healthy(db)


def test_eviction_works_on_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as db:
        fill(db, 5)
        monkeypatch.setattr("kvdb.files.free_bytes", lambda _: 0)
        assert len(db.evict(0)) == 5
        assert not (path / "catalog" / "ballast").exists()  # given up, so that LMDB had pages
        with pytest.raises(StorageFull):
            fill(db, 1)
        monkeypatch.undo()
        fill(db, 1)
        db.evict(0)
        assert (path / "catalog" / "ballast").exists()


def test_what_a_full_disk_took_from_the_catalog_comes_back_under_the_cap(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ballast comes back with a deletion, here of abstracts, and what these belong to may not go to make room for it."""
    with opened(path) as db:
        with monkeypatch.context() as patch:
            patch.setattr("kvdb.files.free_bytes", lambda path: 0)
            db.gc()
        assert not (path / "catalog" / "ballast").exists()
        key = extend(db, token_list(40)).key
        db.set_size_cap(cap := db.info()["used_bytes"] + 16 * KIB)
        assert keys(db) == {key}
        db.set_abstracts(key, ())
        assert (path / "catalog" / "ballast").exists()
        assert occupied(path) <= cap


# -- the order


@pytest.mark.parametrize("seed", range(3))
def test_the_least_recently_used_goes_first(path: Path, seed: int) -> None:
    with opened(path) as db:
        order = fill(db, 8)
        for key in np.random.default_rng(seed).choice(order, 12).tolist():
            db.touch(db.sequence(key).spans)
            order.append(order.pop(order.index(key)))
        each = db.info()["disk_bytes"] // 8
        gone = []
        while keys(db):
            gone += [s.key for s in db.evict(db.info()["disk_bytes"] - each // 2)]
        assert gone == order


def test_a_handle_counts_its_own_uses_before_it_lets_anything_go(path: Path) -> None:
    with opened(path) as db, opened(path) as other:
        first, second = fill(db, 2)
        other.touch(other.sequence(first).spans)
        assert [s.key for s in other.evict(other.info()["disk_bytes"] - 1)] == [second]
        assert keys(db) == {first}


def test_no_more_goes_than_was_asked_for(path: Path) -> None:
    with opened(path) as db:
        fill(db, 6)
        total, each = db.info()["disk_bytes"], db.info()["disk_bytes"] // 6
        assert db.evict(total) == []
        assert len(db.evict(total - 1)) == 1
        assert len(db.evict(total - each - 1)) == 1


def test_a_parent_goes_only_after_its_children(path: Path) -> None:
    trunk = token_list(96)
    branches = [np.concatenate((trunk, token_list(32, seed))) for seed in (1, 2, 3)]
    with opened(path) as db:
        for tokens in branches:
            extend(db, tokens, segment_tokens=32)
        db.touch(db.match(identity(), branches[0]).spans[-1:])
        while db.info()["segments"]:
            db.evict(db.info()["disk_bytes"] - 1)
            assert_healthy(db)  # a child without its parent would be a problem
            left = [db.match(identity(), tokens).tokens for tokens in branches]
            assert left[0] >= max(left[1:])  # the branch that was used last goes last
            for tokens, count in zip(branches, left, strict=True):
                assert_reads_back(db, tokens[:count], db.match(identity(), tokens).spans)
    assert left == [0, 0, 0]


def test_a_sequence_that_loses_its_end_goes_on_with_the_rest(path: Path) -> None:
    tokens = token_list(96)
    with opened(path) as db:
        extend(db, tokens, segment_tokens=32)
        lost = db.evict(db.info()["disk_bytes"] - 1)
        assert [s.tokens for s in lost] == [96]
        assert [s.tokens for s in db.sequences()] == [64]
        assert_reads_back(db, tokens[:64], db.sequences()[0].spans)


def test_named_sequences_go_only_when_that_is_asked_for(path: Path) -> None:
    with opened(path) as db:
        fill(db, 2)
        extend(db, token_list(40, 50), name="n")
        extend(db, token_list(40, 51), name="pinned")
        db.pin("pinned")
        assert len(db.evict(0)) == 2
        assert {s.name for s in db.sequences()} == {"n", "pinned"}
        assert [s.name for s in db.evict(0, named=True)] == ["n"]
        assert {s.name for s in db.sequences()} == {"pinned"}
        assert_reads_back(db, token_list(40, 51), db.sequence("pinned").spans)


def test_an_unnamed_sequence_can_be_pinned(path: Path) -> None:
    with opened(path) as db:
        key = fill(db, 3)[0]
        db.pin(key)
        db.set_size_cap(1)
        assert keys(db) == {key}
        with pytest.raises(InvalidInput, match="pinned"):
            db.delete(key)
        db.pin(key, False)
        assert keys(db) == set()  # nothing holds it any more, and the cap is there


def test_a_pin_moves_on_with_its_name(path: Path) -> None:
    tokens = token_list(80)
    with opened(path) as db:
        extend(db, tokens[:40], name="n")
        db.pin("n")
        extend(db, tokens, name="n")
        assert [(s.tokens, s.name, s.pinned) for s in db.sequences()] == [(40, None, False), (80, "n", True)]


@pytest.mark.parametrize("named", [False, True])
def test_what_a_cache_continues_is_never_evicted_to_make_room_for_it(path: Path, named: bool) -> None:
    tokens = token_list(900)
    with opened(path) as db:
        fill(db, 30)
        stored = extend(db, tokens[:320], segment_tokens=160, name="n" if named else None)
        extend(db, np.concatenate((tokens[:160], token_list(200, 7))))  # another branch, used later
        db.set_size_cap(db.info()["used_bytes"] + 16 * KIB)
        writer = write_segment(db, tokens, start=320, parent=stored.last.info.segment)
        assert db.holds(db.sequence(stored.key).spans)
        assert_healthy(db)  # nor does it stay without a sequence
        db.commit(writer, tokens[320:])
        assert_reads_back(db, tokens, db.match(identity(), tokens).spans)


# -- time


def brief(db: KVDB, tokens: Array) -> str:
    """Store tokens under the name n, for a minute."""
    stored = extend(db, tokens)
    return db.put_sequence(stored.last, len(tokens), name="n", replaces=stored.key, ttl_s=60)


def test_a_sequence_expires_when_its_time_has_come(path: Path, wait: Callable[[float], None]) -> None:
    with opened(path) as db:
        stays = extend(db, token_list(40))
        key = brief(db, token_list(40, 1))
        wait(59)
        assert db.evict(10**12) == []
        assert db.sequence("n").key == key
        wait(2)
        for what in ("n", key):
            with pytest.raises(SequenceNotFound, match="expired"):
                db.sequence(what)
        db.gc()
        assert keys(db) == {stays.key}
        assert db.match(identity(), token_list(40, 1)).tokens == 0


def test_a_pin_outlasts_expiry_until_it_is_taken_away(path: Path, wait: Callable[[float], None]) -> None:
    with opened(path) as db:
        brief(db, token_list(40))
        db.pin("n")
        wait(100)
        db.gc()
        assert db.sequence("n").tokens == 40
        db.pin("n", False)
        db.gc()
        assert db.sequences() == []


def test_saving_again_starts_the_time_anew_or_ends_it(path: Path, wait: Callable[[float], None]) -> None:
    with opened(path) as db:
        last = extend(db, token_list(40)).last
        db.put_sequence(last, 40, name="n", ttl_s=60)
        wait(50)
        db.put_sequence(last, 40, name="n", ttl_s=60)
        wait(50)
        assert db.sequence("n").tokens == 40
        db.put_sequence(last, 40, name="n")
        wait(1000)
        assert db.sequence("n").expires is None


def test_opening_removes_what_has_expired(path: Path, wait: Callable[[float], None]) -> None:
    with opened(path) as db:
        brief(db, token_list(40))
    wait(100)
    with opened(path) as db:
        assert db.sequences() == []
        assert os.listdir(path / "names") == []


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan")])
def test_a_time_to_live_is_above_zero(path: Path, ttl_s: float) -> None:
    with opened(path) as db:
        last = extend(db, token_list(40)).last
        with pytest.raises(InvalidInput, match="ttl_s"):
            db.put_sequence(last, 40, ttl_s=ttl_s)


# -- the trash


def test_deleted_files_wait_for_their_grace_and_gc_ends_the_wait(path: Path) -> None:
    with KVDB.open(path, grace_s=3600) as db:
        db.delete(extend(db, token_list(40)).key)
        assert len(os.listdir(path / "trash")) == 2
        fill(db, 1)
        assert len(os.listdir(path / "trash")) == 2
        assert db.gc() > 0
        assert os.listdir(path / "trash") == []
        assert_healthy(db)


def test_without_grace_nothing_waits(path: Path) -> None:
    with KVDB.open(path, grace_s=0) as db:
        db.delete(extend(db, token_list(40)).key)
        assert os.listdir(path / "trash") == []
        assert_healthy(db)


def test_trash_goes_before_anything_that_is_stored(path: Path) -> None:
    with KVDB.open(path, grace_s=3600, min_free=0) as db:
        stays, *rest = fill(db, 10)
        for key in rest:
            db.delete(key)
        db.set_size_cap(occupied(path) - 100 * KIB)
        assert keys(db) == {stays}
        assert os.listdir(path / "trash") == []
