"""Compaction: fewer segments, the same tokens and KV, and everybody who held an old one goes on."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    TWO_GROUPS,
    Array,
    assert_healthy,
    assert_reads_back,
    extend,
    flip,
    identity,
    opened,
    read_kv,
    token_list,
    write_segment,
)

from kvdb import KVDB, Geometry
from kvdb.errors import Damaged, SequenceNotFound, StorageFull


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def talk(db: KVDB, tokens: Array, turn: int, *, name: str | None = "n", geometry: Geometry | None = None) -> None:
    """Store tokens as a conversation does: one segment a turn, each turn's sequence in place of the one before."""
    key = None
    for stop in [*range(turn, len(tokens), turn), len(tokens)]:
        stored = extend(db, tokens[:stop], **({} if geometry is None else {"geometry": geometry}))
        key = db.put_sequence(stored.last, stop, replaces=key)
    if name is not None:
        db.put_sequence(stored.last, len(tokens), name=name, replaces=key)


def segments(db: KVDB) -> int:
    return int(db.info()["segments"])


@pytest.mark.parametrize("turn", [17, 16, 40])
def test_a_compacted_sequence_reads_the_same_in_one_segment(path: Path, turn: int) -> None:
    tokens = token_list(203)
    with opened(path) as db:
        talk(db, tokens, turn, geometry=TWO_GROUPS)
        before = segments(db)
        assert before == math.ceil(203 / turn)
        assert db.compact("n") == before - 1
        assert segments(db) == 1
        assert_reads_back(db, tokens, db.sequence("n").spans)
        assert_reads_back(db, tokens, db.match(identity(), tokens).spans)
        assert db.compact("n") == db.compact() == 0


def test_turns_shorter_than_a_chunk_leave_nothing_wrong_behind(path: Path) -> None:
    """Each writes the started chunk anew, so the segment before it is continued by nothing."""
    tokens = token_list(60)
    with opened(path) as db:
        talk(db, tokens, 5)
        assert_healthy(db)
        db.compact()
        db.evict(0)
        assert [s.name for s in db.sequences()] == ["n"]
        assert segments(db) == 4
        assert db.compact() == 3
        assert_reads_back(db, tokens, db.sequence("n").spans)


def test_what_is_known_of_a_sequence_outlasts_compaction(path: Path) -> None:
    with opened(path) as db:
        talk(db, token_list(100), 20)
        db.put_sequence(db.segments(db.sequence("n").spans)[-1], 100, name="n", model="m", ttl_s=1000)
        db.pin("n")
        db.touch(db.sequence("n").spans)
        db.pin("n")
        before = db.sequence("n")
        db.compact()
        after = db.sequence("n")
        for field in ("name", "identity", "tokens", "fidelity", "created", "model", "expires", "pinned", "hits"):
            assert getattr(after, field) == getattr(before, field), field
        assert after.key != before.key
        with pytest.raises(SequenceNotFound):
            db.sequence(before.key)
        assert os.listdir(path / "names") == [f"{after.key}.json"]


def test_turns_cost_logarithmically_many_segments_and_copies(path: Path) -> None:
    """A new segment is at least half as long again as any it was made of, and what stays is longer than twice all after it."""
    turns, turn = 128, 16
    tokens = token_list(turns * turn)
    copied, ids = 0, set[str]()
    with opened(path) as db:
        key = None
        for stop in range(turn, len(tokens) + 1, turn):
            stored = extend(db, tokens[:stop])
            key = db.put_sequence(stored.last, stop, replaces=key)
            ids.add(stored.last.info.segment)
            db.compact(key)
            key = db.sequences()[0].key
            for segment in db.segments(db.sequence(key).spans):
                copied += 0 if segment.info.segment in ids else segment.info.tokens
                ids.add(segment.info.segment)
            assert segments(db) <= math.log2(stop / turn) / math.log2(3) + 2
        assert copied <= len(tokens) * math.log(turns, 1.5)
        assert_reads_back(db, tokens, db.sequence(key).spans)


def test_a_cache_whose_prefix_was_compacted_goes_on(path: Path) -> None:
    tokens = token_list(160)
    with opened(path) as db, opened(path) as other:
        talk(db, tokens[:96], 32)
        parent = db.segments(db.sequence("n").spans)[-1]
        writer = write_segment(db, tokens, start=96, parent=parent.info.segment)
        assert other.compact() == 2
        assert other.compact() == 0
        committed = db.commit(writer, tokens[96:])
        assert_reads_back(db, tokens, db.sequence(committed.sequence).spans)
        assert segments(db) == 2
        late = write_segment(db, tokens[:130], start=96, parent=parent.info.segment)  # still by the old id
        assert_reads_back(db, tokens[:130], db.sequence(db.commit(late, tokens[96:130]).sequence).spans)
        assert_reads_back(db, tokens[:90], db.sequence(db.put_sequence(parent, 90)).spans)


def test_old_ids_lead_to_the_newest_segment_and_end_with_it(path: Path) -> None:
    tokens = token_list(400)
    with opened(path) as db:
        talk(db, tokens[:64], 32)
        first = db.segments(db.sequence("n").spans)[0]
        for stop in range(100, 401, 50):
            talk(db, tokens[:stop], stop)
            db.compact()
        assert segments(db) == 1
        assert_reads_back(db, tokens[:20], db.sequence(db.put_sequence(first, 20, name="begin")).spans)
        for sequence in db.sequences():
            db.delete(sequence.key)
        with db.catalog.begin() as txn:
            assert list(txn.keys_of("moved")) == []


def test_other_branches_stay_as_they_are(path: Path) -> None:
    trunk = token_list(64)
    a, b = (np.concatenate((trunk, token_list(100, seed))) for seed in (1, 2))
    with opened(path) as db:
        extend(db, trunk, segment_tokens=32)
        for tokens, name in ((a, "a"), (b, "b")):
            extend(db, tokens, name=name, segment_tokens=32)
        shared = db.sequence("b").spans
        db.compact("a")
        assert db.sequence("b").spans == shared
        assert db.sequence("a").spans[:2] == shared[:2]
        assert len(db.sequence("a").spans) == 3
        for tokens, name in ((a, "a"), (b, "b")):
            assert_reads_back(db, tokens, db.sequence(name).spans)


@pytest.mark.parametrize("kept", [True, False])
def test_the_end_of_another_branch_is_not_lost(path: Path, kept: bool) -> None:
    """A segment may end in tokens that what continues it does not have: a sequence, or a cache, may live on them."""
    old = token_list(40)
    new = np.concatenate((old[:35], token_list(60, 9)))
    with opened(path) as db:
        first = extend(db, old, name="old").last
        extend(db, new, name="new", segment_tokens=32)
        if not kept:
            db.delete("old")
        db.compact()
        assert db.match(identity(), old).tokens == 40
        if kept:
            assert_reads_back(db, old, db.sequence("old").spans)
        assert_reads_back(db, new, db.sequence("new").spans)
        assert db.sequence("new").spans[0].segment == first.info.segment
        assert len(db.sequence("new").spans) == 2


def test_a_cache_on_the_end_of_another_branch_goes_on_with_its_own_tokens(path: Path) -> None:
    old = token_list(48)
    new = np.concatenate((old[:35], token_list(60, 9)))
    longer = np.concatenate((old, token_list(30, 4)))
    with opened(path) as db:
        parent = extend(db, old, name="old").last
        extend(db, new, name="new")
        writer = write_segment(db, longer, start=48, parent=parent.info.segment)
        db.delete("old")
        db.compact()
        key = db.commit(writer, longer[48:]).sequence
        assert_reads_back(db, longer, db.sequence(key).spans)


def test_only_segments_of_one_kind_are_merged(path: Path) -> None:
    tokens = token_list(128)
    with opened(path) as db:
        extend(db, tokens[:64], segment_tokens=32)
        extend(db, tokens, fidelity="sparse", segment_tokens=32, name="n")
        assert db.compact("n") == 1
        assert [s.info.fidelity for s in db.segments(db.sequence("n").spans)] == ["exact", "exact", "sparse"]
        with pytest.raises(SequenceNotFound):
            db.compact("other")


def test_a_reader_of_the_old_segments_reads_on(path: Path) -> None:
    tokens = token_list(96)
    with KVDB.open(path, grace_s=3600) as db:
        talk(db, tokens, 32)
        old = db.segments(db.sequence("n").spans)
        reader = db.reader()
        before = [read_kv(reader, segment, 0, 32) for segment in old]
        db.compact()
        late = db.reader()  # opens them only now
        for each in (reader, late):
            after = [read_kv(each, segment, 0, 32) for segment in old]
            assert all(
                np.array_equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
            )
            each.close()
        assert_healthy(db)


def test_a_damaged_segment_is_not_copied_and_nothing_changes(path: Path) -> None:
    tokens = token_list(96)
    with KVDB.open(path) as db:
        talk(db, tokens, 32)
        spans = db.sequence("n").spans
        file = path / "chunks" / f"{spans[1].segment}.kv0" / "c.0.0.0.0.0"
        flip(file, 100)
        with pytest.raises(Damaged, match=rf"segment {spans[1].segment}, layer 0"):
            db.compact()
        flip(file, 100)
        assert db.sequence("n").spans == spans
        assert os.listdir(db.own_workspace()) == ["lock"]
        assert_healthy(db)
        assert db.compact() == 2


class Died(BaseException):
    pass


@pytest.mark.parametrize("where", ["seal", "publish", "after the files moved", "commit"])
@pytest.mark.parametrize("killed", [True, False])
def test_compaction_that_is_cut_short_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str, killed: bool
) -> None:
    tokens = token_list(96)

    def die(*_: object, **__: object) -> None:
        raise Died

    with opened(path) as db:
        talk(db, tokens, 32)
        spans = db.sequence("n").spans
    db = KVDB.open(path)
    with monkeypatch.context() as m:
        target = {
            "seal": "kvdb.segments.SegmentWriter.seal",
            "publish": "kvdb.segments.SegmentWriter.publish",
            "after the files moved": "kvdb.files.fsync_dir",
            "commit": "kvdb.transaction.Transaction.finish_writing",
        }[where]
        m.setattr(target, die)
        if killed:  # nobody tidies up
            m.setattr("kvdb.store.KVDB.abandon", die)
        with pytest.raises(Died):
            db.compact()
    if killed:
        assert db._workspace_lock is not None
        os.close(db._workspace_lock)
        db._workspace = db._workspace_lock = None
    else:
        assert_healthy(db)
    db.close()
    with opened(path) as db:
        assert db.sequence("n").spans == spans
        assert_reads_back(db, tokens, spans)
        assert db.compact() == 2


def test_compaction_never_evicts_what_it_merges(path: Path) -> None:
    tokens = token_list(1024)
    with opened(path) as db:
        talk(db, tokens, 16, name=None)
        db.gc()
        db.set_size_cap(db.info()["used_bytes"] + (100 << 10))
        with pytest.raises(StorageFull):
            db.compact()
        assert_reads_back(db, tokens, db.match(identity(), tokens).spans)
        db.set_size_cap("unlimited")
        for seed in range(1, 60):
            extend(db, token_list(20, seed))
        db.set_size_cap(db.info()["used_bytes"] + (100 << 10))
        assert db.compact() == 63
        assert_reads_back(db, tokens, db.match(identity(), tokens).spans)
