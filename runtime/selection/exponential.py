"""exp for compiled loops, as a polynomial: compilers make vectors of it, which they do not of a call."""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

FAST: Final = {"reassoc", "contract", "nsz"}
"""What compiled loops of scores let a compiler do to numbers: infinities and NaN stay what they are."""


@numba.njit(fastmath=FAST)
def exp_parts(x: Any) -> tuple[Any, Any]:
    """exp(x) = m * 2^n for x <= 0, m to within 1.1e-7 of itself: a polynomial, which a compiler can make vectors of."""
    y = max(x * np.float32(1.4426950408889634), np.float32(-126))
    n = np.floor(y + np.float32(0.5))
    f = y - n
    m = np.float32(1.546973e-4)
    m = m * f + np.float32(1.3400432e-3)
    m = m * f + np.float32(9.618026e-3)
    m = m * f + np.float32(5.5503272e-2)
    m = m * f + np.float32(2.4022651e-1)
    m = m * f + np.float32(6.9314721e-1)
    return m * f + np.float32(1), np.int32(n)
