"""What the documents say works: their Python examples run as they stand, every file they name exists, and links lead somewhere."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_models import prompt, tiny

import kvdb
from kvdb.tools.cli import app

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
        *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ):
        named = re.findall(r"\b((?:kvdb|runtime|tools|docs|benchmarks)/[\w./-]*\w)", (ROOT / document).read_text())
        missing = {name for name in named if not (ROOT / name).exists()}
        assert missing == set()


def test_the_examples_of_how_to_embed_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/how-to-embed.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 8
    both = prompt(900)
    questions = [torch.cat([both, prompt(20, seed=seed)], dim=1) for seed in (1, 2)]
    known: dict[str, Any] = {"model": tiny(), "input_ids": both, "questions": questions}
    for at, block in enumerate(blocks):
        exec(compile(block, f"docs/how-to-embed.md, block {at}", "exec"), known)
    assert known["found"].tokens >= both.shape[1]
    assert len(known["answers"]) == 2
    with kvdb.KVDB.open("caches.kvdb", "r") as db:
        assert db.sequences() == []
        assert db.check() == []


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_somewhere(document: Path) -> None:
    """Those inside the repository; a part of a document by the words of its heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, part = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if part else []
        slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert not part or part in slugs, link


def test_commands_that_documents_show_exist() -> None:
    """Every `kvdb` line of the tutorial and of the README: its command, and the options it is given."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [
        *re.findall(r"^    \$ kvdb (.*)$", (ROOT / "docs/tutorial.md").read_text(), re.MULTILINE),
        *(line.partition("#")[0] for line in re.findall(r"^    kvdb (.*)$", README, re.MULTILINE)),
    ]
    assert len(lines) > 20
    for line in lines:
        name, *words = shlex.split(line)
        known = {option for param in commands[name].params for option in (*param.opts, *param.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line
