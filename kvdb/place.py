"""The folder a store lies in, or could: its file system, and what works there. Looking writes nothing, but for `fsync_cost`, which says so."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from kvdb import files
from kvdb.errors import Damaged, InvalidInput, StoreLocked, Unsupported
from kvdb.machine import Tried
from kvdb.mounts import mount_of

_TIMES: Final = 20
_UNTRIED: Final = Tried(None, "no file of a sound store to try it with")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a store lies, or could.

    file_system   type, such as ext4; `network`: whether it is one of the network file systems that we know
    read_only     mounted so; `writable`: whether this user may write to the folder
    free_bytes    for an unprivileged writer; `free_files`: inodes, None where the file system has no such bound
    locks, maps, direct  flock keeps others out, files can be mapped, files can be read past the page cache
    direct_align  bytes that such reads must be multiples of
    """

    path: str
    file_system: str
    mount_options: tuple[str, ...]
    network: bool
    read_only: bool
    writable: bool
    free_bytes: int
    free_files: int | None
    locks: Tried
    maps: Tried
    direct: Tried
    direct_align: int | None


class FsyncCost(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of an fsync after 4 KiB, in the folder that the store lies in."""

    folder: str
    times: int
    median_ms: float
    worst_ms: float


def look_at_place(folder: Path, file: Path | None) -> Place:
    """Of an existing folder.

    file  one of a store's in it, to try reads with; it is only read
    """
    mount, space = mount_of(folder), os.statvfs(folder)
    maps = _UNTRIED if file is None else _maps(file)
    direct, align = (_UNTRIED, None) if file is None else _direct(file)
    return Place(
        path=str(folder),
        file_system=mount.kind,
        mount_options=mount.options,
        network=mount.network,
        read_only=bool(space.f_flag & os.ST_RDONLY),
        writable=os.access(folder, os.W_OK | os.X_OK),
        free_bytes=files.free_bytes(folder),
        free_files=space.f_favail if space.f_files else None,
        locks=_locks(folder),
        maps=maps,
        direct=direct,
        direct_align=align,
    )


def fsync_cost(store: Path) -> FsyncCost:
    """Writes a small file beside a store, forces it to disk a few times, and removes it.

    raises  InvalidInput where the folder above is on another file system or may not be written to; StorageFull
    """
    folder = store.resolve().parent
    if os.stat(folder).st_dev != os.stat(store).st_dev or not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"{folder}: may not be written to or is another file system than the store's, expected room for a temporary file "
            "beside the store; leave out --probe"
        )
    path, took = folder / f".kvdb-probe-{secrets.token_hex(8)}", []
    fd = files.open_excl(path)
    try:
        for turn in range(_TIMES):
            files.write_all(fd, bytes(4096), 4096 * turn, path)
            started = time.perf_counter()
            files.fsync(fd, path)
            took.append(1e3 * (time.perf_counter() - started))
    finally:
        files.close(fd)
        files.unlink(path)
    return FsyncCost(folder=str(folder), times=_TIMES, median_ms=statistics.median(took), worst_ms=max(took))


def _locks(folder: Path) -> Tried:
    """Whether a lock that is shared keeps another from being exclusive, as every open handle counts on."""
    with contextlib.ExitStack() as held:
        try:
            for _ in range(2):
                fd = files.lock(folder, timeout_s=0, create=False, shared=True)
                held.callback(files.close, fd)
        except StoreLocked:
            return Tried(True)
        except OSError as e:
            return Tried(None if isinstance(e, PermissionError) else False, f"flock: {e.strerror}")
        try:
            files.make_exclusive(fd, folder)
        except StoreLocked:
            return Tried(True)
        except OSError as e:
            return Tried(False, f"flock: {e.strerror}")
    return Tried(False, "flock: given to two at once")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    fd = files.open_read(file)
    try:
        yield fd
    finally:
        files.close(fd)


def _maps(file: Path) -> Tried:
    try:
        with _opened(file) as fd, files.mmap(fd, files.file_size(fd)) as map_:
            files.populate(map_, 0, min(len(map_), mmap.PAGESIZE))
            return Tried(True)
    except (OSError, ValueError, Damaged) as e:  # ValueError: an empty file
        return Tried(False, _reason(e))


def _direct(file: Path) -> tuple[Tried, int | None]:
    """One read of a block, and what it must be aligned to."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    view: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(memory, np.uint8)
    try:
        with _opened(file) as fd:
            align = files.make_direct(fd, file)
            files.read_to(fd, view.ctypes.data, mmap.PAGESIZE, 0)
            return Tried(True), align
    except (OSError, Unsupported, Damaged) as e:
        return Tried(False, _reason(e)), None


def _reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
