"""Whether to read ahead, decided by what it gains: a cache's steps are timed with and without.

A step that reads ahead predicts each layer's query a layer early, chooses records with it, and has those on their way while the layer before
computes. That costs a second round of scores, and records that are not chosen in the end. It gains where the disk is waited for. So as long
as records that were asked for were not in memory, a few steps are taken each way in turn, and the faster way is kept for a while.
source: speculative selection from the layer before, InfiniGen, arXiv 2406.19707.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from torch import Tensor

from kvdb.runtime.comparison import Comparison
from kvdb.runtime.selection import Plan

REACH: Final = 1.25
"""Records asked for ahead, of those that will be read: at 1, 1.25 and 1.5 times, 62, 80 and 88 % of what the last 8 steps had not read were
among them, with 1.2, 2.5 and 5 records read in vain for each (7 400 tokens, 10 %)."""
_CALM: Final = 8
"""Steps in a row that found everything in memory, after which nothing is read ahead."""


class Prefetch:
    """Reading ahead in one cache.

    wanted  True: always; False: never; None: where it gains
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted
        self._impossible: str | None = None
        self._calm = _CALM
        self._comparison = Comparison()
        self._expected: dict[int, Plan] = {}
        self._counts: dict[int, list[int]] = {}  # layer -> records expected, chosen, both
        self.active = False

    # -- steps

    def begin_step(self) -> None:
        """Decide for the step that begins."""
        self._expected.clear()
        if self._wanted is not None or self._impossible is not None:
            self.active = bool(self._wanted) and self._impossible is None
            return
        if self._calm >= _CALM:
            self.active = False
            self._comparison.restart()
        else:
            self.active = self._comparison.next()

    def end_step(self, seconds: float, fetched: int) -> None:
        """fetched: bytes that were asked for and not in memory."""
        self._calm = 0 if fetched else self._calm + 1
        self._comparison.took(self.active, seconds)

    @property
    def comparing(self) -> bool:
        """Whether this step is timed."""
        return self._wanted is None and self._impossible is None and self._comparison.comparing

    def give_up(self, reason: str) -> None:
        """Nothing can be predicted here."""
        self._impossible, self.active = reason, False

    # -- what came of it

    def expect(self, layer: int, plan: Plan) -> None:
        self._expected[layer] = plan

    def chosen(self, layer: int, plan: Plan, chunks: int) -> None:
        """What the true query chose, of a history of `chunks`."""
        expected = self._expected.pop(layer, None)
        if expected is None:
            return
        both = _count(expected.read(chunks) & plan.read(chunks))
        counts = self._counts.setdefault(layer, [0, 0, 0])
        for i, count in enumerate((expected.records, plan.records, both)):
            counts[i] += count

    def stats(self) -> dict[str, Any]:
        """JSON-safe. `layers`: for each, records expected and chosen so far, and the share of the chosen ones that was expected."""
        return {
            "active": self.active,
            "why": self._why(),
            "layers": {
                str(layer): {"expected": expected, "chosen": chosen, "hit_rate": both / chosen if chosen else 0.0}
                for layer, (expected, chosen, both) in sorted(self._counts.items())
            },
        }

    def _why(self) -> str:
        if self._impossible is not None:
            return self._impossible
        if self._wanted is not None:
            return "asked for" if self._wanted else "not wanted"
        if self._calm >= _CALM:
            return "what was read was in memory"
        found = self._comparison.medians
        if not found:
            return "steps are compared"
        return f"a step takes {1e3 * found[True]:.1f} ms with it, {1e3 * found[False]:.1f} ms without"


def _count(marks: Tensor) -> int:
    return int(np.count_nonzero(marks.cpu().numpy()))
