"""Which of two ways is faster, found by taking both in turn; looked at again after a while."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Final

TURN: Final = 4
TURNS: Final = 6
KEPT: Final = 512
"""A comparison takes `TURNS` turns of `TURN` steps, each way in turn; the way with the lower median is kept for so many steps."""


class Comparison:
    def __init__(self) -> None:
        self._times: dict[bool, list[float]] = {True: [], False: []}
        self._schedule: Iterator[bool] = iter(())
        self._comparing = False
        self.medians: dict[bool, float] = {}
        """Seconds a step takes each way, as the last comparison found; empty before the first one has ended."""

    def next(self) -> bool:
        """Which way to take now."""
        way = next(self._schedule, None)
        if way is None:
            self._comparing = not self._comparing
            self._schedule = self._compared() if self._comparing else self._kept()
            way = next(self._schedule)
        return way

    @property
    def comparing(self) -> bool:
        return self._comparing

    def took(self, way: bool, seconds: float) -> None:
        if self._comparing:
            self._times[way].append(seconds)

    def restart(self) -> None:
        """Forget a comparison that has begun: what comes next is another situation."""
        self._schedule, self._comparing = iter(()), False

    def _compared(self) -> Iterator[bool]:
        self._times = {True: [], False: []}
        for turn in range(TURNS):
            for _ in range(TURN):
                yield turn % 2 == 0

    def _kept(self) -> Iterator[bool]:
        self.medians = {way: statistics.median(times) for way, times in self._times.items()}
        better = self.medians[True] < self.medians[False]
        for _ in range(KEPT):
            yield better
