"""What a figure was measured on and with: machine, versions, commit, a digest of the code, the command. torch is not imported for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import xxhash

import kvdb
from kvdb.machine import versions

_BEGAN: Final = time.monotonic()
RESULTS_VARIABLE: Final = "KVDB_BENCH_RESULTS"
"""Of the environment: another folder for results."""
MACHINE: Final = ("cpu", "cores")
"""Fields that tell machines apart."""
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_SAME: Final = (*MACHINE, "python", "commit", "code", "versions", "threads_from", "command")
"""Fields that are equal where a measurement need not be made again."""


def machine() -> dict[str, Any]:
    """What tells this machine from others."""
    return {"cpu": _cpu(), "cores": os.cpu_count()}


def host() -> dict[str, Any]:
    """JSON-safe.

    cpu       its model name
    commit    of the checkout that the code is in, "unknown" elsewhere; `code` is 16 hex digits over every module, changed files included
    threads_from  what the number of threads follows from where a benchmark sets none
    command   what python was told to run
    took_s    seconds since this process began
    """
    return {
        **machine(),
        "python": platform.python_version(),
        "kvdb": kvdb.__version__,
        "commit": _commit(),
        "code": code_digest(),
        "versions": versions(),
        "threads_from": _threads_from(),
        "command": command_line(sys.orig_argv[1:]),
        "took_s": round(time.monotonic() - _BEGAN, 1),
    }


def command_line(arguments: list[str]) -> str:
    return " ".join(arguments)


def same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two are of the same code and command on the same machine."""
    return all(field in old and old[field] == new[field] for field in _SAME)


def code_digest() -> str:
    """Of every module of the engine, the runtime and the tools, as they lie on the disk."""
    digest = xxhash.xxh3_64()
    for path in sorted({path.resolve() for folder in _folders() for path in folder.rglob("*.py")}):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _threads_from() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {"usable_cores": usable, **{name: os.environ.get(name) for name in _THREAD_VARIABLES}}


def _folders() -> list[Path]:
    """Of the three packages, which lie in one folder or in three; nothing is imported."""
    specs = [find_spec(name) for name in ("kvdb.runtime", "kvdb.tools")]
    outer = [Path(folder).resolve() for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    return [Path(kvdb.__file__).resolve().parent, *outer]


def _commit() -> str:
    where = str(Path(kvdb.__file__).resolve().parent)
    ours = [
        "git",
        "-C",
        where,
        "ls-files",
        "--error-unmatch",
        "__init__.py",
    ]  # an installation may lie in somebody else's checkout
    try:
        if subprocess.run(ours, capture_output=True, check=False).returncode:
            return "unknown"
        told = subprocess.run(
            ["git", "-C", where, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git
        return "unknown"
    return told.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.processor())
