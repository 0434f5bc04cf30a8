"""Numbers as people read them: bytes, seconds, ages, shares."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def bytes_text(count: float) -> str:
    """0 B, 999 B, 1.5 KiB, 308 MiB: three digits at most."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0 or value >= 99.95:
        return f"{value:.0f} {_UNITS[unit]}"
    return f"{value:.1f} {_UNITS[unit]}"


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


def age_text(seconds: float) -> str:
    """just now, 5 min ago, 3 h ago, 12 days ago. A clock that went backwards reads as just now."""
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    if seconds < 2 * 86400:
        return f"{int(seconds // 3600)} h ago"
    return f"{int(seconds // 86400)} days ago"


def share_text(share: float) -> str:
    """0 %, 0.4 %, 20.1 %, 100 %; never rounded up to 100 %, nor down to 0 %."""
    if share in (0.0, 1.0):
        return f"{share * 100:.0f} %"
    percent = round(share * 100, 1)
    if percent >= 100 and share < 1:
        return "99.9 %"
    return "< 0.1 %" if percent < 0.1 else f"{percent:.1f} %"
