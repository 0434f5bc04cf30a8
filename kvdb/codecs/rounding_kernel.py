"""float16 and bfloat16 by their bits, for compiled loops: numba has neither, and not every processor has instructions for them.

Every step says its type again, since numba would go on with 64 bits, and vectors would hold half as much. No step meets a
subnormal float32, which a processor may be told to take for zero. numba compiles these into the loops that call them.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

_U, _F = np.uint32, np.float32
_HALF_BIAS: Final = 112 << 23
"""What the exponent of a float32 is greater by than that of the same float16."""
_LARGEST: Final = 0x477F_E000
"""Bits of 65504."""


@numba.njit
def half_value(bits: Any) -> Any:
    """The float16 of these bits (uint32) as float32, exactly."""
    size = _U(bits & _U(0x7FFF))
    special = _U(_HALF_BIAS) if size >= _U(0x7C00) else _U(0)
    wide = _U(_U(_U(size << _U(13)) + _U(_HALF_BIAS)) + special)
    value = wide.view(np.float32) if size >= _U(0x400) else _F(np.int32(size)) * _F(2.0**-24)
    return _U(_F(value).view(np.uint32) | _U(_U(bits & _U(0x8000)) << _U(16))).view(np.float32)


@numba.njit
def half_bits(value: Any) -> Any:
    """Bits (uint32) of the nearest finite float16, ties to even."""
    bits = _F(value).view(np.uint32)
    size = _U(bits & _U(0x7FFF_FFFF))
    size = size if size < _U(_LARGEST) else _U(_LARGEST)
    odd = _U(_U(size >> _U(13)) & _U(1))
    normal = _U(_U(_U(size + odd) + _U(0xFFF + (1 << 32) - _HALF_BIAS)) >> _U(13))
    small = _U(_F(abs(value) + _F(0.5)).view(np.uint32) - _U(0x3F00_0000))  # steps of 2^-24 above 0.5: as below 2^-14
    return _U(_U(_U(bits >> _U(16)) & _U(0x8000)) | (small if size < _U(113 << 23) else normal))


@numba.njit
def brain_bits(value: Any) -> Any:
    """Bits (uint32) of the nearest bfloat16, ties to even."""
    bits = _F(value).view(np.uint32)
    return _U(_U(_U(bits + _U(0x7FFF)) + _U(_U(bits >> _U(16)) & _U(1))) >> _U(16))
