"""One LMDB environment per path and process: opened behind a guard, grown in time, reopened after a fork.

Rules: both meta pages are checked before LMDB maps the file, because a truncated one ends the process with SIGBUS; the
file keeps a sparse tail, so that damaged page contents lead into a hole and not beyond the end; the map always has room
for the next write, so growth never happens inside a transaction; a child of fork gets an environment of its own. Foreign
errors are translated here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import lmdb

from kvdb import files
from kvdb.errors import Damaged, StorageFull, StoreError, StoreLocked

TABLES: Final = (
    "meta", "identities", "segments", "tokens", "tree", "sequences", "names", "uses", "moved", "unsynced",
)  # fmt: skip
DATA: Final = "data.mdb"
_MAGIC, _VERSION, _META_FLAG, _NO_PAGE = 0xBEEF_C0DE, 1, 0x08, (1 << 64) - 1
_HEADROOM: Final = 32 << 20
"""Least free address space when a write begins: more than any one transaction of ours writes."""
_TAIL: Final = 1 << 20
"""Sparse bytes kept behind the last page: more than a 16-bit offset and the longest value can reach."""
_RESIZE_TIMEOUT_S: Final = 30.0


def check_meta_pages(path: Path) -> None:
    """Both meta pages of an LMDB data file describe a file of this size; without this, LMDB faults on a truncated one.

    raises  Damaged
    """
    fd = files.open_read(path)
    try:
        size = files.file_size(fd)
        head = files.pread(fd, 4096, 0)
        page_size = struct.unpack_from("<I", head, 40)[0] if len(head) >= 160 else 0
        if page_size < 512 or page_size > 65536 or page_size & (page_size - 1):
            raise Damaged(f"{path}: page size {page_size}, expected a power of two; run 'kvdb repair --rebuild'")
        for number, page in enumerate((head, files.pread(fd, 160, page_size))):
            where = f"{path}, meta page {number}"
            if len(page) < 160:
                raise Damaged(f"{where}: {size} bytes in the file, expected two pages; run 'kvdb repair --rebuild'")
            (flags,) = struct.unpack_from("<H", page, 10)
            magic, version = struct.unpack_from("<II", page, 16)
            (own_size,) = struct.unpack_from("<I", page, 40)
            free_root, main_root, last = (struct.unpack_from("<Q", page, at)[0] for at in (80, 128, 136))
            if (magic, version, own_size) != (_MAGIC, _VERSION, page_size) or not flags & _META_FLAG:
                raise Damaged(
                    f"{where}: magic {magic:#x}, version {version}, page size {own_size}, expected {_MAGIC:#x}, "
                    f"{_VERSION}, {page_size}; run 'kvdb repair --rebuild'"
                )
            if (last + 1) * page_size > size or any(r > last and r != _NO_PAGE for r in (free_root, main_root)):
                raise Damaged(
                    f"{where}: last page {last}, roots {free_root:#x} and {main_root:#x}, expected them inside the file's "
                    f"{size} bytes; run 'kvdb repair --rebuild'"
                )
    finally:
        files.close(fd)


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError) as e:
        raise StorageFull(f"{path}: {e}, expected room for the catalog; nothing was committed, free space") from e
    except (
        lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PageNotFoundError, lmdb.CursorFullError,
        lmdb.IncompatibleError, lmdb.BadTxnError, lmdb.BadValsizeError, lmdb.TxnFullError,
    ) as e:  # fmt: skip
        raise Damaged(f"{path}: {e}, expected a readable catalog; run 'kvdb verify'") from e
    except lmdb.MemoryError as e:
        raise StoreError(f"{path}: {e}, expected memory for the catalog; free memory and try again") from e
    except lmdb.Error as e:
        if "No space left" in str(e) or "File too large" in str(e) or "quota" in str(e):
            raise StorageFull(f"{path}: {e}, expected room for the catalog; nothing was committed, free space") from e
        raise StoreError(
            f"{path}: {e}, expected a usable catalog; see whether the disk is well and open it again"
        ) from e


class Environment:
    """An open LMDB environment and its tables; shared by every handle on the same path in this process."""

    def __init__(self, path: Path, *, readonly: bool, durable: bool, lock: bool) -> None:
        self.path, self.readonly, self.durable, self._lock = path, readonly, durable, lock
        self._open()

    def _open(self) -> None:
        self._idle, self._active, self._failed = threading.Condition(), 0, False
        self.pid = os.getpid()
        data = self.path / DATA
        exists = data.exists()
        if exists:
            check_meta_pages(data)
        with translated(self.path):
            self.env = lmdb.open(
                str(self.path), map_size=self._wanted(data.stat().st_size if exists else 0), max_dbs=len(TABLES),
                mode=files.FILE_MODE, readonly=self.readonly, create=not self.readonly, readahead=False, max_readers=1024,
                metasync=self.durable, lock=self._lock,
            )  # fmt: skip
            create = not self.readonly
            self.db = {t: self.env.open_db(t.encode(), dupsort=t == "tree", create=create) for t in TABLES}
            if not self.readonly:
                self.env.reader_check()
        if not self.readonly:
            for name in (DATA, "lock.mdb"):  # the umask may have taken more than we asked for, or an old version less
                with contextlib.suppress(FileNotFoundError):
                    os.chmod(self.path / name, files.FILE_MODE)

    @staticmethod
    def _wanted(used: int) -> int:
        size = 64 << 20
        while size < 4 * used + _HEADROOM:
            size *= 2
        return size

    def ready(self) -> None:
        """Make the environment usable in this process: a fork or a failed commit needs it opened anew."""
        if self.pid != os.getpid():  # locks of the parent's threads mean nothing here; closing leaves its slots alone
            self.env.close()
            self._open()
        elif self._failed:
            with self._idle:
                if self._failed and self._active == 0:
                    self.env.close()
                    self._open()

    @contextlib.contextmanager
    def transaction(self, *, write: bool) -> Iterator[lmdb.Transaction]:
        """An LMDB transaction, committed when the block ends well. Writers hold the store's lock already."""
        with translated(self.path):
            if write:
                self._make_room()
            raw = self._begin(write=write)
            try:
                with raw:
                    yield raw
            except (lmdb.PanicError, lmdb.DiskError, lmdb.Error):
                self._failed = True
                raise
            finally:
                with self._idle:
                    self._active -= 1
                    self._idle.notify_all()

    def _begin(self, *, write: bool) -> lmdb.Transaction:
        for last in (False, False, True):
            with self._idle:
                self._active += 1
            try:
                return self.env.begin(write=write, buffers=True)
            except BaseException as e:
                with self._idle:
                    self._active -= 1
                    self._idle.notify_all()
                if last or not isinstance(e, (lmdb.MapResizedError, lmdb.ReadersFullError)):
                    raise
                if isinstance(e, lmdb.MapResizedError):  # another process grew the file
                    self._resize(0)
                else:  # slots of processes that died
                    self.env.reader_check()
        raise AssertionError("unreachable")

    def _make_room(self) -> None:
        info = self.env.info()
        page_size = self.env.stat()["psize"]
        used = (info["last_pgno"] + 1) * page_size
        if info["map_size"] < 2 * used + _HEADROOM:
            self._resize(self._wanted(used))
        files.extend(self.path / DATA, used + 2 * _TAIL, at_least=used + _TAIL)

    def _resize(self, size: int) -> None:
        with self._idle:
            deadline = time.monotonic() + _RESIZE_TIMEOUT_S
            while self._active:
                if not self._idle.wait(deadline - time.monotonic()):
                    raise StoreLocked(
                        f"{self.path}: transactions open for {_RESIZE_TIMEOUT_S:g} s, expected them to end; the catalog "
                        "cannot grow before"
                    )
            self.env.set_mapsize(size)

    def sync(self) -> None:
        with translated(self.path):
            self.env.sync(True)


_OPEN: weakref.WeakValueDictionary[tuple[str, bool], Environment] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


def environment(path: Path, *, readonly: bool, durable: bool, lock: bool = True) -> Environment:
    """The environment of a path: LMDB allows one per process, so a second handle joins the first.

    raises  Damaged; StoreError when it is open read-only here and is now wanted for writing
    """
    where = os.path.realpath(path)
    with _OPENING:
        for mode in (readonly, False):
            env = _OPEN.get((where, mode))
            if env is not None:
                env.ready()
                return env
        if _OPEN.get((where, True)) is not None:
            raise StoreError(
                f"{path}: already open read-only in this process, expected no other handle; close it before opening for "
                "writing"
            )
        env = Environment(path, readonly=readonly, durable=durable, lock=lock)
        _OPEN[(where, readonly)] = env
        return env
