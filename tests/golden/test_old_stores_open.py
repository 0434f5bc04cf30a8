"""Stores of every released format open, and hold what was stored in them, bit for bit (R19); a newer one is left alone."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from golden.make_golden import CONTENT, SIZE_CAP
from helpers import assert_reads_back, extend, opened, token_list, tree_bytes

from kvdb import KVDB
from kvdb.errors import OlderFormat, StoreError
from kvdb.format import FORMAT_VERSION

GOLDEN = sorted(Path(__file__).parent.glob("v*.zip"))
every_store = pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)


def unpacked(golden: Path, target: Path) -> Path:
    with zipfile.ZipFile(golden) as archive:
        archive.extractall(target)
    return target


def assert_holds_the_content(db: KVDB) -> None:
    for known in CONTENT:
        match = db.match(known.ident, known.tokens, exact=known.fidelity == "exact")
        assert match.tokens == len(known.tokens), known.name
        assert_reads_back(db, known.tokens, match.spans)
        if known.name is not None:
            named = db.sequence(known.name)
            assert (named.tokens, named.fidelity, named.identity) == (
                len(known.tokens),
                known.fidelity,
                known.ident.digest().hex(),
            )
            assert np.array_equal(db.tokens(named.spans), known.tokens)
    assert {s.name for s in db.sequences()} == {known.name for known in CONTENT}
    ends = {known.tokens.tobytes() for known in CONTENT}
    assert {db.tokens(s.spans).tobytes() for s in db.sequences()} == ends


def test_there_is_a_store_of_every_released_format() -> None:
    assert [path.stem for path in GOLDEN] == [f"v{version}" for version in range(FORMAT_VERSION + 1)]


@every_store
def test_it_holds_what_was_stored_and_goes_on(golden: Path, tmp_path: Path) -> None:
    root = unpacked(golden, tmp_path / "s")
    with opened(root) as db:
        assert db.header.format == FORMAT_VERSION
        assert_holds_the_content(db)
        assert extend(db, CONTENT[0].tokens, name="again").written is False
        extend(db, token_list(40, 77), name="new")
    with opened(root, "r", read_mode="pread") as db:
        assert_reads_back(db, token_list(40, 77), db.sequence("new").spans)
        assert_reads_back(db, CONTENT[0].tokens, db.sequence("again").spans)


@every_store
def test_it_takes_other_abstracts(golden: Path, tmp_path: Path) -> None:
    with opened(unpacked(golden, tmp_path / "s")) as db:
        for wanted in (("sketch",), (), ("box",)):
            assert db.set_abstracts(None, wanted) == db.info()["segments"]
            assert_holds_the_content(db)


@every_store
def test_its_arrays_stay_as_they_are(golden: Path, tmp_path: Path) -> None:
    root = unpacked(golden, tmp_path / "s")
    before = tree_bytes(root / "chunks")
    with opened(root):
        pass
    assert tree_bytes(root / "chunks") == before


def test_the_current_format_is_read_without_being_changed(tmp_path: Path) -> None:
    root = unpacked(GOLDEN[-1], tmp_path / "s")
    before = tree_bytes(root)
    with opened(root, "r") as db:
        assert_holds_the_content(db)
        assert [s.name for s in db.sequences() if s.pinned] == ["report"]
        assert db.info()["size_cap"] == SIZE_CAP
    assert {name: data for name, data in tree_bytes(root).items() if name != "catalog/lock.mdb"} == before


@pytest.mark.parametrize("golden", GOLDEN[:-1], ids=lambda path: path.stem)
def test_an_older_format_is_not_read_before_it_is_upgraded_and_left_untouched(golden: Path, tmp_path: Path) -> None:
    root = unpacked(golden, tmp_path / "s")
    before = tree_bytes(root)
    with pytest.raises(OlderFormat, match="open it once with mode"):
        KVDB.open(root, "r")
    assert tree_bytes(root) == before


@pytest.mark.parametrize("mode", ["r", "r+", "a", "w", "w-"])
@every_store
def test_a_newer_format_is_refused_and_left_byte_identical(golden: Path, tmp_path: Path, mode: str) -> None:
    root = unpacked(golden, tmp_path / "s")
    header = json.loads((root / "kvdb.json").read_text())
    (root / "kvdb.json").write_text(json.dumps(header | {"format": FORMAT_VERSION + 1, "colour": "blue"}))
    before = tree_bytes(root)
    with pytest.raises(StoreError, match=r"upgrade kvdb|a store is there"):
        KVDB.open(root, mode)  # type: ignore[arg-type]
    assert tree_bytes(root) == before
