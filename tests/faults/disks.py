"""Real file systems of a test's own: small ones in memory, and ext4 and xfs in a file, on which the power can be cut.

They need root and, in a file, a loop device and mkfs: where one is missing the test skips and says which.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

FS_IOC_SHUTDOWN: Final = 0x8004587D
NO_LOG_FLUSH: Final = 2
MKFS: Final = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
IMAGE_BYTES: Final = 512 << 20
"""Sparse; xfs wants 300 MiB."""


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")


def _need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")


@contextlib.contextmanager
def tmpfs(at: Path, size: str) -> Iterator[Path]:
    """A file system in memory of so many bytes ("1m")."""
    _need_root()
    at.mkdir()
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at)
    except OSError as error:
        pytest.skip(f"no tmpfs can be mounted: {error}")
    try:
        yield at
    finally:
        _run("umount", "--lazy", at)  # whatever a failed test has left open


class LoopDisk:
    """A file system in a file. After `cut_power` nothing that was not on the disk by then gets there."""

    def __init__(self, at: Path, device: str) -> None:
        self.at, self._device = at, device
        self._mounted = False  # asked of the system, a disk without power says no

    def mount(self) -> None:
        _run("mount", self._device, self.at)
        self._mounted = True

    def unmount(self) -> None:
        if self._mounted:
            _run("umount", self.at)
            self._mounted = False

    def cut_power(self) -> None:
        fd = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(fd)


@contextlib.contextmanager
def loop_disk(folder: Path, kind: str) -> Iterator[LoopDisk]:
    """A mounted file system in a file in `folder`."""
    _need_root()
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    for tool in (MKFS[kind][0], "losetup"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed")
    image, at = folder / f"{kind}.image", folder / kind
    at.mkdir()
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    with contextlib.ExitStack() as stack:
        mkfs = shutil.which(MKFS[kind][0], path=path)
        losetup = shutil.which("losetup", path=path)
        assert mkfs is not None
        assert losetup is not None
        try:
            _run(mkfs, *MKFS[kind][1:], image)
            attached = subprocess.run([losetup, "-f", "--show", image], capture_output=True, text=True, check=True)
            disk = LoopDisk(at, attached.stdout.strip())
            stack.callback(_run, losetup, "-d", disk._device)
            disk.mount()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no {kind} in a file here: {getattr(error, 'stderr', '') or error}")
        stack.callback(disk.unmount)
        yield disk
