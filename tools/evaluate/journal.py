"""What has been judged so far, in a file: an evaluation that was interrupted goes on from it.

One JSON object a line. The first says what was judged with; each other one is a text or a needle and what every configuration made of
it. A line that was not written to its end is made again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec

from kvdb.errors import InvalidInput
from kvdb.tools.evaluate.report import Answered, Quality


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """of: the text or needle, its token ids included. texts, needles: by configuration; what dense attention does not find has none."""

    of: str
    texts: dict[str, Quality] = {}
    needles: dict[str, Answered] = {}


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    judged_with: dict[str, Any]


class Journal:
    """with_: what must be equal for figures to belong together, JSON-safe.

    raises  InvalidInput for a file that is no journal, or one of another evaluation; OSError
    """

    def __init__(self, path: Path, with_: dict[str, Any]) -> None:
        self._path, self._found = path, dict[str, Judged]()
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        if not lines:
            path.write_bytes(msgspec.json.encode(_Header(judged_with=with_)) + b"\n")
            return
        self._expect(lines[0], with_)
        whole = len(lines[0])
        for line in lines[1:]:
            with contextlib.suppress(msgspec.DecodeError):
                judged = msgspec.json.decode(line, type=Judged)
                if line.endswith(b"\n"):
                    self._found[judged.of] = judged
                    whole += len(line)
                    continue
            break
        os.truncate(path, whole)

    def _expect(self, line: bytes, with_: dict[str, Any]) -> None:
        try:
            found = msgspec.json.decode(line, type=_Header).judged_with
        except msgspec.DecodeError as e:
            raise InvalidInput(
                f"--keep {self._path}: {e}, expected what 'kvdb eval --keep' wrote; name another file"
            ) from None
        if differ := sorted(name for name in {*found, *with_} if found.get(name) != with_.get(name)):
            raise InvalidInput(
                f"--keep {self._path}: of an evaluation with other {', '.join(differ)}, expected this one; name another file, or delete it"
            )

    def get(self, of: str) -> Judged | None:
        return self._found.get(of)

    def add(self, judged: Judged) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(judged) + b"\n")
        self._found[judged.of] = judged
