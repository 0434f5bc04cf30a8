"""Arrays in the making: a folder each, with one file and, last, its zarr.json.

A file has its full size from the start, sparse: that is the reservation of its room. It is filled in any order; whoever made
an array moves it to where it belongs. `AbstractWriter` knows how an abstract's rows lie in its arrays; where KV lies, the
segment's writer knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash

from kvdb import files, format
from kvdb.abstracts import ABSTRACTS
from kvdb.format import SegmentInfo
from kvdb.geometry import Geometry

Array = np.ndarray[Any, np.dtype[Any]]

ARRAY_OVERHEAD: Final = 24 << 10
"""Bytes an array may take besides its values: its folder, its metadata, the last block of each file."""
_DIGEST_OVERHEAD: Final = 32
"""Bytes that the digest of a plane takes in an abstract's metadata."""
_WRITEBACK_BYTES: Final = 512 << 10
"""Writes from here on go to the disk at once, beside the work on the next layer: then the sync at the end has little left."""


class ArrayWriter:
    """One array of `size` bytes, in a new folder inside `parent`."""

    def __init__(self, parent: Path, array: str, size: int) -> None:
        self.folder = parent / array
        self._path = self.folder / format.SHARD_KEY
        files.mkdir(self.folder)
        self._fd: int | None = files.open_excl(self._path)
        try:
            files.truncate(self._fd, size, self._path)
        except BaseException:
            self.close()
            raise

    @property
    def fd(self) -> int:
        assert self._fd is not None
        return self._fd

    def write(self, data: Array, offset: int) -> None:
        files.write_all(self.fd, data.data, offset, self._path)
        if data.nbytes >= _WRITEBACK_BYTES:
            files.start_writeback(self.fd, offset, data.nbytes)

    def shorten(self, size: int) -> None:
        """Give back the room that was reserved beyond the first `size` bytes."""
        files.truncate(self.fd, size, self._path)

    def describe(self, metadata: bytes) -> None:
        """Write zarr.json."""
        path = self.folder / format.METADATA_KEY
        fd = files.open_excl(path)
        try:
            files.write_all(fd, metadata, 0, path)
        finally:
            files.close(fd)

    def close(self) -> None:
        """Closing twice is fine."""
        fd, self._fd = self._fd, None
        if fd is not None:
            files.close(fd)


class AbstractWriter:
    """One abstract of a segment: an array for each layer group, in new folders inside `parent`.

    info  of the segment; its tokens and abstracts count for nothing before `seal`
    """

    def __init__(self, parent: Path, info: SegmentInfo, name: str) -> None:
        self.abstract, self._geometry = ABSTRACTS[name], info.geometry
        groups = range(len(info.geometry.groups))
        self._places = [format.abstract_layout(info.geometry, g, info.capacity, self.abstract) for g in groups]
        self._arrays: list[ArrayWriter] = []
        try:
            for group, place in enumerate(self._places):
                array = format.abstract_array(info.segment, name, group)
                self._arrays.append(ArrayWriter(parent, array, place.file_bytes))
        except BaseException:
            self.close()
            raise

    def write(self, layer: int, chunk: int, planes: Array) -> None:
        """Put the rows of one layer's chunks in their place, from chunk number `chunk` of the segment on.

        planes  (planes, chunks, kv_heads, row_bytes) uint8
        """
        group, layer_row = self._geometry.locate(layer)
        place, heads = self._places[group], self._geometry.groups[group].kv_heads
        start = layer_row * place.layer_bytes + chunk * heads * place.row_bytes
        for plane, stored in enumerate(planes):
            self._arrays[group].write(stored, start + plane * place.plane_bytes)

    def seal(self, info: SegmentInfo) -> dict[str, str]:
        """Write the metadata of what is there; array name -> seal."""
        seals = {}
        for group, (array, place) in enumerate(zip(self._arrays, self._places, strict=True)):
            planes = range(0, place.file_bytes, place.plane_bytes)
            digests = [xxhash.xxh3_64_hexdigest(files.pread(array.fd, place.plane_bytes, at)) for at in planes]
            array.describe(format.abstract_metadata(info, group, self.abstract, digests))
            seals[array.folder.name] = format.abstract_seal(digests)
        return seals

    def close(self) -> None:
        for array in self._arrays:
            array.close()


def abstract_bytes(geometry: Geometry, name: str, capacity: int) -> int:
    """Most that the files of one abstract of a segment of `capacity` chunks can occupy, folders and metadata included."""
    total = 0
    for group, g in enumerate(geometry.groups):
        digests = len(g.layers) * ABSTRACTS[name].planes
        place = format.abstract_layout(geometry, group, capacity, ABSTRACTS[name])
        total += place.file_bytes + digests * _DIGEST_OVERHEAD + ARRAY_OVERHEAD
    return total
