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


@contextmanager
def memory_cap(limit_bytes: int) -> Iterator[None]:
    """raises  Unsupported where this process may make no control group with a memory limit"""
    first = (_ROOT / "memory").is_dir()
    parent, limit = (_ROOT / "memory", "memory.limit_in_bytes") if first else (_ROOT, "memory.max")
    group = parent / f"kvdb-bench-{os.getpid()}"
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
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def force_out(files: list[Path]) -> None:
    """Bring files out of the page cache; no process may have them mapped."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
