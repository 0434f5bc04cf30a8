"""How much memory a process may still take: of the machine, of its control group, and of what it was allowed itself."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path
from typing import Final

_MEMINFO: Final = Path("/proc/meminfo")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_GROUPS: Final = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, membership: Path = _MEMBERSHIP, groups: Path = _GROUPS) -> int:
    """Bytes that can be had without pushing others out, cached files aside: MemAvailable, or less where a group of version 2 that this process is in, or one
    around it, has a limit, or where its address space has one (ulimit -v). Half of the memory where the system tells nothing."""
    found = [*_in_groups(membership, groups), *_in_address_space()]
    told = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(meminfo), re.MULTILINE)
    if told:
        found.append(int(told[1]) << 10)
    if not found:
        found.append(total_bytes() // 2)
    return max(0, min(found))


def group_limit_bytes(membership: Path = _MEMBERSHIP, groups: Path = _GROUPS) -> int | None:
    """The least memory that a group of version 2 that this process is in, or one around it, may take; None: no limit."""
    limits = (_text(place / "memory.max").strip() for place in _around(membership, groups))
    return min((int(limit) for limit in limits if limit.isdigit()), default=None)


def first_version_limit_bytes(membership: Path = _MEMBERSHIP, groups: Path = _GROUPS) -> int | None:
    """The same of groups of version 1, which `available_bytes` does not heed; None also for more than the machine has."""
    told = re.search(r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(/.*)$", _text(membership), re.MULTILINE)
    places = _upwards(groups / "memory", told[1]) if told else []  # a container sees its own group as the root
    limits = [int(text) for place in places if (text := _text(place / "memory.limit_in_bytes").strip()).isdigit()]
    return min((limit for limit in limits if limit < total_bytes()), default=None)


def total_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _in_groups(membership: Path, groups: Path) -> list[int]:
    found = []
    for place in _around(membership, groups):
        limit, used = _text(place / "memory.max").strip(), _text(place / "memory.current").strip()
        cached = re.findall(r"^(?:in)?active_file (\d+)$", _text(place / "memory.stat"), re.MULTILINE)
        if limit.isdigit() and used.isdigit():  # "max" is no limit
            found.append(int(limit) - int(used) + sum(map(int, cached)))
    return found


def _around(membership: Path, groups: Path) -> list[Path]:
    """The group of version 2 that this process is in, and those around it."""
    told = re.search(r"^0::(/.*)$", _text(membership), re.MULTILINE)
    return [] if told is None else _upwards(groups, told[1])


def _upwards(root: Path, group: str) -> list[Path]:
    """A group, and those around it."""
    place = root / group.lstrip("/")
    return [each for each in (place, *place.parents) if each.is_relative_to(root)]


def _in_address_space() -> list[int]:
    limit, used = resource.getrlimit(resource.RLIMIT_AS)[0], _text(Path("/proc/self/statm")).split()
    if limit == resource.RLIM_INFINITY or not used:
        return []
    return [limit - int(used[0]) * resource.getpagesize()]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
