"""One LMDB environment per path and process: opened behind a guard, grown in time, reopened after a fork.

Rules: both meta pages are checked before LMDB maps the file, because a truncated one ends the process with SIGBUS, and,
where they are not too many, all pages they lead to before LMDB follows them, because a damaged one can end it too; the
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
from kvdb.errors import Damaged, OutOfMemory, StorageFull, StoreError, StoreLocked
from kvdb.lmdb_pages import META_BYTES, check_pages, transaction_id, used_bytes

TABLES: Final = (
    "meta", "identities", "segments", "tokens", "tree", "sequences", "names", "uses", "moved", "unsynced",
)  # fmt: skip
DATA: Final = "data.mdb"
LOCK_TABLE: Final = "lock.mdb"
RELAXED: Final = "relaxed"
"""A file beside it, once it was ever written to without waiting for the disk."""
_MAGIC, _VERSION, _META_FLAG, _NO_PAGE = 0xBEEF_C0DE, 1, 0x08, (1 << 64) - 1
_HEADROOM: Final = 32 << 20
"""Least free address space when a write begins: more than any one transaction of ours writes."""
_ATTEMPTS: Final = 100
"""Looks at a meta page that writers overwrite just then."""
_NEARLY_FULL: Final = 64 << 10
_TAIL: Final = 1 << 20
"""Sparse bytes kept behind the last page: more than a 16-bit offset and the longest value can reach."""
_WALK_BYTES: Final = 16 << 20
"""Catalogs up to this size, of some thousand sequences, have their pages looked through at every open; larger ones by `check`,
`repair` and `open_untrusted`."""
_TIMEOUT_S: Final = 30.0
"""How long growth, or a fork, waits for transactions to end."""


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
        pages = (head[:META_BYTES], files.pread(fd, META_BYTES, page_size))
        if any(len(page) < META_BYTES for page in pages):
            raise Damaged(f"{path}: {size} bytes, expected two meta pages; run 'kvdb repair --rebuild'")
        for number, page in enumerate(pages):
            (flags,) = struct.unpack_from("<H", page, 10)
            magic, version = struct.unpack_from("<II", page, 16)
            (own_size,) = struct.unpack_from("<I", page, 40)
            if (magic, version, own_size) != (_MAGIC, _VERSION, page_size) or not flags & _META_FLAG:
                raise Damaged(
                    f"{path}, meta page {number}: magic {magic:#x}, version {version}, page size {own_size}, expected "
                    f"{_MAGIC:#x}, {_VERSION}, {page_size}; run 'kvdb repair --rebuild'"
                )
        _check_neighbours(fd, path, page_size)
        newest = max(pages, key=transaction_id)  # all that LMDB looks at: a failed commit may have torn the other one
        free_root, main_root, last = (struct.unpack_from("<Q", newest, at)[0] for at in (80, 128, 136))
        # The last pages of a transaction may never have been written; what lies before them is looked through later.
        if (last + 1) * page_size > size + _HEADROOM or any(
            r > min(last, size // page_size) and r != _NO_PAGE for r in (free_root, main_root)
        ):
            raise Damaged(
                f"{path}: last page {last}, roots {free_root:#x} and {main_root:#x}, expected them inside the file's {size} "
                "bytes; run 'kvdb repair --rebuild'"
            )
    finally:
        files.close(fd)


def _check_neighbours(fd: int, path: Path, page_size: int) -> None:
    """The two meta pages are of successive transactions, the even one first. With one number flipped LMDB would take the older
    page for the newest, and the last commit would be gone without a word. (Where a commit did not wait for its meta page to
    reach the disk, a power failure may leave others.)

    raises  Damaged
    """
    seen: set[tuple[int, ...]] = set()
    for _ in range(_ATTEMPTS):
        ids = tuple(transaction_id(files.pread(fd, META_BYTES, at)) for at in (0, page_size))
        relaxed = path.with_name(RELAXED).exists()
        if ids == (0, 0) or (ids[0] % 2 == 0 and ids[1] % 2 == 1 and (relaxed or abs(ids[0] - ids[1]) == 1)):
            return
        if ids in seen:  # nobody is writing
            break
        seen.add(ids)
    raise Damaged(
        f"{path}: meta pages of transactions {ids[0]} and {ids[1]}, expected an even and an odd one, neighbours; run 'kvdb "
        "repair --rebuild'"
    )


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError) as e:
        raise StorageFull(_said(path, e, "room for the catalog; nothing was committed, free space")) from e
    except (
        lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PageNotFoundError, lmdb.CursorFullError,
        lmdb.IncompatibleError, lmdb.BadTxnError, lmdb.BadValsizeError, lmdb.TxnFullError,
    ) as e:  # fmt: skip
        raise Damaged(_said(path, e, "a readable catalog; run 'kvdb verify'")) from e
    except lmdb.MemoryError as e:
        raise OutOfMemory(_said(path, e, "memory to map the catalog; free memory and try again")) from e
    except lmdb.Error as e:
        full = any(reason in str(e) for reason in ("No space left", "File too large", "quota"))
        if full or files.free_bytes(path) < _NEARLY_FULL:  # LMDB calls a short write an input/output error
            raise StorageFull(_said(path, e, "room for the catalog; nothing was committed, free space")) from e
        raise StoreError(_said(path, e, "a usable catalog; see whether the disk is well and open it again")) from e


def _said(path: Path, error: lmdb.Error, expected: str) -> str:
    """LMDB names the path itself in some of its messages."""
    return f"{path}: {str(error).removeprefix(f'{path}: ')}, expected {expected}"


def may_lock(path: Path) -> bool:
    """Whether this process may write to the table of readers of a catalog's folder. Where it may not, it can read without a place in the
    table, while nobody writes: a writer uses pages anew that no reader in the table needs, and LMDB ends a process that follows them."""
    table = path / LOCK_TABLE
    return os.access(table if table.exists() else path, os.W_OK)


class Environment:
    """An open LMDB environment and its tables; shared by every handle on the same path in this process."""

    def __init__(self, path: Path, *, readonly: bool, durable: bool, lock: bool) -> None:
        self.path, self.readonly, self.durable, self._lock = path, readonly, durable, lock
        self._idle, self._inherited, self.handles = threading.Condition(), False, 1
        self._open()

    def before_fork(self) -> None:
        """Let transactions end, and none begin. A child closes the environment before it opens its own: LMDB has one per
        process. Closing it ends every transaction it knows, and those of other threads have slots that all processes share.
        """
        self._idle.acquire()
        self._idle.wait_for(lambda: not self._active, _TIMEOUT_S)

    def after_fork_in_parent(self) -> None:
        self._idle.release()

    def after_fork(self) -> None:
        self._idle, self._inherited = threading.Condition(), True

    def _open(self) -> None:
        data = self.path / DATA
        exists = data.exists()
        if exists:
            check_meta_pages(data)
        for path in (data, self.path / "lock.mdb") if self._lock else ():  # LMDB writes there, wherever they lead
            if not files.is_own_file_or_nothing(path):
                raise Damaged(
                    f"{path}: a link or no file, expected a file with one name; copy the store, do not link it"
                )
        with translated(self.path):
            self.env = lmdb.open(
                str(self.path), map_size=self._wanted(data.stat().st_size if exists else 0), max_dbs=len(TABLES),
                mode=files.FILE_MODE, readonly=self.readonly, create=not self.readonly, readahead=False, max_readers=1024,
                metasync=self.durable, lock=self._lock,
            )  # fmt: skip
            try:
                if (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"] <= _WALK_BYTES:
                    self.check_structure()
            except BaseException:
                self.env.close()
                raise
            create = not self.readonly
            self.db = {t: self.env.open_db(t.encode(), dupsort=t == "tree", create=create) for t in TABLES}
            if not self.readonly:
                self.env.reader_check()
        if not self.readonly:
            for name in (DATA, LOCK_TABLE):  # the umask may have taken more than we asked for, or an old version less
                with contextlib.suppress(FileNotFoundError):
                    os.chmod(self.path / name, files.FILE_MODE)
        self._inode = files.inode(data)
        self._active, self._failed, self._inherited = 0, False, False

    @property
    def uses_lock(self) -> bool:
        return self._lock

    def expect_same_file(self) -> None:
        """raises  StoreError when another store has been put at the path of this one"""
        try:
            there = files.inode(self.path / DATA)
        except FileNotFoundError:
            there = None
        if there != self._inode:
            raise StoreError(
                f"{self.path}: removed or replaced while it is open in this process, expected the same store; close all "
                "handles on it first"
            )

    def check_structure(self) -> None:
        """Look through the pages of the newest snapshot; a reader of ours keeps them from being used again meanwhile.

        raises  Damaged
        cost    a millisecond for a few hundred pages, 0.1 s for 100 MiB
        """
        path = self.path / DATA
        page_size = self.env.stat()["psize"]
        fd = files.open_read(path)
        try:
            for _ in range(_ATTEMPTS):
                with self.env.begin() as raw:
                    meta = files.pread(fd, META_BYTES, raw.id() % 2 * page_size)
                    if transaction_id(meta) == raw.id():  # two commits later the page is another's
                        size = min(used_bytes(meta, page_size), files.file_size(fd) // page_size * page_size)
                        pages = files.mmap(fd, size)
                        files.populate(pages, 0, size)
                        check_pages(pages, page_size, meta, str(path))
                        return
            raise Damaged(
                f"{path}: transaction {raw.id()} is not the one in its meta page; run 'kvdb repair --rebuild'"
            )
        except (OSError, ValueError) as e:
            raise Damaged(f"{path}: {e}, expected readable pages; run 'kvdb repair --rebuild'") from e
        finally:
            files.close(fd)

    @staticmethod
    def _wanted(used: int) -> int:
        size = 64 << 20
        while size < 4 * used + _HEADROOM:
            size *= 2
        return size

    def ready(self) -> None:
        """Make the environment usable in this process: a fork or a failed commit needs it opened anew."""
        if self._inherited or self._failed:
            with self._idle:
                if self._inherited and self._active:
                    raise StoreError(
                        f"{self.path}: this process was forked inside a transaction, expected between them; open the store in "
                        "a process of its own"
                    )
                if self._inherited or (self._failed and self._active == 0):
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
        self.expect_same_file()
        self.env.reader_check()  # a snapshot of a reader that died would keep every page deleted since
        info = self.env.info()
        page_size = self.env.stat()["psize"]
        used = (info["last_pgno"] + 1) * page_size
        if info["map_size"] < 2 * used + _HEADROOM:
            self._resize(self._wanted(used))
        files.extend(self.path / DATA, used + 2 * _TAIL, at_least=used + _TAIL)

    def _resize(self, size: int) -> None:
        with self._idle:
            deadline = time.monotonic() + _TIMEOUT_S
            while self._active:
                if not self._idle.wait(deadline - time.monotonic()):
                    raise StoreLocked(
                        f"{self.path}: transactions open for {_TIMEOUT_S:g} s, expected them to end; the catalog "
                        "cannot grow before"
                    )
            self.env.set_mapsize(size)

    def sync(self) -> None:
        with translated(self.path):
            self.env.sync(True)


class _Open:
    """The environments of this process, by path and whether they are read-only."""

    def __init__(self) -> None:
        self.lock, self.known = threading.Lock(), weakref.WeakValueDictionary[tuple[str, bool], Environment]()
        self._watching = False

    def add(self, key: tuple[str, bool], env: Environment) -> None:
        if not self._watching:  # with the first environment, not at import
            self._watching = True
            os.register_at_fork(
                before=self._before_fork, after_in_parent=self._after_fork_in_parent, after_in_child=self._after_fork
            )
        self.known[key] = env

    def _before_fork(self) -> None:
        self.lock.acquire()  # until it is done: no environment comes, and no other thread forks
        for env in list(self.known.values()):
            env.before_fork()

    def _after_fork_in_parent(self) -> None:
        for env in list(self.known.values()):
            env.after_fork_in_parent()
        self.lock.release()

    def _after_fork(self) -> None:
        self.lock = threading.Lock()
        for env in list(self.known.values()):
            env.after_fork()


_OPEN: Final = _Open()


def environment(path: Path, *, readonly: bool, durable: bool, lock: bool = True) -> Environment:
    """The environment of a path: LMDB allows one per process, so a second handle joins the first.

    raises  Damaged; StoreError when it is open read-only here and is now wanted for writing
    """
    where = os.path.realpath(path)
    with _OPEN.lock:
        for mode in (readonly, False):
            env = _OPEN.known.get((where, mode))
            if env is not None and env.uses_lock == lock:
                env.ready()
                env.expect_same_file()
                env.handles += 1
                return env
        if _OPEN.known.get((where, True)) is not None or _OPEN.known.get((where, False)) is not None:
            raise StoreError(
                f"{path}: already open read-only in this process, or untrusted, expected no such handle; close it before "
                "opening it otherwise"
            )
        env = Environment(path, readonly=readonly, durable=durable, lock=lock)
        _OPEN.add((where, readonly), env)
        return env


def leave(env: Environment) -> None:
    """A handle is closed. With the last one the environment is, whoever still refers to it: the frames of an exception that
    a notebook keeps must not keep a store open that may be replaced meanwhile."""
    with _OPEN.lock:
        env.handles -= 1
        if not env.handles:
            for key in [key for key, known in _OPEN.known.items() if known is env]:
                del _OPEN.known[key]
            env.env.close()
