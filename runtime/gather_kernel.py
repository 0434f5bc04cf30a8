"""`kvdb.runtime.gather.Gather`, compiled: attention over records where they lie, in one pass over their keys and values.

A record's logits are kept while its values are added, so keys and values are read once and nothing is copied. Loops run over the head
dimension, with nothing in them that keeps the compiler from making vectors of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numba
import numpy as np

from kvdb.codecs import ahead_kernel, rounding_kernel
from kvdb.codecs.ahead_kernel import AHEAD, LINE, fetch
from kvdb.codecs.rounding_kernel import half_value
from kvdb.compiled import compiled, stamp
from kvdb.runtime.selection import exponential
from kvdb.runtime.selection.exponential import FAST, exp_parts

_ATTEND: Final = (
    "void(Array({0}, 1, 'C', True), Array({0}, 1, 'C', True), int64[::1], int64[::1], int64[::1], int64, float32[:, :, ::1], "
    "float32[:, ::1], float32[:, ::1], float32[:, :, ::1], float32[:, ::1])"
)
_JOIN: Final = "void(float32[:, ::1], float32[:, ::1], float32[:, :, ::1], float32[:, ::1], float32[:, :, ::1])"
_DTYPES: Final = ("float32", "float16", "bfloat16")
_U, _F = np.uint32, np.float32


@cache
def attend(dtype: str) -> Callable[..., None]:
    """attend(keys, values, key_at, value_at, starts, tokens, q, tops, sums, out, lse): see `Gather.add`."""
    made_of = stamp(ahead_kernel, rounding_kernel, exponential)
    signature = _ATTEND.format("float32" if dtype == "float32" else "uint16")
    return compiled(
        _attend_of(_DTYPES.index(dtype), made_of), signature, fastmath=FAST, error_model="numpy", nogil=True
    )


@cache
def join() -> Callable[..., None]:
    """join(tops, sums, out, lse, beside): add what is known by its log-sum-exp and output, and divide by the sums."""
    return compiled(_join, _JOIN, fastmath=FAST, error_model="numpy", nogil=True)


@numba.njit
def _widen(bits: Any, dtype: int, out: Any) -> None:
    """float16 (1) or bfloat16 (2) as float32."""
    if dtype == 1:
        for j in range(len(bits)):
            out[j] = half_value(_U(bits[j]))
    else:
        for j in range(len(bits)):
            out[j] = _U(_U(bits[j]) << _U(16)).view(np.float32)


def _attend_of(dtype: int, made_of: int) -> Callable[..., None]:
    """Closes over numbers only: what closes over another compiled function is compiled anew by each process. made_of: see `stamp`."""

    def attend(
        keys: Any,
        values: Any,
        key_at: Any,
        value_at: Any,
        starts: Any,
        tokens: int,
        q: Any,
        tops: Any,
        sums: Any,
        out: Any,
        lse: Any,
    ) -> None:
        if made_of < 0:
            return
        heads, group, dim = q.shape
        size, width = tokens * dim, 4 if dtype == 0 else 2
        weights = np.empty((group, tokens), np.float32)
        exponents = weights.view(np.int32)
        wide = np.empty(size if dtype else 0, np.float32)
        every = LINE // width
        for head in range(heads):
            for i in range(starts[head], starts[head + 1]):
                if i + AHEAD < len(key_at):
                    for at in range(0, size, every):
                        fetch(keys, key_at[i + AHEAD] + at)
                        fetch(values, value_at[i + AHEAD] + at)
                own = keys[key_at[i] : key_at[i] + size]
                if dtype:
                    _widen(own, dtype, wide)
                k = own if dtype == 0 else wide
                for g in range(group):
                    query, mine = q[head, g], weights[g]
                    for t in range(tokens):
                        logit = _F(0)
                        for d in range(dim):
                            logit += query[d] * k[t * dim + d]
                        mine[t] = logit
                own = values[value_at[i] : value_at[i] + size]
                if dtype:
                    _widen(own, dtype, wide)
                v = own if dtype == 0 else wide
                for g in range(group):
                    mine, powers, sink = weights[g], exponents[g], out[head, g]
                    top, before, bad = mine[0], tops[head, g], False
                    for t in range(tokens):
                        top = max(top, mine[t])
                        bad = bad or mine[t] != mine[t] or mine[t] == np.inf
                    best = max(top, before)
                    scale = np.exp(before - best)
                    if scale != _F(1):
                        for d in range(dim):
                            sink[d] *= scale
                    for t in range(tokens):
                        power, exponent = exp_parts(mine[t] - best)
                        mine[t] = power
                        powers[t] += exponent << np.int32(23)
                    total = _F(0)
                    for t in range(tokens):
                        total += mine[t]
                    if bad:
                        total = _F(np.nan)
                    for t in range(tokens):
                        weight = mine[t]
                        for d in range(dim):
                            sink[d] += weight * v[t * dim + d]
                    tops[head, g] = best
                    sums[head, g] = sums[head, g] * scale + total
                    if len(lse):
                        lse[i, g] = best + np.log(total)

    return attend


def _join(tops: Any, sums: Any, out: Any, lse: Any, beside: Any) -> None:
    heads, group, dim = out.shape
    for head in range(heads):
        for g in range(group):
            own, other = out[head, g], _F(0)
            scale, top = _F(1), tops[head, g]
            if len(lse) and lse[head, g] > -np.inf:
                best = max(top, lse[head, g])
                scale, other = np.exp(top - best), np.exp(lse[head, g] - best)
            total = sums[head, g] * scale + other
            scale, other = scale / total, other / total
            for d in range(dim):
                own[d] *= scale
            if other > _F(0):
                for d in range(dim):
                    own[d] += other * beside[head, g, d]
