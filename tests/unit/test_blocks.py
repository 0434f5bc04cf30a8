"""Rows compressed in blocks: what is read is what was stored, in bounded memory, and what is damaged or made up is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import pytest
from helpers import (
    TWO_GROUPS,
    Array,
    assert_abstracts_follow,
    assert_healthy,
    assert_reads_back,
    extend,
    flip,
    identity,
    model_kv,
    opened,
    read_kv,
    token_list,
    write_segment,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb import KVDB, Geometry, LayerGroup
from kvdb.blocks import Unpacked
from kvdb.codecs import BlockForm, Blosc, CodecPlan, RecordCodec
from kvdb.errors import Damaged, InvalidInput, OutOfMemory
from kvdb.format import SegmentInfo
from kvdb.geometry import STORAGE_DTYPES
from kvdb.readers import READERS
from kvdb.repair import repair
from kvdb.segments import Segment, codecs_of, layout, reserved_bytes

TOKENS = token_list(200)
SMALL_BLOCKS = CodecPlan.parse("blosc:tokens=48")
every_codec = pytest.mark.parametrize("codec", ["blosc", "blosc:tokens=48", "blosc:clevel=5,tokens=16", "raw;1=blosc"])
every_reader = pytest.mark.parametrize("kind", READERS.values(), ids=READERS)


def forms() -> st.SearchStrategy[BlockForm]:
    return st.builds(
        BlockForm,
        chunks=st.integers(1, 5),
        kv_heads=st.integers(1, 3),
        chunk_tokens=st.integers(1, 9),
        head_dim=st.integers(1, 9),
        dtype=st.sampled_from([*STORAGE_DTYPES]),
    )


def some_numbers(form: BlockForm, seed: int) -> Array:
    values = np.random.default_rng(seed).integers(0, 256, form.nbytes, np.uint8)
    return values.view(form.storage_dtype).reshape(form.shape)


@given(form=forms(), data=st.data())
def test_a_block_is_its_records_by_head(form: BlockForm, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, form.records))
    row = form.nbytes // form.records
    rows = np.random.default_rng(0).integers(0, 256, (count, row), np.uint8)
    numbers = form.numbers(rows)
    for record, stored in enumerate(rows):
        chunk, head = divmod(record, form.kv_heads)
        own = numbers[head, :, chunk * form.chunk_tokens : (chunk + 1) * form.chunk_tokens]
        assert own.tobytes() == stored.tobytes()
    assert not form.rows(numbers)[count:].any()
    assert np.array_equal(form.rows(numbers)[:count], rows)


@given(form=forms(), seed=st.integers(0, 99), clevel=st.integers(1, 9), repeated=st.booleans())
def test_any_bit_pattern_comes_back(form: BlockForm, seed: int, clevel: int, repeated: bool) -> None:
    numbers = some_numbers(form, seed)
    if repeated:
        numbers[...] = numbers.flat[0]
    packed, out = Blosc(clevel).pack(numbers), np.empty_like(numbers)
    assert len(packed) <= form.most_stored
    Blosc().unpack(packed, out)
    assert out.tobytes() == numbers.tobytes()


def test_a_block_that_was_packed_once_unpacks_for_ever() -> None:
    known = json.loads((Path(__file__).parents[1] / "golden" / "blosc_blocks.json").read_text())
    assert {entry["dtype"] for entry in known} == {*STORAGE_DTYPES}
    for entry in known:
        out = np.empty(entry["shape"], STORAGE_DTYPES[entry["dtype"]])
        Blosc().unpack(bytes.fromhex(entry["block"]), out)
        assert out.tobytes().hex() == entry["decoded"]


def resealed(packed: bytes) -> bytes:
    return packed + struct.pack("<I", google_crc32c.value(packed))


def test_what_no_writer_made_is_refused_before_it_is_decoded() -> None:
    form = BlockForm(4, 2, 16, 8, "float16")
    numbers = np.zeros(form.shape, form.storage_dtype)
    block = Blosc().pack(numbers)
    packed = block[:-4]
    bomb = packed[:4] + struct.pack("<I", (1 << 31) - 1) + packed[8:]
    another = bytes([*packed[:2], packed[2] & 0x1F, *packed[3:]])
    for wrong in (b"", block[:3], block[:-1], block[1:], packed + b"\0\0\0\0", resealed(packed[:-1]), resealed(bomb),
                  resealed(another), resealed(packed[:3] + b"\4" + packed[4:]), resealed(packed[:12])):  # fmt: skip
        out = np.ones_like(numbers)
        with pytest.raises(InvalidInput, match="codec blosc"):
            Blosc().unpack(wrong, out)
        assert (out == 1).all()


@given(seed=st.integers(0, 10_000))
def test_a_block_with_a_right_checksum_and_wrong_bytes_never_leaves_its_place(seed: int) -> None:
    form, rng = BlockForm(4, 2, 16, 8, "float16"), np.random.default_rng(seed)
    numbers = (rng.normal(size=form.shape) * 4).astype("<f2")
    packed = bytearray(Blosc().pack(numbers)[:-4])
    for at in rng.integers(16, len(packed), 4):
        packed[at] = rng.integers(256)
    room = np.full(form.nbytes + 128, 0xAB, np.uint8)
    out = room[64:-64].view("<f2").reshape(form.shape)
    with contextlib.suppress(InvalidInput):
        Blosc().unpack(resealed(bytes(packed)), out)
    assert (room[:64] == 0xAB).all()
    assert (room[-64:] == 0xAB).all()


@every_reader
@every_codec
@settings(max_examples=10)
@given(tokens=st.integers(1, 150), spare=st.integers(0, 5), data=st.data())
def test_any_records_in_any_order_are_read_bit_for_bit(
    kind: Any, codec: str, tmp_path_factory: pytest.TempPathFactory, tokens: int, spare: int, data: st.DataObject
) -> None:
    ids, geometry = token_list(tokens), TWO_GROUPS
    step = data.draw(st.sampled_from([16, 32, 80, 160]))
    with opened(tmp_path_factory.mktemp("any") / "s") as db:
        plan = CodecPlan.parse(codec)
        writer = write_segment(db, ids, geometry=geometry, codec=plan, spare=spare, append_tokens=step)
        segment, reader = db.commit(writer, ids).segment, kind("always")
        reader._unpacked = Unpacked(data.draw(st.sampled_from([0, 20_000, 1 << 30])))
        for layer, kv in model_kv(geometry, ids, 0, tokens, salt="exact").items():
            group = geometry.groups[geometry.locate(layer)[0]]
            last = geometry.chunks(tokens) * group.kv_heads - 1
            for _ in range(2):
                records = np.array(data.draw(st.lists(st.integers(0, last), max_size=8)), np.int64)
                out = np.empty((2, len(records), 16, group.head_dim), geometry.storage_dtype)
                reader.read(segment, layer, records, out)
                for plane, values in zip(out, kv, strict=True):
                    for found, record in zip(plane, records.tolist(), strict=True):
                        chunk, head = divmod(record, group.kv_heads)
                        wanted = values[head, chunk * 16 : chunk * 16 + 16]
                        assert found[: len(wanted)].tobytes() == wanted.tobytes()
        reader.close()
        assert db.check() == []


def test_memory_is_bounded_by_what_one_read_needs(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, TOKENS, name="n", geometry=TWO_GROUPS)
        db.recode("n", SMALL_BLOCKS)
        (segment,) = db.segments(db.sequence("n").spans)
        reader = db.reader()
        reader._unpacked = Unpacked(100_000)
        expected = model_kv(TWO_GROUPS, TOKENS, 0, 200, salt="exact")
        for _ in range(3):
            for layer, (keys, values) in expected.items():
                for chunk in range(12):
                    group = TWO_GROUPS.groups[TWO_GROUPS.locate(layer)[0]]
                    records = np.arange(chunk * group.kv_heads, (chunk + 1) * group.kv_heads)
                    out = np.empty((2, group.kv_heads, 16, group.head_dim), TWO_GROUPS.storage_dtype)
                    reader.read(segment, layer, records, out)
                    assert np.array_equal(out[0], keys[:, chunk * 16 : chunk * 16 + 16])
                    assert np.array_equal(out[1], values[:, chunk * 16 : chunk * 16 + 16])
                    assert reader.unpacked_bytes <= 100_000
        reader.close()
        assert (reader.unpacked_bytes, len(reader._unpacked._held)) == (0, 0)


@every_codec
def test_a_sequence_stored_anew_is_what_it_was_and_goes_back(tmp_path: Path, codec: str) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, TOKENS, name="n", geometry=TWO_GROUPS, segment_tokens=64, abstracts=("box", "sketch"))
        before = db.sequence("n")
        assert db.recode("n", CodecPlan.parse(codec)) == 4
        assert db.recode("n", CodecPlan.parse(codec)) == 0
        after = db.sequence("n")
        assert (after.fidelity, after.tokens, after.created) == ("exact", 200, before.created)
        assert_reads_back(db, TOKENS, after.spans)
        assert db.match(identity(), TOKENS).tokens == 200
        reader = db.reader()
        for segment in db.segments(after.spans):
            assert_abstracts_follow(reader, segment)
            for group in range(2):
                file = segment.folder / f"{segment.info.segment}.kv{group}" / "c.0.0.0.0.0"
                assert file.stat().st_size == layout(segment.info, group).file_bytes
        reader.close()
        assert_healthy(db)
        assert db.recode("n", CodecPlan.parse("raw")) == 4
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        assert_healthy(db)


def test_from_one_lossy_codec_and_to_it(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, TOKENS, name="n", geometry=TWO_GROUPS)
        db.recode("n", SMALL_BLOCKS)
        db.recode("n", CodecPlan.parse("int8;1=blosc"))
        assert db.sequence("n").fidelity == "int8;1=blosc"
        reader = db.reader()
        for segment in db.segments(db.sequence("n").spans):
            keys, _ = read_kv(reader, segment, 1, segment.info.tokens)
            wanted = model_kv(TWO_GROUPS, TOKENS, segment.info.start, segment.info.stop, salt="exact")[1][0]
            assert np.array_equal(keys, wanted)
        reader.close()
        assert_healthy(db)


def test_turns_after_it_are_stored_as_they_are_and_merge_among_themselves(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        extend(db, TOKENS[:100], name="n", geometry=TWO_GROUPS)
        db.recode("n", SMALL_BLOCKS)
        extend(db, TOKENS, name="n", geometry=TWO_GROUPS, segment_tokens=48)
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        kinds = [codecs_of(s.info)[0] == SMALL_BLOCKS.usual for s in db.segments(db.sequence("n").spans)]
        assert kinds == [True, False, False, False]
        db.compact("n")
        db.recode("n", SMALL_BLOCKS)
        before = len(db.sequence("n").spans)
        assert db.compact("n") > 0  # pieces that are no whole blocks
        assert len(db.sequence("n").spans) < before
        assert_reads_back(db, TOKENS, db.sequence("n").spans)
        assert_healthy(db)


def test_a_run_that_is_cut_short_keeps_what_every_layer_has(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = write_segment(db, TOKENS, geometry=TWO_GROUPS, codec=SMALL_BLOCKS, append_tokens=16)
        writer.keep(80)
        last = db.commit(writer, TOKENS[:80]).segment
        db.put_sequence(last, 80, name="n")
        assert_reads_back(db, TOKENS[:80], db.sequence("n").spans)
        assert_healthy(db)


def test_room_is_reserved_for_what_does_not_shrink(tmp_path: Path) -> None:
    geometry = Geometry(dtype="float32", chunk_tokens=16, groups=(LayerGroup(layers=(0, 1), kv_heads=2, head_dim=64),))
    with opened(tmp_path / "s") as db:
        rng = np.random.default_rng(0)
        plan = CodecPlan.parse("blosc")
        writer = db.writer(
            identity=identity(), fidelity="exact", geometry=geometry, parent=None, start=0, capacity=64, codec=plan
        )
        kv = rng.integers(0, 256, (2, 2, 1000, 64, 4), np.uint8).view("<f4")[..., 0]
        for layer in (0, 1):
            writer.append(layer, kv[0], kv[1])
        entry = writer.seal(TOKENS.repeat(5))
        assert entry.disk_bytes <= reserved_bytes(geometry, (plan.usual,), ("box",), 64)
        writer.discard()


class Case:
    """A store of a good sequence and one whose blocks are tampered with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with opened(root) as db:
            extend(db, token_list(90, 7), name="good", geometry=TWO_GROUPS)
            extend(db, TOKENS, name="bad", geometry=TWO_GROUPS)
            db.recode("bad", SMALL_BLOCKS)
            db.recode("good", SMALL_BLOCKS)
            self.segment: Segment = db.segments(db.sequence("bad").spans)[0]
        self.file = root / "chunks" / f"{self.segment.info.segment}.kv0" / "c.0.0.0.0.0"

    @property
    def info(self) -> SegmentInfo:
        return self.segment.info

    def read(self, db: KVDB) -> None:
        reader = db.reader()
        try:
            for layer in self.info.geometry.groups[0].layers:
                read_kv(reader, self.segment, layer, 200)
        finally:
            reader.close()


def a_flipped_bit(case: Case) -> None:
    flip(case.file, 100)


def a_flipped_index(case: Case) -> None:
    flip(case.file, layout(case.info, 0).index_offset + 3)


def a_cut_file(case: Case) -> None:
    data = case.file.read_bytes()
    case.file.write_bytes(data[:-1])


def other_bytes_with_right_checksums(case: Case) -> None:
    place = layout(case.info, 0)
    data = bytearray(case.file.read_bytes())
    offset, size = struct.unpack_from("<QQ", data, place.index_offset)
    form = BlockForm.of(TWO_GROUPS, 0, case.info.capacity, 48)
    block = np.empty(form.shape, form.storage_dtype)
    Blosc(tokens=48).unpack(bytes(data[offset : offset + size]), block)
    for step in range(1, 1 << 12):
        block[0, 0, 0, 0] = step
        packed = Blosc(tokens=48).pack(block)
        if len(packed) == size:
            data[offset : offset + size] = packed
            case.file.write_bytes(data)
            return
    raise AssertionError("no block of that size")


def an_index_that_leads_elsewhere(case: Case) -> None:
    place = layout(case.info, 0)
    data = bytearray(case.file.read_bytes())
    struct.pack_into("<QQ", data, place.index_offset, (1 << 64) - 8, 64)
    body = bytes(data[place.index_offset : -4])
    data[-4:] = struct.pack("<I", google_crc32c.value(body))
    case.file.write_bytes(data)


def exchanged_blocks(case: Case) -> None:
    place = layout(case.info, 0)
    data = bytearray(case.file.read_bytes())
    one, other = data[place.index_offset : place.index_offset + 16], data[place.index_offset + 16 :][:16]
    data[place.index_offset : place.index_offset + 32] = other + one
    data[-4:] = struct.pack("<I", google_crc32c.value(bytes(data[place.index_offset : -4])))
    case.file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [a_flipped_bit, a_flipped_index, a_cut_file, other_bytes_with_right_checksums, an_index_that_leads_elsewhere,
     exchanged_blocks],
)  # fmt: skip
def test_damage_is_told_and_mended_and_others_are_served(tmp_path: Path, damage: Any) -> None:
    case = Case(tmp_path / "s")
    damage(case)
    with KVDB.open(case.root) as db:
        with pytest.raises(Damaged, match=case.info.segment):
            case.read(db)
        assert_reads_back(db, token_list(90, 7), db.sequence("good").spans)
        assert {p.kind for p in db.check()} <= {"record", "index", "size"}
        assert {p.segment for p in db.check()} == {case.info.segment}
    repair(case.root, apply=True)
    with opened(case.root) as db:
        assert [s.name for s in db.sequences() if s.tokens] == ["good"]
        assert_reads_back(db, token_list(90, 7), db.sequence("good").spans)
        assert_healthy(db)


@pytest.mark.parametrize("packed", [(), (1,), (0, 10), (1 << 60, 10), (-5, 10), (10, 10, 10)])
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, packed: tuple[int, ...]) -> None:
    case = Case(tmp_path / "s")
    with pytest.raises(Damaged, match="packed is"):
        codecs_of(msgspec.structs.replace(case.info, packed=packed))


def test_blocks_beyond_what_a_container_holds_are_refused(tmp_path: Path) -> None:
    wide = Geometry(
        dtype="float32", chunk_tokens=16, groups=(LayerGroup(layers=(0,), kv_heads=1 << 10, head_dim=1 << 10),)
    )
    with opened(tmp_path / "s") as db, pytest.raises(InvalidInput, match="take fewer tokens"):
        db.writer(
            identity=identity(),
            fidelity="exact",
            geometry=wide,
            parent=None,
            start=0,
            capacity=64,
            codec=CodecPlan.parse("blosc"),
        )


def test_rows_that_lost_something_are_not_compressed() -> None:
    int4 = RecordCodec.parse("int4")
    with pytest.raises(InvalidInput, match="expected rows of raw"):
        RecordCodec(int4.key, int4.value, Blosc())
    for config in ({"clevel": 0}, {"clevel": 10}, {"tokens": 0}, {"tokens": 1 << 20}, {"clevel": True}):
        with pytest.raises(InvalidInput, match="codec blosc"):
            Blosc(**config)


def test_what_is_exported_is_imported(tmp_path: Path) -> None:
    case = Case(tmp_path / "s")
    with opened(case.root) as db:
        db.export_sequence("bad", tmp_path / "bad.zip")
        size = (tmp_path / "bad.zip").stat().st_size
    with opened(tmp_path / "other") as db:
        db.import_sequence(tmp_path / "bad.zip")
        assert_reads_back(db, TOKENS, db.sequence("bad").spans)
        assert codecs_of(db.segments(db.sequence("bad").spans)[0].info) == (SMALL_BLOCKS.usual,) * 2
    data = bytearray((tmp_path / "bad.zip").read_bytes())
    data[data.index(b"\x02\x01") + 40] ^= 1  # inside the first block
    (tmp_path / "bad.zip").write_bytes(data)
    assert len(data) == size
    with opened(tmp_path / "third") as db:
        with pytest.raises(Damaged):
            db.import_sequence(tmp_path / "bad.zip")
        assert db.sequences() == []


def test_a_catalog_made_anew_knows_its_blocks(tmp_path: Path) -> None:
    case = Case(tmp_path / "s")
    for file in (case.root / "catalog").iterdir():
        file.unlink()
    repair(case.root, apply=True, rebuild=True)
    with opened(case.root) as db:
        assert_reads_back(db, TOKENS, db.sequence("bad").spans)
        assert_healthy(db)


def test_want_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library fails alike for both; so it is not called where it could not work."""
    case = Case(tmp_path / "s")
    before = case.file.read_bytes()
    with monkeypatch.context() as small:
        small.setattr("kvdb.codecs.blosc._WORKSPACE", 1 << 60)
        with KVDB.open(case.root) as db:
            with pytest.raises(OutOfMemory):
                case.read(db)
            with pytest.raises(OutOfMemory):
                db.check()
            with pytest.raises(OutOfMemory):
                db.recode("good", CodecPlan.parse("blosc"))
        for rebuild in (False, True):
            with pytest.raises(OutOfMemory):
                repair(case.root, apply=True, rebuild=rebuild)
    assert case.file.read_bytes() == before
    with opened(case.root) as db:
        assert_reads_back(db, TOKENS, db.sequence("bad").spans)
        assert_reads_back(db, token_list(90, 7), db.sequence("good").spans)
