"""Stores made to do harm, visited in forked children: no crash, no hang, no memory bomb, nothing touched outside.

What a store says is wrong when it is; that is for `check`. Here only the visitor is looked after. See README.md for the ideas.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks.malformed import IDEAS, OUTSIDE
from faults.forked import trials
from faults.tally import Tally, counts
from faults.workload import Violation

Trial = tuple[str, Violation | None]


def visited(folder: Path, count: int, idea: str = "", plant: str = "") -> list[Trial]:
    """What was done to the stores of seeds 0..count, and what is wrong with how the visits ended."""
    lines = trials("attacks.malformed", folder, count, idea, plant)
    return [
        (f"seed {seed}, {done}", violation(*ended, touched, beside)) for seed, done, ended, touched, beside in lines
    ]


def violation(harm: str | None, answer: object, touched: bool, beside: list[str]) -> Violation | None:
    if touched or beside != [OUTSIDE, "s"]:
        return Violation("torn", f"something outside the store was changed; beside it: {beside}")
    return None if harm is None else Violation(harm, str(answer))


@pytest.mark.slow
def test_no_malformed_store_harms_its_visitor(scratch: Path, tally: Tally) -> None:
    count = counts(10_000, one_in=30)
    for trial in visited(scratch, count):
        tally.add(*trial)
    tally.assert_clean(count)


@pytest.mark.parametrize("idea", sorted(IDEAS))
def test_each_idea_alone_is_harmless(scratch: Path, idea: str) -> None:
    assert [trial for trial in visited(scratch, counts(40), idea) if trial[1] is not None] == []


@pytest.mark.parametrize(
    ("plant", "idea", "kind"),
    [
        ("links are followed", "link outside", "torn"),
        ("circles are walked", "circle of moves", "hung"),
        ("sizes are believed", "giant file", "untyped"),
    ],
)
def test_the_trials_see_a_planted_bug(scratch: Path, plant: str, idea: str, kind: str) -> None:
    found = visited(scratch, 4 if kind == "hung" else 30, idea, plant)
    assert kind in {violation.kind for _, violation in found if violation is not None}


def test_every_idea_has_its_verdict_in_the_readme() -> None:
    text = (Path(__file__).parent / "README.md").read_text()
    assert [idea for idea in IDEAS if f"| {idea} |" not in text] == []
