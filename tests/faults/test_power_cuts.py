"""The power is cut on ext4 and on xfs while a store lives: what was acknowledged is there after recovery.

The file system is shut down without a flush of its log, so all that it held in memory is gone; then it is mounted again. The
acknowledgements lie on another file system. Each cut has a new store on the same disk, at a random moment of its life.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
from faults.children import Nursery, duration_s
from faults.disks import LoopDisk, loop_disk
from faults.tally import Tally, counts, seen
from faults.workload import LIFE, Violation, acks_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]


def cut_after(nurse: Nursery, disk: LoopDisk, acks: Path, delay_s: float, plant: str | None = None) -> Violation | None:
    store = disk.at / acks.name
    pid = nurse.live(store, acks, plant=plant)
    time.sleep(delay_s)
    disk.cut_power()
    nurse.kill(pid)
    nurse.wait(pid)
    disk.unmount()
    disk.mount()
    violation = nurse.verdict(store, acks, plant=plant)
    shutil.rmtree(store, ignore_errors=True)  # it may never have been made
    return violation


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_power_cut_loses_nothing_acknowledged(nurse: Nursery, scratch: Path, tally: Tally, kind: str) -> None:
    rng, reached = random.Random(1), set[int]()
    with loop_disk(scratch, kind) as disk:
        lasts_s = duration_s(nurse, disk.at / "whole", scratch / "whole")
        for number in range(counts(500)):
            acks = scratch / f"{number}"
            tally.add(f"cut {number}", cut_after(nurse, disk, acks, rng.uniform(0, lasts_s)))
            reached.add(len(acks_of(acks)))
    tally.assert_clean()
    assert reached & set(range(1, len(LIFE)))


@pytest.mark.parametrize("plant", ["no file fsync", "no directory fsync"])
def test_power_cuts_show(nurse: Nursery, scratch: Path, plant: str) -> None:
    with loop_disk(scratch, "ext4") as disk:
        lasts_s = duration_s(nurse, disk.at / "whole", scratch / "whole")
        cuts = (cut_after(nurse, disk, scratch / f"{n}", lasts_s * n / 20, plant) for n in range(40))
        assert seen(cuts)
