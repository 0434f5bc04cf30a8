"""Every effect on the file system goes through here, so that a test can fail, shorten or tear any one of them.

Functions take and return plain descriptors and paths. Foreign errors become KVDB errors here and nowhere else: a full
disk or quota raises StorageFull, everything else stays the OSError it is, with the path in it. A failed fsync is final
for that file: callers drop the file, they never retry.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap as _mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvdb.errors import StorageFull, StoreLocked

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def _translated(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise StorageFull(
                f"{path}: {e.strerror}, expected room to write; nothing was committed, free space and try again"
            ) from e
        raise


def open_excl(path: Path) -> int:
    """Create a file that must not exist, for reading and writing, private under any umask."""
    with _translated(path):
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
        os.fchmod(fd, FILE_MODE)
        return fd


def open_read(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def close(fd: int) -> None:
    os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """Write every byte at `offset`; short writes are continued."""
    view = memoryview(data).cast("B")
    with _translated(path):
        while view:
            n = os.pwrite(fd, view, offset)
            view, offset = view[n:], offset + n


def truncate(fd: int, size: int, path: Path) -> None:
    """Set the size of a file still being written. Committed files are never truncated."""
    with _translated(path):
        os.ftruncate(fd, size)


def fsync(fd: int, path: Path) -> None:
    with _translated(path):
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone does not reach the platter
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)


def fsync_dir(path: Path) -> None:
    with _translated(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd, path)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    with _translated(target):
        os.rename(source, target)


def mkdir(path: Path, *, exist_ok: bool = False) -> None:
    """One folder, private under any umask."""
    with _translated(path):
        try:
            os.mkdir(path, FOLDER_MODE)
        except FileExistsError:
            if not exist_ok or not path.is_dir():
                raise
            return
        os.chmod(path, FOLDER_MODE)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; what is already gone is fine. Symbolic links are removed, never followed."""
    if path.is_symlink() or not path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    with contextlib.suppress(FileNotFoundError):  # another process may be removing it too
        for child in list_dir(path):
            remove_tree(path / child)
        os.rmdir(path)


def list_dir(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def read_file(path: Path) -> bytes:
    fd = open_read(path)
    try:
        return pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)


def pread(fd: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes; fewer only at the end of the file."""
    parts = []
    while count:
        part = os.pread(fd, count, offset)
        if not part:
            break
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return b"".join(parts)


def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
    return os.preadv(fd, buffers, offset)


def mmap(fd: int, size: int) -> _mmap.mmap:
    """A shared read-only map: writes through the descriptor show up in it, writes through the map are impossible."""
    return _mmap.mmap(fd, size, flags=_mmap.MAP_SHARED, prot=_mmap.PROT_READ)


def resident_pages(map_: _mmap.mmap) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which pages of a map are in the page cache, one bool per page; all False where the system cannot tell."""
    pages = np.zeros(-(-len(map_) // _mmap.PAGESIZE), np.uint8)
    address = np.frombuffer(map_, np.uint8).ctypes.data
    if not hasattr(_LIBC, "mincore") or _LIBC.mincore(
        ctypes.c_void_p(address), ctypes.c_size_t(len(map_)), pages.ctypes.data_as(ctypes.c_void_p)
    ):
        return np.zeros(len(pages), bool)
    return (pages & 1).astype(bool)


def file_size(fd: int) -> int:
    return os.fstat(fd).st_size


def disk_bytes(path: Path) -> int:
    """Bytes a file really occupies; a hole in a sparse file costs nothing."""
    return os.stat(path).st_blocks * 512


def now() -> float:
    """Wall-clock seconds since the epoch. Clocks may lie: only for display and retention, never for correctness."""
    return time.time()


def write_new(path: Path, data: bytes) -> None:
    """Create, fill and fsync a small file."""
    fd = open_excl(path)
    try:
        write_all(fd, data, 0, path)
        fsync(fd, path)
    finally:
        close(fd)


def lock(path: Path, *, timeout_s: float, create: bool = True, shared: bool = False) -> int:
    """Take a `flock` and return its descriptor; closing it (or dying) releases it.

    raises  StoreLocked after `timeout_s` seconds
    """
    with _translated(path):
        access = os.O_RDONLY if shared else os.O_RDWR
        fd = os.open(path, access | os.O_CLOEXEC | (os.O_CREAT if create else 0), FILE_MODE)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(fd)
                raise StoreLocked(
                    f"{path}: in use for {timeout_s:g} s, expected it to be free; close what has it open, or try again later"
                ) from None
            time.sleep(0.01)
