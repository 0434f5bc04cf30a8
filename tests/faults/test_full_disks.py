"""Disks that are really full, and files that may not grow: typed errors, old data intact, room can be made and is used again."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.disks import tmpfs
from faults.workload import CREATE, LAST, Life, Step, delete, evict, judge, store
from helpers import token_list


def sequence(n: int, *, named: bool = True) -> Step:
    return store(f"sequence {n}", token_list(40, 100 + n), name=f"{n}" if named else None)


def fill(life: Life) -> list[Step]:
    """Store named sequences until one more does not fit. (What LMDB says of a short write is EIO.)"""
    script = [CREATE]
    life.live(script)
    while life.acks[-1].startswith("done"):
        script.append(sequence(len(script)))
        life.live(script[-1:])
    return script


def junk(path: Path) -> None:
    """Take the last byte of the disk."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("size", ["1m", "4m"])
@pytest.mark.parametrize("way_out", [evict(), delete("3")], ids=["evict", "delete"])
def test_room_can_be_made_on_a_disk_without_a_free_byte(scratch: Path, size: str, way_out: Step) -> None:
    with tmpfs(scratch / "disk", size) as disk:
        life = Life(disk / "s", lambda ack: None, min_free=0)
        script = [CREATE, *(sequence(n, named=way_out.label != "evict") for n in range(6)), way_out]
        life.live(script[:-1])
        junk(disk / "junk")
        life.live(script[-1:])
        assert [ack for ack in life.acks if not ack.startswith("done")] == []
        (disk / "junk").unlink()
        more = [store("last", LAST, name="last")]
        life.live(more)
        life.look((*script, *more))
        judge(disk / "s", life.acks, (*script, *more), min_free=0)


@pytest.mark.parametrize("size", ["2m", "4m"])
def test_a_full_disk_takes_nothing_away(scratch: Path, size: str) -> None:
    with tmpfs(scratch / "disk", size) as disk:
        life = Life(disk / "s", lambda ack: None, min_free=0)
        script = fill(life)
        assert "StorageFull" in life.acks[-1]
        more = [*(delete(f"{n}") for n in range(1, 13)), store("last", LAST, name="last")]
        life.live(more)
        life.look((*script, *more))
        judge(disk / "s", life.acks, (*script, *more), min_free=0)


@pytest.fixture
def file_bytes() -> Iterator[int]:
    """No file of this process may grow beyond so many bytes: a write is short there, and the next one fails with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow_takes_nothing_away(scratch: Path, file_bytes: int) -> None:
    life = Life(scratch / "s", lambda ack: None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, before[1]))
    script = fill(life)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    more = [store("last", LAST, name="last")]
    life.live(more)
    assert life.acks[-1] == "done store last"
    life.close()
    judge(scratch / "s", life.acks, (*script, *more))
