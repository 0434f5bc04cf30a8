"""Both readers: bytes asked for are delivered and counted, or an error names where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import TWO_GROUPS, assert_healthy, extend, model_kv, read_kv, token_list

from kvdb import KVDB
from kvdb.errors import Damaged, InvalidInput
from kvdb.format import as_float32
from kvdb.reader import READERS, MmapReader, Reader
from kvdb.segments import Segment, layout

TOKENS = token_list(50)


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[Segment]:
    with KVDB.open(tmp_path / "s") as db:
        yield extend(db, TOKENS, geometry=TWO_GROUPS, spare=2).last


@pytest.fixture(params=READERS.values(), ids=READERS)
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    found: Reader = request.param()
    yield found
    found.close()
    found.close()


def shard(segment: Segment, group: int) -> Path:
    return segment.folder / f"{segment.info.segment}.kv{group}" / "c.0.0.0.0.0"


def test_records_come_in_the_order_asked_for_and_may_repeat(segment: Segment, reader: Reader) -> None:
    keys, values = model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact")[3]
    records = np.array([13, 0, 13, 7])
    out = np.full((2, 4, 16, 80), 7, "<f2")
    reader.read(segment, 3, records, out)
    for i, (chunk, head) in enumerate(divmod(r, 5) for r in records.tolist()):
        assert np.array_equal(out[0, i], keys[head, chunk * 16 : chunk * 16 + 16])
        assert np.array_equal(out[1, i], values[head, chunk * 16 : chunk * 16 + 16])
    assert reader.bytes_read == 4 * 2 * 16 * 80 * 2


def test_padding_of_the_last_chunk_is_zeros(segment: Segment, reader: Reader) -> None:
    out = np.full((2, 1, 16, 24), 7, "<f2")
    reader.read(segment, 1, np.array([3]), out)
    assert not out[:, :, 2:].any()
    assert out[:, :, :2].any()


def test_no_records_cost_nothing(segment: Segment, reader: Reader) -> None:
    reader.read(segment, 0, np.empty(0, np.int64), np.empty((2, 0, 16, 80), "<f2"))
    assert reader.bytes_read == 0


@pytest.mark.parametrize("record", [-1, 4 * 5, 10**9])
def test_a_record_outside_the_segment_is_refused(segment: Segment, reader: Reader, record: int) -> None:
    with pytest.raises(InvalidInput, match=r"records .*expected 0\.\.19"):
        reader.read(segment, 0, np.array([record]), np.empty((2, 1, 16, 80), "<f2"))


def test_a_layer_without_kv_is_refused(segment: Segment, reader: Reader) -> None:
    with pytest.raises(InvalidInput, match="layer 2: not stored"):
        reader.read(segment, 2, np.array([0]), np.empty((2, 1, 16, 80), "<f2"))


def test_the_box_of_each_record_is_its_least_and_greatest_key(segment: Segment, reader: Reader) -> None:
    for layer, (keys, _) in model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact").items():
        box = reader.abstract(segment, "box", layer)
        exact = as_float32(keys, "float16")
        for chunk in range(4):
            part = exact[:, chunk * 16 : chunk * 16 + 16]
            assert np.array_equal(box[chunk, :, 0], part.min(axis=1))
            assert np.array_equal(box[chunk, :, 1], part.max(axis=1))


@pytest.mark.parametrize("group", [0, 1])
def test_a_missing_shard_is_damage_and_names_segment_layer_and_file(
    segment: Segment, reader: Reader, group: int
) -> None:
    shard(segment, group).unlink()
    with pytest.raises(Damaged, match=rf"segment {segment.info.segment}, layer {group}, file {shard(segment, group)}"):
        reader.open(segment)


@pytest.mark.parametrize(("kept", "layer"), [(0.0, 0), (0.4, 0), (0.6, 3)])
def test_a_truncated_shard_is_damage_and_names_the_first_layer_cut(
    segment: Segment, reader: Reader, kept: float, layer: int
) -> None:
    path = shard(segment, 0)
    size = int(layout(segment.info, 0).payload_bytes * kept)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Damaged, match=rf"layer {layer}, file {path}: {size} bytes"):
        reader.read(segment, 0, np.array([0]), np.empty((2, 1, 16, 80), "<f2"))


def test_an_abstract_that_is_missing_or_short_is_damage(segment: Segment, reader: Reader) -> None:
    path = segment.folder / f"{segment.info.segment}.box0" / "c.0.0.0.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match="layer 3, box abstract"):
        reader.abstract(segment, "box", 3)
    reader.close()
    path.unlink()
    with pytest.raises(Damaged, match="expected its box abstract"):
        reader.abstract(segment, "box", 0)


def test_an_open_reader_keeps_its_bytes_when_the_sequence_is_deleted(tmp_path: Path, reader: Reader) -> None:
    with KVDB.open(tmp_path / "s") as db:
        stored = extend(db, TOKENS, geometry=TWO_GROUPS)
        reader.open(stored.last)
        db.delete(stored.key)
        assert not shard(stored.last, 0).exists()
        for layer, (keys, _) in model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact").items():
            assert np.array_equal(read_kv(reader, stored.last, layer, 50)[0], keys)
        reader.forget(stored.last.info.segment)
        with pytest.raises(Damaged):
            reader.open(stored.last)
        assert_healthy(db)


def test_asking_again_what_is_cached_changes_no_byte(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MmapReader, "LOOK_AGAIN_AFTER", 2)
    reader = MmapReader()
    for _ in range(5):
        keys = read_kv(reader, segment, 0, 50)[0]
        assert np.array_equal(keys, model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact")[0][0])
    reader.close()
