"""Planes: the same cells as the sketch, prefixes that need nothing after them, NumPy against what is compiled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Array, seeds

from kvdb.abstracts import Sketch
from kvdb.codecs import Planes, planes_numpy
from kvdb.errors import InvalidInput
from kvdb.geometry import STORAGE_DTYPES

bits_stored = st.integers(2, 8)


@st.composite
def numbers(draw: st.DrawFn) -> Array:
    """Noise, channels of any magnitude, whole numbers of steps, zeros of both signs. Shrinks to noise of one token."""
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from([1, 7, 8, 9, 16])), draw(st.sampled_from([1, 3, 8, 24])))
    rng = np.random.default_rng(draw(seeds()))
    kind = draw(st.sampled_from(["noise", "magnitudes", "steps", "zeros"]))
    values = rng.normal(size=shape)
    if kind == "magnitudes":
        values *= 2.0 ** rng.integers(-140, 120, (shape[0], 1, shape[2]))
    elif kind == "steps":
        values = rng.integers(-127, 128, shape) * 2.0 ** draw(st.integers(-110, 110))
    elif kind == "zeros":
        values *= rng.integers(-1, 2, shape) * 0.0
    return values.astype(np.float32)


def decoded(codec: Planes, rows: Array, like: Array, dtype: str = "float32") -> Array:
    out = np.empty(like.shape, STORAGE_DTYPES[dtype])
    codec.decode(rows, np.arange(len(rows)), 0, out, dtype)
    return out


def cells(rows: Array, bits: int, tokens: int, dim: int) -> Array:
    """(n, tokens, dim): numbers of cells, one bit after the other, from the words of FORMAT.md."""
    lines = -(-tokens // 8)
    planes = rows[:, 2 * dim + 4 :].reshape(len(rows), -1, lines, dim)
    found = np.zeros((len(rows), tokens, dim), int)
    for plane in range(bits):
        for token in range(tokens):
            found[:, token] = 2 * found[:, token] + (planes[:, plane, token // 8] >> token % 8 & 1)
    return found


@given(values=numbers())
def test_box_and_first_planes_are_the_sketch(values: Array) -> None:
    n, tokens, dim = values.shape
    rows, plane_bytes = Planes(bits=8).encode(values, "float32"), -(-tokens // 8) * dim
    sketch = Sketch().build(values[None], n * tokens, "float32")[:, :, 0]  # [planes, n, row_bytes]
    assert np.array_equal(rows[:, : 2 * dim + 4], sketch[0, :, : 2 * dim + 4])
    for plane in range(4):
        begin = 2 * dim + 4 + plane * plane_bytes
        assert np.array_equal(rows[:, begin : begin + plane_bytes], sketch[1 + plane, :, :plane_bytes])


@given(values=numbers(), bits=bits_stored)
def test_fewer_bits_are_a_prefix(values: Array, bits: int) -> None:
    whole = Planes(bits=8).encode(values, "float32")
    rows = Planes(bits=bits).encode(values, "float32")
    assert np.array_equal(rows, whole[:, : rows.shape[1]])


@given(values=numbers(), bits=bits_stored, data=st.data())
def test_what_follows_a_prefix_is_not_looked_at(values: Array, bits: int, data: st.DataObject) -> None:
    taken = data.draw(st.integers(2, bits))
    codec, shorter = Planes(bits=bits), Planes(bits=taken)
    rows, prefix = codec.encode(values, "float32"), shorter.encode(values, "float32")
    rows[:, prefix.shape[1] :] ^= 0xFF
    assert decoded(codec.at(taken), rows, values).tobytes() == decoded(shorter, prefix, values).tobytes()


@given(values=numbers(), bits=bits_stored)
def test_every_number_lies_in_its_cell_and_a_point_of_it_is_decoded(values: Array, bits: int) -> None:
    tokens, dim = values.shape[1:]
    codec = Planes(bits=bits)
    rows = codec.encode(values, "float32")
    low, width = (part.astype(np.float64) for part in planes_numpy.box(rows, dim))
    u, x, slack = cells(rows, bits, tokens, dim), values.astype(np.float64), 2.0**-20
    assert np.all(low + width * (u / 2**bits - slack) <= x)
    assert np.all(x <= low + width * ((u + 1) / 2**bits + slack))
    found = decoded(codec, rows, values).astype(np.float64)
    point = np.where(u == 0, 0.25, np.where(u == 2**bits - 1, 0.75, 0.5))
    expected = low + width * (u + point) / 2**bits
    assert np.all(abs(found - expected) <= 2.0**-23 * (abs(expected) + width))  # two roundings
    assert np.all(u[np.broadcast_to(width == 0, u.shape)] == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(values=numbers(), bits=bits_stored, data=st.data())
def test_compiled_planes_are_numpys(dtype: str, values: Array, bits: int, data: st.DataObject) -> None:
    pytest.importorskip("numba")
    codec, taken = Planes(bits=bits), data.draw(st.integers(2, bits))
    rows = codec.encode(values, "float32")
    plain = np.full_like(rows, 0xA5)
    planes_numpy.encode(values, bits, plain)
    assert np.array_equal(rows, plain)
    out = np.empty(values.shape, STORAGE_DTYPES[dtype])
    planes_numpy.decode(rows, np.arange(len(rows)), 0, taken, out, dtype)
    assert decoded(codec.at(taken), rows, values, dtype).tobytes() == out.tobytes()


def test_more_bits_are_never_worse() -> None:
    values = np.random.default_rng(0).normal(size=(50, 16, 64)).astype(np.float32)
    codec = Planes(bits=8)
    rows = codec.encode(values, "float32")
    errors = [np.square(decoded(codec.at(bits), rows, values) - values).mean() for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[-1]


@pytest.mark.parametrize("bits", [0, 1, 7])
def test_a_prefix_that_is_not_there_is_refused(bits: int) -> None:
    with pytest.raises(InvalidInput, match=f"bits that are decoded is {bits}, expected 2 to 6"):
        Planes(bits=6).at(bits)
