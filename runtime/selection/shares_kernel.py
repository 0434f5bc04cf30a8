"""The loops of `kvdb.runtime.selection.shares`, compiled: a row of scores stays in the nearest cache from its maximum to its shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from kvdb.compiled import compiled, stamp
from kvdb.runtime.selection import exponential
from kvdb.runtime.selection.exponential import FAST, exp_parts

_SHARE: Final = "void(float32[:, :, ::1], float32[:, ::1], float64, float64, float32[:, ::1])"


@cache
def share() -> Callable[..., None]:
    """share(lse, tail_lse, sure, unknown_share, out): see `kvdb.runtime.selection.shares.shares`."""
    return compiled(_share_of(stamp(exponential)), _SHARE, fastmath=FAST, nogil=True)


def _share_of(made_of: int) -> Callable[..., None]:
    """made_of: see `stamp`."""

    def share(lse: Any, tail_lse: Any, sure: float, unknown_share: float, out: Any) -> None:
        heads, group, chunks = lse.shape
        if made_of < 0:
            return
        limit, unknown, nothing = np.float32(sure), np.float32(unknown_share), np.float32(-np.inf)
        row, powers = np.empty(chunks + 1, np.float32), np.empty(chunks + 1, np.float32)
        bits, exponents = row.view(np.int32), powers.view(np.int32)
        order = np.empty(
            chunks + 1, np.int32
        )  # whole numbers in the order of scores: of those a maximum is made of vectors
        best = np.empty(1, np.int32)
        for head in range(heads):
            total = out[head]
            total[:] = 0
            for g in range(group):
                for c in range(chunks):
                    row[c] = lse[head, g, c] if lse[head, g, c] < limit else nothing
                row[chunks] = tail_lse[head, g]
                for c in range(chunks + 1):
                    order[c] = bits[c] ^ (bits[c] >> np.int32(31) & np.int32(0x7FFF_FFFF))
                highest = order[chunks]
                for c in range(chunks):
                    highest = max(highest, order[c])
                best[0] = highest ^ (highest >> np.int32(31) & np.int32(0x7FFF_FFFF))
                top = best.view(np.float32)[0]
                something = top > nothing
                top = top if something else np.float32(0)
                for c in range(chunks + 1):
                    power, exponent = exp_parts(row[c] - top)
                    powers[c] = power
                    exponents[c] += exponent << np.int32(23)
                mass = np.float32(0)
                for c in range(chunks + 1):
                    mass += powers[c]
                each = np.float32(1) / mass if something else np.float32(0)
                for c in range(chunks):
                    total[c] += unknown if lse[head, g, c] >= limit else powers[c] * each
                total[chunks] += powers[chunks] * each
            for c in range(chunks + 1):
                total[c] /= np.float32(group)

    return share
