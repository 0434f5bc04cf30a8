"""Sketches are the same to the bit whether numba or NumPy makes them, whatever the keys, in threads, too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import finish, python
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Array, seeds

from kvdb.abstracts import Sketch
from kvdb.abstracts.sketch_build import LARGEST, SMALLEST_SCALE, summarise, summarise_in_numpy

SPECIAL = np.array(
    [0.0, -0.0, 1e-45, -1e-38, SMALLEST_SCALE, -127 * SMALLEST_SCALE, 1.0, -1.0, LARGEST, -LARGEST, 1e38, np.inf, -np.inf, np.nan],
    np.float32,
)  # fmt: skip


@st.composite
def records_and_tokens(draw: st.DrawFn) -> tuple[Array, int]:
    """Noise about whole numbers of steps, or of any magnitude, or any bits, with some special numbers among them.

    Shrinks to one token of one dimension.
    """
    chunk_tokens, tokens = draw(st.sampled_from([1, 7, 8, 9, 16, 40])), draw(st.integers(1, 60))
    dim = draw(st.sampled_from([1, 3, 8, 17, 64, 80]))
    shape = (-(-tokens // chunk_tokens), draw(st.sampled_from([1, 2, 3])), chunk_tokens, dim)
    rng = np.random.default_rng(draw(seeds()))
    kind = draw(st.sampled_from(["steps", "magnitudes", "bits"]))
    if kind == "steps":
        records = rng.integers(-127, 128, shape) * np.float32(2.0 ** draw(st.integers(-110, 120)))
        records = np.nextafter(records, rng.choice([-np.inf, np.inf], shape).astype(np.float32)).astype(np.float32)
    elif kind == "magnitudes":
        records = (rng.normal(size=shape) * 2.0 ** rng.integers(-140, 127, (*shape[:2], 1, dim))).astype(np.float32)
    else:
        records = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
        records = np.where(abs(records) <= LARGEST, records, np.float32(1))
    specials = rng.random(shape) < draw(st.sampled_from([0, 0.001, 0.1]))
    records[specials] = rng.choice(SPECIAL, specials.sum())
    return records, tokens


def zeros_for(records: Array) -> Array:
    chunks, heads, chunk_tokens, dim = records.shape
    return np.zeros((5, chunks, heads, Sketch().row_bytes(chunk_tokens, dim, 4)), np.uint8)


@given(given_records=records_and_tokens())
@example(given_records=(np.full((1, 1, 16, 8), LARGEST), 16))
@example(given_records=(np.full((2, 1, 16, 8), np.nextafter(LARGEST, np.float32(np.inf))), 17))
@example(given_records=(np.zeros((1, 1, 16, 8), np.float32), 9))
def test_compiled_sketches_are_numpys_to_the_bit(given_records: tuple[Array, int]) -> None:
    pytest.importorskip("numba")
    records, tokens = given_records
    compiled, plain, before = zeros_for(records), zeros_for(records), records.copy()
    summarise(records, tokens, compiled)
    summarise_in_numpy(records, tokens, plain)
    assert np.array_equal(compiled, plain)
    assert np.array_equal(records.view(np.uint32), before.view(np.uint32))


@pytest.mark.parametrize("order", ["records", "read only", "heads", "tokens backwards"])
def test_keys_may_lie_in_memory_as_they_like(order: str) -> None:
    keys = np.random.default_rng(0).normal(size=(3, 5, 16, 24)).astype(np.float32)
    expected, lying = Sketch().build(keys, 75, "float32"), keys
    if order == "records":
        lying = np.stack([keys, keys + 1], 2).swapaxes(0, 1).copy().swapaxes(0, 1)[:, :, 0]
    elif order == "read only":
        lying = keys.swapaxes(0, 1).copy().swapaxes(0, 1)
        lying.flags.writeable = False
    elif order == "tokens backwards":
        lying = keys[:, :, ::-1].copy()[:, :, ::-1]
    assert np.array_equal(Sketch().build(lying, 75, "float32"), expected)


def test_threads_build_side_by_side() -> None:
    many = np.random.default_rng(0).normal(size=(8, 3, 50, 16, 64)).astype(np.float32)
    expected = [Sketch().build(keys, 790, "float32") for keys in many]
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda keys: Sketch().build(keys, 790, "float32"), np.concatenate([many] * 4)))
    assert all(np.array_equal(*pair) for pair in zip(built, expected * 4, strict=True))


BUILD = """
import sys
if sys.argv[1] == "without":
    sys.modules["numba"] = None
import numpy as np
from kvdb.abstracts import Sketch

keys = np.random.default_rng(0).normal(size=(2, 3, 16, 8)).astype(np.float32)
print(Sketch().build(keys, 41, "float32").tobytes().hex(), "kvdb.compiled" in sys.modules)
"""


def test_without_numba_the_same_is_made() -> None:
    found = [finish(python(BUILD, how)).split() for how in ("with", "without")]
    assert found[0][0] == found[1][0]
    assert found[1][1] == "False"
