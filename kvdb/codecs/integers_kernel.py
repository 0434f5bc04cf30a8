"""Integers with scales and minima, compiled: a half at a time, while its numbers are in the nearest cache.

The same numbers as in NumPy, to the bit. Loops run over the head dimension, or a group's part of it, with nothing in them that keeps the
compiler from making vectors of them; a group's size is a constant to it. Import it only to encode or decode: numba takes a while.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from kvdb.codecs import ahead_kernel, rounding_kernel
from kvdb.codecs.ahead_kernel import AHEAD, LINE, fetch
from kvdb.codecs.base import Array
from kvdb.codecs.integers_numpy import Form
from kvdb.codecs.rounding_kernel import brain_bits, half_bits, half_value
from kvdb.compiled import compiled, stamp

_ENCODE: Final = "void(Array(float32, 3, 'C', True), int64, uint8[:, ::1])"
_DECODE: Final = "void(Array(uint8, 2, 'C', True), Array(int64, 1, 'C', True), int64, int64, {}[:, :, ::1])"
_DTYPES: Final = ("float32", "float16", "bfloat16")
_U, _F, _D = np.uint32, np.float32, np.float64


def encode(values: Array, form: Form, rows: Array) -> None:
    _encoder(form.by_token, form.channels)(values, form.nbits, rows)


def decode(rows: Array, which: Array, first: int, form: Form, out: Array, dtype: str) -> None:
    bits = out if dtype == "float32" else out.view(np.uint16)
    _decoder(form.by_token, form.channels, dtype)(rows, which, first, form.nbits, bits)


@cache
def _encoder(by_token: bool, channels: int) -> Callable[..., None]:
    return compiled(
        _encode_of(by_token, channels, stamp(ahead_kernel, rounding_kernel)), _ENCODE, error_model="numpy", nogil=True
    )


@cache
def _decoder(by_token: bool, channels: int, dtype: str) -> Callable[..., None]:
    signature = _DECODE.format("float32" if dtype == "float32" else "uint16")
    made_of = stamp(ahead_kernel, rounding_kernel)
    return compiled(
        _decode_of(by_token, channels, _DTYPES.index(dtype), made_of), signature, error_model="numpy", nogil=True
    )


def _decode_of(by_token: bool, channels: int, dtype: int, made_of: int) -> Callable[..., None]:
    """Closes over numbers, which are constants to the compiler. made_of: see `stamp`."""

    def decode(rows: Any, which: Any, first: int, nbits: int, out: Any) -> None:
        if made_of < 0:
            return
        _, tokens, dim = out.shape
        per, mask, across = 8 // nbits, _U((1 << nbits) - 1), dim // channels
        groups = across * (tokens if by_token else 1)
        half_bytes = 4 * groups + (tokens + per - 1) // per * dim
        scales, lows = np.empty(groups, np.float32), np.empty(groups, np.float32)
        for i in range(len(which)):
            if i + AHEAD < len(which):
                ahead = which[i + AHEAD] * rows.shape[1] + first
                for at in range(ahead, ahead + half_bytes, LINE):
                    fetch(rows, at)
            half = rows[which[i], first:]
            for k in range(groups):
                scales[k] = half_value(_U(_U(half[2 * k]) | _U(_U(half[2 * k + 1]) << _U(8))))
            minima = half[2 * groups :]
            for k in range(groups):
                lows[k] = half_value(_U(_U(minima[2 * k]) | _U(_U(minima[2 * k + 1]) << _U(8))))
            for t in range(tokens):
                begin, shift, own = 4 * groups + t // per * dim, _U(t % per * nbits), out[i, t]
                codes = half[begin : begin + dim]
                for g in range(across if by_token else 1):
                    k = t * across + g
                    for d in range(g * channels if by_token else 0, (g + 1) * channels if by_token else dim):
                        at = k if by_token else d
                        value = _F(np.int32(_U(_U(_U(codes[d]) >> shift) & mask))) * scales[at] + lows[at]
                        if dtype == 0:
                            own[d] = value
                        elif dtype == 1:
                            own[d] = np.uint16(half_bits(value))
                        else:
                            own[d] = np.uint16(brain_bits(value))

    return decode


def _encode_of(by_token: bool, channels: int, made_of: int) -> Callable[..., None]:
    """As `_decode_of`."""

    def encode(values: Any, nbits: int, rows: Any) -> None:
        if made_of < 0:
            return
        n, tokens, dim = values.shape
        per, levels, across = 8 // nbits, _D((1 << nbits) - 1), dim // channels
        groups = across * (tokens if by_token else 1)
        least, most = np.empty(groups, np.float32), np.empty(groups, np.float32)
        lows, steps, per_step = np.empty(groups), np.empty(groups), np.empty(groups)
        low_bits, step_bits = np.empty(groups, np.uint32), np.empty(groups, np.uint32)
        for i in range(n):
            row, half = rows[i], values[i]
            if by_token:
                for t in range(tokens):
                    own = half[t]
                    for g in range(across):
                        lo = hi = own[g * channels]
                        for d in range(g * channels, (g + 1) * channels):
                            lo, hi = min(lo, own[d]), max(hi, own[d])
                        least[t * across + g], most[t * across + g] = lo, hi
            else:
                for d in range(dim):
                    least[d] = most[d] = half[0, d]
                for t in range(1, tokens):
                    own = half[t]
                    for d in range(dim):
                        least[d], most[d] = min(least[d], own[d]), max(most[d], own[d])
            for k in range(groups):
                lo, hi = least[k] + _F(0), _D(most[k] + _F(0))  # no -0
                low = half_bits(lo)
                further = _U(low + _U(1)) if low >= _U(0x8000) else (_U(low - _U(1)) if low > 0 else _U(0x8001))
                low = further if half_value(low) > lo else low
                low_bits[k], lows[k] = low, _D(half_value(low))
                step = half_bits(_F((hi - lows[k]) / levels))
                step = _U(step + _U(1)) if lows[k] + levels * _D(half_value(step)) < hi else step
                step_bits[k], steps[k] = step, _D(half_value(step))
                per_step[k] = _D(1) / steps[k] if steps[k] > 0 else _D(0)
            for k in range(groups):
                for byte in range(2):
                    row[2 * k + byte] = step_bits[k] >> _U(8 * byte)
                    row[2 * (groups + k) + byte] = low_bits[k] >> _U(8 * byte)
            for t in range(tokens):
                begin, shift, own = 4 * groups + t // per * dim, _U(t % per * nbits), half[t]
                codes, kept = row[begin : begin + dim], _U(0xFF if t % per else 0)
                for g in range(across if by_token else 1):
                    k = t * across + g
                    for d in range(g * channels if by_token else 0, (g + 1) * channels if by_token else dim):
                        at = k if by_token else d
                        below = np.int32((_D(own[d]) - lows[at]) * per_step[at])
                        above = _D(own[d]) > lows[at] + (_D(below) + 0.5) * steps[at]
                        code = _U(_U(np.int32(below + np.int32(above))) << shift)
                        codes[d] = _U(_U(_U(codes[d]) & kept) | code)

    return encode
