"""What the contract of codecs says, for every member of the table as it is for keys and for values, and for some parameters more.

The bound of a codec is exact arithmetic's; what is decoded is rounded to float32, and then to the KV dtype. For rounding to nearest,
|fl(x) - x| <= u |fl(x)| with u half a unit in the last place of 1, or half the least number where fl(x) is subnormal.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Array, seeds

import kvdb.codecs
from kvdb.codecs import CODECS, Codec, Int2, Int4, Planes, Raw
from kvdb.errors import InvalidInput, NotFinite
from kvdb.geometry import STORAGE_DTYPES, as_float32, from_float32

CASES = {
    repr(codec): codec
    for codec in (
        *(kind.of_keys() for kind in CODECS.values()),
        *(kind.of_values() for kind in CODECS.values()),
        Int4(axis="token", group=4),
        Int2(axis="token", group=1),
        *(Planes(bits=bits) for bits in (2, 4, 8)),
        Planes(bits=7).at(3),
    )
}
every_codec = pytest.mark.parametrize("codec", CASES.values(), ids=CASES)
lossless_codecs = pytest.mark.parametrize("codec", [c for c in CASES.values() if c.lossless], ids=repr)
codecs_as_is = pytest.mark.parametrize("codec", [c for c in CASES.values() if c.stored_as_is], ids=repr)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 7, 16, 17]), st.sampled_from([4, 8, 40, 64]))
UNIT = {"float32": (2.0**-24, 2.0**-150), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}
"""Rounding to nearest: relative to the result, and where that is subnormal."""


@st.composite
def vectors(draw: st.DrawFn, dtype: str) -> Array:
    """Halves whose numbers any codec can keep: noise, channels of any magnitude, small steps about zero, few distinct numbers, zeros of
    both signs. Shrinks to one token of noise."""
    shape = draw(shapes)
    rng = np.random.default_rng(draw(seeds()))
    kind = draw(st.sampled_from(["noise", "magnitudes", "steps", "few", "zeros"]))
    values = rng.normal(size=shape)
    if kind == "magnitudes":
        values *= 2.0 ** rng.integers(-30, 16, (shape[0], 1, shape[2]))
    elif kind == "steps":
        values = rng.integers(-9, 10, shape) * 2.0**-24
    elif kind == "few":
        values = rng.choice(rng.normal(size=2) * 1000, shape)
    elif kind == "zeros":
        values *= rng.integers(-1, 2, shape) * 0.0
    values = np.clip(values, -65280, 65280).astype(np.float32)
    return np.ascontiguousarray(from_float32(values, dtype))


def decoded(codec: Codec, rows: Array, like: Array, dtype: str) -> Array:
    out = np.full_like(like, 1)
    codec.decode(rows, np.arange(len(rows)), 0, out, dtype)
    return out


@pytest.mark.parametrize("kind", CODECS.values(), ids=CODECS)
def test_a_codec_is_in_the_table_under_its_name(kind: type[Codec]) -> None:
    assert CODECS[kind.name] is kind
    assert kind.lossless or not kind.stored_as_is
    assert kind.values_beside is None or kind.values_beside in CODECS


@every_codec
def test_the_representation_of_a_codec_rebuilds_it(codec: Codec) -> None:
    assert eval(repr(codec), vars(kvdb.codecs)) == codec


@every_codec
@every_dtype
def test_the_config_of_a_codec_rebuilds_what_is_stored(codec: Codec, dtype: str) -> None:
    again = type(codec)(**json.loads(json.dumps(codec.config())))
    values = from_float32(np.arange(-192, 192, dtype=np.float32).reshape(3, 16, 8), dtype)
    assert again.config() == codec.config()
    assert again.encode(values, dtype).tobytes() == codec.encode(values, dtype).tobytes()


@every_codec
@every_dtype
@given(data=st.data())
def test_rows_have_the_length_that_was_announced(codec: Codec, dtype: str, data: st.DataObject) -> None:
    values = data.draw(vectors(dtype))
    values, before = values[data.draw(st.sampled_from([slice(None), slice(0)]))], values.copy()
    rows = codec.encode(values, dtype)
    assert rows.dtype == np.uint8
    assert rows.shape == (len(values), codec.half_bytes(*values.shape[1:], dtype))
    assert values.tobytes() == before[: len(values)].tobytes()


@every_codec
@every_dtype
@given(data=st.data())
def test_what_comes_back_is_within_the_bound(codec: Codec, dtype: str, data: st.DataObject) -> None:
    values = data.draw(vectors(dtype))
    rows = codec.encode(values, dtype)
    found = as_float32(decoded(codec, rows, values, dtype), dtype).astype(np.float64)
    error = abs(found - as_float32(values, dtype).astype(np.float64))
    relative, least = UNIT[dtype]
    rounding = abs(found) * (relative + (0 if dtype == "float32" else 2.0**-23)) + least
    bound = codec.bound(rows, *values.shape[1:])
    assert bound.shape == values.shape
    assert np.all(error <= bound.astype(np.float64) + rounding)
    if codec.lossless:
        assert not bound.any()


@lossless_codecs
@every_dtype
@given(seed=seeds())
def test_a_lossless_codec_keeps_every_bit_pattern(codec: Codec, dtype: str, seed: int) -> None:
    storage = STORAGE_DTYPES[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, (3, 16, 8, storage.itemsize), np.uint8)  # NaN payloads too
    values = raw.view(storage)[..., 0]
    assert decoded(codec, codec.encode(values, dtype), values, dtype).tobytes() == raw.tobytes()


@codecs_as_is
@every_dtype
@given(data=st.data())
def test_a_half_stored_as_is_is_the_vectors(codec: Codec, dtype: str, data: st.DataObject) -> None:
    values = data.draw(vectors(dtype))
    assert codec.encode(values, dtype).tobytes() == values.tobytes()


@every_codec
@every_dtype
@given(data=st.data())
def test_halves_are_found_in_any_row_in_any_order(codec: Codec, dtype: str, data: st.DataObject) -> None:
    """Before and after the half a row holds something else, and so does memory around `out`."""
    values = data.draw(vectors(dtype))
    which = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), max_size=9)), np.int64)
    before, after = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    rows = codec.encode(values, dtype)
    wide = np.pad(rows, ((0, 0), (before, after)), constant_values=0xA5)
    wide.flags.writeable = False
    expected = decoded(codec, rows, values, dtype)[which]
    around = np.full((len(which) + 2, *values.shape[1:]), 7, values.dtype)
    codec.decode(wide, which, before, around[1:-1], dtype)
    assert around[1:-1].tobytes() == expected.tobytes()
    assert np.all(around[[0, -1]] == 7)
    for lying in (np.frombuffer(b"?" + which.tobytes(), np.int64, offset=1), np.repeat(which, 2)[::2]):
        codec.decode(wide, lying, before, around[1:-1], dtype)
        assert around[1:-1].tobytes() == expected.tobytes()
    assert np.all(wide[:, before : before + rows.shape[1]] == rows)


@every_codec
@given(data=st.data())
def test_each_half_is_encoded_on_its_own(codec: Codec, data: st.DataObject) -> None:
    values = data.draw(vectors("bfloat16"))
    together = codec.encode(values, "bfloat16")
    for i in range(len(values)):
        assert codec.encode(values[i : i + 1], "bfloat16").tobytes() == together[i].tobytes()


@every_codec
def test_more_than_a_block_is_encoded_as_one(codec: Codec) -> None:
    values = np.random.default_rng(0).normal(size=(700, 16, 64)).astype(np.float16)
    rows = codec.encode(values, "float16")
    assert rows[650:].tobytes() == codec.encode(values[650:], "float16").tobytes()
    assert (
        decoded(codec, rows, values, "float16")[650:].tobytes()
        == decoded(codec, rows[650:], values[650:], "float16").tobytes()
    )


@every_codec
def test_vectors_may_lie_in_memory_as_they_like(codec: Codec) -> None:
    values = np.random.default_rng(0).normal(size=(5, 16, 24)).astype(np.float32)
    expected = codec.encode(values, "float32")
    strided = np.stack([values, values + 1], 1)[:, 0]
    backwards = values[:, :, ::-1].copy()[:, :, ::-1]
    closed = values.copy()
    closed.flags.writeable = False
    odd = np.frombuffer(b"?" + values.tobytes(), np.float32, offset=1).reshape(values.shape)
    for lying in (strided, backwards, closed, odd):
        assert np.array_equal(codec.encode(lying, "float32"), expected)


@every_codec
def test_rows_may_be_a_map_of_a_file(codec: Codec, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 16, 24)).astype(np.float32)
    rows = codec.encode(values, "float32")
    (tmp_path / "rows").write_bytes(rows.tobytes())
    mapped = np.memmap(tmp_path / "rows", np.uint8, "r").reshape(rows.shape)
    assert decoded(codec, mapped, values, "float32").tobytes() == decoded(codec, rows, values, "float32").tobytes()


@every_codec
def test_threads_make_the_same_rows_side_by_side(codec: Codec) -> None:
    many = np.random.default_rng(0).normal(size=(8, 300, 16, 24)).astype(np.float32)

    def there_and_back(values: Array) -> bytes:
        rows = codec.encode(values, "float32")
        return rows.tobytes() + decoded(codec, rows, values, "float32").tobytes()

    expected = [there_and_back(values) for values in many]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(there_and_back, many)) == expected


@every_codec
@every_dtype
@given(seed=seeds(), tokens=st.sampled_from([1, 7, 16]), dim=st.sampled_from([4, 24]))
def test_damaged_rows_decode_to_something(codec: Codec, dtype: str, seed: int, tokens: int, dim: int) -> None:
    rows = np.random.default_rng(seed).integers(0, 256, (3, codec.half_bytes(tokens, dim, dtype)), np.uint8)
    rows[2] = 0xFF
    around = np.full((5, tokens, dim), 7, STORAGE_DTYPES[dtype])
    codec.decode(rows, np.arange(3), 0, around[1:-1], dtype)
    assert np.all(around[[0, -1]] == 7)


@every_codec
@every_dtype
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_numbers_that_are_not_finite_are_kept_or_refused(codec: Codec, dtype: str, value: float) -> None:
    numbers = np.zeros((900, 16, 40), np.float32)
    numbers[850, 3, 1] = value
    values = np.ascontiguousarray(from_float32(numbers, dtype))
    if codec.lossless:
        assert decoded(codec, codec.encode(values, dtype), values, dtype).tobytes() == values.tobytes()
    else:
        with pytest.raises(NotFinite, match=f"vectors 850, token 3, channel 1 is {value}, expected finite") as refused:
            codec.encode(values, dtype)
        assert refused.value.kind == "not-finite"


@every_codec
def test_what_scales_cannot_hold_is_refused(codec: Codec) -> None:
    numbers = np.zeros((1, 16, 40), np.float32)
    numbers[0, 15, 39] = 3e38
    if codec.lossless:
        assert codec.encode(numbers, "float32").tobytes() == numbers.tobytes()
    else:
        with pytest.raises(NotFinite, match=r"vectors 0, token 15, channel 39 is 3e\+38, expected"):
            codec.encode(numbers, "float32")


@every_codec
def test_other_arrays_are_refused(codec: Codec) -> None:
    values = np.zeros((3, 16, 8), np.float32)
    rows, which, out = codec.encode(values, "float32"), np.arange(3), np.zeros_like(values)
    for wrong, dtype in ((values[0], "float32"), (values, "float16"), (values, "int8"), (values[:, :0], "float32")):
        with pytest.raises(InvalidInput, match=f"codec {codec.name}"):
            codec.encode(wrong, dtype)
    closed = out.copy()
    closed.flags.writeable = False
    for wrong in (out[0], out.astype(np.float16), out[:, ::2], out[..., ::-1], closed):
        with pytest.raises(InvalidInput, match=f"codec {codec.name}: out"):
            codec.decode(rows, which, 0, wrong, "float32")
    for wrong, first in (
        (rows[0], 0),
        (rows, 1),
        (rows, -1),
        (rows[:, :-1], 0),
        (rows.astype(np.int64), 0),
        (rows[::2], 0),
    ):
        with pytest.raises(InvalidInput, match=f"codec {codec.name}: rows"):
            codec.decode(wrong, which, first, out, "float32")
    for number in ([0, 1, 3], [0, -1, 2], [0, 1 << 62, 0]):
        with pytest.raises(InvalidInput, match=rf"codec {codec.name}: rows .*, expected them within 0 to 2"):
            codec.decode(rows, np.array(number), 0, out, "float32")
    for wrong in (which[:2], which.astype(np.int32), which[None]):
        with pytest.raises(InvalidInput, match=f"codec {codec.name}: which"):
            codec.decode(rows, wrong, 0, out, "float32")


def test_there_is_a_lossless_codec() -> None:
    assert Raw.lossless
    assert Raw.stored_as_is
