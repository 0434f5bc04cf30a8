"""Which bytes of files to ask for, to have given rows of them: pure arithmetic.

Rows that lie one after the other are asked for together. Where O_DIRECT cannot read a row by itself, because it does not begin and
end with a block of the device, it is read with the whole blocks around it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Extents(NamedTuple):
    """Reads, each of (m,) int64, and where in them the rows are, each of (n,) int64.

    offsets, sizes  bytes of a file
    first           the first row of each read, which tells the file
    of              the read that a row is part of
    at              bytes from the beginning of that read to the row's
    """

    offsets: Array
    sizes: Array
    first: Array
    of: Array
    at: Array


def exactly(files: Array, rows: Array, slots: Array, row_bytes: int) -> Extents:
    """Reads of nothing but rows: of those together that follow each other in a file and in memory.

    files  (n,) int64, ascending: which file each row is in
    rows   (n,) int64, of each file ascending
    slots  (n,) int64: where they go, counted in rows
    """
    apart = (np.diff(rows) != 1) | (np.diff(slots) != 1) | (np.diff(files) != 0)
    return _extents(rows * row_bytes, (rows + 1) * row_bytes, rows * row_bytes, apart)


def around(files: Array, rows: Array, row_bytes: int, align: int) -> Extents:
    """Reads of whole blocks of `align` bytes: of those together that touch. files, rows: as for `exactly`."""
    starts = rows * row_bytes // align * align
    stops = -(-(rows + 1) * row_bytes // align) * align
    return _extents(starts, stops, rows * row_bytes, (starts[1:] > stops[:-1]) | (np.diff(files) != 0))


def _extents(starts: Array, stops: Array, rows_at: Array, apart: Array) -> Extents:
    first = np.flatnonzero(np.concatenate(([True], apart)))
    last = np.concatenate((first[1:], [len(starts)])) - 1
    of = np.repeat(np.arange(len(first)), last - first + 1)
    offsets = starts[first]
    return Extents(offsets, stops[last] - offsets, first, of, rows_at - offsets[of])
