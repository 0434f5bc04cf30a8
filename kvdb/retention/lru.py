"""Least recently used goes first."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import ClassVar

from kvdb.catalog import Sequence
from kvdb.retention.base import Retention


class LRU(Retention):
    name: ClassVar[str] = "lru"

    def order(self, sequences: List[Sequence]) -> list[Sequence]:
        return sorted((s for s in sequences if s.name is None), key=lambda s: (s.last_used, s.key))
