"""Hypothesis strategies of the engine's inputs. Each says what it shrinks to."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kvdb.geometry import STORAGE_DTYPES, Geometry, LayerGroup

Array = np.ndarray[Any, np.dtype[Any]]

DTYPES = sorted(STORAGE_DTYPES)
HEAD_DIMS = (1, 4, 24, 64, 80)
KV_HEADS = (1, 2, 3, 5)


def dtypes() -> st.SearchStrategy[str]:
    """Shrinks to bfloat16."""
    return st.sampled_from(DTYPES)


@st.composite
def geometries(draw: st.DrawFn, *, chunk_tokens: int | None = 16, max_layers: int = 5) -> Geometry:
    """Odd models: 5 KV heads, head_dim 80, layers of two shapes in turns, layers without KV.

    Shrinks to one bfloat16 layer of one head of one dimension.
    """
    groups_of_layers = draw(
        st.lists(st.sampled_from([0, 1, None]), min_size=1, max_size=max_layers).filter(
            lambda found: any(group is not None for group in found)
        )
    )
    groups = [
        LayerGroup(
            layers=tuple(layer for layer, g in enumerate(groups_of_layers) if g == group),
            kv_heads=draw(st.sampled_from(KV_HEADS)),
            head_dim=draw(st.sampled_from(HEAD_DIMS)),
        )
        for group in (0, 1)
        if group in groups_of_layers
    ]
    size = draw(st.sampled_from([16, 1, 7, 32])) if chunk_tokens is None else chunk_tokens
    return Geometry(dtype=draw(dtypes()), chunk_tokens=size, groups=tuple(groups))


def token_lists(min_size: int = 1, max_size: int = 200, words: int = 3) -> st.SearchStrategy[Array]:
    """Token ids of a tiny vocabulary, so that lists share beginnings. Shrinks to a short list of zeros."""
    ids = st.lists(st.integers(0, words - 1), min_size=min_size, max_size=max_size)
    return ids.map(lambda found: np.array(found, "<u4"))


def seeds() -> st.SearchStrategy[int]:
    """Shrinks to 0."""
    return st.integers(0, 2**32 - 1)


def finite_kv(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Any finite bit pattern of the dtype, as stored: signed zeros, subnormals and the largest values included."""
    storage = STORAGE_DTYPES[dtype]
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, storage.itemsize), np.uint8)
    words = bits.view(f"<u{storage.itemsize}")[..., 0]
    exponent = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    lowest = exponent & -exponent
    words = np.where(words & exponent == exponent, words & ~np.array(lowest, words.dtype), words)
    return np.ascontiguousarray(words).view(storage)
