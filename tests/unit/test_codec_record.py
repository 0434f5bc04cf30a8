"""Two halves in a row: where they lie, how two codecs are written down, and what a stranger's description may not say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb.codecs import CODECS, Blosc, Codec, Int2, Int4, Int8, Planes, Raw, RecordCodec
from kvdb.errors import InvalidInput, Unsupported

INTEGERS = st.sampled_from([Int8, Int4, Int2])
HALVES = st.one_of(
    st.just(Raw()),
    INTEGERS.map(lambda kind: kind()),
    st.tuples(INTEGERS, st.none() | st.sampled_from([16, 64])).map(lambda made: made[0](axis="token", group=made[1])),
    st.integers(2, 8).map(Planes),
)
TEXTS = {
    "raw": RecordCodec(Raw(), Raw()),
    "int4": RecordCodec(Int4(), Int4(axis="token")),
    "int8": RecordCodec(Int8(), Int8(axis="token")),
    "planes": RecordCodec(Planes(bits=6), Int4(axis="token")),
    "planes:bits=4+int8": RecordCodec(Planes(bits=4), Int8(axis="token")),
    "raw+int2:group=16": RecordCodec(Raw(), Int2(axis="token", group=16)),
    "int4+int4:axis=channel": RecordCodec(Int4(), Int4()),
    "planes+planes": RecordCodec(Planes(), Planes()),
    "blosc": RecordCodec(Raw(), Raw(), Blosc()),
    "blosc:clevel=5,tokens=256": RecordCodec(Raw(), Raw(), Blosc(5, 256)),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_names_two_codecs(text: str) -> None:
    assert RecordCodec.parse(text) == TEXTS[text]
    assert str(TEXTS[text]) == text


@given(key=HALVES, value=HALVES)
def test_texts_and_descriptions_come_back(key: Codec, value: Codec) -> None:
    codec = RecordCodec(key, value)
    assert RecordCodec.parse(str(codec)) == codec
    assert RecordCodec.from_spec(json.loads(json.dumps(codec.spec()))) == codec


@pytest.mark.parametrize(
    "text",
    ["", "zip", "raw+", "raw+raw+raw", "raw:x=1", "planes:taken=4", "int4:bits=4", "blosc:cname=lz4", "blosc+raw"],
)
def test_an_unknown_name_is_not_supported(text: str) -> None:
    with pytest.raises(Unsupported, match="upgrade kvdb"):
        RecordCodec.parse(text)


@pytest.mark.parametrize(
    "text",
    ["planes:", "planes:bits", "planes:bits=", "planes:bits=9", "planes:bits=1", "planes:bits=-4", "planes:bits=4,bits=4",
     "planes:bits=" + "9" * 5000, "int4+int4:group=0", "int4:group=4", "int4:axis=both", "planes:=4", "planes:bits=４",
     "blosc:", "blosc:clevel=0", "blosc:tokens=0", "blosc:tokens=99999", "blosc:clevel=1,clevel=1"],
)  # fmt: skip
def test_a_wrong_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="codec"):
        RecordCodec.parse(text)


GOOD = RecordCodec.parse("planes+int4").spec()
PLAIN = RecordCodec.parse("raw").spec()


@pytest.mark.parametrize(
    "spec",
    [
        None, [], "raw", {}, {"key": GOOD["key"]}, {**GOOD, "key": None}, {**GOOD, "key": "raw"},
        {**GOOD, "key": {"name": "raw"}}, {**GOOD, "key": {"name": "raw", "config": None}},
        {**GOOD, "key": {"name": ["raw"], "config": {}}},
        {**GOOD, "key": {"name": "raw", "config": {1: 2}}}, {**GOOD, "key": {"name": "raw", "config": []}},
        *({**GOOD, "key": {"name": "planes", "config": {"bits": bits}}} for bits in (1, 9, -6, True, 6.0, "6", None, [6], 1 << 70)),
        *({**GOOD, "value": {"name": "int4", "config": {"axis": axis}}} for axis in ("row", None, 0, ["token"], {})),
        *({**GOOD, "value": {"name": "int4", "config": {"axis": "token", "group": group}}} for group in (0, -1, True, 1.5, "8", 1 << 40)),
        {**GOOD, "value": {"name": "int4", "config": {"axis": "channel", "group": 8}}},
        *({**PLAIN, "blocks": blocks} for blocks in (None, [], "blosc", {}, {"name": "blosc"}, {"name": 1, "config": {}})),
        *({**PLAIN, "blocks": {"name": "blosc", "config": {"clevel": level}}} for level in (0, 10, -1, True, 1.0, "1", None, 1 << 70)),
        *({**PLAIN, "blocks": {"name": "blosc", "config": {"tokens": tokens}}} for tokens in (0, 16_385, True, "64", None)),
    ],
    ids=str,
)  # fmt: skip
def test_a_strangers_description_is_refused(spec: object) -> None:
    with pytest.raises(InvalidInput, match="codec") as refused:
        RecordCodec.from_spec(spec)
    assert not isinstance(refused.value, Unsupported)


@pytest.mark.parametrize(
    "half", [{"name": "pickle", "config": {}}, {"name": "", "config": {}}, {"name": "raw", "config": {"x": 1}},
             {"name": "planes", "config": {"taken": 4}}, {"name": "__class__", "config": {}}]
)  # fmt: skip
def test_a_later_versions_codec_is_not_supported(half: object) -> None:
    with pytest.raises(Unsupported, match="upgrade kvdb"):
        RecordCodec.from_spec({**GOOD, "value": half})


@pytest.mark.parametrize(
    "spec",
    [{**PLAIN, "blocks": {"name": "zip", "config": {}}}, {**PLAIN, "blocks": {"name": "blosc", "config": {"cname": "lz4"}}},
     {**PLAIN, "more": {}}, {**GOOD, "key": {"name": "raw", "config": {}, "more": 1}}, {**GOOD, "blocks": {"name": "blosc", "config": {}}}],
    ids=str,
)  # fmt: skip
def test_what_a_later_version_may_add_is_not_supported(spec: object) -> None:
    with pytest.raises(Unsupported):
        RecordCodec.from_spec(spec)


@pytest.mark.parametrize("text", TEXTS)
def test_a_description_survives_json(text: str) -> None:
    assert RecordCodec.from_spec(json.loads(json.dumps(TEXTS[text].spec()))) == TEXTS[text]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@given(key=HALVES, value=HALVES)
def test_a_row_is_the_key_half_then_the_value_half(dtype: str, key: Codec, value: Codec) -> None:
    codec = RecordCodec(key, value)
    records = np.random.default_rng(0).normal(size=(4, 2, 16, 64)).astype(dtype)
    rows = codec.encode(records, dtype)
    assert rows.shape == (4, codec.row_bytes(16, 64, dtype))
    halves = [key.encode(records[:, 0], dtype), value.encode(records[:, 1], dtype)]
    assert rows.tobytes() == np.concatenate(halves, axis=1).tobytes()
    which, out = np.array([3, 0, 0, 2, 1]), np.empty((2, 5, 16, 64), dtype)
    codec.decode(rows, which, out, dtype)
    for half, own, found in zip(halves, (key, value), out, strict=True):
        expected = np.empty_like(found)
        own.decode(half, which, 0, expected, dtype)
        assert found.tobytes() == expected.tobytes()
    assert codec.stored_as_is == (records.tobytes() == rows.tobytes())
    assert not codec.stored_as_is or codec.lossless


def test_no_records_make_no_rows() -> None:
    for codec in TEXTS.values():
        rows = codec.encode(np.empty((0, 2, 16, 64), np.float32), "float32")
        assert rows.shape == (0, codec.row_bytes(16, 64, "float32"))
        codec.decode(rows, np.empty(0, np.int64), np.empty((2, 0, 16, 64), np.float32), "float32")


def test_other_arrays_are_refused() -> None:
    codec = TEXTS["planes"]
    records = np.zeros((3, 2, 16, 64), np.float32)
    rows, out = codec.encode(records, "float32"), np.zeros((2, 3, 16, 64), np.float32)
    for either in (codec, TEXTS["raw"]):
        for wrong in (records[0], records[:, :1], records.swapaxes(0, 1), records.astype(np.float16)):
            with pytest.raises(InvalidInput, match=f"codec {either}: records"):
                either.encode(wrong, "float32")
        for shape in ((3, 2, 0, 64), (3, 2, 16, 0)):
            with pytest.raises(InvalidInput, match="expected one or more of each"):
                either.encode(np.zeros(shape, np.float32), "float32")
    for wrong in (out[0], records, out[:, :, ::2]):
        with pytest.raises(InvalidInput, match="codec planes: out"):
            codec.decode(rows, np.arange(3), wrong, "float32")
    with pytest.raises(InvalidInput, match="codec int4: rows"):
        codec.decode(rows[:, 1:].copy(), np.arange(3), out, "float32")


def test_fewer_bits_are_asked_of_keys_that_have_them() -> None:
    assert TEXTS["planes"].at(4) == RecordCodec(Planes(bits=6).at(4), Int4(axis="token"))
    assert TEXTS["int4"].at(2) == TEXTS["int4"]
    assert TEXTS["planes"].at(4).spec() == TEXTS["planes"].spec()


@pytest.mark.parametrize(("text", "per_token"), [("raw", 23_040), ("int8", 12_960), ("int4", 7_200), ("int2", 4_320)])
def test_bytes_per_token_are_kivis_with_groups_of_32(text: str, per_token: int) -> None:
    """SmolLM2-135M: 30 layers of 3 KV heads of 64 channels; codes, and 2 + 2 bytes for each group of 32."""
    assert RecordCodec.parse(text).row_bytes(32, 64, "bfloat16") * 30 * 3 == per_token * 32


def test_six_bits_of_keys_and_four_of_values_are_less_than_two_fifths() -> None:
    codec = RecordCodec.parse("planes:bits=6+int4")
    assert codec.row_bytes(16, 64, "float16") <= 0.4 * RecordCodec.parse("raw").row_bytes(16, 64, "float16")


def test_every_codec_of_the_table_has_a_text() -> None:
    for name in CODECS:
        assert RecordCodec.parse(name).key.name == name
