"""Load a stored prefix, or compute it again? What either takes is estimated from what reading and computing took before.

Loading is lazy, so what counts is the bytes that attention will ask for at once: all of a prefix where tokens that follow it are prefilled or
everything is attended to, a budget's share of it otherwise. Where both are unknown, it is loaded.
source: the choice is KVPR's, arXiv 2411.17089, for a whole prefix: nothing is computed while the rest of it is read.
"""

from __future__ import annotations

from typing import Final, NamedTuple

_KEPT: Final = 0.5
"""What a measurement before the last one counts, of one that is as large."""

LEAST_GAIN_S: Final = 0.5
"""Less is not worth it: what is computed again differs from what is stored by rounding."""
LOOK_AGAIN: Final = 8
"""Prefixes computed again in a row, after which one is loaded: a disk that was slow once is not slow for ever."""


class Rate:
    """Seconds a unit, of what was measured; the latest counts most."""

    def __init__(self) -> None:
        self._units = self._seconds = 0.0

    def note(self, units: float, seconds: float) -> None:
        if units > 0:
            self._units = _KEPT * self._units + units
            self._seconds = _KEPT * self._seconds + max(0.0, seconds)

    def seconds(self, units: float) -> float | None:
        """What so many units take; None: unknown."""
        return self._seconds / self._units * units if self._units else None


class Choice(NamedTuple):
    """load: whether to load a prefix. why: in words."""

    load: bool
    why: str


class Costs:
    """What reading and computing took, of all caches of an attachment.

    recompute  True: always; False: never; None: where it takes less time
    """

    def __init__(self, recompute: bool | None) -> None:
        self._recompute = recompute
        self.reading, self.computing = Rate(), Rate()  # of bytes, of tokens
        self._unread = 0

    def choose(self, tokens: int, bytes_read: int, *, storable: bool = True) -> Choice:
        """Of a prefix of so many tokens, of which so many bytes would be read at once; all rows of a batch together.

        storable  whether what is computed again can go to disk without pushing anything out: if not, all of it would stay in memory
        """
        if not tokens:
            return Choice(True, "nothing is stored")
        if self._recompute is not None:
            return Choice(not self._recompute, "asked for" if self._recompute else "not to be computed again")
        if not storable:
            return Choice(True, "what is computed again could not be stored")
        reading, computing = self.reading.seconds(bytes_read), self.computing.seconds(tokens)
        if reading is None or computing is None:
            return Choice(True, "what it takes to read and to compute is not known yet")
        load = reading <= computing + LEAST_GAIN_S
        self._unread = 0 if load else self._unread + 1
        if self._unread > LOOK_AGAIN:
            self._unread = 0
            return Choice(True, "to see what it takes to read now")
        return Choice(
            load,
            f"{bytes_read >> 20:,} MiB take {reading:.2f} s to read, {tokens:,} tokens {computing:.2f} s to compute",
        )
