"""Selectors by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from typing import Final

from kvdb.runtime.selection.base import DENSE_BELOW, Forced, Resident, Scores, Selector
from kvdb.runtime.selection.box import BoxSelector
from kvdb.runtime.selection.mass import covered_mass
from kvdb.runtime.selection.rules import Budget, Certified, Mass, Plan, StopRule
from kvdb.runtime.selection.sketch import SketchSelector

SELECTORS: Final[dict[str, type[Selector]]] = {selector.name: selector for selector in (BoxSelector, SketchSelector)}

__all__ = [
    "DENSE_BELOW", "SELECTORS", "BoxSelector", "Budget", "Certified", "Forced", "Mass", "Plan", "Resident", "Scores", "Selector",
    "SketchSelector", "StopRule", "covered_mass",
]  # fmt: skip
