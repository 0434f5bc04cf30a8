"""Abstracts by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from typing import Final

from kvdb.abstracts.base import Abstract
from kvdb.abstracts.box import Box
from kvdb.abstracts.centroid import Centroid
from kvdb.abstracts.mean import Mean
from kvdb.abstracts.sketch import Sketch

ABSTRACTS: Final[dict[str, Abstract]] = {abstract.name: abstract for abstract in (Box(), Sketch(), Mean(), Centroid())}

__all__ = ["ABSTRACTS", "Abstract", "Box", "Centroid", "Mean", "Sketch"]
