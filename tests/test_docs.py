"""What the README says works: its Python example runs as it stands, and every file of its tour exists."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
from tiny_models import prompt, tiny

import kvdb

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = README.split("## In Python\n", 1)[1].split("\n\nHow much attention reads", 1)[0]
    model, input_ids = tiny(), prompt(1500)
    known = {"model": model, "input_ids": input_ids}
    exec(compile(textwrap.dedent(example), "README.md", "exec"), known)
    with kvdb.KVDB.open("caches.kvdb", "r") as db:
        assert db.sequence("report").tokens > 1500
        assert db.check() == []


def test_every_file_that_documents_name_exists() -> None:
    for document in (
        "README.md",
        "SECURITY.md",
        *(f"docs/design/{path.name}" for path in (ROOT / "docs/design").iterdir()),
    ):
        named = re.findall(r"\b((?:kvdb|runtime|tools|docs|benchmarks)/[\w./-]*\w)", (ROOT / document).read_text())
        missing = {name for name in named if not (ROOT / name).exists()}
        assert missing == set()
