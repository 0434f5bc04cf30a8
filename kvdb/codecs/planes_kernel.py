"""Boxes and bit planes, compiled: a half at a time, while its numbers are in the nearest cache.

The same numbers as in NumPy, to the bit. Loops run over the head dimension, with nothing in them that keeps the compiler from making
vectors of them. Import it only to encode or decode: numba takes a while.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numba
import numpy as np

from kvdb.abstracts import sketch_build
from kvdb.abstracts.sketch_build import CELLS, SMALLEST_SCALE
from kvdb.codecs import ahead_kernel, rounding_kernel
from kvdb.codecs.ahead_kernel import AHEAD, LINE, fetch
from kvdb.codecs.base import Array
from kvdb.codecs.rounding_kernel import brain_bits, half_bits
from kvdb.compiled import compiled, stamp

_ENCODE: Final = "void(Array(float32, 3, 'C', True), int64, uint8[:, ::1])"
_DECODE: Final = "void(Array(uint8, 2, 'C', True), Array(int64, 1, 'C', True), int64, {}[:, :, ::1])"
_DTYPES: Final = ("float32", "float16", "bfloat16")
_U, _F, _I = np.uint32, np.float32, np.int32


def encode(values: Array, bits: int, rows: Array) -> None:
    _encoder()(values, bits, rows)


def decode(rows: Array, which: Array, first: int, bits: int, out: Array, dtype: str) -> None:
    _decoder(bits, dtype)(rows, which, first, out if dtype == "float32" else out.view(np.uint16))


@cache
def _encoder() -> Callable[..., None]:
    return compiled(_encode_of(stamp(sketch_build)), _ENCODE, error_model="numpy", nogil=True)


@cache
def _decoder(bits: int, dtype: str) -> Callable[..., None]:
    signature = _DECODE.format("float32" if dtype == "float32" else "uint16")
    return compiled(
        _decode_of(bits, _DTYPES.index(dtype), stamp(ahead_kernel, rounding_kernel)),
        signature,
        error_model="numpy",
        nogil=True,
    )


@numba.njit
def _four(planes: Any, place: Any) -> Any:
    """A token's bits of four planes, as a number: a byte of each plane, and which bit of it. The product brings them side by side."""
    return _U(_U(_U(_U(planes >> place) & _U(0x0101_0101)) * _U(0x0102_0408)) >> _U(24)) & _U(15)


@numba.njit
def _spread(four: Any, place: Any) -> Any:
    """The inverse of `_four`, for the other bits zero."""
    return _U(_U(_U(four * _U(0x0020_4081)) & _U(0x0101_0101)) << place)


def _decode_of(bits: int, dtype: int, made_of: int) -> Callable[..., None]:
    """Closes over numbers, which are constants to the compiler. made_of: see `stamp`."""
    cell, last = _F(2.0 ** -(bits + 2)), _U((1 << bits) - 1)
    down = _U((8 if bits > 4 else 4) - bits)

    def decode(rows: Any, which: Any, first: int, out: Any) -> None:
        if made_of < 0:
            return
        _, tokens, dim = out.shape
        plane_bytes = (tokens + 7) // 8 * dim
        half_bytes = 2 * dim + 4 + bits * plane_bytes
        lows, cells = np.empty(dim, np.float32), np.empty(dim, np.float32)
        tops, rests = np.empty(dim, np.uint32), np.empty(dim, np.uint32)
        scale_bits = np.empty(1, np.uint32)
        scales = scale_bits.view(np.float32)
        for i in range(len(which)):
            if i + AHEAD < len(which):
                ahead = which[i + AHEAD] * rows.shape[1] + first
                for at in range(ahead, ahead + half_bytes, LINE):
                    fetch(rows, at)
            half = rows[which[i], first:]
            scale_bits[0] = 0
            for byte in range(4):
                scale_bits[0] |= _U(half[2 * dim + byte]) << _U(8 * byte)
            scale, corners = scales[0], half[: 2 * dim].view(np.int8)
            for d in range(dim):
                lo, hi = _F(corners[d]), _F(corners[dim + d])
                lows[d], cells[d] = lo * scale, (hi - lo) * scale * cell
            for line in range((tokens + 7) // 8):
                tops[:], rests[:] = 0, 0
                for plane in range(bits):
                    begin, up = 2 * dim + 4 + plane * plane_bytes + line * dim, _U(24 - 8 * (plane % 4))
                    four, ones = tops if plane < 4 else rests, half[begin : begin + dim]
                    for d in range(dim):
                        four[d] |= _U(_U(ones[d]) << up)
                for t in range(8 * line, min(8 * line + 8, tokens)):
                    place, own = _U(t % 8), out[i, t]
                    for d in range(dim):
                        u = _four(tops[d], place)
                        if bits > 4:
                            u = _U(_U(u << _U(4)) | _four(rests[d], place))
                        u = _U(u >> down)
                        v = _U(_U(_U(u << _U(2)) + _U(2)) + _U(_U(u == last) - _U(u == 0)))
                        value = lows[d] + cells[d] * _F(_I(v))
                        if dtype == 0:
                            own[d] = value
                        elif dtype == 1:
                            own[d] = np.uint16(half_bits(value))
                        else:
                            own[d] = np.uint16(brain_bits(value))

    return decode


def _encode_of(made_of: int) -> Callable[..., None]:
    """As `_decode_of`."""

    def encode(values: Any, bits: int, rows: Any) -> None:
        if made_of < 0:
            return
        n, tokens, dim = values.shape
        plane_bytes = (tokens + 7) // 8 * dim
        least, most, factor = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
        tops, rests = (
            np.empty(dim, np.uint32),
            np.empty(dim, np.uint32),
        )  # of eight cells, a byte for each of four planes
        scale_bits = np.empty(1, np.uint32)
        scales = scale_bits.view(np.float32)
        many, one, up = CELLS * _F(2.0 ** (bits - 4)), _F(1), _U(8 - bits)
        for i in range(n):
            row, half = rows[i], values[i]
            for d in range(dim):
                least[d] = most[d] = half[0, d]
            for t in range(1, tokens):
                own = half[t]
                for d in range(dim):
                    least[d], most[d] = min(least[d], own[d]), max(most[d], own[d])
            largest = _F(0)
            for d in range(dim):
                largest = max(largest, max(-least[d], most[d]))
            scales[0] = max(largest / _F(127), SMALLEST_SCALE)
            scale_bits[0] = _U(_U(scale_bits[0] + _U(0x100)) & _U(0xFFFF_FF00))
            scale = scales[0]
            for byte in range(4):
                row[2 * dim + byte] = scale_bits[0] >> _U(8 * byte)
            lows, highs = row[:dim], row[dim : 2 * dim]
            for d in range(dim):
                low, high = np.floor(least[d] / scale), np.ceil(most[d] / scale)
                low = low - one if low * scale > least[d] else low
                high = high + one if high * scale < most[d] else high
                lows[d], highs[d] = _I(low), _I(high)
                least[d] = low * scale
                factor[d] = many / max((high - low) * scale, scale)
            for line in range((tokens + 7) // 8):
                tops[:], rests[:] = 0, 0
                for t in range(8 * line, min(8 * line + 8, tokens)):
                    own, place = half[t], _U(t % 8)
                    for d in range(dim):
                        cell = _U(_U(_I((own[d] - least[d]) * factor[d])) << up)
                        tops[d] |= _spread(_U(cell >> _U(4)), place)
                        rests[d] |= _spread(_U(cell & _U(15)), place)
                for plane in range(bits):
                    begin, down = 2 * dim + 4 + plane * plane_bytes + line * dim, _U(24 - 8 * (plane % 4))
                    four, to = tops if plane < 4 else rests, row[begin : begin + dim]
                    for d in range(dim):
                        to[d] = four[d] >> down

    return encode
