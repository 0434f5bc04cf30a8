"""Every system call of a life fails once, or from then on: the store is none the worse.

The caller gets a KVDB error or an OSError that says where; the same process goes on as soon as the disk works again; the next one
finds everything that was acknowledged and nothing left over.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import lmdb
import pytest
from faults.children import Nursery
from faults.syscalls import Call, inject, needs_strace, record
from faults.tally import Tally, sample, seen
from faults.workload import LAST, Violation
from helpers import extend, identity, opened

from kvdb.errors import StorageFull
from kvdb.transaction import Transaction

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3_600)]

ERRORS: Final = {
    "openat": ("EMFILE", "ENFILE", "ENOSPC", "EIO"),
    "mkdir": ("ENOSPC", "EIO"),
    "pwrite64": ("ENOSPC", "EIO", "EFBIG"),
    "writev": ("ENOSPC", "EIO", "EFBIG"),
    "pwritev": ("ENOSPC", "EIO", "EFBIG"),
    "ftruncate": ("ENOSPC", "EIO", "EFBIG"),
    "mmap": ("ENOMEM",),
    "fsync": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC"),
    "rename": ("ENOSPC", "EIO"),
    "link": ("ENOSPC", "EIO"),
}
"""What a call may say. One that is not here says EIO."""


def failing_at(
    nurse: Nursery, folder: Path, call: Call, *, onwards: bool, plant: str | None = None
) -> Violation | None:
    """The fault is gone when a life ends (onwards) or after one call (and then the same process looks at its store)."""
    folder.mkdir()
    errors = ERRORS.get(call.name, ("EIO",))
    what = f"error={errors[(call.number + onwards) % len(errors)]}"
    status = inject(nurse, folder, call, what, onwards=onwards, look=not onwards, plant=plant)
    violation = nurse.verdict(folder / "s", folder / "acks", status, plant=plant)
    shutil.rmtree(folder)
    return violation


@needs_strace
@pytest.mark.parametrize("onwards", [False, True], ids=["once", "persistent"])
def test_a_failing_call_costs_only_the_operation_it_failed_in(
    nurse: Nursery, scratch: Path, tally: Tally, onwards: bool
) -> None:
    calls = record(nurse, scratch, also=("openat", "mmap"))
    assert len(calls) >= 300
    for number, call in enumerate(sample(calls)):
        tally.add(call, failing_at(nurse, scratch / f"{number}", call, onwards=onwards))
    tally.assert_clean()


@needs_strace
def test_failing_every_rename_shows_an_error_that_is_ignored(nurse: Nursery, scratch: Path) -> None:
    plant = "rename error ignored"
    renames = [call for call in record(nurse, scratch, plant=plant) if call.name == "rename"]
    found = (failing_at(nurse, scratch / f"{n}", call, onwards=False, plant=plant) for n, call in enumerate(renames))
    assert seen(found)


@pytest.mark.parametrize("error", [lmdb.MapFullError("full"), lmdb.DiskError("disk")], ids=["map full", "disk"])
def test_a_full_catalog_commits_nothing(scratch: Path, error: lmdb.Error) -> None:
    def full(*_: object) -> None:
        raise error

    with opened(scratch / "s") as db:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Transaction, "_put", full)
            with pytest.raises(StorageFull, match="nothing was committed"):
                extend(db, LAST)
        assert db.match(identity(), LAST).tokens == 0
        extend(db, LAST)
