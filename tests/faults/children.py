"""Lives and judges in processes of their own, forked from a server that has everything imported and no store open.

A fork takes a millisecond where a new interpreter takes hundreds, and a store that crashes or hangs its reader costs a
child and not the test run. One nursery per thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import plants
from faults.workload import LIFE, SCRIPTS, Life, Violation, ack_file, acks_of, judge, repeatable
from helpers import python

HUNG = "hung"
PATIENCE_S = 30


class Nursery:
    """The server, seen from a test."""

    def __init__(self) -> None:
        self._server = python("from faults.children import serve; serve()")
        assert self._server.stdout is not None
        if self._server.stdout.readline() != "ready\n":
            raise RuntimeError(self._server.communicate()[1])

    def close(self) -> None:
        self._server.communicate(timeout=PATIENCE_S)

    def _ask(self, *request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request, default=str) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def live(
        self,
        path: Path,
        acks: Path,
        *,
        script: str = "life",
        plant: str | None = None,
        look: bool = False,
        stopped: bool = False,
    ) -> int:
        """Begin a life and return its pid.

        look     at the end the process itself looks at its store
        stopped  it waits for SIGCONT before it begins
        """
        return int(self._ask("live", path, acks, script, plant, look, stopped))

    def wait(self, pid: int) -> int | str:
        """Exit code of a child, negative for a signal, or HUNG. A child that hangs is killed."""
        return self._ask("wait", pid)

    def kill(self, pid: int) -> None:
        """Kill a child that nobody has waited for yet."""
        os.kill(pid, signal.SIGKILL)

    def verdict(
        self, path: Path, acks: Path, status: int | str = 0, *, script: str = "life", plant: str | None = None
    ) -> Violation | None:
        """What is wrong with a life that ended with `status` and with the store it left; None if nothing is."""
        for what in ("its life", "its judge"):
            if status == HUNG:
                return Violation(HUNG, f"{what} took more than {PATIENCE_S} s")
            if status not in (0, -signal.SIGKILL) or (status != 0 and what == "its judge"):
                said = _said(acks).read_text() if _said(acks).exists() else f"exit status {status}"
                kind, _, message = said.partition(": ")
                return Violation(kind if kind.isalpha() else "crashed", f"{what}: {message}")
            if what == "its life":
                status = self.wait(int(self._ask("judge", path, acks, script, plant)))
        return None


def duration_s(nurse: Nursery, path: Path, acks: Path) -> float:
    """How long a life takes that nothing happens to: random moments lie within it."""
    begin = time.monotonic()
    assert nurse.wait(nurse.live(path, acks)) == 0
    return time.monotonic() - begin


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    server = Nursery()
    try:
        yield server
    finally:
        server.close()


def _said(acks: Path) -> Path:
    return acks.with_suffix(".said")


# -- in the server


def serve() -> None:
    _live_once()
    print("ready", flush=True)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        answer = {"live": _live, "judge": _judge, "wait": _wait}[what](*arguments)
        print(json.dumps(answer), flush=True)


def _live_once() -> None:
    """Whatever is compiled, loaded or imported when it is first needed is there before the first fork: a life would spend more calls on
    that than on its store, and LLVM aborts where it finds no memory for a loop."""
    with tempfile.TemporaryDirectory() as folder, repeatable():
        Life(Path(folder) / "s", lambda _: None).live(LIFE)


def _fork(acks: str, act: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException as error:
            said = str(error) if isinstance(error, Violation) else f"crashed: {traceback.format_exc()}"
            _said(Path(acks)).write_text(said)
            os._exit(1)
        os._exit(0)
    return pid


def _live(path: str, acks: str, script: str, plant: str | None, look: bool, stopped: bool) -> int:
    def act() -> None:
        acknowledge = ack_file(Path(acks))
        with repeatable(), plants.planted(plant):
            if stopped:
                os.kill(os.getpid(), signal.SIGSTOP)
            life = Life(Path(path), acknowledge)
            life.live(SCRIPTS[script])
            if look:
                life.look(SCRIPTS[script])

    pid = _fork(acks, act)
    if stopped:
        os.waitpid(pid, os.WUNTRACED)
    return pid


def _judge(path: str, acks: str, script: str, plant: str | None) -> int:
    def act() -> None:
        with plants.planted(plant):
            judge(Path(path), acks_of(Path(acks)), SCRIPTS[script])

    return _fork(acks, act)


def _wait(pid: int) -> int | str:
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], PATIENCE_S)[0]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(pidfd)
