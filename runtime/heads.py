"""Work on KV heads, shared out over threads: compiled loops that let go of the interpreter, on as many threads as torch computes with.

Threads take pieces as they come to them. One that the system keeps waiting costs no more than its piece, and who has the work does all of
it where no other thread comes in time. To ask one takes a tenth of a millisecond or less, so small work asks nobody.

An interrupt may come between any two steps of whoever has the work, and must not leave somebody at it who reads memory that was only lent.
So nothing here is undone or counted by the one who can be interrupted: helpers say that they are about to take pieces, and that they have ended.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch

from kvdb import forks

LEAST_BYTES: Final = 1 << 20
"""For each thread, work reads at least so many bytes: a quarter of a millisecond's worth."""
_PIECES: Final = 4
"""Pieces for each thread."""
_LOOK_AGAIN_S: Final = 0.05
"""A helper that ends wakes who waits for it; where an interrupt took that away, it is seen after so long."""


class _Work:
    """Pieces of somebody's work. `began` and `ended` are as long as the number of helpers who came, and who left."""

    def __init__(self, pieces: list[slice], run: Callable[[slice], object]) -> None:
        self._pieces, self._run = deque(pieces), run
        self._began, self._ended = list[None](), list[None]()
        self._left: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.error: BaseException | None = None

    def take(self) -> None:
        """Run pieces until there are none."""
        while self._pieces:
            try:
                piece = self._pieces.popleft()
            except IndexError:  # another thread had the last one
                return
            self._run(piece)

    def help(self) -> None:
        """As `take`, in another thread."""
        self._began.append(None)
        try:
            self.take()
        except BaseException as e:  # raised by who has the work
            self.error = e
        finally:
            self._ended.append(None)
            self._left.put(None)

    def end(self) -> None:
        """No piece is begun any more, and nobody is at one when this returns; through any number of interrupts, the last of which it raises."""
        interrupt: BaseException | None = None
        while True:
            try:
                self._pieces.clear()  # who comes later finds nothing
                while len(self._ended) < len(self._began):
                    try:
                        self._left.get(timeout=_LOOK_AGAIN_S)
                    except queue.Empty:  # nobody said so in this time: who has ended is counted above
                        pass
                break
            except BaseException as e:
                interrupt = e
        if interrupt is not None:
            raise interrupt


class _Helpers:
    """Threads beside the caller's, made when they are first needed; a child of a fork makes its own."""

    def __init__(self) -> None:
        self._watched = False
        self.after_fork()

    def after_fork(self) -> None:
        self.threads: list[threading.Thread] = []
        self._asked: queue.SimpleQueue[_Work] = queue.SimpleQueue()

    def ask(self, work: _Work, count: int) -> None:
        """Have so many come, or as many as there can be."""
        if not self._watched:
            forks.watch(self)
            self._watched = True
        while len(self.threads) < count:
            thread = threading.Thread(target=_serve, args=(self._asked,), name="kvdb-heads", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more of them
                break
            self.threads.append(thread)
        for _ in range(min(count, len(self.threads))):
            self._asked.put(work)


def _serve(asked: queue.SimpleQueue[_Work]) -> None:
    while True:
        asked.get().help()


_HELPERS: Final = _Helpers()


def over_heads(heads: int, read_bytes: int, run: Callable[[slice], object]) -> None:
    """run(some heads) until all heads are done, in slices that do not overlap, maybe in several threads.

    read_bytes  what all of it reads, roughly: it decides how many threads are asked, with this one at most as many as torch's
    run         has no effect but on what belongs to its heads, and lets go of the interpreter for most of its time
    raises      what it raises; nobody is at work then, either
    """
    threads = min(torch.get_num_threads(), heads, read_bytes // LEAST_BYTES)
    if threads <= 1:
        run(slice(0, heads))
        return
    count = min(heads, _PIECES * threads)
    work = _Work([slice(*ends) for ends in pairwise(heads * i // count for i in range(count + 1))], run)
    try:
        try:
            _HELPERS.ask(work, threads - 1)
            work.take()
        finally:
            work.end()
    finally:  # an interrupt may have come just before the first one
        work.end()
    if work.error is not None:
        raise work.error
