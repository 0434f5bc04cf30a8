"""What surroundings mean for a store, in plain sentences: what is unsafe, what will be slow, and what to change. Pure: facts in, findings out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from kvdb.machine import Machine
from kvdb.place import FsyncCost, Place
from kvdb.surroundings import Accelerator, Reading, Surroundings

Level = Literal["unsafe", "slow", "note"]
_LEVELS: Final[tuple[Level, ...]] = ("unsafe", "slow", "note")
MIN_FREE: Final = 64 << 20
"""What `KVDB.open` leaves free on the disk unless told otherwise: with less, nothing can be written."""
_SLOW_FSYNC_MS: Final = 5.0
"""A commit waits about four times in a row: so many milliseconds make a turn of a conversation wait for longer than a fiftieth of a second."""
_FEW_FILES: Final = 1024
_TEMPORARY: Final = ("tmpfs", "ramfs")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One sentence.

    level  unsafe: the store may break, or cannot be used as a writer would; slow: it works, slower than it could; note: good to know
    about  what it is about, in a word or two
    what   what is, and what follows
    do     what to change, as a command or a setting; empty where nothing is to be done
    """

    level: Level
    about: str
    what: str
    do: str = ""


def advise(found: Surroundings) -> list[Finding]:
    """The worst first; of one level in the order of place, reading, memory, computing."""
    findings = [*_of_machine(found.machine)]
    if found.place is not None:
        findings = [*_of_place(found.place), *findings]
    if found.fsync is not None:
        findings += _of_fsync(found.fsync)
    if found.reading is not None:
        findings += _of_reading(found.reading, found.machine)
    if found.accelerator is not None:
        findings += _of_accelerator(found.accelerator, found.machine)
    if found.broken:
        findings.append(
            Finding(level="unsafe", about="store", what=f"it cannot be opened: {found.broken}", do="kvdb repair STORE")
        )
    if found.place is not None:
        label = shlex.quote(found.place.path)
        findings = [msgspec.structs.replace(finding, do=finding.do.replace("STORE", label)) for finding in findings]
    return sorted(findings, key=lambda finding: _LEVELS.index(finding.level))


def _of_place(place: Place) -> Iterator[Finding]:
    if place.network:
        yield Finding(
            level="unsafe",
            about="file system",
            what=f"{place.file_system} is a network file system: the catalog is a map, which hosts do not share, and a file that another host "
            "cuts ends the process",
            do="put the store on a local disk, and move sequences with kvdb export and kvdb import",
        )
    if place.locks.works is False:
        yield Finding(
            level="unsafe",
            about="locks",
            what=f"{place.locks.told}: two writers at once would damage the store",
            do="mount with locks (without nolock), or use a local disk",
        )
    if place.maps.works is False:
        yield Finding(
            level="unsafe",
            about="maps",
            what=f"files cannot be mapped ({place.maps.told}), and the catalog must be",
            do="use a local disk",
        )
    if place.read_only:
        yield Finding(
            level="unsafe",
            about="disk",
            what="it is mounted read-only: nothing can be stored",
            do=f"mount -o remount,rw (the mount of {place.path}), or copy the store",
        )
    elif not place.writable:
        yield Finding(
            level="unsafe",
            about="permissions",
            what="this user may not write to the folder: nothing can be stored",
            do=f"run as its owner, or chown -R $USER {place.path}",
        )
    elif place.free_bytes < MIN_FREE:
        yield Finding(
            level="unsafe",
            about="disk",
            what=f"{place.free_bytes >> 20} MiB are free, and writers leave {MIN_FREE >> 20} MiB: nothing can be stored, deleting works",
            do="kvdb evict STORE --to SIZE, or free room on the disk",
        )
    if place.free_files is not None and place.free_files < 1000 and place.writable:
        yield Finding(
            level="unsafe",
            about="disk",
            what=f"room for {place.free_files:,} more files, and a stored turn takes about ten",
            do="kvdb compact STORE, or remove files from the disk",
        )
    if place.direct.works is False:
        yield Finding(
            level="slow",
            about="direct reads",
            what=f"{place.file_system or 'the file system'} has no reads past the page cache: KV larger than memory is read through the page "
            "cache, one record at a time under pressure",
            do="put the store on ext4 or xfs",
        )
    if place.file_system in _TEMPORARY:
        yield Finding(
            level="note",
            about="file system",
            what=f"{place.file_system} is memory: the store takes memory, and is gone with the machine's next start",
        )


def _of_fsync(cost: FsyncCost) -> Iterator[Finding]:
    if cost.median_ms > _SLOW_FSYNC_MS:
        yield Finding(
            level="slow",
            about="fsync",
            what=f"it takes {cost.median_ms:.1f} ms (worst {cost.worst_ms:.1f}), and each commit waits for several",
            do="KVDB.open(..., durability='relaxed') or kvdb ask --durability relaxed: a power failure may then lose the last commits",
        )


def _of_reading(reading: Reading, machine: Machine) -> Iterator[Finding]:
    if not reading.shared:
        yield Finding(
            level="slow",
            about="readers",
            what="this user may not write to LMDB's table of readers: writers wait while one of its readers looks into the catalog",
            do="let this user write to STORE/catalog and the files in it",
        )
    if reading.stored_bytes > machine.available_bytes:
        yield Finding(
            level="slow" if reading.mode != "direct" else "note",
            about="memory",
            what=f"{reading.stored_bytes >> 20} MiB are stored and {machine.available_bytes >> 20} MiB of memory are available: what is read "
            f"comes from the disk ({reading.mode})",
            do="kvdb compact STORE SEQUENCE --codec int4 for less to read, a smaller budget, or more memory",
        )


def _of_machine(machine: Machine) -> Iterator[Finding]:
    if machine.system not in ("Linux", "Darwin"):
        yield Finding(
            level="unsafe", about="system", what=f"{machine.system}: KVDB runs on Linux and macOS", do="use one of them"
        )
    if machine.first_version_limit_bytes is not None:
        yield Finding(
            level="slow",
            about="memory",
            what=f"a control group of version 1 allows {machine.first_version_limit_bytes >> 20} MiB, which KVDB does not see: it may be killed",
            do=f"KVDB.open(..., host_budget={machine.first_version_limit_bytes // 4}), or control groups of version 2",
        )
    if machine.overcommit == 2:
        yield Finding(
            level="note",
            about="overcommit",
            what="vm.overcommit_memory is 2: memory that is only reserved counts, the host tier among it",
            do="sysctl -w vm.overcommit_memory=0, or a smaller host_budget",
        )
    if machine.address_space_bytes is not None:
        yield Finding(
            level="slow",
            about="address space",
            what=f"{machine.address_space_bytes >> 20} MiB at most: maps of a store count, though they take no memory",
            do="ulimit -v unlimited",
        )
    if machine.open_files is not None and machine.open_files < _FEW_FILES:
        yield Finding(
            level="slow",
            about="open files",
            what=f"{machine.open_files} at most: a sequence of many segments keeps several open for each",
            do="ulimit -n 4096, or kvdb compact STORE",
        )
    if machine.io_uring.works is False and machine.system == "Linux":
        yield Finding(
            level="slow",
            about="io_uring",
            what=f"{machine.io_uring.told.removeprefix('io_uring: ')}: read_mode 'direct' uses threads, which cost more of the processor",
            do="sysctl -w kernel.io_uring_disabled=0; in a container also a seccomp profile that allows io_uring_setup, io_uring_enter",
        )
    if machine.huge_pages == "never":
        yield Finding(
            level="slow",
            about="huge pages",
            what="never: devices fill the host tier page by page, records of 64 KiB and more at about half the speed",
            do="echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if machine.versions.get("numba") is None:
        yield Finding(
            level="slow",
            about="numba",
            what="it is not installed: sketches cannot be scored, records are copied first",
            do="pip install numba",
        )
    elif machine.numba_cache is None:
        yield Finding(
            level="slow",
            about="numba",
            what="compiled loops cannot be kept: each process compiles them for seconds",
            do="NUMBA_CACHE_DIR=FOLDER, one that this user may write to",
        )


def _of_accelerator(found: Accelerator, machine: Machine) -> Iterator[Finding]:
    if found.threads > machine.usable_cores:
        yield Finding(
            level="slow",
            about="threads",
            what=f"torch computes with {found.threads} threads on {machine.usable_cores} cores that this process may run on",
            do=f"kvdb ask --threads {machine.usable_cores}, or OMP_NUM_THREADS={machine.usable_cores}",
        )
    if found.cuda and machine.versions.get("triton") is None:
        yield Finding(
            level="slow",
            about="triton",
            what=f"it is not installed: KV of codecs is decoded by the CPU, not by {found.device}",
            do="pip install 'kvdb[triton]'",
        )
    if not found.cuda:
        yield Finding(level="note", about="GPU", what=f"none that torch ({found.build}) can use: models run on the CPU")
