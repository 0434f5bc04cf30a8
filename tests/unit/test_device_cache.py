"""Whatever was kept, evicted or never seen, the device tier gives the records that were asked for; the device is memory here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdb.errors import InvalidInput
from kvdb.geometry import Geometry, LayerGroup
from kvdb.replacement import REPLACEMENT
from kvdb.runtime.device_cache import DeviceCache, Rows, device_bytes, shapes_of
from kvdb.slots import SlotTable

CPU, SHAPE = torch.device("cpu"), (4, 3)
CAPACITY = 50


def record(key: int, row: int) -> torch.Tensor:
    """(2, 4, 3): a number for each record, and its sign for K and V."""
    return torch.tensor([1.0, -1.0])[:, None, None] * (1000 * key + row) * torch.ones(SHAPE)


def of_slots(count: int, policy: str = "lru") -> DeviceCache:
    return DeviceCache(count * 2 * 12 * 4, {SHAPE: 1}, torch.float32, CPU, policy)


def ask(cache: DeviceCache, key: int, wanted: list[int], read: list[int] | None = None) -> torch.Tensor:
    def bring(rows: Any) -> torch.Tensor:
        assert rows.tolist() == sorted(set(rows.tolist()))
        if read is not None:
            read.extend(rows.tolist())
        return torch.stack([record(key, row) for row in rows.tolist()], 1)

    return cache.gather(Rows(key, CAPACITY, np.array(wanted, np.int64)), SHAPE, bring)


@given(
    slots=st.integers(0, 30),
    policy=st.sampled_from(sorted(REPLACEMENT)),
    steps=st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, CAPACITY - 1), min_size=1, max_size=25)), max_size=25
    ),
)
def test_records_are_what_was_asked_for(slots: int, policy: str, steps: list[tuple[int, list[int]]]) -> None:
    cache = of_slots(slots, policy)
    for key, wanted in steps:
        found = ask(cache, key, wanted)
        assert found.is_contiguous()
        assert torch.equal(found, torch.stack([record(key, row) for row in wanted], 1))
    assert cache.nbytes == slots * 96


def test_what_is_there_is_not_read_again() -> None:
    cache, read = of_slots(20), list[int]()
    ask(cache, 1, [3, 9, 3], read)
    ask(cache, 1, [9, 4], read)
    ask(cache, 2, [9], read)  # of another array
    assert read == [3, 9, 4, 9]
    assert cache.absent(Rows(1, CAPACITY, np.array([3, 5, 9])), SHAPE).tolist() == [5]
    told = cache.stats()
    assert (told["hits"], told["misses"], told["admitted"], told["evicted"]) == (1, 5, 4, 0)


def test_an_eviction_that_leaves_the_map_as_it_was_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = of_slots(2)
    ask(cache, 1, [1, 2])
    monkeypatch.setattr(SlotTable, "_unmap", lambda *_: None)
    ask(cache, 1, [3, 4])
    assert not torch.equal(ask(cache, 1, [1]), record(1, 1)[:, None])


def test_an_error_while_reading_leaves_nothing_behind() -> None:
    cache = of_slots(4)
    ask(cache, 1, [1, 2])

    def fail(_: object) -> torch.Tensor:
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        cache.gather(Rows(1, CAPACITY, np.array([2, 3])), SHAPE, fail)
    for row in range(10, 40, 4):  # every slot can still be taken
        assert torch.equal(ask(cache, 1, [*range(row, row + 4)])[0, :, 0, 0], torch.arange(row, row + 4) + 1000.0)
    assert cache.stats()["admitted"] == 2 + 32


def test_an_error_while_copying_leaves_nothing_that_counts_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = of_slots(4)

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("the device")

    with monkeypatch.context() as full:
        full.setattr(torch.Tensor, "index_copy_", fail)
        with pytest.raises(torch.OutOfMemoryError):
            ask(cache, 1, [1, 2])
    read: list[int] = []
    assert torch.equal(ask(cache, 1, [1, 2], read), torch.stack([record(1, 1), record(1, 2)], 1))
    assert read == [1, 2]


def test_it_serves_inside_and_outside_of_inference_mode() -> None:
    with torch.inference_mode():
        cache = of_slots(4)
        ask(cache, 1, [1, 2])
    assert torch.equal(ask(cache, 1, [2, 3]), torch.stack([record(1, 2), record(1, 3)], 1))


def test_shapes_share_the_budget_by_their_bytes() -> None:
    groups = (LayerGroup(layers=(0, 1, 2), kv_heads=2, head_dim=8), LayerGroup(layers=(3,), kv_heads=1, head_dim=16))
    shapes = shapes_of(Geometry(dtype="float16", chunk_tokens=16, groups=groups))
    assert shapes == {(16, 8): 48, (16, 16): 16}
    cache = DeviceCache(1 << 20, shapes, torch.float16, CPU)
    assert cache.nbytes == 1 << 20
    assert cache.holds((16, 8), (3 << 18) // 512)
    assert not cache.holds((16, 8), (3 << 18) // 512 + 1)
    assert not cache.holds((16, 99), 1)


def test_options_are_checked() -> None:
    assert device_bytes(CPU, None, "lru") is None
    with pytest.raises(InvalidInput, match="device_budget is '4GiB' for a model on 'cpu'"):
        device_bytes(CPU, "4GiB", "lru")
    with pytest.raises(InvalidInput, match="device_policy is 'best', expected one of"):
        device_bytes(CPU, None, "best")
