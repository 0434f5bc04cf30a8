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
import itertools
import mmap as _mmap
import os
import resource as _resource
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from kvdb.errors import Damaged, StorageFull, StoreLocked, Unsupported

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_READ, _PREAD = _LIBC.read, _LIBC.pread
_READ.argtypes, _READ.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_ssize_t
_PREAD.argtypes, _PREAD.restype = (*_READ.argtypes, ctypes.c_int64), ctypes.c_ssize_t
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SYNC_FILE_RANGE_WRITE: Final = 2
_WILL_NEED: Final = 3
_POPULATE_READ: Final = 22  # MADV_POPULATE_READ, Linux 5.14: an error instead of a SIGBUS


@contextlib.contextmanager
def translated(path: str | Path) -> Iterator[None]:
    """For what writes to a file of its own accord, too."""
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise StorageFull(
                f"{path}: {e.strerror}, expected room to write; nothing was committed, free space and try again"
            ) from e
        if e.filename is None:
            e.filename = str(path)
        raise


def _name(error: OSError, fd: int) -> None:
    """Give an error of a call that knows only a descriptor its path."""
    if error.filename is None:
        with contextlib.suppress(OSError):
            error.filename = os.readlink(f"/proc/self/fd/{fd}")


def open_excl(path: Path) -> int:
    """Create a file that must not exist, for reading and writing, private under any umask."""
    with translated(path):
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
        os.fchmod(fd, FILE_MODE)
        return fd


def open_read(path: Path) -> int:
    """Open a regular file. A symbolic link, a device or a pipe in its place is Damaged: none is followed or waited for."""
    fd = _open_as_it_is(path, os.O_RDONLY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Damaged(f"{path}: not a regular file, expected one; run 'kvdb verify'")
    return fd


def make_direct(fd: int, path: Path) -> int:
    """Have all reads through a descriptor go past the page cache from here on, and each return when its bytes are there. Returns what
    their offsets, sizes and addresses must be multiples of, in bytes.

    raises  Unsupported where the file system has no such reads
    """
    align = _direct_alignment(fd)
    try:
        if not align:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK | os.O_DIRECT)
    except (OSError, AttributeError) as e:
        raise Unsupported(
            f"{path}: {e}, expected a file system with reads past the page cache (O_DIRECT); use read_mode 'mmap' or 'pread'"
        ) from e
    return align


def _direct_alignment(fd: int) -> int:
    """What Linux 6.1 and later say of O_DIRECT on a file, 0 for "cannot be"; of others, what all devices can do."""
    told = (ctypes.c_uint32 * 64)()  # struct statx
    at_empty_path, dioalign, mem_align, offset_align = 0x1000, 0x2000, 152 // 4, 156 // 4
    call = getattr(_LIBC, "statx", None)
    if call is None or call(fd, b"", at_empty_path, dioalign, told) or not told[0] & dioalign:
        return _mmap.PAGESIZE
    return max(told[mem_align], told[offset_align])


def _open_as_it_is(path: Path, access: int) -> int:
    """Follow no symbolic link and wait for no pipe."""
    try:
        return os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, FILE_MODE)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENXIO):
            raise Damaged(f"{path}: {e.strerror}, expected a regular file; run 'kvdb verify'") from e
        raise


def close(fd: int) -> None:
    os.close(fd)


def duplicate(fd: int) -> int:
    """Another descriptor for what is open."""
    return os.dup(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int, path: Path) -> None:
    """Write every byte at `offset`; short writes are continued."""
    view = memoryview(data).cast("B")
    with translated(path):
        while view:
            n = os.pwrite(fd, view, offset)
            view, offset = view[n:], offset + n


def truncate(fd: int, size: int, path: Path) -> None:
    """Set the size of a file still being written. Committed files are never truncated."""
    with translated(path):
        os.ftruncate(fd, size)


def start_writeback(fd: int, offset: int, count: int) -> None:
    """Let the disk begin on bytes just written, while the caller makes more; nothing where the system has no such call.

    A hint: it makes nothing durable, and what goes wrong is left for fsync to tell (as it waits for nothing, it takes no
    error away from there).
    """
    if hasattr(_LIBC, "sync_file_range"):
        _LIBC.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def extend(path: Path, size: int, *, at_least: int) -> None:
    """Give a file of less than `at_least` bytes a sparse tail up to `size`; never cuts."""
    if os.stat(path).st_size < at_least:
        with translated(path):
            os.truncate(path, size)


def fsync(fd: int, path: Path) -> None:
    with translated(path):
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone does not reach the platter
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)


def fsync_dir(path: Path) -> None:
    with translated(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(fd, path)
    finally:
        os.close(fd)


def fsync_trees(folders: Iterable[Path], *, also: Iterable[Path] = ()) -> None:
    """Force folders with their files, and further paths, to disk, 16 at a time: a journal merges flushes that wait together."""
    paths = (path for folder in folders for path in (*(folder / name for name in list_dir(folder)), folder))
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(_fsync_path, itertools.chain(paths, also))
        )  # a descriptor lasts as long as its fsync: there may be many


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fsync(fd, path)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    with translated(target):
        os.rename(source, target)


def link(source: Path, target: Path) -> None:
    """A second name for a file; raises FileExistsError where the name is taken."""
    with translated(target):
        os.link(source, target)


def unlink(path: Path) -> None:
    """Remove a file; one that is already gone is fine."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def mark_now(path: Path) -> None:
    """Set a folder's modification time to now."""
    with translated(path):
        os.utime(path, follow_symlinks=False)


def mkdir(path: Path, *, exist_ok: bool = False) -> None:
    """One folder, private under any umask."""
    with translated(path):
        try:
            os.mkdir(path, FOLDER_MODE)
        except FileExistsError:
            if not exist_ok or not path.is_dir():
                raise
            return
        os.chmod(path, FOLDER_MODE)


def make_private(folder: Path) -> None:
    os.chmod(folder, FOLDER_MODE)


def copy_file(source: Path, target: Path) -> None:
    """A new private file with the bytes of another, on disk when this returns; holes stay holes. What fails leaves nothing."""
    fd, copy = open_read(source), open_excl(target)
    try:
        for start, stop in _data_ranges(fd):
            for offset in range(start, stop, 1 << 20):
                write_all(copy, pread(fd, min(1 << 20, stop - offset), offset), offset, target)
        truncate(copy, file_size(fd), target)
        fsync(copy, target)
    except BaseException:
        with contextlib.suppress(OSError):
            unlink(target)
        raise
    finally:
        close(fd)
        close(copy)


def _data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what is no hole in a file, in bytes."""
    stop = 0
    while True:
        try:
            start = os.lseek(fd, stop, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:  # no data from there on
                return
            raise
        stop = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, stop


def make_parents(path: Path) -> None:
    """The folders that lead to `path`, where they are missing, durably; with the modes that the umask leaves them."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    for parent in reversed(missing):
        with translated(parent):
            parent.mkdir(exist_ok=True)
        fsync_dir(parent.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it; what is already gone is fine. Symbolic links are removed, never followed."""
    if path.is_symlink() or not path.is_dir():
        unlink(path)
        return
    with contextlib.suppress(FileNotFoundError):  # another process may be removing it too
        for child in list_dir(path):
            remove_tree(path / child)
        os.rmdir(path)


def is_folder_or_nothing(path: Path) -> bool:
    """Whether there is a folder at `path` or nothing; a symbolic link is neither."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True


def is_own_file_or_nothing(path: Path) -> bool:
    """Whether there is nothing at `path` or a regular file without a second name; a symbolic link is neither."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def list_dir(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def read_file(path: Path, *, limit: int = 16 << 20) -> bytes:
    """A whole small file.

    raises  Damaged for one of more than `limit` bytes
    """
    fd = open_read(path)
    try:
        return read_all(fd, path, limit=limit)
    finally:
        os.close(fd)


def read_all(fd: int, path: Path, *, limit: int = 16 << 20) -> bytes:
    """As `read_file`, of a file that is open."""
    size = file_size(fd)
    if size > limit:
        raise Damaged(f"{path}: {size} bytes, expected at most {limit}; run 'kvdb verify'")
    return pread(fd, size, 0)


def pread(fd: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes; fewer only at the end of the file."""
    parts = []
    try:
        while count and (part := os.pread(fd, count, offset)):
            parts.append(part)
            count, offset = count - len(part), offset + len(part)
    except OSError as e:
        _name(e, fd)
        raise
    return b"".join(parts)


def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
    try:
        return os.preadv(fd, buffers, offset)
    except OSError as e:
        _name(e, fd)
        raise


def read_to(fd: int, address: int, count: int, offset: int) -> int:
    """One read into memory at `address`, which may be short; returns how many bytes. Other threads run meanwhile.

    A pipe, which has no offsets, is read as it comes, as io_uring does.

    raises  OSError, EFAULT among them
    """
    found: int = _PREAD(fd, address, count, offset)
    if found < 0 and ctypes.get_errno() == errno.ESPIPE:
        found = _READ(fd, address, count)
    if found < 0:
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        _name(error, fd)
        raise error
    return found


def mmap(fd: int, size: int) -> _mmap.mmap:
    """A shared read-only map: writes through the descriptor show up in it, writes through the map are impossible."""
    try:
        return _mmap.mmap(fd, size, flags=_mmap.MAP_SHARED, prot=_mmap.PROT_READ)
    except OSError as e:
        _name(e, fd)
        raise


def tells_residence(fd: int) -> bool:
    """Whether `resident_pages` is the truth: of files that are not the caller's own and that it may not write to, Linux says that all is there."""
    return os.fstat(fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)


def resident_pages(map_: _mmap.mmap, offset: int, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of `count` pages of a map, from the one at `offset` on, are in the page cache; none where the system cannot tell."""
    pages = np.zeros(count, np.uint8)
    address, length = (
        np.frombuffer(map_, np.uint8).ctypes.data + offset,
        min(count * _mmap.PAGESIZE, len(map_) - offset),
    )
    if not hasattr(_LIBC, "mincore") or _LIBC.mincore(
        ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)
    ):
        return np.zeros(count, bool)
    return (pages & 1).astype(bool)


def major_faults() -> int:
    """Page faults of this thread so far that had to wait for a device; 0 where the system does not count them by thread."""
    thread = getattr(_resource, "RUSAGE_THREAD", None)
    return 0 if thread is None else _resource.getrusage(thread).ru_majflt


def file_size(fd: int) -> int:
    try:
        return os.fstat(fd).st_size
    except OSError as e:
        _name(e, fd)
        raise


def will_need(map_: _mmap.mmap, offset: int, length: int) -> None:
    """Let the kernel begin to read pages of a map; what it makes of that shows when they are touched."""
    _advise(map_, _WILL_NEED, offset, length)


def populate(map_: _mmap.mmap, offset: int, length: int) -> None:
    """Bring pages of a map in now, so that what cannot be read is an error here and no SIGBUS later.

    raises  OSError (EFAULT) for a device error or a file that was cut; nothing happens where the system cannot tell
    """
    if (error := _advise(map_, _POPULATE_READ, offset, length)) not in (0, errno.EINVAL):
        raise OSError(error, os.strerror(error))


def _advise(map_: _mmap.mmap, advice: int, offset: int, length: int) -> int:
    """errno. Unlike `mmap.madvise`, it lets other threads of Python run while it waits."""
    address = np.frombuffer(map_, np.uint8).ctypes.data + offset
    if _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice):
        return ctypes.get_errno()
    return 0


def disk_bytes(path: Path) -> int:
    """Bytes a file really occupies; a hole in a sparse file costs nothing. A folder counts without what is in it."""
    return os.lstat(path).st_blocks * 512


def tree_bytes(path: Path, *, reserved: bool = False) -> int:
    """Bytes that everything under a folder occupies; what vanishes meanwhile counts nothing.

    reserved  count a sparse file as if it were full already
    """
    total = 0
    for folder, _, names in os.walk(path):
        for name in (".", *names):
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(os.path.join(folder, name))
                sparse = found.st_size if reserved and stat.S_ISREG(found.st_mode) else 0
                total += max(found.st_blocks * 512, sparse)
    return total


def free_bytes(path: Path) -> int:
    """Bytes an unprivileged writer may still use on the file system of `path`."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def now() -> float:
    """Wall-clock seconds since the epoch. Clocks may lie: only for display and retention, never for correctness."""
    return time.time()


class Moment(NamedTuple):
    """Now, by two clocks: the wall clock, which may jump, and the seconds since this boot, which may not."""

    wall: float
    boot: str
    uptime: float


def moment() -> Moment:
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return Moment(now(), f.read().strip(), time.clock_gettime(time.CLOCK_BOOTTIME))
    except FileNotFoundError:  # not Linux: one boot that never ends, by a clock that starts anew with each
        return Moment(now(), "", time.monotonic())


def modified(path: Path) -> float:
    """When a folder was last marked, in wall-clock seconds."""
    return os.lstat(path).st_mtime


def write_new(path: Path, data: bytes) -> None:
    """Create, fill and fsync a small file."""
    fd = open_excl(path)
    try:
        write_all(fd, data, 0, path)
        fsync(fd, path)
    finally:
        close(fd)


def create_stream(path: Path) -> BinaryIO:
    """A new private file as a stream, for what wants one."""
    return os.fdopen(open_excl(path), "w+b")


def open_stream(path: Path) -> BinaryIO:
    return os.fdopen(open_read(path), "rb")


def lock(path: Path, *, timeout_s: float, create: bool = True, shared: bool = False) -> int:
    """Take a `flock` on a file, or on a folder with `create=False`, and return its descriptor; closing it (or dying)
    releases it.

    raises  StoreLocked after `timeout_s` seconds; Damaged for a symbolic link, a device or a pipe
    """
    access = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    with translated(path):
        fd = _open_as_it_is(path, access)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline, pause = time.monotonic() + timeout_s, 0.0005
    try:
        while True:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise StoreLocked(
                        f"{path}: in use for {timeout_s:g} s, expected it to be free; close what has it open, or try "
                        "again later"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
    except BaseException:
        os.close(fd)
        raise


def make_exclusive(fd: int, path: Path) -> None:
    """Turn a shared lock into an exclusive one.

    raises  StoreLocked when others share it
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreLocked(
            f"{path}: open elsewhere, expected no other handle; close what has it open, or try again later"
        ) from None


def is_at(fd: int, path: Path) -> bool:
    """Whether a path still leads to what is open."""
    try:
        there, mine = os.stat(path), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def content_of(fd: int) -> tuple[int, int, int]:
    """What tells an open file, as it is now, from others and from what it was: numbers of inodes are used again."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_mtime_ns


def inode(path: Path) -> tuple[int, int]:
    """What tells a file from another that takes its place."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def unlock(fd: int) -> None:
    """Give a lock back even where a forked child still has its descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
