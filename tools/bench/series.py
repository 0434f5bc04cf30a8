"""Benchmarks one after the other, each in a process of its own: what is finished on this machine with this code is not measured again.

A result appears whole or not at all, so what was interrupted begins anew, and all before it stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final, Literal, NamedTuple

from kvdb.errors import InvalidInput
from kvdb.tools.bench.compare import benchmark_of, read_result
from kvdb.tools.bench.machine import RESULTS_VARIABLE, command_line, host, machine, same
from kvdb.tools.bench.table import BENCHES, command, missing, result_file

State = Literal["measured", "kept", "skipped", "failed"]
_LOOKS_S: Final = 0.2
_PATIENCE_S: Final = 20.0
"""So long an interrupted benchmark has to remove what it made."""
_LONGEST_S: Final = 1e6
"""What claims to have taken longer is not believed."""


class Outcome(NamedTuple):
    """state: measured now; kept, as it was finished before; skipped, for want of what it needs; failed. told: what it printed, or why."""

    name: str
    state: State
    told: str
    seconds: float


def chosen(names: list[str]) -> list[str]:
    """Those that are named, in the order of the table; all without names.

    raises  InvalidInput for a name that is none
    """
    if unknown := sorted(set(names) - set(BENCHES)):
        raise InvalidInput(f"benchmark {unknown[0]!r}: not known, expected some of {', '.join(BENCHES)}")
    return [name for name in BENCHES if name in names or not names]


def finished(names: list[str], results: Path) -> set[str]:
    """Those of which there is a result of this code on this machine, made by the benchmark's own defaults."""
    here = host()
    return {
        name
        for name in names
        if (measured := machine_of(name, results)) is not None
        and same(measured, {**here, "command": command_line(command(name, str(results)))})
    }


def expected_s(name: str, results: Path) -> float:
    """About how long it takes: what it took here before, else what the table says."""
    before = machine_of(name, results) or {}
    took_s = before.get("took_s") if all(before.get(field) == value for field, value in machine().items()) else None
    if isinstance(took_s, int | float) and 0 <= took_s < _LONGEST_S:
        return float(took_s)
    return 60 * BENCHES[name].minutes


def machine_of(name: str, results: Path) -> dict[str, Any] | None:
    """What the result of a benchmark says it was measured on; None where there is none, or one of another benchmark."""
    file = result_file(name, results)
    try:
        result = read_result(file)
    except InvalidInput:
        return None
    measured: dict[str, Any] = result["machine"]
    return measured if benchmark_of(result) == file.stem else None


def measure(name: str, results: Path, watch: Callable[[float], None] = lambda _: None) -> Outcome:
    """Run one, whatever was there before.

    watch  called a few times a second, with the seconds so far
    """
    if lacks := missing(BENCHES[name]):
        return Outcome(name, "skipped", f"needs {' and '.join(lacks)}", 0.0)
    results.mkdir(parents=True, exist_ok=True)
    before, started = _stamp(result_file(name, results)), time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        code = _run(command(name, str(results)), results, out, err, watch)
        printed, complained = _text(out), _text(err)
    seconds = time.monotonic() - started
    if code:
        return Outcome(name, "failed", f"exit code {code}: {_last_line(complained or printed)}", seconds)
    if _stamp(result_file(name, results)) == before:
        return Outcome(name, "skipped", _last_line(printed), seconds)
    return Outcome(name, "measured", printed, seconds)


def _run(arguments: list[str], results: Path, out: IO[bytes], err: IO[bytes], watch: Callable[[float], None]) -> int:
    """The exit code. Ctrl-C reaches the benchmark and all its processes once, from us."""
    width = str(shutil.get_terminal_size().columns if sys.stdout.isatty() else 240)
    environment = {**os.environ, RESULTS_VARIABLE: str(results), "COLUMNS": width}
    with _ends_like_ctrl_c():
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=out, stderr=err, env=environment, process_group=0
        )
        started = time.monotonic()
        try:
            while process.poll() is None:
                watch(time.monotonic() - started)
                time.sleep(_LOOKS_S)
            return process.returncode
        except BaseException:
            _end(process)
            raise


@contextlib.contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP, too, must not leave a benchmark behind, which is in a group of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it clean up; another Ctrl-C, or no end in time, kills it and its processes."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        try:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(_PATIENCE_S)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(_PATIENCE_S)


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
