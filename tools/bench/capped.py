"""A memory limit for this process from now on: what it allocates, and what it brings into the page cache, from here.

Linux control groups, version 1 or 2, as root. What a process has when it enters stays charged where it was: so a model that is loaded
before does not count, and pages of files that are in the page cache already belong to whoever brought them. Force them out first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvdb.errors import Unsupported

_ROOT: Final = Path("/sys/fs/cgroup")


NO_LIMIT: Final = 1 << 50
"""As a limit: none, and what is charged can still be read."""


@contextmanager
def memory_cap(limit_bytes: int) -> Iterator[Path]:
    """Gives the control group's folder.

    raises  Unsupported where this process may make no control group with a memory limit
    """
    limit = "memory.limit_in_bytes" if _first_version() else "memory.max"
    group, parent = _group(os.getpid()), _group(os.getpid()).parent
    try:
        group.mkdir()
        (group / limit).write_text(str(limit_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as e:
        group.rmdir() if group.is_dir() else None
        raise Unsupported(
            f"memory cap: {group}: {e.strerror}, expected a control group with a memory limit; run as root on Linux"
        ) from e
    try:
        yield group
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def can_cap() -> bool:
    """Whether this process may make such a group."""
    parent = _group(os.getpid()).parent
    return os.access(parent, os.W_OK) and (_first_version() or "memory" in _controllers(parent))


def page_cache_bytes(group: Path) -> int:
    """Of files: what is in the page cache now and was brought there from within the group."""
    charged = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(charged["cache" if _first_version() else "file"])


def remove_group(pid: int) -> None:
    """Of a process that was killed inside `memory_cap`; nothing happens where there is none."""
    if (group := _group(pid)).is_dir():
        group.rmdir()


def _first_version() -> bool:
    return (_ROOT / "memory").is_dir()


def _controllers(group: Path) -> list[str]:
    try:
        return (group / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _group(pid: int) -> Path:
    return (_ROOT / "memory" if _first_version() else _ROOT) / f"kvdb-bench-{pid}"


def force_out(files: list[Path]) -> None:
    """Bring files out of the page cache; no process may have them mapped."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
