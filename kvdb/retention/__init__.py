"""Retention policies by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from typing import Final

from kvdb.retention.base import Leaf, Retention
from kvdb.retention.lru import LRU

RETENTION: Final[dict[str, Retention]] = {policy.name: policy for policy in (LRU(),)}

__all__ = ["LRU", "RETENTION", "Leaf", "Retention"]
