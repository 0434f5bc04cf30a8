"""A second process opens the store for writing, sweeps it and commits while the first is in the middle of a segment.

Neither loses anything. That is what locks are for: the sweep must not take what a live writer is writing for a dead one's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from faults import plants
from faults.children import Nursery
from faults.tally import seen
from faults.workload import CREATE, NEXT, TRUNK, Held, Life, State, Violation, acks_of, held_by, store
from helpers import opened

BOTH: State = frozenset({Held("trunk", TRUNK.tobytes()), Held("visit", NEXT.tobytes())})


def visited(nurse: Nursery, scratch: Path, write: int, plant: str | None = None) -> Violation | None:
    """Another process visits before the `write`th write of a commit. None if both got what they wanted."""
    real, writes = os.pwrite, 0

    def pwrite(*arguments: Any) -> int:
        nonlocal writes
        writes += 1
        if writes == write:
            nurse.wait(nurse.live(scratch / "s", scratch / "visit", script="visit", plant=plant))
        return real(*arguments)

    with plants.planted(plant), pytest.MonkeyPatch.context() as patch:
        life = Life(scratch / "s", lambda ack: None)
        life.live([CREATE])
        patch.setattr(os, "pwrite", pwrite)
        life.live([store("trunk", TRUNK, name="trunk")])
        life.close()
    assert writes >= write
    for ack in (*life.acks, *acks_of(scratch / "visit")):
        if not ack.startswith("done"):
            return Violation("untyped" if "untyped" in ack else "lost", ack)
    with opened(scratch / "s") as db:
        found = held_by(db)
        return None if found == BOTH else Violation("lost", f"{len(found)} sequences, expected two")


@pytest.mark.parametrize("write", range(1, 40, 3))
def test_a_writer_is_not_disturbed_by_one_that_opens_the_store(nurse: Nursery, scratch: Path, write: int) -> None:
    assert visited(nurse, scratch, write) is None


def test_a_visit_shows_that_locks_were_skipped(nurse: Nursery, scratch: Path) -> None:
    assert seen([visited(nurse, scratch, 5, "lock skipped")])
