"""How keys are put into clusters: compiled where numba is installed, in NumPy elsewhere. Ways differ in what rounding decides."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import numpy as np

from kvdb.abstracts.base import Array
from kvdb.geometry import div_ceil

TURNS: Final = 1
"""Steps of power iteration towards the direction in which keys differ most, from the element that does. Three leave 5 % less KL."""
LARGEST: Final = np.float32(2.0**96)
"""Sums of as many numbers as a segment has tokens are finite, and so are squares of what is left when they are divided by the largest."""
SMALLEST: Final = np.float32(1e-30)
"""Keys all below it in magnitude are taken for zeros: nothing tells them apart."""


def cluster(keys: Array, values: Array, known: Array, size: int) -> tuple[Array, Array, Array]:
    """Put tokens whose keys lie together into clusters.

    keys, values  (tokens, head_dim) float32, C-contiguous
    known         (n,) int64, ascending: tokens to put into clusters, whose keys and values are at most `LARGEST`; at least one
    returns       the tokens (n,) int64, of which each `size` in a row are a cluster, the last one of what is left; the mean keys and mean
                  values of the clusters (clusters, head_dim) float32
    """
    order, used = known.copy(), div_ceil(len(known), size)
    mean_keys, mean_values = np.empty((2, used, keys.shape[1]), np.float32)
    _best()(keys, values, order, size, mean_keys, mean_values)
    return order, mean_keys, mean_values


@cache
def _best() -> Callable[[Array, Array, Array, int, Array, Array], None]:
    try:
        from kvdb.abstracts.centroid_kernel import kernel
    except (ImportError, OSError):  # not installed, not for this NumPy, or a library of it is missing
        return cluster_in_numpy
    return kernel()


def cluster_in_numpy(keys: Array, values: Array, order: Array, size: int, mean_keys: Array, mean_values: Array) -> None:
    """`order` holds tokens, and is put in order by halving them and their halves, down to `size`; then means are filled in."""
    largest = np.abs(keys[order]).max()
    points = keys / max(largest, SMALLEST)
    todo = [(0, len(order))]
    while todo:
        start, stop = todo.pop()
        count = div_ceil(stop - start, size)
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
    for vectors, means in ((keys, mean_keys), (values, mean_values)):
        for number in range(len(means)):
            vectors[order[number * size : (number + 1) * size]].mean(0, out=means[number])
