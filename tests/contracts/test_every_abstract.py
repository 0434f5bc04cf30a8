"""What the contract of abstracts says, for every member; that boxes bound every query's score; that a sketch's cells hold keys.

The bound is exact arithmetic's: ub = sum_d max(q_d lo_d, q_d hi_d) >= q.k for every key k of the record. Here q and k are
multiples of 2^-6 below 2^6 in magnitude, so every product and every sum of 80 of them is exact in float64 and `<=` is
meant literally. So are the corners of a sketch's box: a product of 8 by 16 significant bits.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, HEAD_DIMS, Array, finite_kv, seeds

from kvdb.abstracts import ABSTRACTS, Abstract, Sketch
from kvdb.abstracts.mean import as_stored
from kvdb.abstracts.sketch import BITS, unpack
from kvdb.errors import InvalidInput
from kvdb.geometry import STORAGE_DTYPES, Geometry, LayerGroup, as_float32, div_ceil

every_abstract = pytest.mark.parametrize("abstract", ABSTRACTS.values(), ids=ABSTRACTS)
every_one_of_records = pytest.mark.parametrize(
    "abstract",
    [a for a in ABSTRACTS.values() if not a.of_blocks],
    ids=[n for n, a in ABSTRACTS.items() if not a.of_blocks],
)


@st.composite
def keys_and_tokens(draw: st.DrawFn) -> tuple[Array, int]:
    """Keys as a writer hands them over, padding full of zeros. Shrinks to one token of one head of one dimension."""
    heads, dim = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from(HEAD_DIMS))
    chunk_tokens, tokens = draw(st.sampled_from([1, 7, 16])), draw(st.integers(1, 40))
    chunks = -(-tokens // chunk_tokens)
    rng = np.random.default_rng(draw(seeds()))
    keys = np.zeros((heads, chunks * chunk_tokens, dim), np.float32)
    keys[:, :tokens] = rng.integers(-127, 128, (heads, tokens, dim)).astype(np.float32) / 64
    if draw(st.booleans()):
        keys[:, :tokens] = abs(keys[:, :tokens]) + 1  # away from the zeros of the padding
    return keys.reshape(heads, chunks, chunk_tokens, dim), tokens


@st.composite
def real_keys(draw: st.DrawFn) -> tuple[Array, int]:
    """Keys of any magnitude, one per record or one per channel, with channels that are constant. Shrinks to the same."""
    keys, tokens = draw(keys_and_tokens())
    heads, chunks, _, dim = keys.shape
    rng = np.random.default_rng(draw(seeds()))
    exponents = draw(st.sampled_from([0, 3, 30, 100]))
    shape = draw(st.sampled_from([(heads, chunks, 1, 1), (heads, chunks, 1, dim)]))
    noise = rng.normal(size=keys.shape).astype(np.float32)
    offset = draw(st.sampled_from([0.0, 1e-3, 1e3])) * rng.normal(size=(heads, chunks, 1, dim))
    scale = 2.0 ** rng.integers(-exponents, exponents + 1, shape)
    keys = ((noise * (rng.random((heads, chunks, 1, dim)) > 0.2) + offset) * scale).astype(np.float32)
    keys.reshape(heads, -1, dim)[:, tokens:] = 0
    return keys, tokens


def values_of(keys: Array) -> Array:
    """Other numbers of the same dtypes, each token's from its own key."""
    return np.ascontiguousarray(keys[..., ::-1]) * np.float32(-0.5)


def build(abstract: Abstract, keys: Array, tokens: int, dtype: str) -> Array:
    return abstract.build(keys, tokens, dtype, values_of(keys) if abstract.of_values else None)


def box_of(keys: Array, tokens: int) -> Array:
    """(chunks, kv_heads, 2, head_dim), as scorers get it."""
    box = ABSTRACTS["box"]
    return box.load(box.build(keys, tokens, "float32"), keys.shape[-1], "float32")


@every_abstract
def test_an_abstract_is_in_the_table_under_its_name(abstract: Abstract) -> None:
    assert ABSTRACTS[abstract.name] is abstract
    assert abstract.name.isascii()
    assert abstract.name.isalpha()
    assert abstract.name != "kv"


@every_abstract
@pytest.mark.parametrize("dtype", DTYPES)
@given(given_keys=keys_and_tokens())
def test_an_abstract_has_its_declared_size_and_leaves_keys_and_values_alone(
    abstract: Abstract, dtype: str, given_keys: tuple[Array, int]
) -> None:
    keys, tokens = given_keys
    values, before = values_of(keys), keys.copy()
    built = abstract.build(keys, tokens, dtype, values)
    heads, chunks, chunk_tokens, dim = keys.shape
    row = abstract.row_bytes(chunk_tokens, dim, STORAGE_DTYPES[dtype].itemsize)
    assert built.shape == (abstract.planes, chunks, heads, row)
    assert built.dtype == np.uint8
    assert built.flags.c_contiguous
    assert np.array_equal(keys, before)
    assert np.array_equal(values, values_of(before))


@every_abstract
@pytest.mark.parametrize("dtype", DTYPES)
@given(given_keys=keys_and_tokens())
def test_the_form_zarr_shows_is_the_stored_bytes(abstract: Abstract, dtype: str, given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    heads, chunks, chunk_tokens, dim = keys.shape
    group = LayerGroup(layers=(0,), kv_heads=heads, head_dim=dim)
    geometry = Geometry(dtype=dtype, chunk_tokens=chunk_tokens, groups=(group,))
    form = abstract.form(chunks, geometry, 0)
    assert len(form.dimensions) == len(form.shape) == 4
    itemsize = 1 if form.dtype == "uint8" else STORAGE_DTYPES[form.dtype].itemsize
    assert np.prod(form.shape) * itemsize == build(abstract, keys, tokens, dtype).nbytes


@every_abstract
@given(given_keys=keys_and_tokens(), noise=st.sampled_from([-1e30, 0.0, 1e30, np.inf, np.nan]))
def test_padding_never_shows_in_an_abstract(abstract: Abstract, given_keys: tuple[Array, int], noise: float) -> None:
    keys, tokens = given_keys
    heads, chunks, chunk_tokens, dim = keys.shape
    noisy = keys.reshape(heads, chunks * chunk_tokens, dim).copy()
    noisy[:, tokens:] = noise
    expected = build(abstract, keys, tokens, "float32")
    assert np.array_equal(build(abstract, noisy.reshape(keys.shape), tokens, "float32"), expected)


@every_one_of_records
@given(given_keys=real_keys(), at=st.integers(0, 39))
def test_an_abstract_is_the_same_however_appends_were_cut(
    abstract: Abstract, given_keys: tuple[Array, int], at: int
) -> None:
    keys, tokens = given_keys
    chunk_tokens = keys.shape[2]
    cut = min(at // chunk_tokens, (tokens - 1) // chunk_tokens)
    parts = [build(abstract, keys[:, cut:], tokens - cut * chunk_tokens, "float32")]
    if cut:
        parts.insert(0, build(abstract, keys[:, :cut], cut * chunk_tokens, "float32"))
    assert np.array_equal(np.concatenate(parts, axis=1), build(abstract, keys, tokens, "float32"))


@every_one_of_records
def test_an_abstract_of_many_keys_is_that_of_each_of_them(abstract: Abstract) -> None:
    """More than are summarised at a time."""
    keys = np.random.default_rng(0).normal(size=(3, 300, 16, 64)).astype(np.float32)
    tokens = 300 * 16 - 5
    built = build(abstract, keys, tokens, "float32")
    for chunk in (0, 1, 84, 85, 86, 170, 298, 299):
        own = min(16, tokens - chunk * 16)
        assert np.array_equal(built[:, chunk : chunk + 1], build(abstract, keys[:, chunk : chunk + 1], own, "float32"))


@every_abstract
@given(given_keys=real_keys())
def test_a_few_planes_load_as_the_beginning_of_all(abstract: Abstract, given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    dim, stored = keys.shape[-1], build(abstract, keys, tokens, "float32")
    whole = abstract.load(stored, dim, "float32")
    for planes in range(1, abstract.planes):
        assert np.array_equal(abstract.load(stored[:planes], dim, "float32"), whole[:planes])


# -- means, by NumPy in float64 and torch's rounding


@every_abstract
@given(given_keys=keys_and_tokens())
def test_values_count_for_nothing_unless_an_abstract_says_so(abstract: Abstract, given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    values = values_of(keys)
    same = np.array_equal(
        abstract.build(keys, tokens, "float32", values), abstract.build(keys, tokens, "float32", values + 1)
    )
    assert same != abstract.of_values


@given(given_keys=real_keys())
def test_a_mean_is_that_of_the_records_own_tokens(given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    _, chunks, chunk_tokens, dim = keys.shape
    abstract = ABSTRACTS["mean"]
    loaded = abstract.load(build(abstract, keys, tokens, "float32"), dim, "float32")
    for chunk in range(chunks):
        own = keys[:, chunk, : min(chunk_tokens, tokens - chunk * chunk_tokens)].astype(np.float64)
        error = (len(own[0]) + 2) * np.finfo(np.float32).eps * abs(own).mean(1)
        assert (abs(loaded[0, chunk] - own.mean(1)) <= error).all()


@pytest.mark.parametrize("dtype", DTYPES)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), coarse=st.booleans())
def test_means_are_stored_as_the_nearest_numbers_of_the_dtype(dtype: str, bits: list[int], coarse: bool) -> None:
    means = np.array([b & 0xFFFF_8000 if coarse else b for b in bits], np.uint32).view(np.float32)  # coarse: many ties
    means = np.where(abs(means) <= 60000 if dtype == "float16" else np.isfinite(means), means, np.float32(np.inf))
    expected = torch.from_numpy(means).to(getattr(torch, dtype)).float().numpy()
    assert np.array_equal(as_float32(as_stored(means, dtype).view(STORAGE_DTYPES[dtype]), dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_shows_in_the_mean_of_its_record_alone(dtype: str, bad: float) -> None:
    keys = np.random.default_rng(0).normal(size=(2, 3, 16, 8)).astype(np.float32)
    keys[1, 2, 5, 7] = bad
    abstract = ABSTRACTS["mean"]
    finite = np.isfinite(abstract.load(build(abstract, keys, 48, dtype), 8, dtype))
    assert (~finite).sum() == abstract.planes
    assert not finite[:, 2, 1].all(-1).any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds())
def test_storing_a_box_rounds_nothing(dtype: str, seed: int) -> None:
    box = ABSTRACTS["box"]
    keys = as_float32(finite_kv(seed, (2, 3, 16, 8), dtype), dtype)
    loaded = box.load(box.build(keys, 41, dtype), 8, dtype)
    assert np.array_equal(loaded, box_of(keys, 41))


@given(given_keys=keys_and_tokens(), seed=seeds())
def test_a_box_bounds_the_score_of_every_key(given_keys: tuple[Array, int], seed: int) -> None:
    keys, tokens = given_keys
    heads, _, chunk_tokens, dim = keys.shape
    box = box_of(keys, tokens).astype(np.float64)
    query = np.random.default_rng(seed).integers(-4096, 4097, (heads, dim)) / 64
    for token in range(tokens):
        chunk, at = divmod(token, chunk_tokens)
        for head in range(heads):
            low, high = box[chunk, head]
            bound = np.maximum(query[head] * low, query[head] * high).sum()
            assert query[head] @ keys[head, chunk, at].astype(np.float64) <= bound


@given(given_keys=keys_and_tokens())
def test_a_box_is_tight_along_every_axis(given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    heads, chunks, chunk_tokens, dim = keys.shape
    box = box_of(keys, tokens)
    flat = keys.reshape(heads, chunks * chunk_tokens, dim)
    for chunk in range(chunks):
        part = flat[:, chunk * chunk_tokens : min(tokens, (chunk + 1) * chunk_tokens)]
        for corner in (0, 1):
            assert (box[chunk, :, corner, None] == part).any(axis=1).all()


# -- the sketch, taken apart in float64 and bit by bit


def box_of_sketch(stored: Array, dim: int) -> tuple[Array, Array, Array]:
    """lo, hi (chunks, heads, dim) and scale (chunks, heads, 1), all float64, from the bytes."""
    plane = stored[0]
    lo, hi = plane[..., :dim].view(np.int8), plane[..., dim : 2 * dim].view(np.int8)
    scale = np.ascontiguousarray(plane[..., 2 * dim : 2 * dim + 4]).view("<f4").astype(np.float64)
    return lo * scale, hi * scale, scale


def cells_of_sketch(stored: Array, chunk_tokens: int, dim: int) -> Array:
    """The 4-bit cell numbers (chunks, heads, chunk_tokens, dim), bit by bit."""
    _, chunks, heads, _ = stored.shape
    cells = np.zeros((chunks, heads, chunk_tokens, dim), np.int64)
    for token, d, plane in np.ndindex(chunk_tokens, dim, 4):
        byte = stored[1 + plane, ..., token // 8 * dim + d].astype(np.int64)
        cells[..., token, d] |= (byte >> token % 8 & 1) << 3 - plane
    return cells


def own_keys(keys: Array, tokens: int) -> tuple[Array, Array]:
    """Keys as float64 (chunks, heads, chunk_tokens, head_dim), and which of them are no padding, to broadcast."""
    chunks, chunk_tokens = keys.shape[1:3]
    real = np.arange(chunks * chunk_tokens).reshape(chunks, 1, chunk_tokens, 1) < tokens
    return keys.swapaxes(0, 1).astype(np.float64), real


any_keys = st.one_of(keys_and_tokens(), real_keys())


@given(given_keys=any_keys)
def test_the_box_of_a_sketch_holds_every_key_and_no_corner_is_a_whole_step_away(given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    k, real = own_keys(keys, tokens)
    lo, hi, scale = box_of_sketch(Sketch().build(keys, tokens, "float32"), keys.shape[-1])
    assert ((lo[:, :, None] <= k) & (k <= hi[:, :, None]) | ~real).all()
    least, greatest = np.where(real, k, np.inf).min(2), np.where(real, k, -np.inf).max(2)
    assert (lo + scale > least).all()
    assert (hi - scale < greatest).all()


@given(given_keys=any_keys)
def test_the_scale_of_a_sketch_is_the_finest_that_reaches_the_greatest_key(given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    k, real = own_keys(keys, tokens)
    scale = box_of_sketch(Sketch().build(keys, tokens, "float32"), keys.shape[-1])[2][..., 0]
    needed = np.maximum(np.where(real, abs(k), 0).max((2, 3)) / 127, 2.0**-100)
    assert (needed <= scale).all()
    assert (scale <= needed * (1 + 2.0**-14)).all()


@given(given_keys=any_keys)
def test_every_key_lies_in_its_cell(given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    k, real = own_keys(keys, tokens)
    stored = Sketch().build(keys, tokens, "float32")
    lo, hi, _ = box_of_sketch(stored, keys.shape[-1])
    cells = cells_of_sketch(stored, *keys.shape[2:])
    low, width = lo[:, :, None], (hi - lo)[:, :, None]
    inside = (low + width * (cells / 16 - 2.0**-20) <= k) & (k <= low + width * ((cells + 1) / 16 + 2.0**-20))
    assert (inside | ~real).all()
    assert (cells * ~real == 0).all()
    assert (cells * (width == 0) == 0).all()


@given(given_keys=any_keys)
def test_what_a_sketch_leaves_over_in_its_rows_is_zeros(given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    chunk_tokens, dim = keys.shape[2:]
    stored = Sketch().build(keys, tokens, "float32")
    used = div_ceil(chunk_tokens, 8) * dim
    assert not stored[0, ..., 2 * dim + 4 :].any()
    assert not stored[1:, ..., used:].any()
    assert stored.shape[-1] == max(2 * dim + 4, used)


@given(given_keys=any_keys)
def test_a_sketch_is_taken_apart_as_it_was_put_together(given_keys: tuple[Array, int]) -> None:
    keys, tokens = given_keys
    chunk_tokens, dim = keys.shape[2:]
    stored = Sketch().build(keys, tokens, "float32")
    lo, hi, _ = box_of_sketch(stored, dim)
    cells = cells_of_sketch(stored, chunk_tokens, dim)
    for bits in range(BITS + 1):
        found = unpack(stored[: 1 + bits], bits, chunk_tokens, dim)
        assert (found.lo.dtype, found.width.dtype, found.cells.dtype) == (np.float32, np.float32, np.uint8)
        assert np.array_equal(found.lo, lo)
        assert np.array_equal(found.width, hi - lo)
        assert np.array_equal(found.cells, cells >> (BITS - bits))


@given(bad=st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -1e38]), where=st.integers(0, 2 * 3 * 16 * 8 - 1))
def test_a_key_that_has_no_box_makes_its_record_unknown_and_no_other(bad: float, where: int) -> None:
    keys = np.random.default_rng(0).normal(size=(2, 3, 16, 8)).astype(np.float32)
    clean = Sketch().build(keys, 48, "float32")
    keys.reshape(-1)[where] = bad
    head, chunk, _, _ = np.unravel_index(where, keys.shape)
    stored = Sketch().build(keys, 48, "float32")
    found = unpack(stored, BITS, 16, 8)
    assert (found.lo[chunk, head] == -np.inf).all()
    assert (found.width[chunk, head] == np.inf).all()
    assert not found.cells[chunk, head].any()
    stored[:, chunk, head] = clean[:, chunk, head]
    assert np.array_equal(stored, clean)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds())
def test_keys_of_any_bits_are_in_their_box_or_unknown(dtype: str, seed: int) -> None:
    keys = as_float32(finite_kv(seed, (2, 3, 16, 8), dtype), dtype)
    lo, hi, scale = box_of_sketch(Sketch().build(keys, 41, dtype), 8)
    k, real = own_keys(keys, 41)
    assert ((lo[:, :, None] <= k) & (k <= hi[:, :, None]) | ~real).all()
    unknown = (abs(k) * real).max((2, 3)) > 2.0**126
    assert np.array_equal(np.isinf(scale[..., 0]), unknown)


def test_the_box_of_zeros_is_a_point() -> None:
    found = unpack(Sketch().build(np.zeros((1, 2, 16, 8), np.float32), 20, "float32"), BITS, 16, 8)
    assert not found.lo.any()
    assert not found.width.any()
    assert not found.cells.any()


@pytest.mark.parametrize(("planes", "bits"), [(5, 5), (5, -1), (1, 1), (0, 0), (4, 4)])
def test_more_bits_than_planes_are_refused(planes: int, bits: int) -> None:
    with pytest.raises(InvalidInput, match=f"for {bits} bits, expected"):
        unpack(np.zeros((planes, 1, 1, 20), np.uint8), bits, 16, 8)


def test_planes_of_another_shape_are_refused() -> None:
    with pytest.raises(InvalidInput, match="expected"):
        unpack(np.zeros((5, 1, 1, 19), np.uint8), 4, 16, 8)
