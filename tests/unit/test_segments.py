"""The segment writer: order of layers is free, order of tokens is not, nothing is half there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers import (
    SMALL,
    TWO_GROUPS,
    Array,
    assert_healthy,
    assert_reads_back,
    extend,
    identity,
    model_kv,
    opened,
    read_kv,
    token_list,
    write_segment,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries

from kvdb import KVDB, Geometry, LayerGroup
from kvdb.abstracts import ABSTRACTS
from kvdb.codecs import RAW, CodecPlan
from kvdb.errors import Damaged, InvalidInput, Unsupported
from kvdb.format import CodecSpec
from kvdb.segments import SegmentWriter, codecs_of, new_segment_id, reserved_bytes


def writer_of(db: KVDB, geometry: Geometry = SMALL, capacity: int = 4, **changes: object) -> SegmentWriter:
    fields = {"identity": identity(), "fidelity": "exact", "parent": None, "start": 0} | changes
    return db.writer(geometry=geometry, capacity=capacity, **fields)  # type: ignore[arg-type]


def zeros(geometry: Geometry, tokens: int, group: int = 0) -> Array:
    g = geometry.groups[group]
    return np.zeros((g.kv_heads, tokens, g.head_dim), geometry.storage_dtype)


def test_what_is_appended_can_be_read_before_it_is_sealed(tmp_path: Path) -> None:
    tokens = token_list(48)
    kv = model_kv(TWO_GROUPS, tokens, 0, 48)
    with opened(tmp_path / "s") as db:
        writer, reader = writer_of(db, TWO_GROUPS), db.reader()
        for start, stop in ((0, 16), (16, 48)):
            for layer in (3, 1, 0):
                keys, values = kv[layer]
                writer.append(layer, keys[:, start:stop], values[:, start:stop])
                found = read_kv(reader, writer.segment, layer, stop)
                assert np.array_equal(found[0], keys[:, :stop])
                assert np.array_equal(found[1], values[:, :stop])
        reader.close()
        writer.discard()


@given(geometries(chunk_tokens=None, max_layers=3), st.data())
def test_the_way_tokens_are_cut_into_appends_does_not_show(
    tmp_path_factory: pytest.TempPathFactory, geometry: Geometry, data: st.DataObject
) -> None:
    tokens = data.draw(st.integers(1, 3 * geometry.chunk_tokens))
    kv = model_kv(geometry, token_list(tokens), 0, tokens)
    with KVDB.open(tmp_path_factory.mktemp("cut") / "s") as db:
        writer = writer_of(db, geometry, 3)
        for layer, (keys, values) in kv.items():
            at = 0
            while at < tokens:
                stop = at + geometry.chunk_tokens * data.draw(st.integers(1, 3))
                writer.append(layer, keys[:, at:stop], values[:, at:stop])
                at = stop
        segment, reader = db.commit(writer, token_list(tokens)).segment, db.reader()
        for layer, (keys, values) in kv.items():
            found = read_kv(reader, segment, layer, tokens)
            assert np.array_equal(found[0], keys)
            assert np.array_equal(found[1], values)
        reader.close()
        db.put_sequence(segment, tokens, name=None, model="")
        assert_healthy(db)


@pytest.mark.parametrize(
    ("keys", "values"),
    [((2, 16, 8), (2, 16, 9)), ((1, 16, 8), (1, 16, 8)), ((2, 0, 8), (2, 0, 8)), ((2, 16, 8), (2, 15, 8))],
)
def test_a_wrong_shape_is_refused(tmp_path: Path, keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    with opened(tmp_path / "s") as db:
        writer = writer_of(db)
        with pytest.raises(InvalidInput, match=r"layer 0: keys \("):
            writer.append(0, np.zeros(keys, "<u2"), np.zeros(values, "<u2"))
        writer.discard()


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i8"])
def test_a_wrong_dtype_is_refused_rather_than_cast(tmp_path: Path, dtype: str) -> None:
    with opened(tmp_path / "s") as db:
        writer = writer_of(db)
        with pytest.raises(InvalidInput, match=r"layer 0: .*uint16"):
            writer.append(0, np.ones((2, 16, 8), dtype), np.ones((2, 16, 8), dtype))
        writer.discard()


def test_nothing_follows_an_append_that_ended_inside_a_chunk(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = writer_of(db)
        writer.append(0, zeros(SMALL, 17), zeros(SMALL, 17))
        with pytest.raises(InvalidInput, match="whole number of chunks"):
            writer.append(0, zeros(SMALL, 1), zeros(SMALL, 1))
        writer.discard()


def test_no_more_is_taken_than_was_reserved(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = writer_of(db, capacity=2)
        with pytest.raises(InvalidInput, match="at most 32"):
            writer.append(0, zeros(SMALL, 33), zeros(SMALL, 33))
        writer.append(0, zeros(SMALL, 32), zeros(SMALL, 32))
        writer.discard()


def test_a_lagging_layer_is_not_sealed(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = writer_of(db)
        writer.append(0, zeros(SMALL, 16), zeros(SMALL, 16))
        with pytest.raises(InvalidInput, match=r"layers hold \[0, 16\] tokens, expected 16"):
            db.commit(writer, token_list(16))
        assert db.match(identity(), token_list(16)).tokens == 0


@pytest.mark.parametrize("change", [{"start": 8}, {"capacity": 0}, {"capacity": 1025}])
def test_a_segment_off_the_grid_or_too_long_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with opened(tmp_path / "s") as db:
        with pytest.raises(InvalidInput, match="on the grid"):
            writer_of(db, **change)
        assert list((tmp_path / "s" / "chunks").iterdir()) == [tmp_path / "s" / "chunks" / "zarr.json"]


def test_a_discarded_writer_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = writer_of(db, TWO_GROUPS)
        writer.append(1, zeros(TWO_GROUPS, 16, 1), zeros(TWO_GROUPS, 16, 1))
        writer.discard()
        writer.discard()
        assert [p.name for p in writer.folder.iterdir()] == ["lock"]


def test_segment_names_are_128_random_bits() -> None:
    names = {new_segment_id() for _ in range(100)}
    assert len(names) == 100
    assert {len(bytes.fromhex(name)) for name in names} == {16}


def test_a_sealed_segment_can_be_given_another_parent(tmp_path: Path) -> None:
    tokens = token_list(48)
    with opened(tmp_path / "s") as db:
        parent = extend(db, tokens[:32]).last.info.segment
        writer = write_segment(db, tokens, start=32, parent=new_segment_id())
        writer.seal(tokens[32:])
        writer.reparent(parent)
        writer.publish(tmp_path / "s" / "chunks")
        assert writer.entry is not None
        with db.write_transaction() as txn:
            txn.add_segment(writer.entry, identity(), tokens[32:])
            txn.record(writer.entry.info, 48)
        assert_reads_back(db, tokens, db.match(identity(), tokens).spans)


def test_a_segment_of_a_cipher_or_codec_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        info = extend(db, token_list(16)).last.info
    unknown = {"cipher": "rot13", "codec": CodecSpec(name="zip"), "abstracts": ("median",)}
    for field, value in unknown.items():
        with pytest.raises(Unsupported, match="upgrade kvdb"):
            codecs_of(msgspec.structs.replace(info, **{field: value}))


WRONG_SPECS: list[Any] = [
    {},
    {"groups": []},
    {"groups": [None]},
    {"groups": "int4"},
    {"groups": [{"key": {"name": "raw", "config": {}}}]},
    {"groups": [{"key": {"name": "int4", "config": {"axis": 7}}, "value": {"name": "raw", "config": {}}}]},
    {"groups": [{"key": {"name": "zip", "config": {}}, "value": {"name": "raw", "config": {}}}]},
    {"groups": [RAW.usual.spec()] * 2},
    {"groups": [RAW.usual.spec()], "more": 1},
]


@pytest.mark.parametrize("config", WRONG_SPECS, ids=str)
def test_codecs_that_no_version_writes_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with opened(tmp_path / "s") as db:
        info = extend(db, token_list(16)).last.info
    with pytest.raises((Unsupported, Damaged), match=info.segment):
        codecs_of(msgspec.structs.replace(info, codec=CodecSpec(name="groups", config=config)))


def test_a_segment_that_calls_a_lossy_codec_exact_is_not_believed(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        info = extend(db, token_list(16)).last.info
    spec = CodecSpec(name="groups", config={"groups": [CodecPlan.parse("int4").usual.spec()]})
    assert len(codecs_of(msgspec.structs.replace(info, codec=spec, fidelity="int4"))) == 1
    with pytest.raises(Damaged, match="fidelity 'exact' with a lossy codec"):
        codecs_of(msgspec.structs.replace(info, codec=spec))


def test_a_lossy_codec_is_never_exact(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "s") as db,
        pytest.raises(InvalidInput, match="fidelity 'exact' with codec int4, expected a lossless"),
    ):
        write_segment(db, token_list(16), codec=CodecPlan.parse("int4"))


MANY_LAYERS = Geometry(
    dtype="float16", chunk_tokens=16, groups=(LayerGroup(layers=tuple(range(300)), kv_heads=1, head_dim=1),)
)


@pytest.mark.parametrize("abstracts", [(), ("box",), ("sketch",), tuple(ABSTRACTS)])
@pytest.mark.parametrize("geometry", [TWO_GROUPS, MANY_LAYERS], ids=["two groups", "many layers"])
def test_a_writer_never_takes_more_room_than_it_reserved(
    tmp_path: Path, geometry: Geometry, abstracts: tuple[str, ...]
) -> None:
    with opened(tmp_path / "s") as db:
        for tokens in (1, 16, 33, 300):
            writer = write_segment(db, token_list(tokens), geometry=geometry, abstracts=abstracts)
            entry = writer.seal(token_list(tokens))
            assert (
                0
                < entry.disk_bytes
                <= reserved_bytes(geometry, (RAW.usual,) * len(geometry.groups), abstracts, geometry.chunks(tokens))
            )
            writer.discard()
