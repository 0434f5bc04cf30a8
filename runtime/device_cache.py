"""The device tier: records in a device's memory, decoded, up to a budget.

What is chosen at a step is mostly what was chosen at one of the last few, so most records need not cross the bus again. Copies into slots and out
of them are queued on the device's own stream in the order they are asked for here: a slot is not given to another record before
the computation that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvdb.errors import InvalidInput
from kvdb.geometry import Geometry
from kvdb.replacement import REPLACEMENT
from kvdb.sizes import parse_bytes
from kvdb.slots import SlotTable

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, int]
"""chunk_tokens, head_dim of a record."""
FREE_SHARE: Final = 4
"""Where nobody says how much, one in so many bytes that are free on the device."""


class Rows(NamedTuple):
    """Records of one array of a segment: what tells it from others, how many it has, and which are asked for."""

    key: Hashable
    capacity: int
    wanted: Array


class _Pool:
    """Slots for records of one shape."""

    def __init__(self, slots: int, shape: Shape, dtype: torch.dtype, device: torch.device, policy: str) -> None:
        self.table = SlotTable(REPLACEMENT[policy])
        self.table.add(0, slots)
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            self.memory = torch.empty((2, slots, *shape), dtype=dtype, device=device)


class DeviceCache:
    """Not thread-safe: one for each cache handle.

    budget_bytes  most that its slots take, shared out to shapes by `bytes_of`
    bytes_of      of all records of a shape that may be asked for, in any unit
    policy        a name of `kvdb.replacement.REPLACEMENT`
    """

    def __init__(
        self,
        budget_bytes: int,
        bytes_of: dict[Shape, int],
        dtype: torch.dtype,
        device: torch.device,
        policy: str = "lru",
    ) -> None:
        self.policy = policy
        self._pools: dict[Shape, _Pool] = {}
        for shape, share in bytes_of.items():
            record = 2 * shape[0] * shape[1] * dtype.itemsize
            slots = int(budget_bytes * share / sum(bytes_of.values())) // record
            if slots:
                self._pools[shape] = _Pool(slots, shape, dtype, device, policy)

    @property
    def nbytes(self) -> int:
        return sum(pool.memory.nbytes for pool in self._pools.values())

    def holds(self, shape: Shape, records: int) -> bool:
        """Whether so many records would all find room at once."""
        pool = self._pools.get(shape)
        return pool is not None and records <= pool.table.in_service

    def gather(self, rows: Rows, shape: Shape, read: Callable[[Array], Tensor]) -> Tensor:
        """Records on the device, (2, n, chunk_tokens, head_dim), keys first: new memory.

        read  brings rows that are not here, (m,) int64, ascending, each once: as this returns them
        """
        pool = self._pools.get(shape)
        if pool is None:
            each, where = np.unique(rows.wanted, return_inverse=True)
            came = read(each)
            return came.index_select(1, _on(where, came))
        slots = pool.table.lookup(rows.key, rows.wanted)
        missing = np.unique(rows.wanted[slots < 0])
        given = np.empty(0, np.int64)
        try:
            if not len(missing):
                return pool.memory.index_select(1, _on(slots, pool.memory))
            came = read(missing)
            given = pool.table.admit(rows.key, missing, rows.capacity)
            kept = np.flatnonzero(given >= 0)
            try:
                pool.memory.index_copy_(1, _on(given[kept], came), came.index_select(1, _on(kept, came)))
            except BaseException:
                pool.table.forget(rows.key, missing)
                raise
            out = came.new_empty((2, len(slots), *shape))
            here, late = np.flatnonzero(slots >= 0), np.flatnonzero(slots < 0)
            out.index_copy_(1, _on(here, out), pool.memory.index_select(1, _on(slots[here], out)))
            places = np.searchsorted(missing, rows.wanted[late])
            return out.index_copy_(1, _on(late, out), came.index_select(1, _on(places, out)))
        finally:
            pool.table.release(slots[slots >= 0])
            pool.table.release(given[given >= 0])

    def absent(self, rows: Rows, shape: Shape) -> Array:
        """Those of the wanted rows that are not here."""
        pool = self._pools.get(shape)
        return rows.wanted if pool is None else rows.wanted[pool.table.find(rows.key, rows.wanted) < 0]

    def weigh(self, rows: Rows, shape: Shape, weights: Array) -> None:
        """Say what rows, none twice, are worth: their share of attention mass."""
        pool = self._pools.get(shape)
        if pool is not None:
            pool.table.weigh(rows.key, rows.wanted, weights)

    def stats(self) -> dict[str, Any]:
        """JSON-safe: rows found and not found, and how they came and went."""
        tables = [pool.table for pool in self._pools.values()]
        hits, misses = sum(t.hits for t in tables), sum(t.misses for t in tables)
        return {
            "bytes": self.nbytes,
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
            "admitted": sum(t.admitted for t in tables),
            "evicted": sum(t.evicted for t in tables),
        }


def device_bytes(device: torch.device, budget: int | str | None, policy: str) -> int | None:
    """Bytes for the device tier of a cache; None on a CPU, whose memory is the host tier's.

    budget  bytes, "4GiB" say; None: a share of what is free on the device now
    raises  InvalidInput for a budget on a CPU or an unknown policy
    """
    if policy not in REPLACEMENT:
        raise InvalidInput(f"attach: device_policy is {policy!r}, expected one of {sorted(REPLACEMENT)}")
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free // FREE_SHARE if budget is None else parse_bytes("attach: device_budget", budget)
    if budget is not None:
        raise InvalidInput(
            f"attach: device_budget is {budget!r} for a model on {device.type!r}, expected none: what is read stays in the page cache"
        )
    return None


def shapes_of(geometry: Geometry) -> dict[Shape, int]:
    """For each shape of records, the bytes of KV of a token that come in it, relative to others."""
    shapes: dict[Shape, int] = {}
    for group in geometry.groups:
        shape = (geometry.chunk_tokens, group.head_dim)
        shapes[shape] = shapes.get(shape, 0) + len(group.layers) * group.kv_heads * group.head_dim
    return shapes


def _on(numbers: Array, beside: Tensor) -> Tensor:
    return torch.from_numpy(numbers).to(beside.device)
