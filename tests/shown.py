"""A store and a trace to be shown, and the command line inside this process: what tests of reports share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers import extend, token_list, tree_bytes
from typer.testing import CliRunner

from kvdb import KVDB
from kvdb.runtime.timeline import Timeline, Trace
from kvdb.tools.cli import app

NASTY = "</script><img src=x onerror=alert(1)> \"&'"


def here(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def unchanged(store: Path) -> dict[str, bytes]:
    """All files of a store but LMDB's table of readers."""
    return {name: data for name, data in tree_bytes(store).items() if not name.endswith("lock.mdb")}


def make_store(path: Path) -> None:
    """Seventy named sequences that share a prompt, one of 3 000 tokens, and one whose name is hostile."""
    with KVDB.open(path, durability="relaxed") as db:
        prompt = token_list(64)
        for number in range(70):
            tokens = [*prompt.tolist(), *token_list(16 + number, 100 + number).tolist()]
            extend(db, np.array(tokens, prompt.dtype), name=f"chat {number:02}")
        extend(db, token_list(3000, 1), name="long", segment_tokens=1024)
        extend(db, token_list(32, 2), name=NASTY)
        db.pin("long")
        for _ in range(3):
            db.touch(db.sequence("chat 07").spans)


def make_trace(path: Path) -> None:
    """What the runtime writes: four steps of two layers."""
    made = Trace()
    timeline = Timeline(made)
    for step in range(4):
        at = step * 10_000_000
        for layer in range(2):
            timeline.note("read", layer, 1000 * (1 + step + layer), at + 1_000_000, at + 2_000_000)
            timeline.note("attend", layer, 0, at + 2_000_000, at + 5_000_000)
        timeline.note("step", None, 0, at, at + 9_000_000)
    made.write(path)
