"""How a store handle is opened: the options of `KVDB.open`, checked."""

from __future__ import annotations

import sys
from typing import Final, Literal

import msgspec

from kvdb.errors import InvalidInput, Unsupported
from kvdb.reader import VERIFY
from kvdb.readers import READERS
from kvdb.replacement import REPLACEMENT
from kvdb.retention import RETENTION

AUTO: Final = "auto"
"""As a read_mode: the way that suits the store where it lies, see `kvdb.calibration`."""
Mode = Literal["r", "r+", "a", "w", "w-"]
_MODES: Final = ("r", "r+", "a", "w", "w-")
DURABILITY: Final = ("commit", "relaxed")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How a handle was opened; see `KVDB.open`."""

    mode: Mode
    salt: str = ""
    read_mode: str = AUTO
    verify: str = "first"
    durability: str = "commit"
    min_free: int = 0
    retention: str = "lru"
    grace_s: float = 0.0
    lock_timeout_s: float = 30.0
    lock: bool = True
    host_budget: int | None = None
    host_policy: str = "lru"
    read_deadline_s: float = 30.0

    def __post_init__(self) -> None:
        for option, allowed in (
            ("mode", _MODES),
            ("read_mode", [AUTO, *sorted(READERS)]),
            ("verify", VERIFY),
            ("durability", DURABILITY),
            ("retention", sorted(RETENTION)),
            ("host_policy", sorted(REPLACEMENT)),
        ):
            if getattr(self, option) not in allowed:
                raise InvalidInput(f"KVDB.open: {option} is {getattr(self, option)!r}, expected one of {list(allowed)}")
        for option in ("grace_s", "lock_timeout_s", "read_deadline_s"):
            if not getattr(self, option) >= 0:
                raise InvalidInput(f"KVDB.open: {option} is {getattr(self, option)!r}, expected seconds, 0 or more")
        if self.host_budget is not None and self.read_mode not in (AUTO, "direct"):
            raise InvalidInput(
                f"KVDB.open: host_budget is {self.host_budget} with read_mode {self.read_mode!r}, expected 'direct'; the system caches "
                "what is read otherwise"
            )
        if sys.platform not in ("linux", "darwin"):
            raise Unsupported(
                f"KVDB.open: platform {sys.platform!r}, expected Linux or macOS; stores need flock and fsync"
            )
        if sys.platform == "darwin" and self.read_mode not in (AUTO, "pread"):
            raise Unsupported(f"KVDB.open: read_mode {self.read_mode!r} on macOS, expected 'pread' there")
