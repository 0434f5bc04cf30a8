"""repair(): every kind of damage is mended, a dry run and a second run change nothing, and nothing is ever deleted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import lmdb
import msgspec
import numpy as np
import pytest
from helpers import (
    assert_healthy,
    assert_reads_back,
    extend,
    flip,
    identity,
    opened,
    token_list,
    tree_bytes,
    write_segment,
)

from kvdb import EXACT, KVDB
from kvdb.codecs import CODECS, CodecPlan
from kvdb.environment import TABLES
from kvdb.errors import Damaged, KVDBError, NewerFormat, NotAStore, OutOfMemory, StorageFull, StoreLocked, Unsupported
from kvdb.format import SegmentInfo
from kvdb.repair import repair
from kvdb.segments import layout

GOOD, BAD = token_list(100, 1), token_list(150, 2)
SHARD = "c.0.0.0.0.0"


class Case:
    """A store of two named sequences: `good` must outlive what is done to the second segment of `bad`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with opened(root) as db:
            extend(db, GOOD, name="good", segment_tokens=48)
            extend(db, BAD, name="bad", segment_tokens=64)
            extend(db, np.concatenate((BAD[:140], token_list(20, 3))))
            self.chain: list[SegmentInfo] = [s.info for s in db.segments(db.sequence("bad").spans)]
        self.hit = self.chain[1]

    def file(self, array: str, name: str = SHARD) -> Path:
        return self.root / "chunks" / f"{self.hit.segment}.{array}" / name


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path / "s")


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def flipped(array: str, name: str, offset: Callable[[SegmentInfo], int]) -> Callable[[Case], None]:
    return lambda case: flip(case.file(array, name), offset(case.hit))


def rewrite(array: str, change: Callable[[str], str]) -> Callable[[Case], None]:
    def do(case: Case) -> None:
        path = case.file(array, "zarr.json")
        path.write_text(change(path.read_text()))

    return do


def resized(array: str, by: int) -> Callable[[Case], None]:
    def do(case: Case) -> None:
        path = case.file(array)
        os.truncate(path, path.stat().st_size + by)

    return do


def other_digest(text: str) -> str:
    digest = json.loads(text)["attributes"]["kvdb"]["layer_xxh3"][0]
    return text.replace(digest, digest[::-1])


def a_link(case: Case) -> None:
    case.file("kv0").unlink()
    case.file("kv0").symlink_to("/dev/zero")


def zeros(case: Case) -> None:
    case.file("kv0").write_bytes(bytes(case.file("kv0").stat().st_size))


SEGMENT_DAMAGE: dict[
    str, tuple[str, Callable[[Case], None]]
] = {  # what is done -> a kind it is told as, how it is done
    "a record": ("record", flipped("kv0", SHARD, lambda info: 5)),
    "a digest": ("digests", flipped("kv0", SHARD, lambda info: layout(info, 0).digests_offset)),
    "a token id": ("token-ids", flipped("kv0", SHARD, lambda info: layout(info, 0).tokens_offset)),
    "the index": ("index", flipped("kv0", SHARD, lambda info: layout(info, 0).index_offset)),
    "an abstract": ("abstract", flipped("box0", SHARD, lambda info: 3)),
    "metadata": ("metadata", rewrite("kv0", lambda text: text.replace('"bytes"', '"bites"', 1))),
    "metadata of the abstract": ("metadata", rewrite("box0", lambda text: text.replace('"box"', '"bax"', 1))),
    "metadata that is no JSON": ("metadata", flipped("kv0", "zarr.json", lambda info: 1)),
    "metadata that is no text": ("metadata", lambda case: flip(case.file("kv0", "zarr.json"), 10, 7)),
    "metadata that goes very deep": ("metadata", lambda case: write(case.file("kv0", "zarr.json"), b"[" * 100_000)),
    "a digest of the abstract": ("seal", rewrite("box0", other_digest)),
    "a byte too few": ("size", resized("kv0", -1)),
    "a byte too many": ("size", resized("kv0", 1)),
    "a short abstract": ("size", resized("box0", -8)),
    "zeros": ("digests", zeros),
    "no shard": ("missing-file", lambda case: case.file("kv0").unlink()),
    "no metadata": ("metadata", lambda case: case.file("kv0", "zarr.json").unlink()),
    "no abstract": ("abstract", lambda case: shutil.rmtree(case.file("box0").parent)),
    "a link": ("missing-file", a_link),
}


def damage_a_record(case: Case) -> None:
    SEGMENT_DAMAGE["a record"][1](case)


def contents(root: Path) -> dict[str, bytes]:
    """Every file but those that change when a store is merely opened."""
    return {n: data for n, data in tree_bytes(root).items() if not n.startswith("catalog/") or n.endswith("data.mdb")}


def kept(before: dict[str, bytes], root: Path) -> bool:
    """Whether all KV that was there is still somewhere in the folder."""
    after = list(tree_bytes(root).values())
    return all(data in after for name, data in before.items() if name.startswith("chunks/"))


@pytest.mark.parametrize("damage", SEGMENT_DAMAGE)
def test_a_damaged_segment_is_quarantined_with_what_continues_it(case: Case, damage: str) -> None:
    kind, do = SEGMENT_DAMAGE[damage]
    do(case)
    before = contents(case.root)
    dry = repair(case.root)
    assert not dry.applied
    assert dry.remaining is None
    assert {p.segment for p in dry.problems} == {case.hit.segment}
    assert kind in {p.kind for p in dry.problems}
    assert contents(case.root) == before
    done = repair(case.root, apply=True)
    assert done.applied
    assert done.remaining == []
    assert (done.problems, done.actions) == (dry.problems, dry.actions)
    assert kept(before, case.root)
    lost = [info.segment for info in case.chain[1:]]
    assert all(any(f"quarantine segment {segment}" in action for action in done.actions) for segment in lost)
    assert any("forget name 'bad': 64 of its 150 tokens stay" in action for action in done.actions)
    quarantined = {name.partition(".")[0] for name in os.listdir(case.root / "quarantine")}
    assert quarantined >= set(lost)
    assert case.chain[0].segment not in quarantined
    mended = contents(case.root)
    again = repair(case.root, apply=True)
    assert (again.problems, again.actions, again.remaining) == ([], [], [])
    assert contents(case.root) == mended
    with opened(case.root) as db:
        assert {s.name for s in db.sequences()} == {"good", None}
        assert_reads_back(db, GOOD, db.sequence("good").spans)
        assert db.match(identity(), BAD).tokens == 64
        assert_reads_back(db, BAD[:64], db.match(identity(), BAD).spans)
        extend(db, BAD, name="bad")  # computed anew
        assert_reads_back(db, BAD, db.sequence("bad").spans)


def test_a_damaged_beginning_takes_the_whole_sequence(case: Case) -> None:
    case.hit = case.chain[0]
    damage_a_record(case)
    assert repair(case.root, apply=True).remaining == []
    with opened(case.root) as db:
        assert [s.name for s in db.sequences()] == ["good"]
        assert db.match(identity(), BAD).tokens == 0


# -- litter


def orphan(root: Path) -> None:
    (root / "chunks" / ("ef" * 16 + ".kv0")).mkdir()
    (root / "chunks" / ("ef" * 16 + ".kv0") / SHARD).write_bytes(b"somebody's")


def foreign_manifest(root: Path) -> None:
    (root / "names" / "somebody.json").write_bytes(b"{}")


def lost_manifest(root: Path) -> None:
    next((root / "names").iterdir()).unlink()


def lying_manifest(root: Path) -> None:
    path = next((root / "names").iterdir())
    path.write_text(path.read_text().replace('"good"', '"evil"').replace('"bad"', '"evil"'))


LITTER = [orphan, foreign_manifest, lost_manifest, lying_manifest]


@pytest.mark.parametrize("damage", LITTER)
def test_what_lies_around_is_tidied_and_no_sequence_suffers(case: Case, damage: Callable[[Path], None]) -> None:
    names = tree_bytes(case.root / "names")
    damage(case.root)
    before = contents(case.root)
    dry = repair(case.root)
    assert len(dry.problems) == len(dry.actions) == 1
    assert contents(case.root) == before
    assert repair(case.root, apply=True).remaining == []
    assert kept(before, case.root)
    assert {n: json.loads(d)["spans"] for n, d in tree_bytes(case.root / "names").items()} == {
        n: json.loads(d)["spans"] for n, d in names.items()
    }
    assert repair(case.root, apply=True).problems == []
    with opened(case.root) as db:
        assert_reads_back(db, GOOD, db.sequence("good").spans)
        assert_reads_back(db, BAD, db.sequence("bad").spans)


# -- the catalog


def damage_entries(root: Path, table: str, *, drop: bool) -> int:
    """Flip a bit in, or remove, every entry of a table, behind the engine's back; returns how many."""
    with lmdb.open(str(root / "catalog"), max_dbs=len(TABLES), map_size=64 << 20) as env:
        db = env.open_db(table.encode(), create=False, dupsort=table == "tree")
        with env.begin(write=True) as txn:
            found = list(txn.cursor(db=db).iternext(keys=True, values=True))
            for key, value in found:
                txn.delete(key, value, db=db)
                if not drop:
                    txn.put(key, value[:-1] + bytes([value[-1] ^ 1]), db=db)
    return len(found)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("table", ["identities", "segments", "tokens", "tree", "sequences", "names", "uses", "meta"])
def test_a_damaged_catalog_is_made_anew_and_loses_no_named_sequence(case: Case, table: str, drop: bool) -> None:
    assert damage_entries(case.root, table, drop=drop) > 0
    before = contents(case.root)
    dry = repair(case.root)
    assert dry.problems
    assert any(action.startswith("rebuild the catalog from") for action in dry.actions)
    assert contents(case.root) == before
    done = repair(case.root, apply=True)
    assert done.remaining == []
    assert kept(before, case.root)
    assert before["catalog/data.mdb"] in tree_bytes(case.root / "quarantine").values()
    with opened(case.root) as db:
        for name, tokens in (("good", GOOD), ("bad", BAD)):
            assert_reads_back(db, tokens, db.sequence(name).spans)
        branch = np.concatenate((BAD[:140], token_list(20, 3)))
        assert_reads_back(db, branch, db.match(identity(), branch).spans)
    assert repair(case.root, apply=True).problems == []


@pytest.mark.parametrize("loss", ["empty", "cut", "gone", "folder gone", "noise"])
def test_a_lost_catalog_is_refused_by_open_and_made_anew_by_repair(case: Case, loss: str) -> None:
    data = case.root / "catalog" / "data.mdb"
    match loss:
        case "empty":
            data.write_bytes(b"")
        case "cut":
            os.truncate(data, 4096)
        case "gone":
            data.unlink()
        case "folder gone":
            shutil.rmtree(case.root / "catalog")
        case "noise":
            data.write_bytes(np.random.default_rng(0).bytes(1 << 16))
    with pytest.raises(Damaged, match="kvdb repair --rebuild"):
        KVDB.open(case.root, "r+")
    report = repair(case.root, apply=True)
    assert report.remaining == []
    assert any("statistics are lost" in action and "pins" in action for action in report.actions)
    with opened(case.root) as db:
        assert_reads_back(db, GOOD, db.sequence("good").spans)
        assert_reads_back(db, BAD, db.sequence("bad").spans)


def test_a_rebuild_quarantines_what_is_not_whole(case: Case) -> None:
    damage_a_record(case)
    (case.root / "catalog" / "data.mdb").unlink()
    before = contents(case.root)
    assert repair(case.root, apply=True).remaining == []
    assert kept(before, case.root)
    with opened(case.root) as db:
        assert {s.name for s in db.sequences()} == {"good", None}
        assert db.match(identity(), BAD).tokens == 64


def test_a_rebuild_keeps_the_cap_where_it_can_be_read(case: Case) -> None:
    with opened(case.root) as db:
        db.set_size_cap(50 << 20)
    repair(case.root, apply=True, rebuild=True)
    with opened(case.root) as db:
        assert db.info()["size_cap"] == 50 << 20


def test_a_rebuild_waits_until_the_store_is_closed_and_mending_does_not(case: Case) -> None:
    with KVDB.open(case.root) as db:
        with pytest.raises(StoreLocked):
            repair(case.root, apply=True, rebuild=True)
        damage_a_record(case)
        assert repair(case.root, apply=True).remaining == []
        assert_healthy(db)
        assert_reads_back(db, GOOD, db.sequence("good").spans)


def test_repair_leaves_a_living_writer_alone(case: Case) -> None:
    tokens = token_list(40, 9)
    with KVDB.open(case.root) as db:
        writer = write_segment(db, tokens)
        orphan(case.root)
        assert repair(case.root, apply=True).remaining == []
        assert_reads_back(db, tokens, db.sequence(db.commit(writer, tokens).sequence).spans)
        assert_healthy(db)


def test_a_healthy_store_needs_no_repair(case: Case) -> None:
    before = contents(case.root)
    report = repair(case.root, apply=True)
    assert (report.problems, report.actions, report.remaining) == ([], [], [])
    assert contents(case.root) == before


def test_repair_refuses_what_it_does_not_know(tmp_path: Path, case: Case) -> None:
    with pytest.raises(NotAStore):
        repair(tmp_path / "nothing", apply=True)
    assert not (tmp_path / "nothing").exists()
    header = case.root / "kvdb.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"format": 99}))
    before = contents(case.root)
    with pytest.raises(NewerFormat):
        repair(case.root, apply=True, rebuild=True)
    assert contents(case.root) == before


@pytest.mark.parametrize(("reason", "error"), [(lmdb.MemoryError, OutOfMemory), (lmdb.MapFullError, StorageFull)])
def test_a_machine_that_is_short_of_something_is_no_reason_to_rebuild(
    case: Case, monkeypatch: pytest.MonkeyPatch, reason: type[lmdb.Error], error: type[KVDBError]
) -> None:
    before = tree_bytes(case.root)

    def refused(path: str, *_: object, **__: object) -> None:
        raise reason(f"{path}: Cannot allocate memory")

    monkeypatch.setattr(lmdb, "open", refused)
    with pytest.raises(error, match=f"^{case.root}/catalog: Cannot allocate memory, expected"):
        repair(case.root, apply=True)
    monkeypatch.undo()
    assert tree_bytes(case.root) == before
    with opened(case.root) as db:
        assert_healthy(db)


def test_a_giant_damaged_catalog_is_kept_aside_without_filling_the_disk(case: Case) -> None:
    data = case.root / "catalog" / "data.mdb"
    os.truncate(data, 1 << 40)
    with data.open("r+b") as f:
        f.write(b"\xff" * 64)
    assert repair(case.root, apply=True).remaining == []
    (aside,) = case.root.glob("quarantine/*/data.mdb")
    assert aside.stat().st_size == 1 << 40
    assert aside.stat().st_blocks * 512 < 1 << 30


def test_a_sequence_that_says_more_than_its_segments_is_found_and_put_right(tmp_path: Path) -> None:
    """Who asks for exact KV by name goes by what the sequence says."""
    with opened(tmp_path / "s") as db:
        extend(db, GOOD, name="n", fidelity="sparse")
    with KVDB.open(tmp_path / "s") as db:
        with db.catalog.begin(write=True) as txn:
            lying = msgspec.structs.replace(txn.sequence("n"), fidelity=EXACT)
            txn._put("sequences", bytes.fromhex(lying.key), lying)
        assert "fidelity" in {problem.kind for problem in db.check()}
    assert repair(tmp_path / "s", apply=True).remaining == []
    with opened(tmp_path / "s") as db:
        assert db.sequence("n").fidelity == "sparse"


@pytest.mark.parametrize("apply", [False, True])
def test_what_only_a_later_version_knows_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apply: bool
) -> None:
    root = tmp_path / "s"
    with opened(root) as db:
        extend(db, GOOD, name="good")
        writer = write_segment(db, BAD, fidelity="int8", codec=CodecPlan.parse("int8"))
        db.put_sequence(db.commit(writer, BAD).segment, len(BAD), name="later")
    with monkeypatch.context() as earlier:
        earlier.delitem(CODECS, "int8")
        before = {name: data for name, data in tree_bytes(root).items() if "lock" not in name}
        with KVDB.open(root) as db:
            assert {p.kind for p in db.check()} == {"unsupported"}
            assert_reads_back(db, GOOD, db.sequence("good").spans)
        with pytest.raises(Unsupported, match=r"'int8', expected one of .*; upgrade kvdb; nothing was repaired"):
            repair(root, apply=apply)
        after = {name: data for name, data in tree_bytes(root).items() if "lock" not in name}
        assert {n: d for n, d in after.items() if n.startswith("chunks")} == {
            n: d for n, d in before.items() if n.startswith("chunks")
        }
    with opened(root) as db:
        assert_reads_back(db, GOOD, db.sequence("good").spans)
        assert db.sequence("later").tokens == len(BAD)
