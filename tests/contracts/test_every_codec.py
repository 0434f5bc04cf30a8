"""What the contract of codecs says, for every member of the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Array, finite_kv, seeds

from kvdb.codecs import CODECS, Codec
from kvdb.geometry import STORAGE_DTYPES

every_codec = pytest.mark.parametrize("kind", CODECS.values(), ids=CODECS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def records(seed: int, n: int, tokens: int, dim: int, dtype: str) -> Array:
    return finite_kv(seed, (n, 2, tokens, dim), dtype)


@every_codec
def test_a_codec_is_in_the_table_under_its_name(kind: type[Codec]) -> None:
    assert CODECS[kind.name] is kind
    assert kind.lossless or not kind.stored_as_is


@every_codec
def test_the_config_of_a_codec_rebuilds_it(kind: type[Codec]) -> None:
    codec = kind()
    assert kind(**json.loads(json.dumps(codec.config()))) == codec


@every_codec
@every_dtype
@given(seed=seeds(), n=st.integers(0, 4), tokens=st.sampled_from([1, 7, 16]), dim=st.sampled_from([1, 5, 80]))
def test_rows_have_the_length_that_was_announced(
    kind: type[Codec], dtype: str, seed: int, n: int, tokens: int, dim: int
) -> None:
    codec, values = kind(), records(seed, n, tokens, dim, dtype)
    before = values.copy()
    rows = codec.encode(values)
    assert rows.dtype == np.uint8
    assert len(rows) == n
    assert n == 0 or rows.shape[1] == codec.row_bytes(tokens, dim, STORAGE_DTYPES[dtype].itemsize)
    assert values.tobytes() == before.tobytes()


@every_codec
@every_dtype
@given(seed=seeds(), n=st.integers(1, 4))
def test_decoding_overwrites_everything_and_modifies_no_row(kind: type[Codec], dtype: str, seed: int, n: int) -> None:
    codec, values = kind(), records(seed, n, 16, 8, dtype)
    rows = codec.encode(values)
    before = rows.copy()
    first, second = np.full_like(values, 0), np.full_like(values, 1)
    codec.decode(rows, first)
    codec.decode(rows, second)
    assert first.tobytes() == second.tobytes()
    assert rows.tobytes() == before.tobytes()


@every_codec
@every_dtype
@given(seed=seeds())
def test_a_lossless_codec_keeps_every_bit_pattern(kind: type[Codec], dtype: str, seed: int) -> None:
    if not kind.lossless:
        pytest.skip(f"{kind.name} is lossy")
    storage = STORAGE_DTYPES[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, (3, 2, 16, 8, storage.itemsize), np.uint8)  # NaN payloads too
    values = raw.view(storage)[..., 0]
    codec, out = kind(), np.empty((3, 2, 16, 8), storage)
    codec.decode(codec.encode(values), out)
    assert out.tobytes() == raw.tobytes()


@every_codec
@every_dtype
@given(seed=seeds())
def test_a_row_stored_as_is_is_the_record(kind: type[Codec], dtype: str, seed: int) -> None:
    if not kind.stored_as_is:
        pytest.skip(f"{kind.name} transforms its rows")
    values = records(seed, 3, 16, 8, dtype)
    assert kind().encode(values).tobytes() == values.tobytes()


@every_codec
@given(seed=seeds())
def test_each_record_is_encoded_on_its_own(kind: type[Codec], seed: int) -> None:
    values, codec = records(seed, 4, 16, 8, "bfloat16"), kind()
    together = codec.encode(values)
    for i in range(4):
        assert codec.encode(values[i : i + 1]).tobytes() == together[i].tobytes()
