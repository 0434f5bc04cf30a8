"""Every system call of a life, recorded once with strace; then any one of them killed or made to fail.

strace attaches to a forked child that waits for it, and counts calls from there: the same life makes the same calls. A
signal is delivered on entry, so the call it hits does not happen. (Never with --seccomp-bpf: injection then silently
stops.)
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from faults.children import PATIENCE_S, Nursery

CHANGING: Final = (
    "openat", "creat", "mkdir", "mkdirat", "pwrite64", "pwritev", "pwritev2", "write", "writev", "ftruncate", "truncate",
    "fallocate", "fsync", "fdatasync", "sync_file_range", "msync", "rename", "renameat", "renameat2", "link", "linkat",
    "symlink", "symlinkat", "unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "copy_file_range", "sendfile",
    "utimensat", "setxattr", "fsetxattr",
)  # fmt: skip
"""Calls that change a file system. openat only with O_CREAT."""

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


class Call(NamedTuple):
    """The `number`th call, from 1, of `name` in a life."""

    name: str
    number: int
    arguments: str

    @property
    def changes(self) -> bool:
        return self.name in CHANGING and (self.name != "openat" or "O_CREAT" in self.arguments)

    def __str__(self) -> str:
        return f"{self.name} #{self.number} ({self.arguments[:120]})"


def record(nurse: Nursery, folder: Path, *, also: tuple[str, ...] = (), **how: Any) -> list[Call]:
    """Every call of a life that changes the file system, and every call of `also`. `how` is as for `Nursery.live`."""
    log = folder / "strace"
    status = traced(nurse, folder, ["-o", str(log), "-e", f"trace={','.join((*CHANGING, *also))}"], **how)
    assert status == 0, status
    numbers: Counter[str] = Counter()
    calls = []
    for line in log.read_text().splitlines():
        if found := re.match(r"(?:\d+ +)?(\w+)\((.*)\) += ", line):
            numbers[found[1]] += 1
            calls.append(Call(found[1], numbers[found[1]], found[2]))
    acks = str(folder / "acks")
    return [c for c in calls if acks not in c.arguments and (c.name in also or (c.changes and c.name != "write"))]


def inject(nurse: Nursery, folder: Path, call: Call, what: str, *, onwards: bool = False, **how: Any) -> int | str:
    """A life in `folder` to which `what` happens ("signal=SIGKILL", "error=EIO") at `call`, or from it on; its exit status."""
    when = f"{call.number}{'+' if onwards else ''}"
    flags = ["-o", "/dev/null", "-e", f"trace={call.name}", "-e", f"inject={call.name}:{what}:when={when}"]
    return traced(nurse, folder, flags, **how)


def traced(nurse: Nursery, folder: Path, flags: list[str], **how: Any) -> int | str:
    """A life under strace: store and acknowledgements are folder/s and folder/acks."""
    pid = nurse.live(folder / "s", folder / "acks", stopped=True, **how)
    strace = subprocess.Popen(["strace", "-f", "-qq", *flags, "-p", str(pid)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
            if strace.poll() is not None or time.monotonic() > deadline:
                strace.kill()
                raise OSError(f"strace could not attach: {strace.communicate()[1]!r}")
            time.sleep(0.0005)
    finally:
        os.kill(pid, signal.SIGCONT)
    status = nurse.wait(pid)
    strace.communicate(timeout=PATIENCE_S)
    return status
