"""No state that a crash may leave on a disk breaks a promise: fsyncs are where they must be, and in the right order.

Crashes are made from a journal of one life, in this process, everywhere: vfs.py says what is a legal state. What a real kernel
and a real file system leave is for the kills and the power cuts.
"""

from __future__ import annotations

import errno
import random
import shutil
from pathlib import Path

import pytest
from faults import plants
from faults.tally import Tally, counts, seen
from faults.vfs import Fault, Vfs, crashed, lived
from faults.workload import LIFE, Step, Violation
from helpers import tree_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]


@pytest.mark.parametrize("script", [LIFE[:1], LIFE], ids=["creation", "whole life"])
def test_no_legal_state_after_a_crash_breaks_a_promise(scratch: Path, tally: Tally, script: tuple[Step, ...]) -> None:
    vfs = lived(scratch / "life", script)
    assert [line.split()[0] for _, line in vfs.acks] == ["done"] * len(script)
    for seed in range(counts(5_000)):
        tally.add(f"seed {seed}", tried(vfs, scratch, seed, script))
    tally.assert_clean()


def tried(vfs: Vfs, scratch: Path, seed: int, script: tuple[Step, ...] = LIFE, *, since: int = 0) -> Violation | None:
    violation = crashed(vfs, scratch / f"crash{seed}", random.Random(seed), script, since=since)
    shutil.rmtree(scratch / f"crash{seed}")
    return violation


def test_nor_does_one_after_an_effect_that_failed(scratch: Path, tally: Tally) -> None:
    effects = len(lived(scratch / "measured").effects)
    for seed in range(counts(2_000)):
        rng = random.Random(seed)
        fault = Fault(rng.randrange(effects), rng.choice([errno.EIO, errno.ENOSPC]), lasting=rng.random() < 0.3)
        tally.add(f"seed {seed}, {fault}", fails_then_crashes(scratch, fault, seed))
    tally.assert_clean()


def fails_then_crashes(scratch: Path, fault: Fault, seed: int, plant: str | None = None) -> Violation | None:
    life = scratch / f"life{seed}"  # never a used path: a handle that an error keeps alive would be joined
    try:
        vfs = lived(life, fault=fault, plant=plant, short_writes=seed % 2 == 0)
        return tried(vfs, scratch, seed, since=vfs.failed[0][0])
    except Violation as violation:
        return violation
    finally:
        shutil.rmtree(life)


@pytest.mark.parametrize(
    "plant",
    [
        "no file fsync",
        "no directory fsync",
        "commit before data",
        "unlink before commit",
        "abstracts by segment",
        "recoded in place",
        "no sweep",
    ],
)
def test_crash_states_show(scratch: Path, plant: str) -> None:
    vfs = lived(scratch / "life", plant=plant)
    with plants.planted(plant):
        assert seen(tried(vfs, scratch, seed) for seed in range(500))


@pytest.mark.parametrize("plant", ["retried fsync", "rename error ignored"])
def test_crash_states_after_a_failure_show(scratch: Path, plant: str) -> None:
    effects = lived(scratch / "measured").effects
    faults = [Fault(at, errno.EIO) for at, effect in enumerate(effects) if effect in plant]
    assert seen(fails_then_crashes(scratch, fault, seed, plant) for seed, fault in enumerate(faults))


def test_a_journal_played_to_its_end_is_the_store_itself(scratch: Path) -> None:
    vfs = lived(scratch / "life")
    vfs.crash(len(vfs.journal), scratch / "copy", random.Random(0), power=False)
    found, expected = tree_bytes(scratch / "copy"), tree_bytes(scratch / "life")
    expected.pop("s/catalog/lock.mdb")  # LMDB's own; it is made anew
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
