"""The store's write lock: one writer at a time, over threads and processes, and never for ever.

LMDB has a writer lock of its own, which waits without end for a writer that was stopped. Ours is taken first and gives up
after a time; the kernel releases it when its holder dies. Reentrant within a thread. A child of fork has its parent's
descriptor, which would keep the lock taken: it closes it, and the parent unlocks before it closes its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from kvdb import files, forks
from kvdb.errors import StoreLocked


class WriteLock:
    def __init__(self, path: Path, *, timeout_s: float) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._thread, self._depth, self._fd = threading.RLock(), 0, -1
        forks.watch(self)

    def after_fork(self) -> None:
        if self._depth:
            files.close(self._fd)
        self._thread, self._depth, self._fd = threading.RLock(), 0, -1

    @contextlib.contextmanager
    def held(self, timeout_s: float | None = None) -> Iterator[None]:
        """Hold the lock for the block.

        timeout_s  instead of the lock's own
        raises     StoreLocked after that time
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if not self._thread.acquire(timeout=timeout_s):
            raise StoreLocked(
                f"{self._path}: held by another thread for {timeout_s:g} s, expected it to be free; try again later"
            )
        try:
            if not self._depth:
                self._fd = files.lock(self._path, timeout_s=timeout_s)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    files.unlock(self._fd)
        finally:
            self._thread.release()
