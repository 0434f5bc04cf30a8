"""What memory a stretch of work takes, against allocations of a known size."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import numpy as np

from kvdb.tools.bench.charged import PeakMemory, disk_bytes

MIB = 2**20


def test_the_peak_is_seen_though_it_has_gone_at_the_end() -> None:
    with PeakMemory() as memory:
        held = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(held, np.uint8)[:] = 1
        time.sleep(0.5)
        held = mmap.mmap(-1, 1)
        time.sleep(0.1)
    assert 63 * MIB <= memory.peak_bytes < 96 * MIB
    held.close()


def test_pages_of_files_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(64 * MIB))
    with (tmp_path / "f").open("rb") as file, PeakMemory() as memory:
        held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        np.frombuffer(held, np.uint8).sum()
        time.sleep(0.5)
    assert memory.peak_bytes < 16 * MIB


def test_holes_take_nothing_on_the_disk(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(64 * MIB)
        file.write(bytes(MIB))
    assert MIB <= disk_bytes(tmp_path) < 2 * MIB
