"""Shapes, sizes and dtypes: pure arithmetic, refused where it could not hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, finite_kv, geometries, seeds

from kvdb.errors import InvalidInput
from kvdb.geometry import SEGMENT_TOKENS, Geometry, LayerGroup, as_float32, div_ceil, from_float32

ONE = LayerGroup(layers=(0,), kv_heads=1, head_dim=1)


@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_div_ceil_is_the_least_sufficient_count(a: int, b: int) -> None:
    n = div_ceil(a, b)
    assert (n - 1) * b < a <= n * b


@given(geometries(chunk_tokens=None), st.integers(0, 10**6))
def test_the_grid_floor_is_the_last_chunk_boundary_not_after_a_token(geometry: Geometry, tokens: int) -> None:
    floor = geometry.grid_floor(tokens)
    assert floor % geometry.chunk_tokens == 0
    assert floor <= tokens < floor + geometry.chunk_tokens
    assert geometry.chunks(floor) * geometry.chunk_tokens == floor


@given(geometries(chunk_tokens=None))
def test_the_parts_of_a_chunk_add_up_to_its_tokens(geometry: Geometry) -> None:
    slots = sum(geometry.slot_bytes(i) * len(g.layers) for i, g in enumerate(geometry.groups))
    assert slots == geometry.token_bytes * geometry.chunk_tokens


@given(geometries())
def test_every_layer_is_located_where_it_was_declared(geometry: Geometry) -> None:
    for layer in geometry.layers:
        group, row = geometry.locate(layer)
        assert geometry.groups[group].layers[row] == layer
    with pytest.raises(InvalidInput, match=r"layer 99: not stored"):
        geometry.locate(99)


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (-1,)])
def test_layers_must_ascend_from_zero(layers: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="ascending"):
        LayerGroup(layers=layers, kv_heads=1, head_dim=1)


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(0, 1), (1, 0), (-5, 80)])
def test_shapes_must_be_positive(kv_heads: int, head_dim: int) -> None:
    with pytest.raises(InvalidInput, match="positive"):
        LayerGroup(layers=(0,), kv_heads=kv_heads, head_dim=head_dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"chunk_tokens": SEGMENT_TOKENS + 1}, "chunk_tokens is 16385"),
        ({"groups": ()}, "each layer exactly once"),
        ({"groups": (ONE, ONE)}, "each layer exactly once"),
    ],
)
def test_an_impossible_geometry_is_refused(change: dict[str, object], message: str) -> None:
    fields = {"dtype": "float16", "chunk_tokens": 16, "groups": (ONE,)} | change
    with pytest.raises(InvalidInput, match=message):
        Geometry(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=seeds())
def test_stored_values_pass_through_float32_unchanged(dtype: str, seed: int) -> None:
    stored = finite_kv(seed, (64,), dtype)
    back = from_float32(as_float32(stored, dtype), dtype)
    assert back.tobytes() == stored.tobytes()
    assert back.dtype == stored.dtype
