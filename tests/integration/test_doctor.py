"""`kvdb doctor` as a user meets it: facts, sentences, exit codes; a store stays as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import extend, opened, token_list
from typer.testing import CliRunner

from kvdb import KVDB, place
from kvdb.mounts import mount_of
from kvdb.surroundings import Surroundings
from kvdb.tools.cli import app


def here(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "a.kvdb"
    with opened(path) as db:
        extend(db, token_list(60), name="n")
    return path


def content(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock.mdb"
    }


def test_the_facts_and_the_verdict_are_printed(store: Path) -> None:
    before = content(store)
    code, out, err = here("doctor", store, "--probe")
    assert (code, err) == (0, ""), out
    for label in ("folder", "file system", "free", "locks", "maps of files", "direct reads", "fsync", "read_mode auto", "system", "cores",
                  "memory", "pages", "limits", "io_uring", "reads in flight", "versions", "compiled loops", "GPU"):  # fmt: skip
        assert any(line.startswith(f"{label} ") for line in out.splitlines()), label
    with KVDB.open(store, "r") as db:
        assert f"{db.read_mode}: " in out
    assert "unsafe" not in out
    assert content(store) == before
    assert sorted(path.name for path in store.parent.iterdir()) == ["a.kvdb"]


def test_json_has_every_fact_and_every_sentence(store: Path) -> None:
    code, out, err = here("doctor", store, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert sorted(told) == sorted([*Surroundings.__struct_fields__, "findings"])
    assert told["accelerator"]["threads"] >= 1
    assert told["fsync"] is None
    assert all(sorted(finding) == ["about", "do", "level", "what"] for finding in told["findings"])
    assert json.loads(here("doctor", "--json")[1])["place"] is None


def test_what_is_unsafe_exits_with_1_and_says_what_to_do(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"host:/x {tmp_path} nfs4 rw 0 0\n")
    monkeypatch.setattr(place, "mount_of", lambda path: mount_of(path, mounts))
    code, out, _ = here("doctor", store)
    assert code == 1
    assert "unsafe: file system: nfs4 is a network file system" in out
    assert "put the store on a local disk" in out
    assert "1 thing to change before a store is used here" in out
    assert here("doctor", store, "--json")[0] == 1


def test_a_damaged_store_is_told_and_the_rest_is_shown(store: Path) -> None:
    data = next(store.rglob("data.mdb"))
    data.write_bytes(data.read_bytes()[:5000])
    before = content(store)
    code, out, _ = here("doctor", store)
    assert code == 1
    assert "unsafe: store: it cannot be opened: " in out
    assert f"kvdb repair {store}" in out
    assert "file system " in out
    assert content(store) == before


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_bad_input_exits_with_2(store: Path, tmp_path: Path, as_json: bool) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    (tmp_path / "newer").mkdir()
    header = json.loads(next(store.glob("*.json")).read_text())
    (tmp_path / "newer" / next(store.glob("*.json")).name).write_text(json.dumps({**header, "format": 99}))
    for arguments, message in (
        (["doctor", tmp_path / "none"], "no store there"),
        (["doctor", tmp_path / "notes"], "a folder without kvdb.json, expected a store or an empty folder"),
        (["doctor", tmp_path / "notes" / "diary.txt"], "a file, expected a folder"),
        (["doctor", tmp_path / "newer"], "format 99"),
        (["doctor", "--probe"], "--probe: no STORE, expected one"),
    ):
        code, out, err = here(*arguments, *(["--json"] if as_json else []))
        assert code == 2, (arguments, out, err)
        assert message in (json.loads(out)["error"]["message"] if as_json else err), arguments


def test_an_empty_folder_is_looked_at_before_a_store_is_made(tmp_path: Path) -> None:
    code, out, _ = here("doctor", tmp_path)
    assert code == 0
    assert "none here yet" in out
    assert "not tried: no file of a sound store to try it with" in out
    assert list(tmp_path.iterdir()) == []


def test_names_from_outside_drive_no_terminal(tmp_path: Path) -> None:
    evil = tmp_path / "a\x1b[31m[bold]b"
    evil.mkdir()
    code, out, _ = here("doctor", evil)
    assert code == 0
    assert "\x1b" not in out
    assert "[bold]b" in out


def test_help_needs_neither_torch_nor_the_engine_of_reading(tmp_path: Path) -> None:
    asks = "import sys; sys.argv = ['kvdb', 'doctor', '--help']\nfrom kvdb.tools.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    asks += "print({'torch', 'transformers', 'zarr', 'numba'} & set(sys.modules))"
    told = subprocess.run(
        [sys.executable, "-c", asks], capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ}
    )
    assert told.stdout.splitlines()[-1] == "set()"
