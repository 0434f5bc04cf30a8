"""What callers say is least important goes first; a weight loses half of itself with every half-life in which the row is not used.

Rows of which nothing was said count as the average of the others. Where nothing was said of any, that is least recently used.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from kvdb.replacement.base import Array, Replacement, Uses

_LEAST: Final = 1e-30
"""Weights below count as this: a logarithm is finite."""


class Importance(Replacement):
    name: ClassVar[str] = "importance"

    def scores(self, uses: Uses, now: int, half_life: float) -> Array:
        said = uses.weight > 0
        usual = float(uses.weight[said].mean()) if said.any() else 1.0
        weights = np.maximum(np.where(said, uses.weight, usual), _LEAST)
        scores: Array = np.log2(weights) + (uses.used_at - now) / half_life
        return scores
