"""Reading by position into the caller's buffer: no map, so a truncated file is an error and never a SIGBUS. The way for network file
systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from kvdb import files
from kvdb.errors import Damaged
from kvdb.reader import Array, OpenArray, Reader


class PreadReader(Reader):
    name: ClassVar[str] = "pread"

    def _prepare(self, array: OpenArray, payload_bytes: int) -> None:
        """The descriptor is all it needs."""

    def _fetch_planes(self, array: OpenArray, rows: Array, out: Array) -> None:
        if array.unpacked is not None:
            super()._fetch_planes(array, rows, out)
            return
        for i, row in enumerate(rows.tolist()):
            self._read_row(array, row, [memoryview(out[0, i]).cast("B"), memoryview(out[1, i]).cast("B")])

    def _stored(self, array: OpenArray, rows: Array, out: Array) -> Callable[[int], Any]:
        return lambda i: out[:, i].tobytes()

    def _fetch_coded(self, array: OpenArray, rows: Array) -> tuple[Array, Array]:
        stored = np.empty((len(rows), array.row), np.uint8)
        self._fetch_rows(array, rows, stored)
        return stored, np.arange(len(rows))

    def _fetch_rows(self, array: OpenArray, rows: Array, out: Array) -> None:
        if array.unpacked is not None:
            super()._fetch_rows(array, rows, out)
            return
        for i, row in enumerate(rows.tolist()):
            self._read_row(array, row, [memoryview(out[i])])

    def _read_row(self, array: OpenArray, row: int, buffers: list[memoryview]) -> None:
        n = files.preadv(array.fd, buffers, row * array.row)
        self.bytes_fetched += n
        if n != array.row:
            raise Damaged(
                f"segment {array.info.segment}, file {array.path}: {n} bytes at {row * array.row}, expected {array.row}; run "
                "'kvdb verify'",
                segment=array.info.segment,
            )
