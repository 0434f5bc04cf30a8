"""A process is killed at every system call that changes the file system, and at random moments.

What was acknowledged is there, bit for bit; what was not is wholly there or wholly absent; the next process that opens the
store for writing finds nothing left over. (A kill cannot show a missing fsync: that is for power cuts and crash states.)
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from faults.children import Nursery, duration_s
from faults.syscalls import Call, inject, needs_strace, record
from faults.tally import Tally, counts, sample, seen
from faults.workload import LIFE, Violation, acks_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]


def killed_at(nurse: Nursery, folder: Path, call: Call, **how: str) -> Violation | None:
    folder.mkdir()
    status = inject(nurse, folder, call, "signal=SIGKILL", **how)
    violation = nurse.verdict(folder / "s", folder / "acks", status, **how)
    assert violation or "plant" in how or status == -signal.SIGKILL, f"{call} did not come"
    shutil.rmtree(folder)
    return violation


@needs_strace
@pytest.mark.parametrize(("script", "at_least"), [("life", 500), ("repaired", 200)])
def test_a_process_killed_at_any_call_loses_nothing_acknowledged(
    nurse: Nursery, scratch: Path, tally: Tally, script: str, at_least: int
) -> None:
    calls = record(nurse, scratch, script=script)
    assert len(calls) >= at_least
    for number, call in enumerate(sample(calls)):
        tally.add(call, killed_at(nurse, scratch / f"{number}", call, script=script))
    tally.assert_clean()


@needs_strace
@pytest.mark.parametrize("plant", ["commit before data", "unlink before commit", "recoded in place", "no sweep"])
def test_killing_at_every_call_shows(nurse: Nursery, scratch: Path, plant: str) -> None:
    """A planted bug: the harness must see it. Only the calls that publish or remove something are tried."""
    calls = record(nurse, scratch, plant=plant)
    suspects = [call for call in calls if call.name in ("rename", "unlink", "mkdir")]
    found = (killed_at(nurse, scratch / f"{n}", call, plant=plant) for n, call in enumerate(suspects[::-1]))
    assert seen(found)


def test_a_process_killed_at_a_random_moment_loses_nothing_acknowledged(
    nurse: Nursery, scratch: Path, tally: Tally
) -> None:
    rng, reached = random.Random(1), set[int]()
    lasts_s = duration_s(nurse, scratch / "s", scratch / "acks")
    for number in range(counts(2_000)):
        folder = scratch / f"{number}"
        folder.mkdir()
        pid = nurse.live(folder / "s", folder / "acks")
        time.sleep(rng.uniform(0, lasts_s))
        nurse.kill(pid)
        status = nurse.wait(pid)
        tally.add(f"kill {number}", nurse.verdict(folder / "s", folder / "acks", status))
        reached.add(len(acks_of(folder / "acks")))
        shutil.rmtree(folder)
    tally.assert_clean()
    assert reached & set(range(1, len(LIFE)))
