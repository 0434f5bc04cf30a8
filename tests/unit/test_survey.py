"""A survey counts what is there, as a walk over the sequences' spans does; damage to one thing leaves the rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lmdb
import pytest
from helpers import SMALL, TWO_GROUPS, extend, flip, identity, opened, token_list, tree_bytes

from kvdb import KVDB, format
from kvdb.codecs import CodecPlan
from kvdb.inspection import survey as survey_module
from kvdb.inspection.survey import Survey, SurveyedSequence, survey
from kvdb.segments import payload_bytes


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two branches that share 96 tokens, one sequence of another shape, one inside another's segment."""
    path, tokens = tmp_path / "a.kvdb", token_list(250)
    with KVDB.open(path) as db:
        extend(db, tokens[:192], name="one", segment_tokens=96)
        extend(db, _branched(tokens), name="two", segment_tokens=96)
        extend(db, token_list(40, 9), name="other", geometry=TWO_GROUPS, ident=identity("w1", dtype="float16"))
        last = db.segments(db.sequence("one").spans)[-1]
        db.put_sequence(last, 150, name="inside")
        db.pin("one")
        db.touch(db.sequence("two").spans)
        db.touch(db.sequence("two").spans)
        extend(db, token_list(20, 8), name="z")
    return path


def _branched(tokens: Any) -> Any:
    """As `tokens` for 96 of them."""
    other = tokens.copy()
    other[96:] = token_list(len(tokens) - 96, 5)
    return other


def looked_at(path: Path) -> Survey:
    with KVDB.open(path, "r") as db:
        return survey(db)


def by_name(found: Survey) -> dict[str | None, SurveyedSequence]:
    return {s.name: s for s in found.sequences if s.name is not None}


def test_it_is_what_a_walk_over_all_spans_gives(store: Path) -> None:
    with opened(store, "r") as db:
        found = survey(db)
        sequences = db.sequences()
        behind = {s.key: db.segments(s.spans) for s in sequences}
        infos = {segment.info.segment: segment.info for each in behind.values() for segment in each}
        with db.catalog.begin() as txn:
            entries = txn.segments()
        through = Counter(segment.info.segment for each in behind.values() for segment in each)
        assert [s.key for s in found.sequences] == [s.key for s in sequences]
        assert {s.segment for s in found.segments} == set(infos)
        for each, sequence in zip(found.sequences, sequences, strict=True):
            segments = behind[sequence.key]
            for field in ("name", "model", "fidelity", "tokens", "created", "last_used", "hits", "expires", "pinned"):
                assert getattr(each, field) == getattr(sequence, field), field
            assert (each.last, each.segments) == (segments[-1].info.segment, len(segments))
            assert each.kv_bytes == sequence.tokens * segments[0].info.geometry.token_bytes
            alone = [s.info.segment for s in segments if through[s.info.segment] == 1]
            assert each.own_bytes == sum(entries[s].disk_bytes for s in alone)
            assert not each.damaged
        for segment in found.segments:
            info = infos[segment.segment]
            assert (segment.parent, segment.start, segment.tokens) == (info.parent, info.start, info.tokens)
            assert (segment.sequences, segment.codecs, segment.problem) == (through[segment.segment], ("raw",), None)
        assert {s.segment: s.hits for s in found.segments if s.hits} == {
            span.segment: 2 for span in db.sequence("two").spans
        }
        assert (by_name(found)["two"].hits, by_name(found)["z"].hits, by_name(found)["one"].pinned) == (2, 0, True)
    for layer in found.layers:
        mine = [info for info in infos.values() if layer.layer in info.geometry.layers]
        sizes = [
            2 * 16 * g.head_dim * 2 * g.kv_heads * i.chunks
            for i in mine
            for g in i.geometry.groups
            if layer.layer in g.layers
        ]
        boxes = [
            2 * g.head_dim * 2 * g.kv_heads * i.capacity
            for i in mine
            for g in i.geometry.groups
            if layer.layer in g.layers
        ]
        assert (layer.kv, layer.abstracts) == ({"raw": sum(sizes)}, {"box": sum(boxes)})
    assert [layer.layer for layer in found.layers] == [0, 1, 2, 3]
    assert found.problems == ()


@pytest.mark.parametrize("codec", ["blosc", "int4;0=int8"])
def test_layers_of_coded_segments_add_up_to_their_payload(tmp_path: Path, codec: str) -> None:
    with opened(tmp_path / "a.kvdb") as db:
        extend(db, token_list(3000), name="n", abstracts=())
        db.recode("n", CodecPlan.parse(codec))
        with db.catalog.begin() as txn:
            infos = [entry.info for entry in txn.segments().values()]
        found = survey(db)
        assert sum(sum(layer.kv.values()) for layer in found.layers) == sum(map(payload_bytes, infos))
        kinds = [set(layer.kv) - {"raw"} for layer in found.layers]
        assert kinds == ([{"blosc"}] * 2 if codec == "blosc" else [{"int8"}, {"int4"}])
        assert by_name(found)["n"].kv_bytes == 3000 * SMALL.token_bytes


def test_an_empty_store_has_nothing_in_it(tmp_path: Path) -> None:
    KVDB.open(tmp_path / "a.kvdb").close()
    found = looked_at(tmp_path / "a.kvdb")
    assert (found.sequences, found.segments, found.layers, found.problems) == ((), (), (), ())


def test_a_lost_file_damages_what_passes_through_it_alone(store: Path) -> None:
    with KVDB.open(store, "r") as db:
        lost = db.sequence("two").spans[1].segment
    (store / "chunks" / format.kv_array(lost, 0) / format.SHARD_KEY).unlink()
    before = tree_bytes(store)
    found = looked_at(store)
    assert {k: v for k, v in tree_bytes(store).items() if "lock.mdb" not in k} == {
        k: v for k, v in before.items() if "lock.mdb" not in k
    }
    assert [(p.kind, p.segment) for p in found.problems] == [("segment", lost)]
    assert [s.segment for s in found.segments if s.problem] == [lost]
    assert {s.name: s.damaged for s in by_name(found).values()} == {
        "one": False, "two": True, "other": False, "inside": False, "z": False,
    }  # fmt: skip
    assert len(found.layers) == 4


def test_digests_that_are_not_the_sealed_ones_are_damage(store: Path) -> None:
    with KVDB.open(store, "r") as db:
        (segment,) = db.segments(db.sequence("z").spans)
    shard = store / "chunks" / format.kv_array(segment.info.segment, 0) / format.SHARD_KEY
    flip(shard, segment.info.capacity * SMALL.slot_bytes(0) * 2 + 3)
    found = looked_at(store)
    assert [p.segment for p in found.problems] == [segment.info.segment]
    assert by_name(found)["z"].damaged


@pytest.mark.parametrize("table", ["segments", "sequences", "uses"])
def test_a_damaged_entry_is_told_and_the_rest_is_shown(store: Path, table: str) -> None:
    with KVDB.open(store, "r") as db:
        sequence = db.sequence("z")
        key = bytes.fromhex(sequence.key if table == "sequences" else sequence.spans[0].segment)
    env = lmdb.open(str(store / "catalog"), max_dbs=16)
    with env.begin(write=True, db=env.open_db(table.encode(), create=False)) as txn:
        data = bytearray(txn.get(key))
        data[-1] ^= 1
        txn.put(key, bytes(data))
    env.close()
    found = looked_at(store)
    assert any(table in p.loc for p in found.problems)
    names = set(by_name(found))
    assert names == ({"one", "two", "other", "inside", "z"} - ({"z"} if table == "sequences" else set()))
    if table == "segments":
        assert by_name(found)["z"].damaged
        assert by_name(found)["z"].kv_bytes is None
    assert not by_name(found)["one"].damaged
    if table == "uses":
        assert [s.hits for s in found.segments if s.segment == key.hex()] == [None]


def test_what_another_handle_deletes_meanwhile_is_no_damage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = survey_module._look_at
    gone: list[str] = []

    def deleting(reader: Any, segment: Any, entry: Any, layers: Any) -> None:
        if not gone:
            gone.append("z")
            db.delete("z")
            db.gc()
        original(reader, segment, entry, layers)

    monkeypatch.setattr(survey_module, "_look_at", deleting)
    with opened(store, "r+") as db:
        found = survey(db)
    assert gone == ["z"]
    assert found.problems == ()
    assert by_name(found)["z"].tokens == 20  # as of one moment


def test_a_later_codec_is_told_and_the_rest_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with KVDB.open(tmp_path / "a.kvdb") as db:
        extend(db, token_list(40), name="n")
        extend(db, token_list(40, 2), name="m")
        newer = db.sequence("n").spans[0].segment
        original = survey_module.codecs_of

        def unknown(info: Any) -> Any:
            if info.segment == newer:
                from kvdb.errors import Unsupported

                raise Unsupported(f"segment {newer}: codec 'later', expected 'raw'; upgrade kvdb")
            return original(info)

        monkeypatch.setattr(survey_module, "codecs_of", unknown)
        found = survey(db)
    assert [p.segment for p in found.problems] == [newer]
    assert [s.codecs for s in found.segments if s.segment == newer] == [()]
    assert sum(sum(layer.kv.values()) for layer in found.layers) == 3 * 16 * SMALL.token_bytes


def test_progress_counts_segments(store: Path) -> None:
    told: list[tuple[int, int]] = []
    with KVDB.open(store, "r") as db:
        found = survey(db, lambda done, total: told.append((done, total)))
    assert told == [(i, len(found.segments)) for i in range(len(found.segments))]
