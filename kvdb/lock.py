"""The store's write lock: one writer at a time, over threads and processes, and never for ever.

LMDB has a writer lock of its own, which waits without end for a writer that was stopped. Ours is taken first and gives up
after a time; the kernel releases it when its holder dies. Reentrant within a thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from kvdb import files
from kvdb.errors import StoreLocked


class WriteLock:
    def __init__(self, path: Path, *, timeout_s: float) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._renew()

    def _renew(self) -> None:
        self._pid, self._thread, self._depth = os.getpid(), threading.RLock(), 0

    @contextlib.contextmanager
    def held(self, timeout_s: float | None = None) -> Iterator[None]:
        """Hold the lock for the block.

        timeout_s  instead of the lock's own
        raises     StoreLocked after that time
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if self._pid != os.getpid():  # after a fork: the parent's hold is not ours
            self._renew()
        if not self._thread.acquire(timeout=timeout_s):
            raise StoreLocked(
                f"{self._path}: held by another thread for {timeout_s:g} s, expected it to be free; try again later"
            )
        try:
            fd = None if self._depth else files.lock(self._path, timeout_s=timeout_s)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if fd is not None:
                    files.close(fd)
        finally:
            self._thread.release()
