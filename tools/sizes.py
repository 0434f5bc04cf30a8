"""Numbers as people read and write them: bytes, counts, seconds, times of day, ages, shares."""

from __future__ import annotations

import math
import re
import time
from typing import Final

from kvdb.errors import InvalidInput

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DURATIONS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def bytes_text(count: float) -> str:
    """0 B, 999 B, 1.5 KiB, 308 MiB: three digits at most."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0 or value >= 99.95:
        return f"{value:.0f} {_UNITS[unit]}"
    return f"{value:.1f} {_UNITS[unit]}"


def count_text(number: int, noun: str) -> str:
    """0 segments, 1 segment, 1,200 segments."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def parse_seconds(where: str, text: str) -> float:
    """Seconds of "90s", "30m", "12h" or "7d".

    raises  InvalidInput for anything else, 0 included
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip(), re.ASCII)
    seconds = float(found[1]) * _DURATIONS[found[2]] if found else 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidInput(f"{where} {text}: expected a time above 0 such as 90s, 30m, 12h or 7d")
    return seconds


def seconds_text(seconds: float) -> str:
    """12 ms, 3.4 s, 48 s, 2 min 05 s, 1 h 03 min."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def time_text(at: float, layout: str = "%Y-%m-%d %H:%M:%S") -> str:
    """2026-01-31 23:59:59, local time. A store may hold any number: what no calendar has reads as an unknown time.

    at  seconds since 1970
    """
    try:
        return time.strftime(layout, time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return "unknown time"


def age_text(seconds: float) -> str:
    """just now, 5 min ago, 3 h ago, 12 days ago, unknown. A clock that went backwards reads as just now."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    if seconds < 2 * 86400:
        return f"{int(seconds // 3600)} h ago"
    return f"{int(seconds // 86400)} days ago"


def left_text(seconds: float) -> str:
    """expired, in 40 s, in 5 min, in 3 h, in 12 days, unknown."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds <= 0:
        return "expired"
    if seconds < 60:
        return f"in {seconds:.0f} s"
    return "in " + age_text(seconds).removesuffix(" ago")


def share_text(share: float) -> str:
    """0 %, 0.4 %, 20.1 %, 100 %; never rounded up to 100 %, nor down to 0 %."""
    if share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    percent = round(share * 100, 1)
    if percent >= 100 and share < 1:
        return "99.9 %"
    return "< 0.1 %" if percent < 0.1 else f"{percent:.1f} %"
