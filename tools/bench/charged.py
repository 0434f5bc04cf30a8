"""What a stretch of work takes of memory: what it allocates at its most, and what it leaves in the page cache.

Allocated is anonymous memory, looked at a hundred times a second: a peak shorter than that is missed. The page cache is what the control
group is charged for, so it is known only where there is one; the kernel may take it back.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_EVERY_S: Final = 0.01


class PeakMemory:
    """Bytes of anonymous memory beyond what the process had when the block began; `peak_bytes` is their maximum so far."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._before = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes() - self._before)


def anonymous_bytes() -> int:
    """Resident memory of this process that no file is behind."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def disk_bytes(folder: Path) -> int:
    """What a folder's files take on their disk; holes take nothing."""
    return sum(512 * file.stat().st_blocks for file in folder.rglob("*") if file.is_file())
