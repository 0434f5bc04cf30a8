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
from kvdb.reader import Reader, Wanted
from kvdb.readers import READERS

every_reader = pytest.mark.parametrize("kind", READERS.values(), ids=READERS)


def lent(reader: Reader, layer: int, wanted: list[Wanted]) -> Array:
    """What `lend` gives, part by part, put together again: (n, numbers of a record)."""
    parts = [(stored[which], of) for stored, which, of in reader.lend(layer, wanted)]
    places = np.concatenate([np.empty(0, np.int64), *(of for _, of in parts)])
    assert all((np.diff(of) > 0).all() for _, of in parts)
    assert sorted(places.tolist()) == list(range(sum(len(records) for _, records in wanted)))
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
            soon = np.array(data.draw(st.lists(st.integers(0, last), max_size=8)), np.int64)
            reader.expect(layer, [Wanted(segment, soon)])
            assert lent(reader, layer, [Wanted(segment, records)]).tobytes() == out.swapaxes(0, 1).tobytes()
            asked += 2 * len(records) * geometry.record_bytes(geometry.locate(layer)[0])
        assert reader.bytes_read == asked
        reader.close()


@every_reader
@given(data=st.data())
def test_records_of_several_segments_are_lent_together(
    kind: type[Reader], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """In any order, whatever is there already; the last segment is still being written."""
    ids, folder = token_list(150), tmp_path_factory.mktemp("several")
    skip_where_refused(kind, folder)
    with opened(folder / "s") as db:
        extend(db, ids[:128], geometry=TWO_GROUPS, segment_tokens=48, name="s")
        writer = write_segment(db, token_list(40, 1), geometry=TWO_GROUPS)
        segments = [*db.segments(db.sequence("s").spans), writer.segment]
        reader, alone = kind(), kind()
        for _ in range(3):
            layer = data.draw(st.sampled_from([0, 3]))
            wanted = []
            for segment in data.draw(st.lists(st.sampled_from(segments), unique_by=id)):
                last = segment.info.chunks * TWO_GROUPS.groups[TWO_GROUPS.locate(layer)[0]].kv_heads - 1
                records = data.draw(st.lists(st.integers(0, last), max_size=8))
                wanted.append(Wanted(segment, np.array(records, np.int64)))
            if data.draw(st.booleans()):
                reader.expect(layer, wanted)
            expected = b"".join(alone.rows(segment, layer, records).tobytes() for segment, records in wanted)
            assert lent(reader, layer, wanted).tobytes() == expected
        reader.close()
        alone.close()
        db.commit(writer, token_list(40, 1))


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
