"""Selectors by name. To add one: its file, and its line in the table; or an entry point of another package."""

from __future__ import annotations

from typing import Final

from kvdb.runtime.selection.base import DENSE_BELOW, Estimate, Forced, Resident, Scores, Selector
from kvdb.runtime.selection.box import BoxSelector
from kvdb.runtime.selection.centroid import CentroidSelector
from kvdb.runtime.selection.mass import covered_mass
from kvdb.runtime.selection.mean import MeanSelector
from kvdb.runtime.selection.rules import Budget, Certified, Mass, Plan, StopRule, Threshold
from kvdb.runtime.selection.sketch import SketchSelector
from kvdb.runtime.selection.table import SelectorTable

SELECTORS: Final = SelectorTable((CentroidSelector, SketchSelector, BoxSelector, MeanSelector))
DEFAULT_SELECTOR: Final = CentroidSelector.name

__all__ = [
    "DEFAULT_SELECTOR", "DENSE_BELOW", "SELECTORS", "BoxSelector", "Budget", "CentroidSelector", "Certified", "Estimate", "Forced", "Mass",
    "MeanSelector", "Plan", "Resident", "Scores", "Selector", "SelectorTable", "SketchSelector", "StopRule", "Threshold", "covered_mass",
]  # fmt: skip
