"""`kvdb.runtime.selection.largest.largest`, compiled: by counting, with no comparison of one number with another.

The bits of a float32, turned so that they rise as whole numbers where it does, are counted by their leading 11, then those of the bin in
which the k-th lies by the next 11, then by the last 10. Three passes, of which mostly the first goes through all of a row.
source: radix selection, as in GPU top-k (Alabi et al., Fast k-selection algorithms for GPUs, 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from kvdb.compiled import compiled

_SIGNATURE: Final = "void(Array(uint32, 2, 'A', True), int64, int64[:, ::1])"
_TOP, _REST, _INFINITE = np.uint32(0x80000000), np.uint32(0xFFFFFFFF), np.uint32(0x7F800000)


@cache
def kernel() -> Callable[..., None]:
    """kernel(bits, k, out): indices (rows, k) of the k largest of float32 in each row of their bits, ascending; of equal ones the first."""
    return compiled(_largest, _SIGNATURE, nogil=True)


def _largest(bits: Any, k: int, out: Any) -> None:
    rows, n = bits.shape
    keys, inside = np.empty(n, np.uint32), np.empty(n, np.uint32)
    counts = np.empty(2048, np.int64)
    for row in range(rows):
        for i in range(n):
            key = bits[row, i]
            if key & ~_TOP > _INFINITE:  # no number, of either sign
                keys[i] = _REST
            elif key == _TOP:  # -0.0 is 0.0
                keys[i] = _TOP
            else:
                keys[i] = key ^ (_REST if key & _TOP else _TOP)
        inside[:] = keys
        found, wanted, least = n, k, np.uint32(0)
        for shift, places in ((21, 2048), (10, 2048), (0, 1024)):
            counts[:places] = 0
            for i in range(found):
                counts[(inside[i] >> np.uint32(shift)) & np.uint32(places - 1)] += 1
            bin_ = places - 1
            while counts[bin_] < wanted:
                wanted -= counts[bin_]
                bin_ -= 1
            least |= np.uint32(bin_) << np.uint32(shift)
            kept = 0
            for i in range(found):
                if (inside[i] >> np.uint32(shift)) & np.uint32(places - 1) == bin_:
                    inside[kept] = inside[i]
                    kept += 1
            found = kept
        at = 0  # `wanted` of those that equal the least are among the k
        for i in range(n):
            if keys[i] > least:
                out[row, at] = i
                at += 1
            elif keys[i] == least and wanted > 0:
                wanted -= 1
                out[row, at] = i
                at += 1
