"""Write-behind: KV is encoded and written on one other thread while the next layer computes.

Bounded: `submit` waits when `depth` writes are pending, so memory does not grow when the disk is slower than the model.
An error of a write is raised at the next `submit` or `wait`, and nothing submitted after it is written. A child of fork has no
such thread: there, what was submitted is the parent's, and going on is an error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from kvdb import forks
from kvdb.errors import InvalidInput
from kvdb.runtime.timeline import Timeline


class WriteBehind:
    def __init__(self, timeline: Timeline, depth: int = 4) -> None:
        self._timeline, self._depth = timeline, depth
        self._pending: deque[tuple[int, Future[None]]] = deque()
        self._pool: ThreadPoolExecutor | None = None  # no thread before the first write
        self._failed: BaseException | None = None
        forks.watch(self)

    def after_fork(self) -> None:
        self._pool = None
        self._pending.clear()
        self._failed = InvalidInput(
            "KVDB cache: made before this process was forked, expected one made in it; make a new cache"
        )

    def submit(self, layer: int, write: Callable[[], None]) -> None:
        """Queue a write of one layer; writes happen in the order of submission."""
        self._raise_failure()
        while len(self._pending) >= self._depth:
            self._finish_oldest()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvdb-write")
        self._pending.append((layer, self._pool.submit(self._guarded, layer, write)))

    def wait(self, layer: int | None = None) -> None:
        """Return once all writes of `layer` (or of every layer) are done."""
        self._raise_failure()
        while any(layer in (None, pending) for pending, _ in self._pending):
            self._finish_oldest()

    def abandon(self) -> None:
        """Wait for the thread to come to rest; errors no longer matter."""
        self._failed = self._failed or RuntimeError("abandoned")
        for _, future in self._pending:
            future.exception()
        self._pending.clear()
        self._failed = None

    def close(self) -> None:
        self.abandon()
        if self._pool is not None:
            self._pool.shutdown()

    def let_go(self, then: Callable[[], None]) -> None:
        """As `close`, but without waiting: a finalizer runs in any thread and whatever locks that holds, joining none.

        then  called once nothing is being written any more
        """
        self._failed = self._failed or RuntimeError("abandoned")
        if self._pending:
            self._pending[-1][1].add_done_callback(lambda _: then())
        else:
            then()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _guarded(self, layer: int, write: Callable[[], None]) -> None:
        if self._failed is None:
            try:
                with self._timeline.span("write", layer):
                    write()
            except BaseException as e:
                self._failed = e
                raise

    def _finish_oldest(self) -> None:
        layer, oldest = self._pending[0]
        if not oldest.done():
            with self._timeline.span("wait", layer):
                oldest.exception()  # wait first: Ctrl-C while waiting must not lose a write that still runs
        self._pending.popleft()[1].result()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise self._failed
