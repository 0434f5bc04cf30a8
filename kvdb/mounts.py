"""Which file system a path lies on, as Linux tells it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

MOUNTS: Final = Path("/proc/self/mounts")
NETWORK: Final = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "ceph",
    "afs",
    "fuse.sshfs",
    "fuse.s3fs",
    "lustre",
    "beegfs",
)
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """kind: type of the file system, such as ext4; empty where the system does not tell. options: it is mounted with."""

    kind: str
    options: tuple[str, ...]

    @property
    def network(self) -> bool:
        return self.kind in NETWORK


def mount_of(path: Path, mounts: Path = MOUNTS) -> Mount:
    """Of the file system that holds a path."""
    best, found = -1, Mount("", ())
    try:
        lines = os.fsdecode(mounts.read_bytes()).splitlines()
    except OSError:
        return found
    for line in lines:
        _, escaped, kind, options, *_ = line.split(" ")
        point = os.fsdecode(_OCTAL.sub(lambda octal: bytes([int(octal[1], 8)]), os.fsencode(escaped)))
        if len(point) >= best and path.resolve().is_relative_to(
            point
        ):  # of two at one place, the later one lies on top
            best, found = len(point), Mount(kind, tuple(options.split(",")))
    return found
