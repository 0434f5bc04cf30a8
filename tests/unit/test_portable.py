"""Export and import: one file that carries a sequence whole, and takes in nothing that is not."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers import (
    SMALL,
    TWO_GROUPS,
    assert_healthy,
    assert_reads_back,
    extend,
    flip,
    identity,
    model_kv,
    opened,
    token_list,
    tree_bytes,
)

from kvdb import EXACT, KVDB
from kvdb.errors import Damaged, IdentityMismatch, InvalidInput, ReadOnly, SequenceNotFound, StorageFull

TOKENS = token_list(150)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A sequence of three segments in one file."""
    target = tmp_path / "one.kvdb.zip"
    with opened(tmp_path / "source") as db:
        extend(db, TOKENS, name="n", segment_tokens=64)
        assert db.export_sequence("n", target) == target.stat().st_size
    return target


def store(path: Path) -> dict[str, bytes]:
    """Everything of a store but what opening it for writing changes."""
    return {name: data for name, data in tree_bytes(path).items() if not name.startswith("catalog/")}


@pytest.mark.parametrize("geometry", [SMALL, TWO_GROUPS], ids=["one group", "two groups"])
def test_what_was_exported_reads_the_same_elsewhere(tmp_path: Path, geometry: object) -> None:
    target = tmp_path / "one.zip"
    with opened(tmp_path / "source") as db:
        extend(db, TOKENS, name="n", geometry=geometry, segment_tokens=64, spare=2)  # type: ignore[arg-type]
        db.export_sequence("n", target)
        origin = db.sequence("n")
    with opened(tmp_path / "other") as db:
        key = db.import_sequence(target)
        found = db.sequence("n")
        assert (found.key, found.spans, found.model, found.root) == (key, origin.spans, origin.model, origin.root)
        assert_reads_back(db, TOKENS, found.spans)
        assert db.match(identity(), TOKENS).tokens == 150
        assert not found.pinned
        extend(db, np.concatenate((TOKENS, token_list(20, 9))), geometry=geometry)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Object at kvdb-sequence.json:zarr.errors.ZarrUserWarning")
def test_the_file_is_a_zarr_hierarchy(exported: Path) -> None:
    group = zarr.open_group(zarr.storage.ZipStore(exported, mode="r"), mode="r")
    arrays = dict(group.arrays())
    assert len(arrays) == 6
    first = next(a for a in arrays.values() if "kv" in a.name and a.attrs["kvdb"]["info"]["start"] == 0)  # type: ignore[index, call-overload]
    keys, _ = model_kv(SMALL, TOKENS, 0, 64, salt=EXACT)[0]
    assert np.array_equal(np.asarray(first[0, :, 0]).view(np.uint8), np.ascontiguousarray(keys).view(np.uint8))


def test_an_unnamed_beginning_of_a_segment_can_be_exported(tmp_path: Path) -> None:
    with opened(tmp_path / "source") as db:
        key = db.put_sequence(extend(db, TOKENS).last, 70)
        db.export_sequence(key, tmp_path / "one.zip")
    with opened(tmp_path / "other") as db:
        found = db.sequence(db.import_sequence(tmp_path / "one.zip", name="given"))
        assert (found.name, found.tokens) == ("given", 70)
        assert_reads_back(db, TOKENS[:70], found.spans)


def test_an_import_adopts_what_is_there(tmp_path: Path, exported: Path) -> None:
    with opened(tmp_path / "source") as db:
        before = db.info()
        assert db.import_sequence(exported) == db.sequence("n").key
        assert db.import_sequence(exported, name="again") != db.sequence("n").key
        after = db.info()
        for fact in ("segments", "disk_bytes", "bytes_written", "tokens_written"):
            assert after[fact] == before[fact], fact
        assert db.sequence("again").spans == db.sequence("n").spans


def test_an_import_adds_only_the_segments_that_are_missing(tmp_path: Path, exported: Path) -> None:
    with opened(tmp_path / "source") as db:
        first = db.sequence("n").spans[0]
        db.put_sequence(db.segments((first,))[0], 64, name="beginning")
        db.delete("n")
        assert db.info()["segments"] == 1
        db.import_sequence(exported)
        assert db.info()["segments"] == 3
        assert_reads_back(db, TOKENS, db.sequence("n").spans)


def test_making_room_leaves_what_the_import_continues(tmp_path: Path, exported: Path) -> None:
    with opened(tmp_path / "source") as db:
        first = db.sequence("n").spans[0]
        db.put_sequence(db.segments((first,))[0], 64)
        db.delete("n")
        for seed in range(10):  # used later, so by age the beginning would go first
            extend(db, token_list(100, 50 + seed))
        db.set_size_cap(db.info()["used_bytes"] + 8192)
        db.import_sequence(exported)
        assert db.info()["segments_evicted"] > 0
        assert_reads_back(db, TOKENS, db.sequence("n").spans)


def test_a_name_that_is_pinned_refuses_an_import_before_anything_goes(tmp_path: Path, exported: Path) -> None:
    with opened(tmp_path / "other") as db:
        pinned = extend(db, token_list(40, 5), name="n").key
        db.pin("n")
        kept = extend(db, token_list(40, 6)).key
        db.set_size_cap(db.info()["used_bytes"])
        with pytest.raises(InvalidInput, match="pinned"):
            db.import_sequence(exported)
        assert {s.key for s in db.sequences()} == {pinned, kept}


def test_a_name_moves_to_what_is_imported(tmp_path: Path, exported: Path) -> None:
    with opened(tmp_path / "other") as db:
        old = extend(db, token_list(40, 5), name="n")
        db.import_sequence(exported)
        assert db.sequence("n").tokens == 150
        assert {s.name for s in db.sequences()} == {"n", None}
        assert_reads_back(db, token_list(40, 5), db.match(identity(), token_list(40, 5)).spans)
        assert old.key not in {s.key for s in db.sequences()}


def test_another_tenants_file_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "source") as db:
        extend(db, TOKENS, name="n", ident=identity(salt="theirs"))
        db.export_sequence("n", tmp_path / "one.zip")
    for salt in ("", "mine"):
        with KVDB.open(tmp_path / "other", salt=salt) as db:
            before = store(tmp_path / "other")
            with pytest.raises(IdentityMismatch, match="salt"):
                db.import_sequence(tmp_path / "one.zip")
            assert db.sequences() == []
            assert_healthy(db)
        assert store(tmp_path / "other") == before
    with KVDB.open(tmp_path / "other", salt="theirs") as db:
        assert db.sequence(db.import_sequence(tmp_path / "one.zip")).tokens == 150


def test_export_never_overwrites_and_leaves_no_draft(tmp_path: Path, exported: Path) -> None:
    before = exported.read_bytes()
    with opened(tmp_path / "source") as db:
        with pytest.raises(FileExistsError):
            db.export_sequence("n", exported)
        with pytest.raises(SequenceNotFound):
            db.export_sequence("other", tmp_path / "two.zip")
    assert exported.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.kvdb.zip", "source"]
    assert exported.stat().st_mode & 0o777 == 0o600


def test_a_damaged_sequence_is_not_exported(tmp_path: Path, exported: Path) -> None:
    with KVDB.open(tmp_path / "source") as db:
        file = tmp_path / "source" / "chunks" / f"{db.sequence('n').spans[1].segment}.kv0" / "c.0.0.0.0.0"
        flip(file, 3)
        with pytest.raises(Damaged, match=r"layer 0, chunk 0.*nothing was exported"):
            db.export_sequence("n", tmp_path / "bad.zip")
        flip(file, 3)
    assert not (tmp_path / "bad.zip").exists()


def refused(target: Path, source: Path, *errors: type[Exception]) -> None:
    """The judge: the import fails with a typed error, and nothing of it is there."""
    with KVDB.open(target) as db:
        db.own_workspace()
        before, known = store(target), db.sequences()
        with pytest.raises(errors or Damaged):
            db.import_sequence(source)
        assert store(target) == before
        assert db.sequences() == known
        assert_healthy(db)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, exported: Path) -> None:
    data, cut = exported.read_bytes(), tmp_path / "cut.zip"
    with opened(tmp_path / "other") as db:
        extend(db, token_list(40, 5), name="n")
    for size in [0, 1, 100, *np.linspace(200, len(data) - 1, 40).astype(int).tolist()]:
        cut.write_bytes(data[:size])
        refused(tmp_path / "other", cut)


def test_a_flipped_bit_is_refused_or_means_nothing(tmp_path: Path, exported: Path) -> None:
    """What a flip does not change in the store it may leave: times, paddings of the zip."""
    data, rng = exported.read_bytes(), np.random.default_rng(0)
    taken = 0
    for number, offset in enumerate(rng.integers(0, len(data), 150).tolist()):
        altered = tmp_path / "altered.zip"
        altered.write_bytes(data)
        flip(altered, offset, number % 8)
        with KVDB.open(tmp_path / f"other{taken}") as db:
            try:
                key = db.import_sequence(altered)
            except (Damaged, IdentityMismatch, InvalidInput):
                assert db.sequences() == []
                assert os.listdir(db.own_workspace()) == ["lock"]
            else:
                taken += 1
                assert_reads_back(db, TOKENS, db.sequence(key).spans)
            assert_healthy(db)
    assert taken < 30


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            data = change(member, old.read(member))
            if data is not None:
                new.writestr(member, data)
    return target


@pytest.mark.parametrize("ending", [".json", "kv0/zarr.json", "kv0/c.0.0.0.0.0", "box0/c.0.0.0.0.0"])
def test_a_file_without_a_member_is_refused(tmp_path: Path, exported: Path, ending: str) -> None:
    lacking = rewritten(exported, tmp_path / "x.zip", lambda name, data: None if name.endswith(ending) else data)
    refused(tmp_path / "other", lacking)


def test_kv_that_does_not_match_its_digests_is_refused(tmp_path: Path, exported: Path) -> None:
    altered = rewritten(
        exported,
        tmp_path / "x.zip",
        lambda name, data: data[:9] + bytes([data[9] ^ 1]) + data[10:] if name.endswith("c.0.0.0.0.0") else data,
    )
    refused(tmp_path / "other", altered)


def test_an_import_without_room_is_refused_whole(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvdb.files.free_bytes", lambda _: 1 << 20)
    refused(tmp_path / "other", exported, StorageFull)
    with opened(tmp_path / "other") as db:
        db.set_size_cap(500 << 10)
    monkeypatch.undo()
    refused(tmp_path / "other", exported, StorageFull)


def test_an_import_needs_a_writable_store_and_a_good_name(tmp_path: Path, exported: Path) -> None:
    with KVDB.open(tmp_path / "source", "r") as db, pytest.raises(ReadOnly):
        db.import_sequence(exported)
    with opened(tmp_path / "other") as db:
        for name in ("", "a\nb", "x" * 513):
            with pytest.raises(InvalidInput, match="name is"):
                db.import_sequence(exported, name=name)
        assert db.sequences() == []
        with pytest.raises(FileNotFoundError):
            db.import_sequence(tmp_path / "nothing.zip")


def test_a_later_version_of_the_file_is_refused_with_a_message(tmp_path: Path, exported: Path) -> None:
    later = rewritten(exported, tmp_path / "x.zip", lambda name, data: data.replace(b'"export": 1', b'"export": 2'))
    refused(tmp_path / "other", later, InvalidInput)
