"""Where the command line writes: results to stdout, everything else to stderr, errors as one line or one JSON object.

Exit codes: 0 fine, 1 a problem was found, 2 usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from kvdb.errors import (
    Damaged,
    KVDBError,
    OutOfMemory,
    PrefixDeleted,
    Problem,
    StorageFull,
    StoreError,
    StoreLocked,
)

PROBLEM: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130
_CONTROLS: Final = {c: "\N{REPLACEMENT CHARACTER}" for c in [*range(32), *range(127, 160)] if c not in b"\n\t"}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a sentence about what was kept."""


def stdout_console() -> Console:
    """Into a pipe or a file lines are as long as they need to be, for grep."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 240)


def stderr_console() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """JSON has no NaN and no infinity: such a number is null."""
    print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def finite(value: Any) -> Any:
    """A tree of JSON values with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def visible(text: str) -> str:
    """Text from files or models without control characters, which could drive a terminal. Newlines and tabs stay."""
    return text if text.isprintable() else text.translate(_CONTROLS)


@contextmanager
def working(what: str, *, interrupted: str) -> Iterator[None]:
    """Say on stderr, where that is a terminal, what takes long.

    interrupted  what Ctrl-C leaves behind, as a sentence
    """
    with stderr_console().status(Text(visible(what))):
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(interrupted) from None


def print_problems(problems: list[Problem]) -> None:
    console = stdout_console()
    for problem in problems:
        console.print(Text.assemble((f"{problem.kind}: ", "bold red"), visible(str(problem))), soft_wrap=True)


def problems_json(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"loc": p.loc, "kind": p.kind, "message": p.message} for p in problems]


def report_error(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong; returns the exit code."""
    kind, message, code = _described(error)
    if as_json:
        described: dict[str, Any] = {"error": {"kind": kind, "message": message}}
        print_json(described)
    else:
        label = "interrupted" if code == INTERRUPTED else "error"
        line = Text.assemble((f"{label}: ", "bold yellow" if code == INTERRUPTED else "bold red"), message)
        sys.stdout.flush()
        stderr_console().print(line, soft_wrap=True)
    return code


def _described(error: BaseException) -> tuple[str, str, int]:
    """(kind, message, exit code)."""
    message = visible(" ".join(str(error).split()))
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", message or "stopped before anything was changed", INTERRUPTED
    if isinstance(error, KVDBError):
        found = (
            isinstance(error, Damaged | StorageFull | StoreLocked | OutOfMemory | PrefixDeleted)
            or type(error) is StoreError
        )
        return error.kind, message, PROBLEM if found else BAD_INPUT
    if isinstance(error, OSError):
        where = visible(str(error.filename)) if error.filename is not None else ""
        reason = error.strerror or message or type(error).__name__
        return "os-error", f"{where}: {reason}" if where else reason, PROBLEM
    unexpected = (
        f"unexpected {type(error).__name__}: {message}; set KVDB_DEBUG=1 for the traceback, and please report it"
    )
    return "internal", unexpected, PROBLEM
