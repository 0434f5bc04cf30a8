"""Where compiled loops can be used: on CPU, where numba can be imported. It takes a while, so it is tried when they are needed."""

from __future__ import annotations

from functools import cache

from torch import Tensor


def can_compile(of: Tensor) -> bool:
    """Whether loops over such a tensor can be compiled."""
    return of.device.type == "cpu" and _numba_works()


@cache
def _numba_works() -> bool:
    try:
        import kvdb.compiled  # noqa: F401
    except (ImportError, OSError):  # not installed, not for this NumPy, or a library of it is missing
        return False
    return True
