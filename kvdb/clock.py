"""Store time: seconds that only go forward, whatever the wall clock does.

Retention compares times, so a clock that jumps must not make new KV look old. Within a boot, store time advances by the
seconds since boot, which nobody can set; across boots, by the wall clock where it went forward. Each reading is later
than the one before. Store time begins as wall-clock time and is shown as such.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from kvdb.files import Moment

_STEP: Final = 1e-6


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Store time when it was last read, and what the clocks said then."""

    time: float
    wall: float
    boot: str
    uptime: float


def read(previous: Reading | None, now: Moment) -> Reading:
    """Store time now, given the last reading; strictly later than that."""
    if previous is None:
        time = now.wall
    else:
        same_boot = now.boot == previous.boot and now.uptime >= previous.uptime
        passed = now.uptime - previous.uptime if same_boot else now.wall - previous.wall
        time = max(previous.time + passed, previous.time + _STEP, math.nextafter(previous.time, math.inf))
    return Reading(time=time, wall=now.wall, boot=now.boot, uptime=now.uptime)
