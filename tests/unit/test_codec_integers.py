"""Integers, bit for bit: an independent packer in exact rational numbers, NumPy against what is compiled, and the ends of float16."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from fractions import Fraction

import numpy as np
import pytest
from helpers import finish, python
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Array, seeds

from kvdb.codecs import Int2, Int4, Int8, integers_numpy
from kvdb.codecs.integers import Integers
from kvdb.errors import InvalidInput
from kvdb.geometry import STORAGE_DTYPES

KINDS = (Int8, Int4, Int2)
HALVES = np.sort(np.arange(1 << 16, dtype=np.uint16).view(np.float16))
FINITE = [Fraction(float(h)) for h in HALVES[np.isfinite(HALVES)]]
SPECIAL = np.array(
    [
        0.0,
        -0.0,
        1e-45,
        -1e-38,
        2.0**-24,
        -(2.0**-25),
        3 * 2.0**-26,
        6e-5,
        -6.2e-5,
        1.0,
        -1.0,
        65504.0,
        -65504.0,
        65503.99,
    ],
    np.float32,
)


@st.composite
def codecs(draw: st.DrawFn) -> Integers:
    """Shrinks to 8 bits by channel."""
    kind = draw(st.sampled_from(KINDS))
    return kind(axis="token", group=draw(st.sampled_from([None, 4]))) if draw(st.booleans()) else kind()


@st.composite
def numbers(draw: st.DrawFn, most: int = 4) -> Array:
    """Noise, magnitudes of all of float16 and beyond its small end, steps of a scale, special numbers among them. Shrinks to noise."""
    shape = (draw(st.integers(1, most)), draw(st.sampled_from([1, 7, 16, 33])), draw(st.sampled_from([4, 8, 20])))
    rng = np.random.default_rng(draw(seeds()))
    kind = draw(st.sampled_from(["noise", "magnitudes", "steps", "one"]))
    values = rng.normal(size=shape)
    if kind == "magnitudes":
        values *= 2.0 ** rng.integers(-150, 15, (shape[0], 1, shape[2]))
    elif kind == "steps":
        values = rng.integers(0, 31, shape) * 2.0 ** draw(st.integers(-26, 10)) / 2
    elif kind == "one":
        values = np.broadcast_to(rng.normal(size=(shape[0], 1, 1)), shape)
    values = np.clip(values, -65504, 65504).astype(np.float32)
    specials = rng.random(shape) < draw(st.sampled_from([0, 0.01, 0.3]))
    return np.where(specials, rng.choice(SPECIAL, shape), values)


def reference(values: Array, codec: Integers) -> bytes:
    """The row of one half, from the words of FORMAT.md: exact numbers, and one bit after the other."""
    tokens, dim = values.shape
    by_channel = codec.axis == "channel"
    size = 1 if by_channel else codec.group or max(s for s in range(1, 33) if dim % s == 0)
    cells = [(t, c) for t in range(tokens) for c in range(dim)]
    groups: dict[int, list[tuple[int, int]]] = {}
    for t, c in cells:
        groups.setdefault(c if by_channel else t * (dim // size) + c // size, []).append((t, c))
    scales, minima, codes = [], [], np.zeros((tokens, dim), int)
    for _, members in sorted(groups.items()):
        exact = [Fraction(float(values[place])) for place in members]
        levels = (1 << codec.nbits) - 1
        low = FINITE[bisect_right(FINITE, min(exact)) - 1]
        scale = FINITE[bisect_left(FINITE, (max(exact) - low) / levels)]
        for place, x in zip(members, exact, strict=True):  # the lowest of the nearest codes
            codes[place] = min(range(levels + 1), key=lambda code: (abs(x - low - code * scale), code))
        scales.append(np.float16(float(scale)))
        minima.append(np.float16(float(low)))
    per, lines = 8 // codec.nbits, -(-tokens * codec.nbits // 8)
    packed = [0] * (lines * dim)
    for t, c in cells:
        for bit in range(codec.nbits):
            packed[t // per * dim + c] |= (int(codes[t, c]) >> bit & 1) << (t % per * codec.nbits + bit)
    return np.array([scales, minima], "<f2").tobytes() + bytes(packed)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("seed", range(4))
def test_rows_are_those_of_the_reference_packer(kind: type[Integers], axis: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codec, tokens, dim = kind(axis=axis), int(rng.choice([3, 8])), int(rng.choice([4, 6]))
    values = (rng.normal(size=(tokens, dim)) * 2.0 ** rng.integers(-20, 14, dim)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = rng.choice(SPECIAL)
    assert codec.encode(values[None], "float32")[0].tobytes() == reference(values, codec)


@given(codec=codecs(), values=numbers())
def test_compiled_rows_are_numpys(codec: Integers, values: Array) -> None:
    pytest.importorskip("numba")
    rows = codec.encode(values, "float32")
    plain = np.full_like(rows, 0xA5)
    integers_numpy.encode(values, codec.form(values.shape[2]), plain)
    assert np.array_equal(rows, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@given(codec=codecs(), values=numbers(), data=st.data())
def test_compiled_decoding_is_numpys(dtype: str, codec: Integers, values: Array, data: st.DataObject) -> None:
    pytest.importorskip("numba")
    rows = np.pad(codec.encode(values, "float32"), ((0, 0), (3, 2)))
    which = np.array(data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1)), np.int64)
    out = np.empty((len(which), *values.shape[1:]), STORAGE_DTYPES[dtype])
    plain = np.empty_like(out)
    codec.decode(rows, which, 3, out, dtype)
    integers_numpy.decode(rows, which, 3, codec.form(values.shape[2]), plain, dtype)
    assert out.tobytes() == plain.tobytes()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [0.0, 1.5, -65504.0, 65504.0, 2.0**-24])
def test_a_group_of_one_number_that_float16_holds_is_exact(kind: type[Integers], value: float) -> None:
    values = np.full((1, 16, 8), value, np.float32)
    for codec in (kind(), kind(axis="token")):
        out = np.empty_like(values)
        rows = codec.encode(values, "float32")
        codec.decode(rows, np.array([0]), 0, out, "float32")
        assert out.tobytes() == values.tobytes()
        assert not codec.bound(rows, 16, 8).any()


def test_zeros_of_both_signs_are_one_row() -> None:
    """Minimum and scale are 0 without a sign, whichever zero a processor finds to be less."""
    signs = np.random.default_rng(0).choice([0.0, -0.0], (1, 16, 8)).astype(np.float32)
    for codec in (Int4(), Int4(axis="token")):
        assert not codec.encode(signs, "float32").any()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_largest_numbers_of_float16_stay_finite(kind: type[Integers]) -> None:
    """The scale is rounded up, so the greatest code may stand for a number beyond 65504; none decodes to infinity."""
    values = np.random.default_rng(0).choice(np.array([-65504, 65504], np.float16), (2, 16, 8))
    for codec in (kind(), kind(axis="token")):
        out = np.empty_like(values)
        rows = codec.encode(values, "float16")
        codec.decode(rows, np.arange(2), 0, out, "float16")
        assert np.isfinite(out).all()
        error = abs(out.astype(np.float64) - values.astype(np.float64))
        assert np.all(error <= codec.bound(rows, 16, 8) + 16)


@pytest.mark.parametrize(("dim", "size"), [(64, 32), (80, 20), (128, 32), (24, 24), (5, 5), (33, 11), (1, 1)])
def test_groups_of_values_are_the_largest_that_fit(dim: int, size: int) -> None:
    assert Int4.of_values().form(dim).channels == size
    assert Int4.of_values().half_bytes(16, dim, "float16") == 16 * dim // size * 4 + 8 * dim


def test_a_group_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInput, match="group is 24, expected it to divide head_dim, 64"):
        Int4(axis="token", group=24).encode(np.zeros((1, 16, 64), np.float32), "float32")


ENCODE = """
import sys
if sys.argv[1] == "without":
    sys.modules["numba"] = None
import numpy as np
from kvdb.codecs import RecordCodec

codec = RecordCodec.parse("planes+int4")
records = np.random.default_rng(0).normal(size=(3, 2, 16, 8)).astype(np.float32)
rows, out = codec.encode(records, "float32"), np.empty((2, 3, 16, 8), np.float32)
codec.decode(rows, np.arange(3), out, "float32")
print(rows.tobytes().hex(), out.tobytes().hex(), "kvdb.compiled" in sys.modules)
"""


def test_without_numba_the_same_is_made() -> None:
    found = [finish(python(ENCODE, how)).split() for how in ("with", "without")]
    assert found[0][:2] == found[1][:2]
    assert found[1][2] == "False"


RAW = """
import sys
import numpy as np
from kvdb.codecs import RecordCodec

codec, records = RecordCodec.parse("raw"), np.zeros((3, 2, 16, 8), np.float32)
codec.decode(codec.encode(records, "float32"), np.arange(3), np.empty((2, 3, 16, 8), np.float32), "float32")
print("numba" in sys.modules)
"""


def test_numbers_stored_as_they_are_need_no_numba() -> None:
    assert finish(python(RAW)).split() == ["False"]
