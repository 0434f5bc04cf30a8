"""Another codec for a stored sequence: near to what it was, under its name, with nobody else's KV changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import (
    TWO_GROUPS,
    Array,
    assert_abstracts_follow,
    assert_healthy,
    assert_reads_back,
    extend,
    identity,
    model_kv,
    opened,
    read_kv,
    token_list,
    write_segment,
)

from kvdb import KVDB, recode
from kvdb.codecs import CodecPlan
from kvdb.errors import InvalidInput, ReadOnly, SequenceNotFound, StorageFull
from kvdb.geometry import as_float32
from kvdb.segments import SegmentWriter, row_bytes

TOKENS = token_list(150)
SEGMENT = 64
FORK = np.concatenate((TOKENS[:100], token_list(40, 5)))
NEAR = {
    "int8": 0.04,
    "int4": 0.6,
    "int2": 2.7,
    "planes": 0.6,
    "planes:bits=8+int8": 0.08,
    "raw+int4": 0.6,
    "int4;0=raw": 0.6,
}
"""Half a step of a range of 16, and a little for rounded scales; for planes, what an 8-bit box takes in beyond that."""
every_codec = pytest.mark.parametrize("codec", NEAR)


def stored(db: KVDB, name: str | None = "n", tokens: Array = TOKENS) -> str:
    return extend(
        db, tokens, name=name, geometry=TWO_GROUPS, segment_tokens=SEGMENT, abstracts=("box", "sketch", "centroid")
    ).key


def distance(db: KVDB, name: str, tokens: Array) -> float:
    """Greatest one between what is stored and what was, where every number is between -8 and 8."""
    reader, worst, spans = db.reader(), 0.0, db.sequence(name).spans
    assert np.array_equal(db.tokens(spans), tokens)
    for segment, span in zip(db.segments(spans), spans, strict=True):
        info, count = segment.info, span.stop - span.start
        expected = model_kv(TWO_GROUPS, tokens, info.start, info.start + count, salt="exact")
        for layer in info.geometry.layers:
            for found, wanted in zip(read_kv(reader, segment, layer, count), expected[layer], strict=True):
                apart = as_float32(found, TWO_GROUPS.dtype) - as_float32(np.ascontiguousarray(wanted), TWO_GROUPS.dtype)
                worst = max(worst, float(np.abs(apart).max()))
    reader.close()
    return worst


def abstracts_of(db: KVDB, name: str) -> list[Array]:
    """Of each abstract and layer, the rows of all chunks."""
    reader, segments = db.reader(), db.segments(db.sequence(name).spans)
    found = [
        np.concatenate([reader.stored_abstract(segment, abstract, layer) for segment in segments], axis=1)
        for abstract in sorted(segments[0].info.abstracts)
        for layer in TWO_GROUPS.layers
    ]
    reader.close()
    return found


def row_bytes_of(db: KVDB, name: str) -> int:
    """What the rows of a sequence's KV take, without what each array takes besides."""
    infos = [segment.info for segment in db.segments(db.sequence(name).spans)]
    return sum(
        info.chunks * len(g.layers) * g.kv_heads * row_bytes(info, group)
        for info in infos
        for group, g in enumerate(info.geometry.groups)
    )


@every_codec
def test_a_sequence_is_near_to_what_it_was_and_keeps_all_but_its_fidelity(tmp_path: Path, codec: str) -> None:
    plan = CodecPlan.parse(codec)
    with opened(tmp_path / "s") as db:
        stored(db)
        db.pin("n")
        before, summaries, size = db.sequence("n"), abstracts_of(db, "n"), row_bytes_of(db, "n")
        assert db.recode("n", plan) == 3
        after = db.sequence("n")
        assert (after.name, after.pinned, after.created, after.tokens) == ("n", True, before.created, 150)
        assert after.fidelity == str(plan)
        assert 0 < distance(db, "n", TOKENS) <= NEAR[codec]
        for one, other in zip(abstracts_of(db, "n"), summaries, strict=True):
            assert np.array_equal(one, other)
        assert db.match(identity(), TOKENS).tokens == 0
        assert db.match(identity(), TOKENS, exact=False).tokens == 150
        assert [s.info.tokens for s in db.segments(after.spans)] == [
            16,
            48,
            64,
            16,
            6,
        ]  # the first chunk and a started one stay
        assert db.info()["segments"] == 5
        assert row_bytes_of(db, "n") < size
        assert db.recode("n", plan) == 0
        assert_healthy(db)
    with opened(tmp_path / "s") as db:
        assert db.sequence("n").fidelity == str(plan)
        assert_healthy(db)


def test_layers_that_are_excepted_stay_as_they_were(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
        db.recode("n", CodecPlan.parse("int2;0=raw;3=raw"))
        reader = db.reader()
        for segment in db.segments(db.sequence("n").spans):
            info = segment.info
            expected = model_kv(TWO_GROUPS, TOKENS, info.start, info.stop, salt="exact")
            for layer in (0, 3):
                for found, wanted in zip(read_kv(reader, segment, layer, info.tokens), expected[layer], strict=True):
                    assert np.array_equal(found, wanted)
        reader.close()


def test_back_to_raw_nothing_is_lost_any_more_and_nothing_comes_back(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
        db.recode("n", CodecPlan.parse("int4"))
        away = distance(db, "n", TOKENS)
        before = abstracts_of(db, "n")
        assert db.recode("n", CodecPlan.parse("raw")) == 4  # all but the first chunk
        assert distance(db, "n", TOKENS) == away
        assert db.sequence("n").fidelity == "int4"
        assert db.match(identity(), TOKENS).tokens == 0
        assert any(not np.array_equal(one, other) for one, other in zip(abstracts_of(db, "n"), before, strict=True))
        reader = db.reader()
        for segment in db.segments(db.sequence("n").spans):
            assert_abstracts_follow(reader, segment)  # the keys are others now: what bounds them is made of them
        reader.close()
        db.recode("n", CodecPlan.parse("int4"))
        assert db.sequence("n").fidelity == "int4 again"
        assert_healthy(db)


def test_what_others_share_stays_exact_for_them(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
        stored(db, "fork", FORK)
        spans = db.sequence("fork").spans
        db.recode("n", CodecPlan.parse("int8"))
        assert db.sequence("fork").spans == spans
        assert_reads_back(db, FORK, spans)
        assert db.match(identity(), TOKENS).tokens == 128  # the fork leaves the second segment inside
        assert distance(db, "n", TOKENS) > 0
        assert_healthy(db)


@pytest.mark.parametrize("stop", [33, 64, 70, 149])
def test_a_sequence_may_end_inside_a_segment_or_a_chunk(tmp_path: Path, stop: int) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
        found, segments = db.find(identity(), TOKENS[:stop])
        assert found.tokens == stop
        db.put_sequence(segments[-1], stop, name="beginning")
        db.recode("beginning", CodecPlan.parse("int8"))
        assert distance(db, "beginning", TOKENS[:stop]) <= 0.1
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        assert_healthy(db)


def test_only_what_is_stored_otherwise_is_written(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        plan = CodecPlan.parse("int8")
        writer = write_segment(db, TOKENS[:64], geometry=TWO_GROUPS, fidelity="int8", codec=plan)
        first = db.commit(writer, TOKENS[:64]).segment
        writer = write_segment(db, TOKENS, start=64, parent=first.info.segment, geometry=TWO_GROUPS, fidelity="int8 x")
        db.put_sequence(db.commit(writer, TOKENS[64:]).segment, 150, name="n")
        assert db.recode("n", plan) == 1
        assert db.sequence("n").spans[0].segment == first.info.segment
        assert db.sequence("n").fidelity == "int8 x again"
        assert_healthy(db)


@pytest.mark.parametrize("call", range(1, 9))
def test_an_interrupted_change_leaves_the_sequence_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
        before, calls = db.sequence("n"), 0
        real = SegmentWriter.append_rows if call % 2 else SegmentWriter.seal

        def failing(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > call:
                raise KeyboardInterrupt
            return real(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(SegmentWriter, "append_rows" if call % 2 else "seal", failing)
        if call % 2 or call < 5:
            with pytest.raises(KeyboardInterrupt):
                db.recode("n", CodecPlan.parse("int4"))
            monkeypatch.undo()
            assert [s.name for s in db.sequences()] == ["n"]
            assert (db.sequence("n").spans, db.sequence("n").root) == (before.spans, before.root)
            assert_reads_back(db, TOKENS, before.spans)
        else:
            assert db.recode("n", CodecPlan.parse("int4")) == 3
        assert_healthy(db)


def test_a_store_without_room_keeps_what_it_has(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
        db.set_size_cap(db.info()["disk_bytes"] + 20_000)
        with pytest.raises(StorageFull):
            db.recode("n", CodecPlan.parse("int8"))
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        assert_healthy(db)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
        with pytest.raises(SequenceNotFound):
            db.recode("none", CodecPlan.parse("int8"))
        with pytest.raises(InvalidInput, match="layers \\[77\\]"):
            db.recode("n", CodecPlan.parse("int8;77=raw"))
    with KVDB.open(tmp_path / "s", "r") as db, pytest.raises(ReadOnly):
        db.recode("n", CodecPlan.parse("int8"))


def test_a_store_whose_commits_do_not_wait_loses_nothing_that_was_durable(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
    with KVDB.open(tmp_path / "s", durability="relaxed") as db:
        db.recode("n", CodecPlan.parse("int8"))
        with db.catalog.begin() as txn:
            assert txn.keys_of("unsynced") == []


def test_making_room_never_takes_what_is_being_written_anew(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        key = stored(db, name=None)
        db.set_size_cap(db.space.used_bytes() + 20_000)
        with pytest.raises(StorageFull):
            db.recode(key, CodecPlan.parse("int8"))
        assert_reads_back(db, TOKENS, db.sequence(key).spans)
        assert_healthy(db)


def test_what_a_killed_run_leaves_expires_and_so_does_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "s") as db:
        stored(db)
        monkeypatch.setattr(recode, "_lead", lambda *args: (_ for _ in ()).throw(SystemExit))
        monkeypatch.setattr(KVDB, "delete", lambda *args: None)
        with pytest.raises(SystemExit):
            db.recode("n", CodecPlan.parse("int8"))
        (left,) = [s for s in db.sequences() if s.name is None]
        assert left.expires is not None


def test_somebody_elses_sequence_that_is_adopted_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = CodecPlan.parse("int8")
    with opened(tmp_path / "s") as db:
        stored(db)
        writer = write_segment(
            db, TOKENS[:64], geometry=TWO_GROUPS, fidelity="int8", codec=plan, abstracts=("box", "sketch", "centroid")
        )
        theirs = db.commit(writer, TOKENS[:64]).sequence
        monkeypatch.setattr(recode, "_lead", lambda *args: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            db.recode("n", plan)
        assert db.sequence(theirs).tokens == 64
        monkeypatch.undo()
        db.recode("n", plan)
        assert_healthy(db)


@pytest.mark.parametrize("change", ["abstracts", "delete"])
def test_another_process_beside_it_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    with opened(tmp_path / "s") as db, KVDB.open(tmp_path / "s", grace_s=0) as other:
        stored(db)
        left, real = (
            [lambda: other.set_abstracts("n", ("box",)) if change == "abstracts" else other.delete("n")],
            recode._copy,
        )

        def beside(*args: object) -> None:
            if left:
                left.pop()()
                other.space.reap(now=True)
            real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(recode, "_copy", beside)
        if change == "delete":
            with pytest.raises(SequenceNotFound):
                db.recode("n", CodecPlan.parse("int8"))
        else:
            assert db.recode("n", CodecPlan.parse("int8")) == 3
            assert {s.info.abstracts for s in db.segments(db.sequence("n").spans)} == {("box",)}
        assert_healthy(db)
