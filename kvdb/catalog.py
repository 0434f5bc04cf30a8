"""The catalog: what exists. A segment or sequence is visible from the commit of one write transaction on.

Write transactions of all processes are serial, under the store's write lock; readers see the state of one moment and
never wait.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvdb import files, manifests
from kvdb.environment import DATA, RELAXED, Environment, environment, leave
from kvdb.errors import Damaged, StorageFull, StoreError, StoreLocked
from kvdb.lock import WriteLock
from kvdb.transaction import Transaction

LOCK: Final = "write.lock"
_BALLAST: Final = "ballast"
BALLAST_BYTES: Final = 256 << 10
"""Given up when the disk is full, so that LMDB has pages to delete with."""


class Catalog:
    """Handle on a store's LMDB environment.

    create   make an empty catalog if there is none; otherwise a missing one is Damaged, never silently empty
    durable  whether a commit reaches the disk before it returns
    names    folder of the manifests that follow named sequences; None: there is none
    lock     False only to look at a store that nobody writes to and that must not be touched
    unlisted  read without a place in LMDB's table of readers, and keep writers waiting for each transaction
    """

    def __init__(
        self,
        path: Path,
        *,
        readonly: bool,
        create: bool = False,
        durable: bool = True,
        names: Path | None = None,
        lock: bool = True,
        unlisted: bool = False,
        lock_timeout_s: float = 30.0,
    ) -> None:
        self.path, self.readonly, self._durable, self._names = path, readonly, durable, names
        if not create and not (path / DATA).exists():
            raise Damaged(f"{path}: no {DATA}, expected the store's catalog; run 'kvdb repair --rebuild'")
        self._locking, self._unlisted, self._lock_timeout_s = lock, unlisted, lock_timeout_s
        self._lock = WriteLock(path / LOCK, timeout_s=lock_timeout_s)
        if not (readonly or durable or (path / RELAXED).exists()):
            with contextlib.suppress(FileExistsError):
                files.write_new(path / RELAXED, b"")
            files.fsync_dir(path)
        with self._undisturbed():
            self._env: Environment | None = environment(
                path, readonly=readonly, durable=durable, lock=lock and not unlisted
            )

    @property
    def closed(self) -> bool:
        return self._env is None

    @property
    def uses_lock(self) -> bool:
        """Whether readers put themselves down in LMDB's table, so that writers leave them their pages."""
        return self._locking and not self._unlisted

    def _environment(self) -> Environment:
        if self._env is None:
            raise StoreError(f"{self.path}: the store is closed, expected an open one; open it again")
        self._env.ready()
        return self._env

    def locked(self, timeout_s: float | None = None) -> contextlib.AbstractContextManager[None]:
        """Keep every other writer out for the block; transactions inside it are this thread's own.

        raises  StoreLocked
        """
        return self._lock.held(timeout_s)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """No writer is at work during the block, if their lock can be had; a reader leaves no file behind for that."""
        lock = self.path / LOCK
        fd = None
        if self._locking and lock.exists():
            with contextlib.suppress(StoreLocked, OSError):
                fd = files.lock(lock, timeout_s=self._lock_timeout_s, create=False, shared=True)
        try:
            yield
        finally:
            if fd is not None:
                files.close(fd)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """For who is in no table of readers: no writer commits during the block.

        raises  StoreLocked
        """
        lock = self.path / LOCK
        if not self._unlisted or not lock.exists():
            yield
            return
        fd = files.lock(lock, timeout_s=self._lock_timeout_s, create=False, shared=True)
        try:
            yield
        finally:
            files.close(fd)

    @contextlib.contextmanager
    def begin(self, *, write: bool = False) -> Iterator[Transaction]:
        """A transaction: committed when the block ends well, else aborted. On disk when this returns, unless the catalog is
        relaxed; where files go afterwards it is on disk even then: entries that come back must find them.

        raises  StoreLocked, StorageFull, Damaged
        """
        env = self._environment()
        if not write:
            with self._undisturbed(), env.transaction(write=False) as raw:
                yield Transaction(env, raw)
            return
        with self._lock.held(), contextlib.ExitStack() as after:
            with env.transaction(write=True) as raw:
                txn = Transaction(env, raw, writing=True)
                yield txn
                txn.finish_writing()
                if self._names is not None:
                    after.enter_context(manifests.following(self._names, txn.manifests))
            if not env.durable and (self._durable or txn.takes_away):
                env.sync()

    def check_structure(self) -> None:
        """Raises Damaged when LMDB's own pages are not what it expects them to be: as of opening, this is checked again."""
        with self._undisturbed():
            self._environment().check_structure()

    def sync(self) -> None:
        """Force to disk what was committed without."""
        self._environment().sync()

    @contextlib.contextmanager
    def freeing(self) -> Iterator[None]:
        """For deletions: what they need on a full disk is there. The ballast is dropped when free space is short, and put
        back at once, also when nothing could be freed: others would take its room."""
        ballast = self.path / _BALLAST
        if files.free_bytes(self.path) < 4 * BALLAST_BYTES:
            files.unlink(ballast)
        try:
            yield
        finally:
            self.ballast()

    def ballast(self) -> None:
        """Put the ballast in its place if there is room for it."""
        ballast = self.path / _BALLAST
        if not ballast.exists() and files.free_bytes(self.path) > BALLAST_BYTES:
            try:
                files.write_new(ballast, os.urandom(BALLAST_BYTES))
            except FileExistsError:  # another process was faster
                pass
            except StorageFull:
                files.unlink(ballast)

    def file_bytes(self) -> int:
        """What its files occupy; the ballast counts while it waits for room, too: nobody asks before it comes back."""
        waits = 0 if (self.path / _BALLAST).exists() else BALLAST_BYTES
        return files.tree_bytes(self.path) + waits

    def close(self) -> None:
        if self._env is not None:
            leave(self._env)
            self._env = None
