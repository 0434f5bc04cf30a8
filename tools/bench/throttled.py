"""A limit for how fast this process reads from a disk, so that a fast disk stands for a slow one.

Linux control groups, version 1 or 2, as root. Reads that the page cache answers are not slowed, nor are writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvdb.errors import Unsupported

_ROOT: Final = Path("/sys/fs/cgroup")
_DEVICES: Final = Path("/sys/dev/block")


@contextmanager
def read_limit(folder: Path, bytes_per_second: int) -> Iterator[None]:
    """For all files of the disk that a folder is on.

    raises  Unsupported where this process may make no control group that limits reads, or the folder is on no disk
    """
    first, group, parent = _first_version(), _group(os.getpid()), _group(os.getpid()).parent
    limit = "blkio.throttle.read_bps_device" if first else "io.max"
    try:
        group.mkdir()
        (group / limit).write_text(f"{_disk_of(folder)} {'' if first else 'rbps='}{bytes_per_second}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as e:
        group.rmdir() if group.is_dir() else None
        raise Unsupported(
            f"read limit: {e.filename or group}: {e.strerror}, expected a disk and a control group that limits reads from it; run as root on "
            "Linux, in a folder on a disk"
        ) from e
    try:
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def can_throttle() -> bool:
    """Whether this process may make such a group."""
    parent = _group(os.getpid()).parent
    return os.access(parent, os.W_OK) and (_first_version() or _controls_io(parent))


def _first_version() -> bool:
    return (_ROOT / "blkio").is_dir()


def _controls_io(group: Path) -> bool:
    try:
        return "io" in (group / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


def _group(pid: int) -> Path:
    return (_ROOT / "blkio" if _first_version() else _ROOT) / f"kvdb-bench-reads-{pid}"


def _disk_of(folder: Path) -> str:
    """Numbers of the whole disk, "254:0": partitions have no limits of their own.

    raises  OSError where there is none
    """
    number = os.stat(folder).st_dev
    device = (_DEVICES / f"{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    return ((device.parent if (device / "partition").exists() else device) / "dev").read_text().strip()
