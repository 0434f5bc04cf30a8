"""Arrays whose rows are compressed in blocks: written one block after the other, and unpacked in memory as rows are asked for.

A block has no place of its own in the file: the shard's index says where it lies. `Unpacked` holds what a reader has unpacked in
memory that belongs to nobody but it, laid out like the file of an array that is not compressed, so that rows are
found there as in a map of one; the least recently used blocks go when there is too much of it.
"""

from __future__ import annotations

import mmap as _mmap
from collections import OrderedDict
from typing import Any, Final

import numpy as np

from kvdb import files, format
from kvdb.arrays import ArrayWriter
from kvdb.codecs import BlockForm, Blosc
from kvdb.errors import Damaged, InvalidInput, OutOfMemory

Array = np.ndarray[Any, np.dtype[Any]]
_RESERVE_NOTHING: Final = getattr(_mmap, "MAP_NORESERVE", 0)


class BlockWriter:
    """Rows of an array's layers, each layer's in order, as blocks into its file."""

    def __init__(self, array: ArrayWriter, codec: Blosc, form: BlockForm, layers: int, capacity: int) -> None:
        self._array, self._codec, self._form = array, codec, form
        self._places = np.full((layers, form.count(capacity), 2), format.ABSENT, "<u8")
        self._done = [0] * layers
        self._waiting: list[list[Array]] = [[] for _ in range(layers)]
        self._end = 0

    def write(self, layer_row: int, rows: Array) -> None:
        """The next rows of one layer, (n, row_bytes) uint8: whole blocks are written, the rest waits."""
        rows = np.concatenate((*self._waiting[layer_row], rows))
        whole = len(rows) - len(rows) % self._form.records
        for start in range(0, whole, self._form.records):
            self._put(layer_row, rows[start : start + self._form.records])
        self._waiting[layer_row] = [rows[whole:].copy()] if whole < len(rows) else []

    def finish(self, chunks: int) -> tuple[int, Array]:
        """Write what waits. Returns the bytes of all blocks and, of those that hold the first `chunks` chunks of each layer, their places:
        (layers, blocks, 2) u64, offset and length; `format.ABSENT` where there is none."""
        for layer_row, waiting in enumerate(self._waiting):
            if waiting:
                self._put(layer_row, waiting.pop())
        self._places[:, self._form.count(chunks) :] = format.ABSENT
        return self._end, self._places

    def _put(self, layer_row: int, rows: Array) -> None:
        data = self._codec.pack(self._form.numbers(rows))
        self._array.write(np.frombuffer(data, np.uint8), self._end)
        self._places[layer_row, self._done[layer_row]] = self._end, len(data)
        self._done[layer_row] += 1
        self._end += len(data)


class BlockFile:
    """A file of blocks, open for reading.

    where   names segment and file
    places  as `format.block_places` gives them
    """

    def __init__(self, fd: int, where: str, codec: Blosc, form: BlockForm, places: Array) -> None:
        self._fd, self._where, self._codec, self.form, self._places = fd, where, codec, form, places
        self.layers, self.per_layer = places.shape[:2]

    def layer_bytes(self, layer_row: int) -> int:
        """What the blocks of one layer take in the file."""
        sizes = self._places[layer_row, :, 1]
        return int(sizes[sizes != format.ABSENT].sum())

    def place(self, layer_row: int, block: int) -> tuple[int, int]:
        """Offset and bytes of one block in the file."""
        offset, size = self._places[layer_row, block].tolist()
        return offset, size

    def rows(self, layer_row: int, block: int) -> Array:
        """The rows of one block, (records, row_bytes) uint8; zeros after the last.

        raises  Damaged for a block that is not there or does not decode; OutOfMemory
        """
        offset, size = self.place(layer_row, block)
        where = f"{self._where}, layer row {layer_row}, block {block}, offset {offset}"
        if size == format.ABSENT:
            raise Damaged(f"{where}: no block, expected one; run 'kvdb repair', then recompute it")
        try:
            numbers = np.empty(self.form.nbytes, np.uint8).view(self.form.storage_dtype)
            self._codec.unpack(files.pread(self._fd, size, offset), numbers)
            return self.form.rows(numbers)
        except InvalidInput as e:
            raise Damaged(f"{where}: {e}; run 'kvdb repair', then recompute it") from e
        except OutOfMemory:
            raise
        except MemoryError as e:
            raise OutOfMemory(f"{where}: {e}, expected room for a block; free some memory") from e


class UnpackedArray:
    """One array's rows in memory. `view` (layers * capacity * kv_heads, row_bytes) uint8 is right where blocks were brought.

    raises  OutOfMemory where there is no address space for it
    """

    def __init__(self, file: BlockFile, capacity: int) -> None:
        self._file = file
        self._records = capacity * file.form.kv_heads
        row = file.form.nbytes // file.form.records
        count = file.layers * self._records
        try:
            self._base = _mmap.mmap(-1, count * row, flags=_mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS | _RESERVE_NOTHING)
        except (OSError, OverflowError) as e:
            raise OutOfMemory(f"{count} rows of {row} bytes: {e}, expected room for them in memory") from e
        self.view = np.frombuffer(self._base, np.uint8).reshape(count, row)

    def blocks_of(self, rows: Array) -> list[int]:
        """The blocks in which rows lie, each once."""
        layer_rows, records = np.divmod(rows, self._records)
        found: list[int] = np.unique(layer_rows * self._file.per_layer + records // self._file.form.records).tolist()
        return found

    def place_of(self, row: int) -> tuple[int, int]:
        """Offset and bytes, in the file, of the block in which a row lies."""
        return self._file.place(*divmod(self.blocks_of(np.array([row]))[0], self._file.per_layer))

    def bring(self, block: int) -> int:
        """Unpack a block into its place; returns its bytes there."""
        target = self._target(block)
        target[...] = self._file.rows(*divmod(block, self._file.per_layer))[: len(target)]
        return target.nbytes

    def drop(self, block: int) -> int:
        """Give back the memory of a block: pages that hold nothing else. Returns what `bring` did."""
        target = self._target(block)
        start = target.ctypes.data - self.view.ctypes.data
        first, stop = -(-start // _mmap.PAGESIZE), (start + target.nbytes) // _mmap.PAGESIZE
        if first < stop:
            self._base.madvise(_mmap.MADV_DONTNEED, first * _mmap.PAGESIZE, (stop - first) * _mmap.PAGESIZE)
        return target.nbytes

    def _target(self, block: int) -> Array:
        layer_row, number = divmod(block, self._file.per_layer)
        first = number * self._file.form.records
        start = layer_row * self._records
        return self.view[start + first : start + min(first + self._file.form.records, self._records)]


class Unpacked:
    """The blocks that a reader holds in memory, all arrays together: at most `most_bytes`, but for those of one read."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self.nbytes = most_bytes, 0
        self._held: OrderedDict[tuple[UnpackedArray, int], None] = OrderedDict()  # least recently used first

    def bring(self, array: UnpackedArray, rows: Array) -> None:
        """Have rows in `array.view`.

        raises  Damaged for a block that is not there or does not decode
        """
        wanted = array.blocks_of(rows)
        for block in wanted:
            key = array, block
            if key not in self._held:
                self.nbytes += array.bring(block)
                self._held[key] = None
            self._held.move_to_end(key)
        while self.nbytes > self._most and len(self._held) > len(wanted):
            (other, block), _ = self._held.popitem(last=False)
            self.nbytes -= other.drop(block)

    def forget(self, array: UnpackedArray) -> None:
        """Let go of an array, which nobody reads any more."""
        for key in [key for key in self._held if key[0] is array]:
            del self._held[key]
            self.nbytes -= array.drop(key[1])
