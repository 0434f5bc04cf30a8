"""Least recently used goes first."""

from __future__ import annotations

from typing import ClassVar

from kvdb.retention.base import Leaf, Retention


class LRU(Retention):
    name: ClassVar[str] = "lru"

    def rank(self, leaf: Leaf) -> tuple[float, ...]:
        return (leaf.last_used,)
