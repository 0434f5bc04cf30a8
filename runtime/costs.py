"""Load a stored prefix, compute it again, or compute its first tokens while the rest is read? What either takes is estimated from what reading and
computing took before.

Loading is lazy, so what counts is the bytes that attention will ask for at once: all of a prefix where tokens that follow it are prefilled or
everything is attended to, a budget's share of it otherwise. Where reading or computing is unknown, it is loaded.
source: the split is KVPR's, arXiv 2411.17089. There every layer is split at each step; here a prefix is split once.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_KEPT: Final = 0.5
"""What a measurement before the last one counts, of one that is as large."""

LEAST_GAIN_S: Final = 0.5
"""Less is not worth it: what is computed again differs from what is stored by rounding."""
LOOK_AGAIN: Final = 8
"""Prefixes computed again in a row, after which one is loaded: a disk that was slow once is not slow for ever. One that is split is read in part,
which tells as much."""


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


class Prospect(NamedTuple):
    """A stored prefix, and what it may cost; all rows of a batch together, but for `tokens`.

    tokens    of each row
    rows      of the batch
    absent    (m,) bytes: what must be read where none, one, two, ... m - 1 grains of tokens are computed first; m = 1 where it cannot be split
    grain     tokens of each row
    storable  whether a prefix that is computed whole can go to disk without pushing anything out: if not, all of it would stay in memory
    room      bytes that can wait in memory until they are asked for; None: all
    """

    tokens: int
    rows: int
    absent: Array
    grain: int
    storable: bool
    room: int | None = None


class Choice(NamedTuple):
    """tokens: how many of a prefix's first tokens to compute again: 0 loads all of it. why: in words."""

    tokens: int
    why: str


class Costs:
    """What reading and computing took, of all caches of an attachment.

    recompute  True: always; False: never; None: where it takes less time, as much as takes the least
    """

    def __init__(self, recompute: bool | None) -> None:
        self._recompute = recompute
        self.reading, self.computing = Rate(), Rate()  # of bytes, of tokens
        self._unread = 0

    def choose(self, prefix: Prospect) -> Choice:
        if not prefix.tokens:
            return Choice(0, "nothing is stored")
        if self._recompute is not None:
            return Choice(prefix.tokens, "asked for") if self._recompute else Choice(0, "not to be computed again")
        reading = self.reading.seconds(float(prefix.absent[0]))
        computing = self.computing.seconds(prefix.tokens * prefix.rows)
        if reading is None or computing is None:
            return Choice(0, "what it takes to read and to compute is not known yet")
        whole = min(reading, computing) if prefix.storable else reading
        grains, split = self._best_split(prefix)
        if split + LEAST_GAIN_S <= whole:
            self._unread = 0
            return Choice(
                grains * prefix.grain,
                f"the first {grains * prefix.grain:,} of {prefix.tokens:,} tokens are computed while {_mib(prefix.absent[grains])} MiB are "
                f"read: {split:.2f} s for {whole:.2f} s",
            )
        if not prefix.storable:
            return Choice(0, "what is computed again could not be stored")
        load = reading <= computing + LEAST_GAIN_S
        self._unread = 0 if load else self._unread + 1
        if self._unread > LOOK_AGAIN:
            self._unread = 0
            return Choice(0, "to see what it takes to read now")
        return Choice(
            0 if load else prefix.tokens,
            f"{_mib(prefix.absent[0])} MiB take {reading:.2f} s to read, {prefix.tokens * prefix.rows:,} tokens {computing:.2f} s to compute",
        )

    def _best_split(self, prefix: Prospect) -> tuple[int, float]:
        """How many grains to compute so that it takes the least time, and the seconds it takes: both at once, but for what must wait on disk until the
        rest has been used."""
        byte, token = self.reading.seconds(1) or 0.0, self.computing.seconds(1) or 0.0
        computing = token * prefix.rows * prefix.grain * np.arange(len(prefix.absent))
        meanwhile = prefix.absent if prefix.room is None else np.minimum(prefix.absent, prefix.room)
        seconds = np.maximum(computing, byte * meanwhile) + byte * (prefix.absent - meanwhile)
        best = int(np.argmin(seconds))
        return best, float(seconds[best])


def _mib(count: float) -> str:
    return f"{int(count) >> 20:,}"
