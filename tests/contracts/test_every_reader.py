"""What the contract of readers says, for every member: any records, any order, any odd shape, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import extend, identity, model_kv, opened, token_list
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries

from kvdb import Geometry, LayerGroup
from kvdb.codecs import CODECS, Raw
from kvdb.codecs.base import Array
from kvdb.reader import READERS, Reader

every_reader = pytest.mark.parametrize("kind", READERS.values(), ids=READERS)


class Turned(Raw):
    """A codec whose rows are not the records, so that readers must decode."""

    __slots__ = ()
    name = "turned"
    stored_as_is = False

    def encode(self, records: Array) -> Array:
        return ~Raw.encode(self, records)

    def decode(self, rows: Array, out: Array) -> None:
        Raw.decode(self, ~rows, out)


@every_reader
def test_a_reader_is_in_the_table_under_its_name(kind: type[Reader]) -> None:
    assert READERS[kind.name] is kind


@every_reader
@given(geometry=geometries(chunk_tokens=None, max_layers=3), tokens=st.integers(1, 70), data=st.data())
def test_any_records_in_any_order_are_read_bit_for_bit(
    kind: type[Reader],
    tmp_path_factory: pytest.TempPathFactory,
    geometry: Geometry,
    tokens: int,
    data: st.DataObject,
) -> None:
    ids = token_list(tokens)
    with opened(tmp_path_factory.mktemp("any") / "s") as db:
        segment = extend(db, ids, geometry=geometry, spare=1).last
        reader = kind()
        asked = 0
        for layer, kv in model_kv(geometry, ids, 0, tokens, salt="exact").items():
            group = geometry.groups[geometry.locate(layer)[0]]
            last = geometry.chunks(tokens) * group.kv_heads - 1
            records = np.array(data.draw(st.lists(st.integers(0, last), max_size=8)), np.int64)
            out = np.empty((2, len(records), geometry.chunk_tokens, group.head_dim), geometry.storage_dtype)
            reader.read(segment, layer, records, out)
            for plane, values in zip(out, kv, strict=True):
                for found, record in zip(plane, records.tolist(), strict=True):
                    chunk, head = divmod(record, group.kv_heads)
                    start = chunk * geometry.chunk_tokens
                    wanted = values[head, start : start + geometry.chunk_tokens]
                    assert found[: len(wanted)].tobytes() == wanted.tobytes()
            asked += len(records) * geometry.record_bytes(geometry.locate(layer)[0])
        assert reader.bytes_read == asked
        reader.close()


@every_reader
def test_rows_that_are_not_records_are_decoded(
    kind: type[Reader], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CODECS, "turned", Turned)
    geometry = Geometry(dtype="float16", chunk_tokens=16, groups=(LayerGroup(layers=(0,), kv_heads=2, head_dim=4),))
    ids = token_list(40)
    with opened(tmp_path_factory.mktemp("turned") / "s") as db:
        writer = db.writer(
            identity=identity(), fidelity="exact", geometry=geometry, parent=None, start=0, capacity=3, codec=Turned()
        )
        keys, values = model_kv(geometry, ids, 0, 40)[0]
        writer.append(0, keys, values)
        segment, reader = db.commit(writer, ids).segment, kind()
        db.put_sequence(segment, 40)
        out = np.empty((2, 1, 16, 4), "<f2")
        reader.read(segment, 0, np.array([5]), out)
        assert np.array_equal(out[0, 0, :8], keys[1, 32:])
        assert np.array_equal(out[1, 0, :8], values[1, 32:])
        reader.close()
