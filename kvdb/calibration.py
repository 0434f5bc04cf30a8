"""Which way to read suits a store where it lies.

Through the page cache, as long as the store's KV fits into the memory that can be had: nothing else shares as much, with as little of our own. What does
not fit is read past it where that is faster: under pressure Linux drops what it was asked to read ahead, and then reads come one by
one. Both ways are tried on rows of a shard that is there. Network file systems, whose maps can end a process, are read by position.
"""

from __future__ import annotations

import contextlib
import mmap as _mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from kvdb import files
from kvdb.available import available_bytes
from kvdb.errors import Unsupported
from kvdb.mounts import MOUNTS, mount_of
from kvdb.requests import best_requests

_READS: Final = 48
_BYTES: Final = 16 << 10
"""So many reads of so many bytes are tried each way: a fiftieth of a second on a disk of its own."""


class Way(NamedTuple):
    """A name of `kvdb.readers.READERS`, and why, in words; whether that is so because all KV fits into memory."""

    name: str
    why: str
    fits: bool = False


def way_to_read(chunks: Path, stored_bytes: int, mounts: Path = MOUNTS) -> Way:
    """chunks: where shards lie. stored_bytes: of all of them."""
    if sys.platform != "linux":
        return Way("pread", f"maps of files are not used on {sys.platform}")
    if (mount := mount_of(chunks, mounts)).network:
        return Way("pread", f"{mount.kind} is a network file system")
    available = available_bytes()
    if stored_bytes <= available:
        return Way("mmap", f"{stored_bytes >> 20} MiB of KV fit into {available >> 20} MiB of memory", fits=True)
    large = f"{stored_bytes >> 20} MiB of KV do not fit into {available >> 20} MiB of memory"
    try:
        shard = _largest(chunks)
        if shard is None:
            return Way("mmap", f"{large}; there is nothing to try")
        direct, mapped = _timed(shard, _direct), _timed(shard, _mapped)
    except (OSError, Unsupported) as e:
        return Way("mmap", f"{large}; {e}")
    times = f"{_READS} reads take {1e3 * direct:.1f} ms past the page cache, {1e3 * mapped:.1f} ms through it"
    return Way("direct" if direct <= mapped else "mmap", f"{large}; {times}")


def _largest(chunks: Path) -> Path | None:
    """The largest shard of a few, of enough bytes to be read in."""
    some = [path for path, _ in zip(chunks.glob("*.kv*/c*"), range(64), strict=False)]
    sizes = dict[Path, int]()
    for path in some:
        with contextlib.suppress(FileNotFoundError):  # a deletion passed by
            sizes[path] = path.stat().st_size
    shard = max(sizes, key=lambda path: sizes[path], default=None)
    return shard if shard is not None and sizes[shard] >= 2 * _READS * _BYTES else None


def _timed(shard: Path, read: Callable[[int, Path, list[int]], None]) -> float:
    """Seconds for reads at random, of places that the other way does not read."""
    fd = files.open_read(shard)
    try:
        places = np.random.default_rng(read is _direct).permutation(files.file_size(fd) // _BYTES)
        some = (places[: 2 * _READS : 2] * _BYTES).tolist()
        started = time.perf_counter()
        read(fd, shard, some)
        return time.perf_counter() - started
    finally:
        files.close(fd)


def _direct(fd: int, shard: Path, places: list[int]) -> None:
    files.make_direct(fd, shard)
    memory = _mmap.mmap(-1, len(places) * _BYTES)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    with best_requests() as requests:
        count = len(places)
        sizes, to = np.full(count, _BYTES, np.int64), address + _BYTES * np.arange(count, dtype=np.int64)
        came = requests.wait(requests.submit(fd, np.array(places, np.int64), sizes, to, memory), timeout_s=5)
    if (came != _BYTES).any():
        raise OSError(f"{shard}: reads past the page cache give {sorted(set(came.tolist()))}, expected {_BYTES}")


def _mapped(fd: int, shard: Path, places: list[int]) -> None:
    with files.mmap(fd, files.file_size(fd)) as map_:
        map_.madvise(_mmap.MADV_RANDOM)
        for at in places:
            files.will_need(map_, at, _BYTES)
        for at in places:
            files.populate(map_, at, _BYTES)
