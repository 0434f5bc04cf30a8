"""What a store runs on, all together: facts alone. `kvdb.advice` says what they mean."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvdb import folder
from kvdb.errors import Damaged, OutOfMemory, StoreLocked, StoreNotFound
from kvdb.machine import Machine, look_at_machine
from kvdb.place import FsyncCost, Place, fsync_cost, look_at_place
from kvdb.store import KVDB


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """How `read_mode="auto"` decides for a store.

    shared  whether a reader puts itself down in LMDB's table of readers, so that writers leave it its pages; False: this user may not
    """

    mode: str
    why: str
    stored_bytes: int
    shared: bool


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """What models run on beside the CPU. build: what torch was built for, such as "cpu" or "cuda 12.8"."""

    build: str
    cuda: bool
    device: str
    memory_bytes: int | None
    threads: int


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found out. place, reading: None without a store; `broken`: why it could not be opened."""

    machine: Machine
    place: Place | None = None
    reading: Reading | None = None
    broken: str = ""
    fsync: FsyncCost | None = None
    accelerator: Accelerator | None = None


def look_around(store: Path | None = None, *, probe: bool = False) -> Surroundings:
    """Look around, and into a store; nothing is written, but for `probe`.

    store   an existing one, or an empty folder for one to be; None: the machine alone
    probe   measure what an fsync costs, in a file beside the store that is removed again
    raises  StoreNotFound, NotAStore, NewerFormat, OlderFormat; InvalidInput where there is no room for that file; OSError
    """
    if store is None:
        return Surroundings(machine=look_at_machine())
    there = folder.holds_store(store)
    if not store.exists():
        raise StoreNotFound(f"{store}: no such folder, expected a store, or an empty folder for one")
    reading, broken = _reading(store) if there else (None, "")
    sound = reading is not None  # files of a store that is refused may be anything, pipes too
    return Surroundings(
        machine=look_at_machine(),
        place=look_at_place(store, store / folder.HEADER if sound else None),
        reading=reading,
        broken=broken,
        fsync=fsync_cost(store) if probe else None,
    )


def _reading(store: Path) -> tuple[Reading | None, str]:
    """How it is read, or why not. Who may not write to a store cannot hold it open as others do, and looks in without locks."""
    try:
        db = KVDB.open(store, "r")
    except (Damaged, OutOfMemory, StoreLocked) as e:
        return None, str(e)
    with db:
        info, shared = db.info(), db.catalog.uses_lock
    return Reading(
        mode=info["read_mode"], why=info["why_read_mode"], stored_bytes=info["disk_bytes"], shared=shared
    ), ""
