"""Another codec for a stored sequence: near to what it was, under its name, with nobody else's KV changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import (
    TWO_GROUPS,
    Array,
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

from kvdb import KVDB
from kvdb.codecs import CodecPlan
from kvdb.errors import InvalidInput, ReadOnly, SequenceNotFound, StorageFull
from kvdb.geometry import as_float32
from kvdb.segments import SegmentWriter

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
    reader = db.reader()
    found = [
        reader.stored_abstract(segment, abstract, layer)
        for segment in db.segments(db.sequence(name).spans)
        for abstract in sorted(segment.info.abstracts)
        for layer in TWO_GROUPS.layers
    ]
    reader.close()
    return found


@every_codec
def test_a_sequence_is_near_to_what_it_was_and_keeps_all_but_its_fidelity(tmp_path: Path, codec: str) -> None:
    plan = CodecPlan.parse(codec)
    with opened(tmp_path / "s") as db:
        stored(db)
        db.pin("n")
        before, summaries, size = db.sequence("n"), abstracts_of(db, "n"), db.info()["disk_bytes"]
        assert db.recode("n", plan) == 3
        after = db.sequence("n")
        assert (after.name, after.pinned, after.created, after.tokens) == ("n", True, before.created, 150)
        assert after.fidelity == str(plan)
        assert 0 < distance(db, "n", TOKENS) <= NEAR[codec]
        for one, other in zip(abstracts_of(db, "n"), summaries, strict=True):
            assert np.array_equal(one, other)
        assert db.match(identity(), TOKENS).tokens == 0
        assert db.match(identity(), TOKENS, exact=False).tokens == 150
        assert db.info()["segments"] == 3
        assert db.info()["disk_bytes"] < size
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
        assert db.recode("n", CodecPlan.parse("raw")) == 3
        assert distance(db, "n", TOKENS) == away
        assert db.sequence("n").fidelity == "int4"
        assert db.match(identity(), TOKENS).tokens == 0
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
        assert db.sequence("n").fidelity == "int8 x"
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
        if call % 2 or call < 3:
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
