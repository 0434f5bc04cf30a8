"""Manifests: one file per named sequence, there before the name is visible and gone after it has gone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import assert_healthy, extend, opened, token_list, tree_bytes

from kvdb import KVDB, manifests


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def named(path: Path) -> dict[str, int]:
    """Name -> tokens, as the files say it."""
    found = [json.loads(data) for data in tree_bytes(path / "names").values()]
    return {each["name"]: each["tokens"] for each in found}


def test_a_manifest_follows_its_sequence(path: Path) -> None:
    tokens = token_list(96)
    with opened(path) as db:
        extend(db, tokens[:32])
        assert named(path) == {}
        key = extend(db, tokens[:32], name="n").key
        assert os.listdir(path / "names") == [f"{key}.json"]
        extend(db, tokens, name="n", segment_tokens=32)
        assert named(path) == {"n": 96}
        extend(db, tokens[:64], name="m")
        assert named(path) == {"n": 96, "m": 64}
        db.pin("m")
        assert [each.pinned for each in manifests.read(path / "names") if each.name == "m"] == [True]
        db.delete("n")
        assert named(path) == {"m": 64}
        db.compact()
        assert named(path) == {"m": 64}
        db.pin("m", False)
        db.evict(0, named=True)
        assert named(path) == {}


def test_a_manifest_is_the_entry_it_stands_for(path: Path) -> None:
    with opened(path) as db:
        stored = extend(db, token_list(40))
        db.put_sequence(stored.last, 40, name="名前", ttl_s=60, model="m")
        (found,) = manifests.read(path / "names")
        assert manifests.agree(found, db.sequence("名前"))
        assert found.root == db.sequence("名前").root


class Died(BaseException):
    pass


def test_a_commit_that_fails_leaves_no_manifest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as db:
        last = extend(db, token_list(40)).last

        def die(*_: object, **__: object) -> None:
            raise Died

        with monkeypatch.context() as m:
            m.setattr("kvdb.manifests.files.fsync_dir", die)
            with pytest.raises(Died):
                db.put_sequence(last, 40, name="n")
        assert os.listdir(path / "names") == []
        assert [s.name for s in db.sequences()] == [None]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"key": "\xff"}', b"[" * 100_000, b'{"key": 3}'], ids=ascii
)
def test_what_is_no_manifest_is_passed_over(path: Path, content: bytes) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="n")
    (path / "names" / f"{'0' * 32}.json").write_bytes(content)
    assert [each.name for each in manifests.read(path / "names")] == ["n"]
    with KVDB.open(path, "r") as db:
        assert [p.kind for p in db.check()] == ["orphan"]


def test_a_manifest_under_another_key_counts_for_nothing(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="n")
    (file,) = (path / "names").iterdir()
    file.rename(file.with_name(f"{'0' * 32}.json"))
    assert manifests.read(path / "names") == []


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_passed_over(path: Path, kind: str) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="n")
    odd = path / "names" / f"{'0' * 32}.json"
    match kind:
        case "folder":
            odd.mkdir()
        case "link":
            odd.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(odd)
    assert [each.name for each in manifests.read(path / "names")] == ["n"]


def test_of_two_manifests_with_one_name_the_later_comes_last(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(40, 1), name="n")
        older = tree_bytes(path / "names")
        extend(db, token_list(50, 2), name="n")
    for name, data in older.items():
        (path / "names" / name).write_bytes(data)
    assert [each.tokens for each in manifests.read(path / "names")] == [40, 50]
    with KVDB.open(path, "r") as db:
        assert db.check() != []


def test_every_manifest_is_private(path: Path) -> None:
    before = os.umask(0)
    try:
        with KVDB.open(path) as db:
            extend(db, token_list(40), name="n")
            assert_healthy(db)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (path / "names").iterdir()} == {0o600}
