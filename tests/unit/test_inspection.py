"""What `kvdb.inspection` computes is what dumb oracles say: a dict of token lists, `os.walk`, NumPy on the files' bytes, and the engine
itself doing, on a copy, what a dry run has foretold.

What must hold: looking writes nothing; a damaged entry hides only itself; and each oracle notices a planted bug.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from helpers import SMALL, TWO_GROUPS, assert_healthy, extend, flip, identity, model_kv, opened, token_list, tree_bytes

from kvdb import EXACT, KVDB
from kvdb.abstracts import ABSTRACTS
from kvdb.codecs import CodecPlan
from kvdb.errors import InvalidInput, SequenceNotFound
from kvdb.geometry import as_float32
from kvdb.inspection import describe, distance, explain, planes, record, room, stores, tree
from kvdb.inspection.snapshot import Snapshot, snapshot
from kvdb.retention import RETENTION
from kvdb.retention.base import Leaf

DOCUMENT, OTHER, CHAT = token_list(400), token_list(120, seed=1), token_list(360, seed=2)
QUESTIONS = [np.concatenate([DOCUMENT[:300], token_list(50, seed=10 + i)]) for i in range(4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document and four questions on its beginning, a text of its own, a conversation of nine turns, one that expired."""
    path = tmp_path_factory.mktemp("inspection") / "a.kvdb"
    with KVDB.open(path, durability="relaxed") as db:  # closing makes it durable
        extend(db, DOCUMENT, name="report", segment_tokens=128)
        for number, question in enumerate(QUESTIONS):
            extend(db, question, name="asked" if number == 0 else None)
        extend(db, OTHER, abstracts=("box", "mean"))
        for stop in range(40, 400, 40):
            extend(db, CHAT[:stop], name="chat" if stop == 360 else None)
        mortal = extend(db, token_list(90, seed=5))
        db.put_sequence(mortal.last, 90, name="mortal", ttl_s=0.001, replaces=mortal.key)
        db.pin("chat")
        db.touch(db.sequence("report").spans)
        assert_healthy(db)
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return copied(made, tmp_path / "copy.kvdb")


def copied(path: Path, to: Path) -> Path:
    """Holes stay holes: what a store takes is what is looked at here."""
    subprocess.run(["cp", "-R", path, to], check=True)
    return to


@contextlib.contextmanager
def looked(path: Path) -> Iterator[tuple[KVDB, Snapshot]]:
    """A store open for reading, which is afterwards what it was, LMDB's lock file aside."""
    before = files_of(path)
    with KVDB.open(path, "r") as db:
        yield db, snapshot(db)
    assert files_of(path) == before


def files_of(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree_bytes(path).items() if not name.endswith("lock.mdb")}


def disk(path: Path) -> int:
    """What a file or folder takes, everything in it counted."""
    below = [Path(folder, name) for folder, _, names in os.walk(path) for name in (".", *names)]
    return sum(os.lstat(found).st_blocks * 512 for found in below or [path])


# -- sequences


def check_facts(path: Path, scratch: Path) -> None:
    """What a sequence has of its own is what deleting it frees, and what it shares is what stays."""
    with looked(path) as (_, snap):
        facts = describe.listed(snap)
        owners = {owner.sequence.key: owner for owner in room.owners(snap)}
    assert len(facts) == len(snap.sequences) > 5
    for found in facts:
        sequence = found.sequence
        again = copied(path, scratch / sequence.key)
        with KVDB.open(again, "r+") as db:
            segments = db.segments(sequence.spans)
            on_disk = sum(disk(again / "chunks" / array) for s in segments for array in s.info.array_names())
            db.pin(sequence.key, False)
            freed = db.delete(sequence.key)
        shutil.rmtree(again)
        assert (found.layers, found.codecs) == (2, ("raw",))
        assert found.kv_bytes == sequence.tokens * 2 * 2 * 2 * 8 * 2  # layers, K and V, heads, dim, bytes
        assert (found.disk_bytes, (found.disk_bytes or 0) - (found.shared_bytes or 0)) == (on_disk, freed)
        assert (owners[sequence.key].own_bytes, owners[sequence.key].shared_bytes) == (freed, found.shared_bytes)


def test_a_sequence_has_of_its_own_what_deleting_it_frees(copy: Path, tmp_path: Path) -> None:
    with KVDB.open(copy, "r+", min_free=0):  # what has expired goes
        pass
    check_facts(copy, tmp_path)


def test_segments_are_described_by_position_codec_and_who_shares_them(tmp_path: Path) -> None:
    with opened(tmp_path / "a.kvdb") as db:
        key = extend(db, token_list(100), geometry=TWO_GROUPS, abstracts=("box", "sketch"), segment_tokens=64).key
        db.recode(key, CodecPlan.parse("int8;1=raw"))
    with looked(tmp_path / "a.kvdb") as (db, snap):
        (sequence,) = snap.sequences
        found = list(describe.segments_of(db, snap, sequence))
        segments = [segment.info for segment in db.segments(sequence.spans)]
    assert [(s.start, s.stop) for s in found] == [(0, 16), (16, 64), (64, 96), (96, 100)]
    assert [s.codecs for s in found] == [
        [("0-1, 3", "raw")], [("0, 3", "int8"), ("1", "raw")], [("0, 3", "int8"), ("1", "raw")], [("0-1, 3", "raw")],
    ]  # fmt: skip
    for facts, info in zip(found, segments, strict=True):
        chunks = tmp_path / "a.kvdb" / "chunks"
        for name in info.abstracts:
            arrays = [p / "c.0.0.0.0.0" for p in chunks.glob(f"{info.segment}.{name}*")]
            assert facts.abstracts[name] == sum(p.stat().st_size for p in arrays) > 0
        kv = sum((p / "c.0.0.0.0.0").stat().st_size for p in chunks.glob(f"{info.segment}.kv*"))
        assert 0 < (facts.payload_bytes or 0) < kv < 1.4 * (facts.payload_bytes or 0) + 2000
        assert (facts.shared_by, facts.wrong) == (0, None)


def test_a_sequence_is_named_by_name_key_or_a_unique_beginning(made: Path) -> None:
    with looked(made) as (_, snap):
        report = snap.sequence("report")
        assert snap.sequence(report.key[:8]) == snap.sequence(report.key) == report
        assert snap.sequence("mortal").tokens == 90  # expired, and still there to be looked at
        for nothing in ("rep", report.key[:3], "", "x" * 40):
            with pytest.raises(SequenceNotFound):
                snap.sequence(nothing)


# -- the prefix tree


def check_tree(snap: Snapshot) -> None:
    """Each segment is in one node, and below a node are the sequences that pass through its last segment."""
    found = tree.nodes(snap)
    assert sorted(s for node in found for s in node.segments) == sorted(snap.segments)
    for place, node in enumerate(found):
        passing = {s.key for s in snap.sequences if node.segments[-1] in {span.segment for span in s.spans}}
        ending = {s.key for s in snap.sequences if s.spans[-1].segment == node.segments[-1]}
        assert (node.below, set(node.ends)) == (len(passing), ending)
        assert node.disk_bytes == sum(snap.segments[s].disk_bytes for s in node.segments)
        parents = [snap.segments[s].info.parent for s in node.segments]
        assert parents[1:] == node.segments[:-1]
        assert parents[0] == (None if node.parent is None else found[node.parent].segments[-1])
        assert node.parent is None or place in found[node.parent].children
        assert node.depth == (0 if node.parent is None else found[node.parent].depth + 1)
        if not ending:  # else it would be part of the run
            assert len(node.children) != 1
    assert sum(node.below_bytes for node in found if node.parent is None) == sum(
        e.disk_bytes for e in snap.segments.values()
    )


def test_the_tree_is_what_the_spans_say(made: Path) -> None:
    with looked(made) as (_, snap):
        check_tree(snap)
        roots = [node for node in tree.nodes(snap) if node.parent is None]
        assert {(9, 40), (5, 384)} <= {
            (root.below, root.stop) for root in roots
        }  # the conversation; document and questions


def test_a_tree_deeper_than_python_has_frames_is_one_node(tmp_path: Path, made: Path) -> None:
    with looked(made) as (_, snap):
        entry = next(iter(snap.segments.values()))
    ids = [f"{i:032x}" for i in range(3000)]
    segments = {
        s: msgspec.structs.replace(
            entry,
            info=msgspec.structs.replace(
                entry.info, segment=s, parent=ids[i - 1] if i else None, start=16 * i, abstracts=()
            ),
            seals={f"{s}.kv0": "0"},
        )
        for i, s in enumerate(ids)
    }
    deep = Snapshot(tmp_path, 0.0, [], segments, {}, {}, [])
    (node,) = tree.nodes(deep)
    assert (node.segments, node.start) == (ids, 0)


# -- room


def check_room(path: Path) -> None:
    """Bytes are those that `os.walk` finds, by the files' names."""
    with looked(path) as (db, snap):
        found = room.measure(db, snap)
    chunks = path / "chunks"
    shards = {p.name: disk(p / "c.0.0.0.0.0") for p in chunks.iterdir() if p.is_dir()}
    assert (found.total, sum(found.parts.values())) == (disk(path), disk(path))
    assert found.parts["kv"] == sum(size for name, size in shards.items() if ".kv" in name)
    assert found.abstracts == {
        name: total for name in sorted(ABSTRACTS) if (total := sum(s for n, s in shards.items() if f".{name}" in n))
    }
    assert sum(found.layers.values()) == sum(found.codecs.values()) == found.parts["kv"]
    assert sum(found.kinds.values()) == found.parts["kv"] + found.parts["abstracts"]
    for part in ("catalog", "names", "quarantine", "tmp", "trash"):
        assert found.parts[part] == sum(disk(p) for p in (path / part).iterdir())


def test_every_byte_on_disk_is_counted_once(made: Path, copy: Path) -> None:
    check_room(made)
    with KVDB.open(copy, "r+", grace_s=1e6) as db:
        db.delete(db.sequences()[-2].key)
    check_room(copy)
    with looked(copy) as (db, snap):
        assert room.measure(db, snap).parts["trash"] > 0


def check_gc(path: Path, scratch: Path) -> None:
    with looked(path) as (db, snap):
        told = room.gc(snap, room.measure(db, snap))
    before = disk(path / "chunks") + disk(path / "trash")
    again = copied(path, scratch / "gc")
    with KVDB.open(again, "r+", grace_s=0) as db:
        db.gc()
        assert {s.key for s in snap.sequences} - {s.key for s in db.sequences()} == {s.key for s in told.sequences}
    freed = before - disk(again / "chunks") - disk(again / "trash")
    assert told.bytes == pytest.approx(freed, abs=8192)  # folders shrink, or do not
    assert told.bytes > 0


def test_gc_frees_what_was_foretold(made: Path, tmp_path: Path) -> None:
    check_gc(made, tmp_path)


def check_cap(path: Path, scratch: Path) -> list[int]:
    """For caps between one sequence and the next: those that lose KV are those that were foretold. Deleting adds a little to the catalog, so
    a cap must not lie close to where the next one has to go."""
    with looked(path) as (db, snap):
        found, used = room.measure(db, snap), db.space.used_bytes()
    foretold = [room.capped(snap, used, found, used - less, RETENTION["lru"]) for less in range(0, 250_000, 4096)]
    levels = sorted({saving.bytes for saving in foretold})
    lost = []
    for number, less in enumerate((*((a + b) // 2 for a, b in pairwise(levels)), levels[-1] + 50_000)):
        told = room.capped(snap, used, found, used - less, RETENTION["lru"])
        again = copied(path, scratch / f"cap-{number}")
        with KVDB.open(again, "r+", grace_s=0, min_free=0) as db:
            db.set_size_cap(used - less)
            whole = {s.key: s.spans for s in db.sequences()}
            over = db.info()["used_bytes"] > used - less
        shutil.rmtree(again)
        changed = {s.key for s in snap.sequences if whole.get(s.key) != s.spans}
        assert {s.key for s in told.sequences} == changed
        assert told.enough is not over
        lost.append(len(told.sequences))
    return lost


def test_a_cap_takes_what_was_foretold(made: Path, tmp_path: Path) -> None:
    lost = check_cap(made, tmp_path)
    assert lost == sorted(lost)
    assert len(set(lost)) > 3


def check_merging(path: Path, scratch: Path) -> None:
    with looked(path) as (_, snap):
        told = room.merging(snap)
    again = copied(path, scratch / "merged")
    with KVDB.open(again, "r+", grace_s=0) as db:
        db.gc()
        before = db.info()["disk_bytes"]
        assert told.segments == db.compact() > 5
        assert told.bytes == pytest.approx(before - db.info()["disk_bytes"], rel=0.2)


def test_compaction_saves_what_was_foretold(made: Path, tmp_path: Path) -> None:
    check_merging(made, tmp_path)


# -- a chunk


@pytest.mark.parametrize("codec", ["raw", "int8", "blosc"])
def test_a_record_is_where_it_is_said_to_be_and_its_numbers_are_numpys(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.kvdb"
    with opened(path) as db:
        key = extend(db, token_list(100), segment_tokens=48).key
        if codec != "raw":
            db.recode(key, CodecPlan.parse(codec))
    with looked(path) as (db, snap):
        (sequence,) = snap.sequences
        exact = model_kv(SMALL, token_list(100), 0, 100, salt=EXACT)
        for layer in SMALL.layers:
            for chunk in range(7):
                found = record.chunk_of(db, sequence, layer, chunk)
                assert (found.start, found.stop) == (16 * chunk, min(16 * chunk + 16, 100))
                for head, facts in enumerate(found.records):
                    kv = [as_float32(plane[head, found.start : found.stop], "bfloat16") for plane in exact[layer]]
                    check_record(path, found, facts, kv)


def check_record(path: Path, chunk: record.ChunkFacts, facts: record.RecordFacts, exact: list[Any]) -> None:
    """exact: keys and values that were stored, (tokens, head_dim) float32; a lossy codec may be off by one step in 255."""
    assert facts.wrong is None
    assert facts.file is not None
    assert facts.box is not None
    slack = 0.0 if chunk.codec in ("raw", "blosc") else 16 / 255 * 8**0.5
    for norms, numbers in ((facts.key_norms, exact[0]), (facts.value_norms, exact[1])):
        true = np.sqrt(np.square(numbers.astype(np.float64)).sum(axis=1))
        assert norms == pytest.approx((true.min(), true.mean(), true.max()), abs=slack + 1e-9)
    assert facts.box.width == pytest.approx(np.ptp(exact[0], axis=0).mean(), abs=slack + 1e-6)
    assert abs(facts.box.reach) == pytest.approx(np.abs(exact[0]).max(), abs=slack)
    stored = (path / facts.file).read_bytes()[facts.offset : (facts.offset or 0) + (facts.nbytes or 0)]
    assert len(stored) == facts.nbytes
    if chunk.codec == "raw":
        keys = as_float32(np.frombuffer(stored, "<u2").reshape(2, 16, 8)[0], "bfloat16")
        assert np.array_equal(keys[: len(exact[0])], exact[0])
    if chunk.codec != "blosc":  # a digest is of the record, seeded with its place
        seed = xxhash.xxh3_64_intdigest(chunk.segment.encode())
        digests = {f"{xxhash.xxh3_64_intdigest(stored, (seed + row) % 2**64):016x}" for row in range(64)}
        assert facts.digest in digests


def test_a_damaged_record_is_told_and_the_others_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.kvdb"
    with opened(path) as db:
        extend(db, token_list(40), name="x")
        array = db.segments(db.sequence("x").spans)[0].info.array_names()[0]
    flip(path / "chunks" / array / "c.0.0.0.0.0", 512 * 3 + 7)  # layer 0, chunk 1, head 1
    with looked(path) as (db, snap):
        records = record.chunk_of(db, snap.sequence("x"), 0, 1).records
        assert [r.wrong is not None for r in records] == [False, True]
        assert "layer 0, chunk 1, head 1" in (records[1].wrong or "")
        assert record.chunk_of(db, snap.sequence("x"), 2, 1).records[1].wrong is None
        for layer, chunk in ((1, 0), (0, 3), (0, -1)):
            with pytest.raises(InvalidInput):
                record.chunk_of(db, snap.sequence("x"), layer, chunk)


# -- misses


def check_break(db: KVDB, snap: Snapshot, lists: dict[str, Any], prompt: Any) -> None:
    """The match is the longest common prefix with any stored list, and the token beside the break is a stored one's."""
    found = explain.explain(db, snap, prompt, identity())
    shared = {key: next((i for i, (a, b) in enumerate(zip(t, prompt, strict=False)) if a != b), min(len(t), len(prompt))) for key, t in lists.items()}  # fmt: skip
    assert found.matched == max(shared.values())
    assert found.asked_token == (None if found.matched == len(prompt) else prompt[found.matched])
    for beside in found.beside:
        tokens = lists[beside.sequence.key]
        assert shared[beside.sequence.key] == found.matched
        assert beside.token == (tokens[found.matched] if len(tokens) > found.matched else None)
    if found.beside:
        tokens = lists[found.beside[0].sequence.key]
        assert found.stored_next == tokens[found.matched : found.matched + 32].tolist()
    assert found.kv_bytes == found.matched * 128
    assert found.started == found.matched % 16


def test_the_break_is_where_a_dict_says(made: Path) -> None:
    with looked(made) as (db, snap):
        lists = {s.key: db.tokens(s.spans) for s in snap.sequences}
        for at in (0, 1, 15, 16, 17, 100, 299, 300, 301, 399):
            changed = DOCUMENT.copy()
            changed[at] += 1
            check_break(db, snap, lists, changed)
        for prompt in (DOCUMENT, DOCUMENT[:50], np.append(DOCUMENT, 7).astype("<u4"), OTHER, QUESTIONS[2]):
            check_break(db, snap, lists, prompt)
        with pytest.raises(InvalidInput, match="no tokens"):
            explain.explain(db, snap, DOCUMENT[:0], identity())


def test_what_agrees_further_and_does_not_count_is_told_with_its_fields(made: Path) -> None:
    mine = identity("other weights", salt="a tenant", dtype="float16", config={"rope_theta": "5.0"})
    with looked(made) as (db, snap):
        found = explain.explain(db, snap, DOCUMENT, mine)
        assert found.matched == 0
        (other,) = found.others
        assert (other.tokens, other.sequences[0].name, other.fidelity) == (400, "report", None)
        assert other.fields == {
            "weights": ("w0", "other weights"), "config.rope_theta": ("10000.0", "5.0"),
            "dtype": ("bfloat16", "float16"), "salt": (explain.NOT_SHOWN, explain.NOT_SHOWN),
        }  # fmt: skip
        without = explain.explain(db, snap, DOCUMENT, None)
        assert (without.matched, without.compared, without.others) == (400, False, [])


def test_approximate_kv_is_told_unless_it_is_accepted(tmp_path: Path) -> None:
    with opened(tmp_path / "a.kvdb") as db:
        key = extend(db, DOCUMENT, name="coded").key
        db.recode(key, CodecPlan.parse("int8"))
    with looked(tmp_path / "a.kvdb") as (db, snap):
        found = explain.explain(db, snap, DOCUMENT, identity())
        assert (found.matched, [(o.tokens, o.fidelity, o.fields) for o in found.others]) == (0, [(400, "int8", {})])
        found = explain.explain(db, snap, DOCUMENT, identity(), accepted=("int8",))
        assert (found.matched, found.others) == (400, [])


def test_the_same_tokens_at_another_place_are_found(made: Path) -> None:
    moved = np.concatenate([token_list(3, seed=99), DOCUMENT[:100]])
    edited = DOCUMENT.copy()
    edited[50] += 1
    with looked(made) as (db, snap):
        found = explain.explain(db, snap, moved, identity()).elsewhere
        assert found is not None
        assert (found.at, found.stored_at, found.tokens) == (3, 0, 100)
        found = explain.explain(db, snap, edited, identity()).elsewhere
        assert found is not None
        assert (found.at, found.stored_at, found.tokens) == (51, 51, 400 - 51)
        assert explain.explain(db, snap, token_list(100, seed=77), identity()).elsewhere is None


def test_what_was_deleted_is_told_while_its_files_are_there(copy: Path) -> None:
    with KVDB.open(copy, "r+", grace_s=1e6) as db:
        db.delete("report")
    with looked(copy) as (db, snap):
        found = explain.explain(db, snap, DOCUMENT, identity())
        assert (found.matched < 400, found.gone) == (True, explain.Gone(400, "trash"))
    with KVDB.open(copy, "r+", grace_s=0) as db:
        db.gc()
    with looked(copy) as (db, snap):
        assert explain.explain(db, snap, DOCUMENT, identity()).gone is None


def test_an_expired_sequence_is_marked(made: Path) -> None:
    with looked(made) as (db, snap):
        found = explain.explain(db, snap, token_list(90, seed=5), identity())
        assert {b.sequence.name: b.expired for b in found.beside}["mortal"] is True
        assert not any(b.expired for b in explain.explain(db, snap, DOCUMENT, identity()).beside)


# -- distances


def check_distance(path: Path) -> None:
    """Against NumPy on the KV that two fidelities were stored with."""
    with looked(path) as (db, snap):
        pair = [(db, snap.sequence(name)) for name in ("one", "two")]
        seen: list[tuple[int, int]] = []
        found = distance.distance(*pair, worst=1000, progress=lambda done, total: seen.append((done, total)))
    tokens = token_list(100)
    a, b = model_kv(TWO_GROUPS, tokens, 0, 70, salt=EXACT), model_kv(TWO_GROUPS, tokens, 0, 70, salt="other")
    assert (found.common, found.shared, found.wrong) == (70, 0, [])
    assert [layer.layer for layer in found.layers] == [0, 1, 3]
    assert seen[-1] == (seen[-1][1], seen[-1][1])
    for layer in found.layers:
        for plane, error in enumerate((layer.keys, layer.values)):
            mine, theirs = (kv[layer.layer][plane].astype(np.float64) for kv in (a, b))
            assert error.relative == pytest.approx(np.linalg.norm(mine - theirs) / np.linalg.norm(mine))
            assert error.most == np.abs(mine - theirs).max()
    assert len(found.worst) == 3 * 5
    values = [max(chunk.keys, chunk.values) for chunk in found.worst]
    assert values == sorted(values, reverse=True)
    for chunk in found.worst:
        mine, theirs = (kv[chunk.layer][0][:, chunk.start : chunk.stop].astype(np.float64) for kv in (a, b))
        assert chunk.keys == pytest.approx(np.linalg.norm(mine - theirs) / np.linalg.norm(mine))


@pytest.fixture
def two_ways(tmp_path: Path) -> Path:
    """The same 70 tokens computed in two ways, in segments that end at different places."""
    path = tmp_path / "two.kvdb"
    tokens = token_list(100)
    with opened(path) as db:
        extend(db, tokens, name="one", geometry=TWO_GROUPS, segment_tokens=48)
        other = np.concatenate([tokens[:70], token_list(9, seed=3)])
        extend(db, other, name="two", geometry=TWO_GROUPS, fidelity="other", segment_tokens=32, ident=identity("w1"))
    return path


def test_distances_are_numpys(two_ways: Path) -> None:
    check_distance(two_ways)


def test_chunks_that_are_not_finite_are_the_worst(two_ways: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN compares with nothing: of keys or of values alone, it must not hide in the order, nor put others out of it."""
    right = planes.read

    def read(reader: Any, holding: Any, layer: int, start: int, stop: int) -> Any:
        found = right(reader, holding, layer, start, stop)
        for plane, at, bad in ((0, 20, np.nan), (1, 50, np.nan), (1, 0, np.inf)):
            if layer == 1:
                found[plane][:, at] = bad
        return found

    monkeypatch.setattr(planes, "read", read)
    with looked(two_ways) as (db, snap):
        pair = [(db, snap.sequence(name)) for name in ("one", "two")]
        every = distance.distance(*pair, worst=1000).worst
        for worst in (1, 3, 5):
            assert repr(distance.distance(*pair, worst=worst).worst) == repr(every[:worst])
    assert [(c.layer, c.start) for c in every[:3]] == [(1, 0), (1, 16), (1, 48)]
    assert all(np.isnan([c.keys, c.values]).any() for c in every[:3])
    rest = [max(c.keys, c.values) for c in every[3:]]
    assert len(rest) == 12
    assert rest == sorted(rest, reverse=True)


def test_what_lies_in_the_same_segments_is_not_compared(made: Path) -> None:
    with looked(made) as (db, snap):
        report, asked = snap.sequence("report"), snap.sequence("asked")
        found = distance.distance((db, report), (db, asked))
        assert (found.common, found.shared) == (300, 288)
        assert all(layer.keys == layer.values == (0.0, 0.0) for layer in found.layers)
        found = distance.distance((db, report), (db, report))
        assert (found.common, found.shared, found.layers) == (400, 400, [])
        found = distance.distance((db, report), (db, snap.sequence("chat")))
        assert (found.common, found.layers) == (0, [])


def test_sequences_of_other_shapes_are_refused_and_damage_is_left_out(two_ways: Path, tmp_path: Path) -> None:
    with opened(two_ways) as db:
        extend(db, token_list(100), name="small", ident=identity("w2"))
    with looked(two_ways) as (db, snap), pytest.raises(InvalidInput, match="expected the same shapes"):
        distance.distance((db, snap.sequence("one")), (db, snap.sequence("small")))
    with KVDB.open(two_ways, "r") as db:
        array = db.segments(db.sequence("two").spans)[0].info.array_names()[0]
    flip(two_ways / "chunks" / array / "c.0.0.0.0.0", 40)
    with looked(two_ways) as (db, snap):
        found = distance.distance((db, snap.sequence("one")), (db, snap.sequence("two")))
    assert len(found.wrong) == 1
    assert "layer 0, chunk 0, head 0" in found.wrong[0]
    assert found.layers[0].keys.relative == 0.0  # the only stretch of that layer
    assert found.layers[1].keys.relative > 0.1


def test_stores_are_compared_by_what_their_sequences_say(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.kvdb"
    with opened(path) as db:
        extend(db, DOCUMENT, name="renamed")  # in other segments
        extend(db, OTHER[:100], name="asked")  # another text under this name
        db.recode(extend(db, CHAT, name="chat").key, CodecPlan.parse("int8"))
        extend(db, token_list(30, seed=8))
    with looked(made) as one, looked(path) as two:
        found = stores.difference(stores.Side(*one), stores.Side(*two))
        assert [(p.first.name, p.second.name, p.common) for p in found.same] == [("report", "renamed", 400)]
        assert {(p.first.name, p.second.name): (p.common, p.differ) for p in found.differ} == {
            ("chat", "chat"): (360, ("fidelity", "codec")), ("asked", "asked"): (0, ("tokens",)),
        }  # fmt: skip
        assert [s.tokens for s in found.only_second] == [30]
        everywhere = [p.first.key for p in found.same + found.differ] + [s.key for s in found.only_first]
        assert sorted(everywhere) == sorted(s.key for s in one[1].sequences)
        itself = stores.difference(stores.Side(*one), stores.Side(*one))
        assert len(itself.same) == len(one[1].sequences)
        assert (itself.differ, itself.only_first, itself.only_second) == ([], [], [])


# -- damage


def test_a_damaged_entry_hides_only_itself(copy: Path) -> None:
    with KVDB.open(copy, "r") as db:
        whole = snapshot(db)
    victim = whole.sequence("report")
    data = copy / "catalog" / "data.mdb"
    raw = data.read_bytes()
    place = raw.find(msgspec.msgpack.encode(victim.root))
    assert place > 0
    while place > 0:  # in old pages, too
        flip(data, place + 5)
        place = raw.find(msgspec.msgpack.encode(victim.root), place + 1)
    with looked(copy) as (_, snap):
        assert {s.key for s in whole.sequences} - {s.key for s in snap.sequences} == {victim.key}
        assert {p.loc for p in snap.problems} == {"catalog table sequences"}
        check_tree(snap)
        with pytest.raises(SequenceNotFound, match="cannot be read"):
            snap.sequence("report")


def test_a_segment_without_an_entry_leaves_the_rest_to_be_shown(made: Path) -> None:
    with looked(made) as (db, snap):
        victim = snap.sequence("report").spans[1].segment
        less = Snapshot(snap.root, snap.now, snap.sequences, {k: v for k, v in snap.segments.items() if k != victim}, snap.uses, snap.identities, [])  # fmt: skip
        facts = {f.sequence.key: f for f in describe.listed(less)}
        hit = [s for s in snap.sequences if victim in {span.segment for span in s.spans}]
        assert 0 < len(hit) < len(facts)
        for sequence in snap.sequences:
            assert (facts[sequence.key].kv_bytes is None) == (sequence in hit)
            assert (less.wrong_with(sequence) is not None) == (sequence in hit)
        found = list(describe.segments_of(db, less, snap.sequence("report")))
        assert [s.wrong for s in found if s.wrong] == ["not in the catalog"]
        assert sorted(s for node in tree.nodes(less) for s in node.segments) == sorted(less.segments)
        room.owners(less), room.merging(less)
        used, measured = db.space.used_bytes(), room.measure(db, less)
        assert room.capped(less, used, measured, 0, RETENTION["lru"]).enough is False


def test_an_empty_store_has_nothing_to_show(tmp_path: Path) -> None:
    KVDB.open(tmp_path / "a.kvdb").close()
    with looked(tmp_path / "a.kvdb") as (db, snap):
        assert (describe.listed(snap), tree.nodes(snap), room.owners(snap), snap.problems) == ([], [], [], [])
        measured = room.measure(db, snap)
        assert (measured.parts["kv"], measured.total) == (0, disk(tmp_path / "a.kvdb"))
        assert room.gc(snap, measured).bytes == room.merging(snap).bytes == 0
        assert explain.explain(db, snap, DOCUMENT, identity()).matched == 0
        assert explain.explain(db, snap, DOCUMENT, None).matched == 0


# -- the oracles notice


@pytest.mark.parametrize("bug", ["twice", "newest first", "values as keys", "one token late", "no trash"])
def test_a_planted_bug_is_noticed(
    bug: str, made: Path, copy: Path, two_ways: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Any
    check: Callable[[], object]
    if bug == "twice":
        right = Snapshot.disk_bytes
        monkeypatch.setattr(Snapshot, "disk_bytes", lambda self, segments: 2 * right(self, segments))
        check = lambda: check_facts(made, tmp_path)  # noqa: E731
    elif bug == "newest first":
        right = room.in_order
        newest = type("Newest", (), {"rank": lambda self, leaf: (-leaf.last_used,)})()
        monkeypatch.setattr(room, "in_order", lambda _, *rest: right(newest, *rest))
        check = lambda: check_cap(made, tmp_path)  # noqa: E731
    elif bug == "values as keys":
        right = planes.read
        monkeypatch.setattr(planes, "read", lambda *arguments: right(*arguments)[::-1])
        check = lambda: check_distance(two_ways)  # noqa: E731
    elif bug == "one token late":
        right = planes.read
        late = lambda r, h, layer, start, stop: right(r, h, layer, start + (h[0].stop == 48), stop + (h[0].stop == 48))  # noqa: E731
        monkeypatch.setattr(planes, "read", late)
        check = lambda: check_distance(two_ways)  # noqa: E731
    else:
        monkeypatch.setattr(room, "_PARTS", ("catalog", "names", "quarantine", "tmp"))
        with KVDB.open(copy, "r+", grace_s=1e6) as db:
            db.delete(db.sequences()[-2].key)
        check = lambda: check_room(copy)  # noqa: E731
    with pytest.raises((AssertionError, KeyError)):
        check()


def test_a_leaf_is_ranked_by_its_own_use(made: Path) -> None:
    """The dry run asks a policy with what the engine asks it: what was used and when."""
    asked: list[Leaf] = []

    class Watching:
        name = "watching"

        def rank(self, leaf: Leaf) -> tuple[float, ...]:
            asked.append(leaf)
            return (leaf.last_used,)

    with looked(made) as (db, snap):
        room.capped(snap, db.space.used_bytes(), room.measure(db, snap), 0, Watching())  # type: ignore[arg-type]
        with db.catalog.begin() as txn:
            for leaf in asked:
                use, info = txn.use(leaf.segment), snap.segments[leaf.segment].info
                assert (leaf.last_used, leaf.hits, leaf.tokens) == (use.last_used, use.hits, info.tokens)
    assert asked
