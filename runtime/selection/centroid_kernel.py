"""`kvdb.runtime.selection.centroid_sums.of_unread`, compiled: one pass over clusters, and values of those only that weigh anything."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from kvdb.compiled import compiled

_SIGNATURE: Final = (
    "boolean(float32[:, :, ::1], int32[:, :, ::1], int32[:, ::1], int64[:, ::1], int64[::1], int8[:, :, ::1], float32[:, ::1], "
    "float32[:, :, ::1], float32[:, ::1])"
)
_FAST: Final = {"reassoc", "contract", "nsz"}
_NOTHING: Final = float(np.float32(2.0**-24))
"""Of the largest weight: what weighs less is left out of the output, but for the sum of all weights."""


@cache
def kernel() -> Callable[..., bool]:
    return compiled(_of_unread, _SIGNATURE, fastmath=_FAST, error_model="numpy", nogil=True)


def _of_unread(
    logits: Any, owners: Any, sizes: Any, chunks: Any, counts: Any, values: Any, scales: Any, out: Any, lse: Any
) -> bool:
    heads, group, clusters = logits.shape
    tokens, dim = owners.shape[2], values.shape[2]
    left = np.empty(clusters, np.int32)
    sums = np.empty(dim, np.float32)
    any_left = False
    for head in range(heads):
        total = 0
        for c in range(clusters):
            left[c] = sizes[head, c]
            total += sizes[head, c]
        for i in range(counts[head]):
            chunk = chunks[head, i]
            for t in range(tokens):
                owner = owners[head, chunk, t]
                if owner >= 0:
                    left[owner] -= 1
                    total -= 1
        any_left = any_left or total > 0
        for g in range(group):
            sums[:] = np.float32(0)
            top, weight = np.float32(-1e30), np.float32(0)
            for c in range(clusters):
                if left[c] > 0:
                    top = max(top, logits[head, g, c])
            for c in range(clusters):
                if left[c] == 0:
                    continue
                share = np.float32(left[c]) * np.exp(logits[head, g, c] - top)
                weight += share
                if share > np.float32(_NOTHING):
                    share *= scales[head, c]
                    for d in range(dim):
                        sums[d] += share * np.float32(values[head, c, d])
            if total:
                for d in range(dim):
                    out[head, g, d] = sums[d] / weight
                lse[head, g] = top + np.log(weight)
            else:
                out[head, g, :] = np.float32(0)
                lse[head, g] = -np.inf
    return any_left
