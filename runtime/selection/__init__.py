"""Selectors by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from typing import Final

from kvdb.runtime.selection.base import (
    DENSE_BELOW,
    Budget,
    Forced,
    Plan,
    Selector,
    covered_mass,
    plan,
)
from kvdb.runtime.selection.box import BoxSelector

SELECTORS: Final[dict[str, type[Selector]]] = {selector.name: selector for selector in (BoxSelector,)}

__all__ = [
    "DENSE_BELOW", "SELECTORS", "BoxSelector", "Budget", "Forced", "Plan", "Selector", "covered_mass", "plan",
]  # fmt: skip
