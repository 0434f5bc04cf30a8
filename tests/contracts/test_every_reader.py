"""What the contract of readers says, for every member: any records, any order, any odd shape, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import TWO_GROUPS, Array, extend, model_kv, opened, skip_where_refused, token_list, write_segment
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries

from kvdb import Geometry
from kvdb.codecs import CodecPlan
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.segments import Segment

every_reader = pytest.mark.parametrize("kind", READERS.values(), ids=READERS)


def lent(reader: Reader, segment: Segment, layer: int, records: Array) -> Array:
    """What `lend` gives, part by part, put together again: (n, numbers of a record)."""
    parts = [
        (stored[which], np.arange(len(records)) if of is None else of)
        for stored, which, of in reader.lend(segment, layer, records)
    ]
    places = np.concatenate([np.empty(0, np.int64), *(of for _, of in parts)])
    assert sorted(places.tolist()) == list(range(len(records)))
    rows = np.concatenate([rows for rows, _ in parts]) if parts else np.empty((0, 0), np.uint8)
    return rows[np.argsort(places)]


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
    ids, folder = token_list(tokens), tmp_path_factory.mktemp("any")
    skip_where_refused(kind, folder)
    with opened(folder / "s") as db:
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
            reader.expect(segment, layer, np.array(data.draw(st.lists(st.integers(0, last), max_size=8)), np.int64))
            assert lent(reader, segment, layer, records).tobytes() == out.swapaxes(0, 1).tobytes()
            asked += 2 * len(records) * geometry.record_bytes(geometry.locate(layer)[0])
        assert reader.bytes_read == asked
        reader.close()


@every_reader
@pytest.mark.parametrize("codec", ["int8", "int2", "planes:bits=6+int4", "raw+int8", "int4;3=raw"])
@given(tokens=st.integers(1, 70), data=st.data())
def test_rows_that_are_not_records_are_decoded(
    kind: type[Reader], codec: str, tmp_path_factory: pytest.TempPathFactory, tokens: int, data: st.DataObject
) -> None:
    """As the codec itself decodes what it makes of the records; tokens that pad the last chunk count for nothing."""
    plan, ids, geometry = CodecPlan.parse(codec), token_list(tokens), TWO_GROUPS
    folder = tmp_path_factory.mktemp("coded")
    skip_where_refused(kind, folder)
    with opened(folder / "s") as db:
        writer = write_segment(db, ids, geometry=geometry, fidelity=codec, codec=plan, spare=1)
        segment, reader = db.commit(writer, ids).segment, kind("always")
        asked = 0
        for layer, kv in model_kv(geometry, ids, 0, tokens, salt=codec).items():
            g, of_layer = geometry.groups[geometry.locate(layer)[0]], plan.of(layer)
            chunks = geometry.chunks(tokens)
            padded = np.concatenate((kv, np.repeat(np.array(kv)[:, :, -1:], chunks * 16 - tokens, 2)), 2)
            by_record = padded.reshape(2, g.kv_heads, chunks, 16, g.head_dim).transpose(2, 1, 0, 3, 4)
            rows = of_layer.encode(by_record.reshape(-1, 2, 16, g.head_dim), geometry.dtype)
            records = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)), np.int64)
            expected, found = np.empty((2, 2, len(records), 16, g.head_dim), geometry.storage_dtype)
            of_layer.decode(rows, records, expected, geometry.dtype)
            reader.read(segment, layer, records, found)
            ends = records // g.kv_heads == chunks - 1
            real = np.ones((len(records), 16), bool)
            real[ends, (tokens - 1) % 16 + 1 :] = False
            assert np.array_equal(found[:, real].view(np.uint8), expected[:, real].view(np.uint8))
            given = np.empty((len(records), rows.shape[1]), np.uint8)
            assert reader.rows(segment, layer, records, given) is given
            assert np.array_equal(given, reader.rows(segment, layer, records))
            assert np.array_equal(given[~ends], rows[records[~ends]])
            asked += 3 * given.nbytes
        assert reader.bytes_read == asked
        reader.close()
