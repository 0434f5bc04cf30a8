"""`python -m kvdb.tools.demo`, which is `make demo`: the main job, three times, through the real command.

A document of about 7 000 tokens (the Python language reference), one question asked in two processes, then another
question. Exits with 1 if the second process did not reuse what the first stored, or if the store is not whole.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from kvdb.store import KVDB
from kvdb.tools.documents import reference_document
from kvdb.tools.models import load_model
from kvdb.tools.sizes import seconds_text

FOLDER: Final = Path("build/demo")
STORE: Final = "demo.kvdb"
DOCUMENT: Final = "language-reference.txt"
STATS: Final = "stats.json"
TOKENS: Final = 7_000
QUESTION: Final = "What does the with statement do?"
ANOTHER_QUESTION: Final = "What is the assert statement for?"


def main() -> int:
    console = Console(highlight=False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if (FOLDER / STORE).exists():
        KVDB.open(FOLDER / STORE, "w").close()  # refuses to empty what is no store
    _write_document(console)
    console.print(f"\nIn {FOLDER}:", style="dim")
    first = _ask(console, "the first run computes the document's KV and stores it", QUESTION)
    second = _ask(console, "another process, the same question: nothing is computed again", QUESTION)
    other = _ask(console, "another question: the document is reused", ANOTHER_QUESTION)
    _run(console, "what the store holds", ["ls", STORE])
    _run(console, "is every byte what was written?", ["verify", STORE])
    return _verdict(console, first, second, other)


def _write_document(console: Console) -> None:
    tokenizer = load_model("smollm2", progress=lambda line: console.print(line, style="dim")).tokenizer
    text = reference_document(tokenizer, TOKENS)
    (FOLDER / DOCUMENT).write_text(text, encoding="utf-8")


def _ask(console: Console, what: str, question: str) -> dict[str, Any]:
    command = ["ask", STORE, question, "--document", DOCUMENT, "--budget", "0.2"]
    _run(console, what, command, hidden=["--stats", STATS])
    found: dict[str, Any] = json.loads((FOLDER / STATS).read_text())
    (FOLDER / STATS).unlink()
    return found


def _run(console: Console, what: str, command: list[str], *, hidden: list[str] | None = None) -> None:
    """Show a command and run it; a failure ends the demo with its exit code."""
    console.print()
    console.print(Text.assemble((f"# {what}\n", "dim"), ("$ ", "dim"), ("kvdb " + shlex.join(command), "bold")), soft_wrap=True)  # fmt: skip
    code = subprocess.run(
        [sys.executable, "-m", "kvdb.tools.cli", *command, *(hidden or [])], cwd=FOLDER, env=_environment()
    ).returncode
    if code:
        raise SystemExit(code)


def _environment() -> dict[str, str]:
    """The same environment; a relative cache folder would mean another one from where the commands run."""
    changed = {
        name: os.path.abspath(os.path.expanduser(value))
        for name in ("KVDB_CACHE_DIR", "XDG_CACHE_HOME")
        if (value := os.environ.get(name))
    }
    return {**os.environ, **changed}


def _verdict(console: Console, first: dict[str, Any], second: dict[str, Any], other: dict[str, Any]) -> int:
    """Say whether reuse happened: 0 if so, 1 if not."""
    console.print()
    everything = second["prompt_tokens"] - 1  # the last prompt token is always computed
    same = second["answer"] == first["answer"]
    if second["reused_tokens"] != everything or not same or other["reused_tokens"] < 0.9 * everything:
        console.print(
            f"demo failed: reused {second['reused_tokens']} and {other['reused_tokens']} of {everything} tokens, "
            f"expected {everything} and most of them; answers {'equal' if same else 'differ'}",
            style="bold red",
        )
        return 1
    before, after = first["time_to_first_token_seconds"], second["time_to_first_token_seconds"]
    if first["reused_tokens"] == 0:
        console.print(
            Text.assemble(
                ("ok: ", "bold green"),
                f"first token after {seconds_text(before)} in the first run, {seconds_text(after)} in the second "
                f"({before / after:.0f} times sooner)",
            ),
            soft_wrap=True,
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
