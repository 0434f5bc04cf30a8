"""Names cannot escape: no string a user, a store or an exported file gives ever becomes a path outside the store.

What stands beside the store is listed before and after; inside, every file has a name the engine makes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import assert_healthy, extend, identity, opened, token_list

from kvdb import KVDB
from kvdb.errors import KVDBError, SequenceNotFound
from kvdb.repair import repair

PARTS = [
    "../escape", "../../escape", "/tmp/kvdb-escape", "..", ".", "~/escape", "a/b", "a\\b", "..\\escape", "C:\\escape",
    "\\\\host\\share", "CON", "NUL", "$(touch escape)", "`touch escape`", "; touch escape", "| touch escape", "%2e%2e%2fescape",
    "..%2fescape", "%c0%ae%c0%ae/escape", "\u2025/escape", "\uff0e\uff0e/escape", "e\u0301", "\u00e9", "-rf", "--help", "*", "?",
    "{0.__class__}", "%s%n", "' OR 1=1 --", '"; DROP TABLE names', "<script>", "kvdb.json", "catalog", "data.mdb", "zarr.json",
    "tmp", "lock", ".json", "names/escape", "\0escape", "a\0b", "a\nb", "a\rb", "\x1b[2J", "\u202eevil", "\ud800", "\ufeffbom", " ", "",
    "x" * 255, "x" * 512, "x" * 513, "\U0001f4a9" * 200, "名前", "nul\x00.json",
]  # fmt: skip
WRAPS = ["{}", "{}/x", "x/{}", "{}.json", "../{}", "./{}", "{}\t", "//{}", "{}/../../escape", "file://{}"]
HOSTILE = list(
    dict.fromkeys(wrap.format(part) if "{0" not in part else part for wrap, part in itertools.product(WRAPS, PARTS))
)[:500]
OURS = re.compile(
    r"kvdb\.json|(catalog|chunks|names|tmp|trash|quarantine)"
    r"|catalog/(data\.mdb|lock\.mdb|write\.lock|ballast)"
    r"|(chunks|trash)/(zarr\.json|[0-9a-f]{32}\.(kv|box)\d+(/(zarr\.json|c\.0\.0\.0\.0\.0))?)"
    r"|names/[0-9a-f]{32}\.json"
    r"|tmp/\d+-[0-9a-f]{16}(/lock)?"
)


@contextlib.contextmanager
def nothing_escapes(root: Path) -> Iterator[None]:
    """The folder around the store, and what a name might reach beyond it, are the same before and after."""

    def around() -> set[str]:
        found = {str(p) for p in root.parent.rglob("*") if not p.is_relative_to(root)}
        return found | {
            str(p) for p in (Path("/tmp/kvdb-escape"), Path.home() / "escape", Path("escape")) if p.exists()
        }

    before = around()
    yield
    assert around() == before
    for path in root.rglob("*"):
        inside = str(path.relative_to(root))
        assert OURS.fullmatch(inside), inside
        assert not path.is_symlink()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "a" / "b" / "store"


def test_there_are_500_hostile_names() -> None:
    assert len(HOSTILE) == len(set(HOSTILE)) == 500


def test_no_name_of_a_sequence_escapes(root: Path) -> None:
    taken = 0
    with KVDB.open(root) as db:
        last = extend(db, token_list(20)).last
        with nothing_escapes(root):
            for name in HOSTILE:
                try:
                    key = db.put_sequence(last, 20, name=name)
                except KVDBError:
                    with pytest.raises(SequenceNotFound):
                        db.sequence(name)
                    continue
                taken += 1
                assert db.sequence(name).key == key
                db.pin(name)
                db.pin(name, False)
                assert len(os.listdir(root / "names")) == 1
                db.delete(name)
                assert os.listdir(root / "names") == []
        assert_healthy(db)
    assert taken > 200  # most are ugly, not refused


def test_no_name_that_is_only_asked_for_escapes(root: Path) -> None:
    with KVDB.open(root) as db, nothing_escapes(root):
        for name in HOSTILE:
            for ask in (
                db.sequence,
                db.delete,
                db.pin,
                db.compact,
                lambda n: db.export_sequence(n, root.parent / "never.zip"),
            ):
                with pytest.raises(KVDBError):
                    ask(name)


def test_no_salt_weights_or_model_escapes(root: Path) -> None:
    with KVDB.open(root) as db, nothing_escapes(root):
        for number, text in enumerate(HOSTILE[::10]):
            with contextlib.suppress(KVDBError):
                ident = identity(text, salt=text, config={"rope_theta": text})
                stored = extend(db, token_list(20), ident=ident)
                db.put_sequence(stored.last, 20, name=f"n{number}", model=text)
        assert_healthy(db)


def test_no_text_in_a_manifest_escapes(root: Path) -> None:
    with opened(root) as db:
        extend(db, token_list(20), name="n")
    manifest = next((root / "names").iterdir())
    good = json.loads(manifest.read_text())
    with nothing_escapes(root):
        for number, text in enumerate(HOSTILE):
            field = ("segment", "key", "name", "identity", "model")[number % 5]
            spans = [dict(good["spans"][0], segment=text)] if field == "segment" else good["spans"]
            manifest.write_text(json.dumps(good | {"spans": spans} | ({} if field == "segment" else {field: text})))
            if number % 25 < 5:
                repair(root, apply=True, rebuild=True)
                for path in (root / "quarantine").iterdir():
                    assert re.fullmatch(r"(catalog|[0-9a-f]{32}\.json)(\.[0-9a-f]{8})?", path.name)
                    path.unlink() if path.is_file() else [p.unlink() for p in path.iterdir()] and path.rmdir()
    repair(root, apply=True)
    with opened(root):
        pass


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_no_text_in_an_exported_file_escapes(root: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "source") as db:
        extend(db, token_list(20), name="n")
        db.export_sequence("n", tmp_path / "good.zip")
    with zipfile.ZipFile(tmp_path / "good.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    good = json.loads(members["kvdb-sequence.json"])
    segment = good["segments"][0]["info"]["segment"]
    bad = tmp_path / "bad.zip"
    bad.touch()
    with KVDB.open(root) as db:
        db.own_workspace()
        with nothing_escapes(root):
            for number, text in enumerate(HOSTILE):
                described = json.loads(members["kvdb-sequence.json"])
                match number % 4:
                    case 0:
                        described["segments"][0]["info"]["segment"] = text
                    case 1:
                        described["segments"][0]["info"]["abstracts"] = [text]
                    case 2:
                        described["sequence"]["key"] = text
                    case 3:
                        described["sequence"]["name"] = text
                with zipfile.ZipFile(bad, "w") as archive:
                    archive.writestr("kvdb-sequence.json", json.dumps(described))
                    for name, data in members.items():
                        if name != "kvdb-sequence.json":
                            archive.writestr(name if number % 2 else name.replace(segment, text), data)
                with contextlib.suppress(KVDBError):
                    db.import_sequence(bad)
        assert_healthy(db)
