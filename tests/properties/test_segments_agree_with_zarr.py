"""Every array of a store, opened by zarr-python and by TensorStore, equals the KV that was written, bit for bit.

Neither library is used by the engine: they are the oracle. Shapes are odd on purpose: 1 003 tokens, 5 heads of 80
dimensions, more chunk slots reserved than used, layers of two shapes, segments that do not begin at position 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from helpers import Array, extend, identity, model_kv, opened, token_list, write_segment
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, finite_kv, geometries, seeds

from kvdb import Geometry, LayerGroup
from kvdb.codecs import CodecPlan
from kvdb.segments import Segment


def by_zarr(folder: Path) -> Array:
    found = zarr.open_array(folder, mode="r", zarr_format=3)
    return np.asarray(found[...])


def by_zarr_names(folder: Path) -> tuple[str | None, ...] | None:
    found = zarr.open_array(folder, mode="r", zarr_format=3)
    return found.metadata.dimension_names  # type: ignore[union-attr]


def by_tensorstore(folder: Path) -> Array:
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
    return np.asarray(tensorstore.open(spec, read=True, open=True).result().read().result())


every_library = pytest.mark.parametrize("library", [by_zarr, by_tensorstore])


def assert_agrees(library: Any, segment: Segment, tokens: Array) -> None:
    info = segment.info
    kv = model_kv(info.geometry, tokens, info.start, info.stop, salt=info.fidelity)
    for index, group in enumerate(info.geometry.groups):
        found = library(segment.folder / f"{info.segment}.kv{index}")
        assert found.shape == (len(group.layers), group.kv_heads, 2, info.tokens, group.head_dim)
        assert found.dtype == info.geometry.storage_dtype
        for row, layer in enumerate(group.layers):
            for plane in (0, 1):
                assert found[row, :, plane].tobytes() == np.ascontiguousarray(kv[layer][plane]).tobytes()


@every_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_short_segment_of_1003_tokens_is_read_bit_for_bit(library: Any, dtype: str, tmp_path: Path) -> None:
    geometry = Geometry(
        dtype=dtype,
        chunk_tokens=16,
        groups=(
            LayerGroup(layers=(0, 3), kv_heads=5, head_dim=80),
            LayerGroup(layers=(1,), kv_heads=1, head_dim=64),
        ),
    )
    tokens = token_list(1_003)
    with opened(tmp_path / "s") as db:
        stored = extend(db, tokens, geometry=geometry, spare=21)
        assert stored.last.info.capacity > geometry.chunks(1_003)
        assert_agrees(library, stored.last, tokens)


@every_library
@settings(max_examples=20)
@given(geometry=geometries(chunk_tokens=None, max_layers=3), tokens=st.integers(1, 90), spare=st.integers(0, 3))
def test_any_chain_of_segments_is_read_bit_for_bit(
    library: Any, tmp_path_factory: pytest.TempPathFactory, geometry: Geometry, tokens: int, spare: int
) -> None:
    ids = token_list(tokens)
    with opened(tmp_path_factory.mktemp("zarr") / "s") as db:
        extend(db, ids, geometry=geometry, spare=spare, segment_tokens=2 * geometry.chunk_tokens)
        for segment in db.segments(db.match(identity(), ids).spans):
            assert_agrees(library, segment, ids)


@every_library
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10)
@given(seed=seeds())
def test_any_finite_bit_pattern_survives(
    library: Any, dtype: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    geometry = Geometry(dtype=dtype, chunk_tokens=16, groups=(LayerGroup(layers=(0,), kv_heads=2, head_dim=4),))
    keys, values = finite_kv(seed, (2, 2, 20, 4), dtype)
    with opened(tmp_path_factory.mktemp("bits") / "s") as db:
        writer = db.writer(identity=identity(), fidelity="exact", geometry=geometry, parent=None, start=0, capacity=2)
        writer.append(0, keys, values)
        segment = db.commit(writer, token_list(20)).segment
        db.put_sequence(segment, 20)
        found = library(segment.folder / f"{segment.info.segment}.kv0")[0]
        assert found[:, 0].tobytes() == keys.tobytes()
        assert found[:, 1].tobytes() == values.tobytes()


@every_library
def test_abstracts_are_arrays_of_their_own(library: Any, tmp_path: Path) -> None:
    geometry = Geometry(dtype="float32", chunk_tokens=16, groups=(LayerGroup(layers=(2, 5), kv_heads=5, head_dim=80),))
    tokens = token_list(50)
    with opened(tmp_path / "s") as db:
        segment, reader = extend(db, tokens, geometry=geometry, spare=2).last, db.reader()
        found = library(segment.folder / f"{segment.info.segment}.box0")
        assert found.shape == (2, 4, 5, 2, 80)
        for row, layer in enumerate((2, 5)):
            assert np.array_equal(found[row], reader.abstract(segment, "box", layer))
            keys = model_kv(geometry, tokens, 0, 50, salt="exact")[layer][0]
            assert np.array_equal(found[row, 3, :, 0], keys[:, 48:].min(axis=1))


@every_library
@pytest.mark.parametrize(
    "codec", ["int4", "planes:bits=6+int8", "int8;1=raw", "blosc", "blosc:tokens=48", "int4;1=blosc"]
)
def test_records_of_a_codec_are_rows_of_bytes(library: Any, codec: str, tmp_path: Path) -> None:
    geometry = Geometry(
        dtype="bfloat16", chunk_tokens=16, groups=(LayerGroup(layers=(0, 1, 3), kv_heads=5, head_dim=80),)
    )
    tokens, plan = token_list(1_003), CodecPlan.parse(codec)
    with opened(tmp_path / "s") as db:
        writer = write_segment(db, tokens, geometry=geometry, fidelity=codec, codec=plan, spare=21)
        segment, reader = db.commit(writer, tokens).segment, db.reader()
        kv = model_kv(geometry, tokens, 0, 1_003, salt=codec)
        for index, group in enumerate(segment.info.geometry.groups):
            found = library(segment.folder / f"{segment.info.segment}.kv{index}")
            for row, layer in enumerate(group.layers):
                if plan.of(layer).stored_as_is:
                    assert found[row, :, 0].tobytes() == np.ascontiguousarray(kv[layer][0]).tobytes()
                    continue
                assert found.shape == (len(group.layers), 1, 63, 5, plan.of(layer).row_bytes(16, 80, "bfloat16"))
                rows = reader.rows(segment, layer, np.arange(63 * 5))
                assert np.array_equal(found[row, 0].reshape(rows.shape), rows)
        reader.close()
        assert db.check() == []


@every_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sketch_is_planes_of_bytes(library: Any, dtype: str, tmp_path: Path) -> None:
    geometry = Geometry(dtype=dtype, chunk_tokens=16, groups=(LayerGroup(layers=(2, 5), kv_heads=5, head_dim=80),))
    tokens = token_list(50)
    with opened(tmp_path / "s") as db:
        writer = write_segment(db, tokens, geometry=geometry, spare=2, abstracts=("box", "sketch"))
        segment, reader = db.commit(writer, tokens).segment, db.reader()
        found = library(segment.folder / f"{segment.info.segment}.sketch0")
        assert (found.shape, found.dtype) == ((2, 5, 4, 5, 164), np.uint8)
        for row, layer in enumerate((2, 5)):
            assert np.array_equal(found[row], reader.abstract(segment, "sketch", layer))
        assert by_zarr_names(segment.folder / f"{segment.info.segment}.sketch0") == (
            "layer",
            "plane",
            "chunk",
            "head",
            "byte",
        )
        assert by_zarr_names(segment.folder / f"{segment.info.segment}.box0") == (
            "layer",
            "chunk",
            "head",
            "part",
            "dim",
        )
        reader.close()


def test_the_chunks_folder_is_a_zarr_group_of_all_arrays(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        info = extend(db, token_list(20)).last.info
        group = zarr.open_group(tmp_path / "s" / "chunks", mode="r", zarr_format=3)
        assert sorted(group.array_keys()) == sorted(info.array_names())
        assert group[f"{info.segment}.kv0"].attrs["kvdb"]["info"]["tokens"] == 20
