"""Replacement policies by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from typing import Final

from kvdb.replacement.base import Replacement, Uses
from kvdb.replacement.importance import Importance
from kvdb.replacement.lfu import LFU
from kvdb.replacement.lru import LRU

REPLACEMENT: Final[dict[str, Replacement]] = {policy.name: policy for policy in (LRU(), LFU(), Importance())}

__all__ = ["LFU", "LRU", "REPLACEMENT", "Importance", "Replacement", "Uses"]
