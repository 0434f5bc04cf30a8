"""Whether stored records go to the device as they are stored, to be decoded there, or decoded already: by what decoding steps take.

Coded bytes are fewer on the bus, and the device decodes them; where the bus is fast, the device busy or its decoder slow, numbers may arrive
sooner. So a few steps that move such records are taken each way in turn, and the faster way is kept for a while.
source: compression decided for each transfer, LeoAM, arXiv 2506.20187.
"""

from __future__ import annotations

from typing import Any

from kvdb.runtime.comparison import Comparison


class Transfers:
    """Of one cache whose device can decode."""

    def __init__(self) -> None:
        self._comparison = Comparison()
        self._coded = True
        self._open = self._chosen = False

    def begin_step(self, *, comparable: bool) -> None:
        """comparable: whether the time of this step says something about transfers. Nothing else is compared meanwhile."""
        self._open, self._chosen = comparable, False
        if not comparable and self._comparison.comparing:
            self._comparison.restart()

    def coded(self) -> bool:
        """Which way what comes now shall go: one way for all of a step."""
        if self._open and not self._chosen:
            self._coded, self._chosen = self._comparison.next(), True
        return self._coded

    def end_step(self, seconds: float) -> None:
        if self._chosen:
            self._comparison.took(self._coded, seconds)
        self._open = self._chosen = False

    def stats(self) -> dict[str, Any]:
        """JSON-safe."""
        found = self._comparison.medians
        why = (
            f"a step takes {1e3 * found[True]:.1f} ms with coded records, {1e3 * found[False]:.1f} ms with decoded ones"
            if found
            else "steps are compared"
        )
        return {"coded": self._coded, "why": why}
