"""`kvdb.abstracts.centroid_build.cluster_in_numpy`, compiled: the keys of a part move together, so that each pass over them is in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from kvdb.abstracts import centroid_build
from kvdb.abstracts.centroid_build import SMALLEST, TURNS
from kvdb.compiled import compiled, stamp

_SIGNATURE: Final = "void(float32[:, ::1], float32[:, ::1], int64[::1], int64, float32[:, ::1], float32[:, ::1])"
_FAST: Final = {"reassoc", "contract", "nsz"}


def kernel() -> Callable[[Any, Any, Any, int, Any, Any], None]:
    return compiled(_cluster_of(stamp(centroid_build)), _SIGNATURE, fastmath=_FAST, error_model="numpy", nogil=True)


def _cluster_of(made_of: int) -> Callable[[Any, Any, Any, int, Any, Any], None]:
    """made_of: see `stamp`."""

    def cluster(keys: Any, values: Any, order: Any, size: int, mean_keys: Any, mean_values: Any) -> None:
        if made_of < 0:
            return
        count, dim = len(order), keys.shape[1]
        points, moved = np.empty((count, dim), np.float32), np.empty((count, dim), np.float32)
        along, ids = np.empty(count, np.float32), np.empty(count, np.int64)
        mean, direction, turned = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
        largest = SMALLEST
        for i in range(count):
            for d in range(dim):
                largest = max(largest, abs(keys[order[i], d]))
        for i in range(count):
            for d in range(dim):
                points[i, d] = keys[order[i], d] / largest
        todo = [(0, count)]
        while len(todo):
            start, stop = todo.pop()
            parts = (stop - start + size - 1) // size
            if parts < 2:
                continue
            mean[:] = np.float32(0)
            for i in range(start, stop):
                for d in range(dim):
                    mean[d] += points[i, d]
            for d in range(dim):
                mean[d] /= np.float32(stop - start)
                turned[d] = np.float32(0)
            for i in range(start, stop):
                for d in range(dim):
                    points[i, d] -= mean[d]
                    turned[d] += points[i, d] * points[i, d]
            direction[:] = np.float32(0)
            direction[np.argmax(turned)] = np.float32(1)
            for turn in range(TURNS + 1):
                turned[:] = np.float32(0)
                for i in range(start, stop):
                    place = np.float32(0)
                    for d in range(dim):
                        place += points[i, d] * direction[d]
                    along[i] = place
                    if turn < TURNS:
                        for d in range(dim):
                            turned[d] += place * points[i, d]
                if turn < TURNS:
                    norm = np.float32(0)
                    for d in range(dim):
                        norm += turned[d] * turned[d]
                    norm = max(np.sqrt(norm), SMALLEST)
                    for d in range(dim):
                        direction[d] = turned[d] / norm
            middle = start + parts // 2 * size
            bound = np.partition(along[start:stop], middle - start)[middle - start]
            equal = middle - start  # so many of those at the bound itself are on the near side
            for i in range(start, stop):
                equal -= 1 if along[i] < bound else 0
            near, far = start, middle
            for i in range(start, stop):
                nearer = along[i] < bound or (along[i] == bound and equal > 0)
                equal -= 1 if along[i] == bound else 0
                to = near if nearer else far
                near, far = near + nearer, far + (not nearer)
                ids[to] = order[i]
                for d in range(dim):
                    moved[to, d] = points[i, d]
            for i in range(start, stop):
                order[i] = ids[i]
                for d in range(dim):
                    points[i, d] = moved[i, d]
            todo.append((start, middle))
            todo.append((middle, stop))
        for number in range(len(mean_keys)):
            first, last = number * size, min(count, (number + 1) * size)
            for d in range(dim):
                mean_keys[number, d] = mean_values[number, d] = np.float32(0)
            for i in range(first, last):
                token = order[i]
                for d in range(dim):
                    mean_keys[number, d] += keys[token, d]
                    mean_values[number, d] += values[token, d]
            for d in range(dim):
                mean_keys[number, d] /= np.float32(last - first)
                mean_values[number, d] /= np.float32(last - first)

    return cluster
