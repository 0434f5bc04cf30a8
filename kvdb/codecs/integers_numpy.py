"""Integers with scales and minima, in NumPy: where numba is not installed, and the oracle of what it compiles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvdb.codecs.base import Array
from kvdb.codecs.lossy import blocks, rounded
from kvdb.geometry import div_ceil


class Form(NamedTuple):
    """How a half is cut into groups: `channels` of them side by side, of one token or of all."""

    nbits: int
    by_token: bool
    channels: int

    def lines(self, chunk_tokens: int) -> int:
        """Groups one below the other."""
        return chunk_tokens if self.by_token else 1

    def groups(self, chunk_tokens: int, head_dim: int) -> int:
        return self.lines(chunk_tokens) * (head_dim // self.channels)


def encode(values: Array, form: Form, rows: Array) -> None:
    """values (n, chunk_tokens, head_dim) float32, C-contiguous, up to 65504 in magnitude -> rows (n, half_bytes), overwritten."""
    n, chunk_tokens, head_dim = values.shape
    lines, levels = form.lines(chunk_tokens), (1 << form.nbits) - 1
    groups = form.groups(chunk_tokens, head_dim)
    exact = values.reshape(n, lines, chunk_tokens // lines, -1, form.channels).astype(np.float64)
    least = exact.min(axis=(2, 4), keepdims=True) + 0.0  # no -0
    most = exact.max(axis=(2, 4), keepdims=True) + 0.0
    low = least.astype(np.float16)
    with np.errstate(over="ignore"):  # below -65504, where no minimum is: it is not taken
        low = np.where(low > least, np.nextafter(low, np.float16(-np.inf)), low)
    scale = ((most - low) / levels).astype(np.float32).astype(np.float16)
    scale = np.where(low + levels * scale.astype(np.float64) < most, np.nextafter(scale, np.float16(np.inf)), scale)
    rows[:, : 2 * groups] = scale.astype("<f2").reshape(n, groups).view(np.uint8)
    rows[:, 2 * groups : 4 * groups] = low.astype("<f2").reshape(n, groups).view(np.uint8)
    step, start = scale.astype(np.float64), low.astype(np.float64)
    per_step = np.divide(1, step, where=step > 0, out=np.zeros_like(step))
    below = np.floor((exact - start) * per_step)
    codes = below + (exact > start + (below + 0.5) * step)  # start + (below + 0.5) * step is exact in float64
    per = 8 // form.nbits
    padded = np.zeros((n, div_ceil(chunk_tokens, per) * per, head_dim), np.uint8)
    padded[:, :chunk_tokens] = codes.reshape(values.shape)
    shifts = np.arange(0, 8, form.nbits, dtype=np.uint8)[:, None]
    packed = np.bitwise_or.reduce(padded.reshape(n, -1, per, head_dim) << shifts, axis=2)
    rows[:, 4 * groups :] = packed.reshape(n, -1)


def decode(rows: Array, which: Array, first: int, form: Form, out: Array, dtype: str) -> None:
    """As `Codec.decode`, of arrays that were looked at."""
    _, chunk_tokens, head_dim = out.shape
    codes_first = 4 * form.groups(chunk_tokens, head_dim)
    stop = codes_first + div_ceil(chunk_tokens * form.nbits, 8) * head_dim
    shifts = np.arange(0, 8, form.nbits, dtype=np.uint8)[:, None]
    for block in blocks(out.shape):
        halves = rows[:, first : first + stop][which[block]]
        scale, low = steps(halves, form, chunk_tokens, head_dim)
        packed = halves[:, codes_first:].reshape(len(halves), -1, 1, head_dim)
        codes = (packed >> shifts & (1 << form.nbits) - 1).reshape(len(halves), -1, head_dim)[:, :chunk_tokens]
        with np.errstate(all="ignore"):  # damaged scales may be anything
            out[block] = rounded(codes.astype(np.float32) * scale + low, dtype)


def steps(rows: Array, form: Form, chunk_tokens: int, head_dim: int) -> tuple[Array, Array]:
    """Scales and minima of rows (n, half_bytes), each (n, 1 or chunk_tokens, head_dim) float32."""
    stored = np.ascontiguousarray(rows[:, : 4 * form.groups(chunk_tokens, head_dim)]).view("<f2").astype(np.float32)
    scale, low = stored.reshape(len(rows), 2, form.lines(chunk_tokens), -1).repeat(form.channels, axis=3).swapaxes(0, 1)
    return scale, low
