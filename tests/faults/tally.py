"""How many points a harness tries, and what came of them.

The counts are those of the nightly run; any other tries a tenth, the same tenth every time, or less of what takes long.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

from faults.workload import Violation

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
HARM = ("lost", "torn", "resurrected", "unusable")
KINDS = (*HARM, "untyped", "crashed", "hung")
T = TypeVar("T")


def counts(full: int, one_in: int = 10) -> int:
    return full if NIGHTLY else -(-full // one_in)


def sample(points: Sequence[T]) -> list[T]:
    """All points in the nightly run, otherwise a tenth, spread over all of them."""
    return list(points) if NIGHTLY else random.Random(0).sample(list(points), counts(len(points)))


def seen(violations: Iterable[Violation | None]) -> bool:
    """True as soon as one of them says what a planted bug does: harm to data, not a crash of the harness."""
    return any(violation is not None and violation.kind in HARM for violation in violations)


class Tally:
    """What came of each point; `report` is the line that documents quote."""

    def __init__(self, name: str) -> None:
        self.name, self.points = name, 0
        self.seen: Counter[str] = Counter()
        self.violations: list[str] = []

    def add(self, point: object, violation: Violation | None) -> None:
        self.points += 1
        if violation is not None:
            self.seen[violation.kind] += 1
            self.violations.append(f"{point}: {violation}")

    def report(self) -> str:
        return f"{self.name}: {self.points} points, " + ", ".join(f"{self.seen[kind]} {kind}" for kind in KINDS)

    def assert_clean(self, at_least: int = 1) -> None:
        assert self.violations == [], "\n".join([self.report(), *self.violations[:20]])
        assert self.points >= at_least, self.report()
