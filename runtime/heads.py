"""Work on KV heads, shared out over threads: compiled loops that let go of the interpreter, on as many threads as torch computes with.

Threads take pieces as they come to them. One that the system keeps waiting costs no more than its piece, and who has the work does all of
it where no other thread comes in time. To ask one takes a tenth of a millisecond or less, so small work asks nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Final

import torch

from kvdb import forks

LEAST_BYTES: Final = 1 << 20
"""For each thread, work reads at least so many bytes: a quarter of a millisecond's worth."""
_PIECES: Final = 4
"""Pieces for each thread."""


class _Pool:
    """Threads beside the caller's, made when they are first needed; a child of a fork makes its own."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._threads = 0

    def submit(self, work: Callable[[], None], threads: int) -> Future[None]:
        if self._executor is None or threads > self._threads:
            if self._executor is None:
                forks.watch(self)
            self._executor, self._threads = ThreadPoolExecutor(threads, "kvdb-heads"), threads
        return self._executor.submit(work)

    def after_fork(self) -> None:
        self._executor, self._threads = None, 0


_POOL: Final = _Pool()


def over_heads(heads: int, read_bytes: int, run: Callable[[slice], object]) -> None:
    """run(some heads) until all heads are done, in slices that do not overlap, maybe in several threads.

    read_bytes  what all of it reads, roughly: it decides how many threads are asked, with this one at most as many as torch's
    run         has no effect but on what belongs to its heads, and lets go of the interpreter for most of its time
    raises      what it raises
    """
    threads = min(torch.get_num_threads(), heads, read_bytes // LEAST_BYTES)
    if threads <= 1:
        run(slice(0, heads))
        return
    count = min(heads, _PIECES * threads)
    pieces = iter([slice(*ends) for ends in pairwise(heads * i // count for i in range(count + 1))])

    def work() -> None:
        for piece in pieces:  # whoever asks a list's iterator has the next one for himself
            run(piece)

    asked = [_POOL.submit(work, threads - 1) for _ in range(threads - 1)]
    try:
        work()
    finally:
        _end(asked)


def _end(asked: list[Future[None]]) -> None:
    """Let nobody begin any more and wait for those who have, through any number of interrupts: they write to the caller's arrays, and read
    memory that is lent to it.

    raises  the last interrupt, or what somebody raised
    """
    raised: BaseException | None = None
    for each in asked:
        while not (each.cancel() or each.done()):
            try:
                each.exception()
            except BaseException as e:
                raised = e
        if not each.cancelled():
            raised = raised or each.exception()
    if raised is not None:
        raise raised
