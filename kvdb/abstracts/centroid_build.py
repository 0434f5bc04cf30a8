"""How keys are put into clusters: compiled where numba is installed, in NumPy elsewhere. Ways differ in what rounding decides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import numpy as np

from kvdb.abstracts.base import Array

TURNS: Final = 1
"""Steps of power iteration towards the direction in which keys differ most, from the element that does. Three leave 5 % less KL."""
LARGEST: Final = np.float32(2.0**96)
"""Sums of as many numbers as a segment has tokens are finite, and so are squares of what is left when they are divided by the largest."""
SMALLEST: Final = np.float32(1e-30)
"""Keys all below it in magnitude are taken for zeros: nothing tells them apart."""


def order_by_likeness(keys: Array, known: Array, size: int) -> Array:
    """Tokens in an order of which each `size` in a row are a cluster, the last one of what is left.

    keys     (tokens, head_dim) float32, C-contiguous
    known    (n,) int64, ascending: tokens to put in order, whose keys are at most `LARGEST`
    returns  (n,) int64
    """
    order = known.copy()
    if len(order) > size:
        _best()(keys, order, size)
    return order


@cache
def _best() -> Callable[[Array, Array, int], None]:
    try:
        from kvdb.abstracts.centroid_kernel import kernel
    except (ImportError, OSError):  # not installed, not for this NumPy, or a library of it is missing
        return halve_in_numpy
    return kernel()


def halve_in_numpy(keys: Array, order: Array, size: int) -> None:
    """Put tokens into an order by halving them and their halves, down to `size` tokens: keys as in `order_by_likeness`, order in place."""
    largest = np.abs(keys[order]).max()
    points = keys / max(largest, SMALLEST)
    todo = [(0, len(order))]
    while todo:
        start, stop = todo.pop()
        count = -(-(stop - start) // size)
        if count < 2:
            continue
        ids = order[start:stop]
        apart = points[ids] - points[ids].mean(0)
        direction = np.zeros(keys.shape[1], np.float32)
        direction[np.square(apart).sum(0).argmax()] = 1
        for _ in range(TURNS):
            direction = (apart @ direction) @ apart
            direction /= max(np.sqrt(direction @ direction), SMALLEST)
        middle = start + count // 2 * size
        nearer = np.zeros(len(ids), bool)
        nearer[np.argsort(apart @ direction, kind="stable")[: middle - start]] = True
        order[start:middle], order[middle:stop] = ids[nearer], ids[~nearer]
        todo += [(start, middle), (middle, stop)]
