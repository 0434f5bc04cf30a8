"""Least frequently used goes first; a row that is not used any more loses half of its uses with every half-life.

In logarithms, so that what was not used for long still differs from what was not used for longer.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvdb.replacement.base import Array, Replacement, Uses


class LFU(Replacement):
    name: ClassVar[str] = "lfu"

    def scores(self, uses: Uses, now: int, half_life: float) -> Array:
        scores: Array = np.log2(uses.times) + (uses.used_at - now) / half_life
        return scores
