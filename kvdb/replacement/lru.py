"""Least recently used goes first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvdb.replacement.base import Array, Replacement, Uses


class LRU(Replacement):
    name: ClassVar[str] = "lru"

    def scores(self, uses: Uses, now: int, half_life: float) -> Array:
        return uses.used_at.astype(np.float64)
