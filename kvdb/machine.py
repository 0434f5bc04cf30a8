"""The machine, and what this process may have of it. Looking writes nothing; what a system does not tell is None or empty."""

from __future__ import annotations

import mmap
import os
import platform
import re
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from kvdb.available import available_bytes, first_version_limit_bytes, group_limit_bytes, total_bytes
from kvdb.errors import Unsupported
from kvdb.requests import REQUESTS, best_requests

PACKAGES: Final = (
    "kvdb", "torch", "transformers", "numpy", "zarr", "numcodecs", "lmdb", "numba", "msgspec", "triton",
)  # fmt: skip
_HUGE_PAGES: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OVERCOMMIT: Final = Path("/proc/sys/vm/overcommit_memory")


class Tried(NamedTuple):
    """works: None where it could not be tried. told: why, or why not."""

    works: bool | None
    told: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, and what this process may have of it.

    cores                      of the machine; `usable_cores`: that this process may run on
    memory_bytes               of the machine; `available_bytes`: as `kvdb.available` counts them
    group_limit_bytes          of its control groups of version 2; `first_version_limit_bytes`: of version 1, which are not heeded
    overcommit                 vm.overcommit_memory: 0, 1 or 2
    huge_pages                 "always", "madvise" or "never"
    in_flight                  how many reads go to a device at once: a name of `kvdb.requests.REQUESTS`
    locked_bytes, open_files, address_space_bytes  soft limits; None: none
    versions                   of packages; None for one that is not installed
    numba_cache                where compiled loops are kept; None where nothing can be written: each process compiles anew
    """

    system: str
    kernel: str
    architecture: str
    python: str
    cores: int
    usable_cores: int
    page_bytes: int
    memory_bytes: int
    available_bytes: int
    group_limit_bytes: int | None
    first_version_limit_bytes: int | None
    overcommit: int | None
    huge_pages: str
    io_uring: Tried
    in_flight: str
    locked_bytes: int | None
    open_files: int | None
    address_space_bytes: int | None
    versions: dict[str, str | None]
    numba_cache: str | None


def look_at_machine() -> Machine:
    cores = os.cpu_count() or 1
    soft = {
        kind: resource.getrlimit(kind)[0]
        for kind in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE, resource.RLIMIT_AS)
    }
    bounds = {kind: None if limit == resource.RLIM_INFINITY else limit for kind, limit in soft.items()}
    overcommit, huge = _text(_OVERCOMMIT).strip(), re.search(r"\[(\w+)\]", _text(_HUGE_PAGES))
    cache = numba_cache()
    return Machine(
        system=platform.system(),
        kernel=platform.release(),
        architecture=platform.machine(),
        python=platform.python_version(),
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores,
        page_bytes=mmap.PAGESIZE,
        memory_bytes=total_bytes(),
        available_bytes=available_bytes(),
        group_limit_bytes=group_limit_bytes(),
        first_version_limit_bytes=first_version_limit_bytes(),
        overcommit=int(overcommit) if overcommit.isdigit() else None,
        huge_pages=huge[1] if huge else "",
        io_uring=_io_uring(),
        in_flight=_in_flight(),
        locked_bytes=bounds[resource.RLIMIT_MEMLOCK],
        open_files=bounds[resource.RLIMIT_NOFILE],
        address_space_bytes=bounds[resource.RLIMIT_AS],
        versions=versions(),
        numba_cache=None if cache is None else str(cache),
    )


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Of what is installed; nothing is imported for it."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def numba_cache() -> Path | None:
    """The first folder that numba may write compiled loops to: NUMBA_CACHE_DIR alone where it is set, else beside the source, else in the
    user's cache folder. A folder that is missing counts as its parent does."""
    if own := os.environ.get("NUMBA_CACHE_DIR"):
        candidates = [Path(own)]
    else:
        candidates = [Path(__file__).resolve().parent / "__pycache__", *_user_cache()]
    return next((folder for folder in candidates if _may_write(folder)), None)


def _user_cache() -> list[Path]:
    """Numba's folder in the user's cache folder; none for a user without a home."""
    try:
        return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba"]
    except RuntimeError:
        return []


def _io_uring() -> Tried:
    try:
        with REQUESTS["io_uring"]():
            return Tried(True)
    except Unsupported as why:
        return Tried(False, str(why))


def _in_flight() -> str:
    with best_requests() as requests:
        return requests.name


def _may_write(folder: Path) -> bool:
    there = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place)
    )  # False, too, for what may not be looked at
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
