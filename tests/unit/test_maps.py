"""Maps of keys agree with NumPy over all stored keys; what is damaged leaves its own cells empty."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SMALL, TWO_GROUPS, extend, flip, identity, opened, read_kv, token_list, tree_bytes

from kvdb import KVDB, Geometry, format
from kvdb.codecs import CodecPlan
from kvdb.geometry import as_float32, div_ceil
from kvdb.inspection.maps import Grid, key_maps

Array = np.ndarray[Any, np.dtype[Any]]


def all_keys(db: KVDB, name: str, layer: int) -> Array:
    """(kv_heads, tokens, head_dim) float32 of a whole sequence."""
    reader, sequence = db.reader(), db.sequence(name)
    try:
        parts = [
            as_float32(read_kv(reader, segment, layer, span.stop)[0], segment.info.geometry.dtype)
            for span, segment in zip(sequence.spans, db.segments(sequence.spans), strict=True)
        ]
        return np.concatenate(parts, axis=1)
    finally:
        reader.close()


def cells(grid: Grid) -> Array:
    return np.array([[np.nan if value is None else value for value in row] for row in grid.values])


def columns(grid: Grid) -> list[tuple[int, int]]:
    return list(zip(grid.bounds, grid.bounds[1:], strict=False))


def widths_by_record(keys: Array, chunk_tokens: int) -> list[float]:
    return [
        float((part.max(1) - part.min(1)).mean())
        for at in range(0, keys.shape[1], chunk_tokens)
        for part in [keys[:, at : at + chunk_tokens].astype(np.float64)]
    ]


@pytest.mark.parametrize("geometry", [SMALL, TWO_GROUPS], ids=["one group", "two groups"])
@pytest.mark.parametrize("abstracts", [("box",), ("sketch",), ()], ids=["box", "sketch", "no abstract"])
@pytest.mark.parametrize("most", [128, 5])
def test_maps_are_those_of_all_keys(tmp_path: Path, geometry: Geometry, abstracts: tuple[str, ...], most: int) -> None:
    tokens = token_list(215)
    with opened(tmp_path / "a.kvdb") as db:
        extend(db, tokens, name="n", geometry=geometry, segment_tokens=96, abstracts=abstracts)
        found = key_maps(db, db.sequence("n"), most)
        assert found.norms.rows == found.widths.rows == geometry.layers
        assert found.norms.bounds == found.widths.bounds
        spans = columns(found.norms)
        assert (spans[0][0], spans[-1][1], len(spans)) == (0, 215, min(most, 14))
        read = 0
        for row, layer in enumerate(found.norms.rows):
            keys = all_keys(db, "n", layer).astype(np.float64)
            records = widths_by_record(keys, 16)
            for column, (start, stop) in enumerate(spans):
                chunk = (start + stop - 1) // 2 // 16 * 16
                middle = keys[:, chunk : chunk + 16]
                read += middle.shape[1] if row == 0 else 0
                assert found.norms.values[row][column] == pytest.approx(np.linalg.norm(middle, axis=-1).mean())
                boxes = (
                    records[start // 16 : div_ceil(stop, 16)] if abstracts else records[chunk // 16 : chunk // 16 + 1]
                )
                # A sketch widens a box to a multiple of its scale on either side: at most a 127th of the largest key.
                slack = 2 * 8 / 127 * 1.01 if abstracts == ("sketch",) else 1e-6
                width = found.widths.values[row][column]
                assert width is not None
                assert np.mean(boxes) - 1e-6 <= width <= np.mean(boxes) + slack
        assert (found.tokens, found.tokens_read, found.problems) == (215, read, ())
        assert found.sources == (abstracts or ("keys",))


def test_a_sequence_that_ends_inside_a_shared_segment_is_mapped_to_its_end(tmp_path: Path) -> None:
    tokens = token_list(120)
    with opened(tmp_path / "a.kvdb") as db:
        stored = extend(db, tokens, abstracts=())
        db.put_sequence(stored.last, 37, name="n")
        found = key_maps(db, db.sequence("n"))
        keys = all_keys(db, "n", 2)[:, :37].astype(np.float64)
        assert (found.norms.bounds, found.tokens_read) == ((0, 16, 32, 37), 37)
        assert found.norms.values[1][2] == pytest.approx(np.linalg.norm(keys[:, 32:], axis=-1).mean())
        assert found.widths.values[1][2] == pytest.approx(widths_by_record(keys, 16)[2])


@pytest.mark.parametrize("codec", ["int4", "blosc"])
def test_stored_with_a_codec_they_are_of_what_it_gives_back(tmp_path: Path, codec: str) -> None:
    with opened(tmp_path / "a.kvdb") as db:
        extend(db, token_list(200), name="n", abstracts=())
        db.recode("n", CodecPlan.parse(codec))
        found = key_maps(db, db.sequence("n"))
        for row, layer in enumerate(found.norms.rows):
            norms = np.linalg.norm(all_keys(db, "n", layer).astype(np.float64), axis=-1).mean(0)
            wanted = [norms[start:stop].mean() for start, stop in columns(found.norms)]
            assert found.norms.values[row] == pytest.approx(wanted)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Segments of 96 tokens; of the first one a record of layer 2, chunk 3 is damaged."""
    path = tmp_path / "a.kvdb"
    with KVDB.open(path) as db:
        extend(db, token_list(192), name="n", segment_tokens=96)
        info = db.segments(db.sequence("n").spans)[0].info
    heads, row = SMALL.groups[0].kv_heads, SMALL.record_bytes(0)
    flip(
        path / "chunks" / format.kv_array(info.segment, 0) / format.SHARD_KEY,
        ((info.capacity + 3) * heads + 1) * row + 5,
    )
    return path


def test_a_damaged_record_leaves_one_cell_empty(damaged: Path) -> None:
    before = tree_bytes(damaged)
    with KVDB.open(damaged, "r") as db:
        found = key_maps(db, db.sequence("n"))
    assert np.argwhere(np.isnan(cells(found.norms))).tolist() == [[1, 3]]
    assert not np.isnan(cells(found.widths)).any()
    (problem,) = found.problems
    assert "layer 2, chunk 3, head 1" in problem
    assert {k: v for k, v in tree_bytes(damaged).items() if "lock.mdb" not in k} == {
        k: v for k, v in before.items() if "lock.mdb" not in k
    }


def test_a_missing_file_leaves_its_segment_empty(damaged: Path) -> None:
    with KVDB.open(damaged, "r") as db:
        segment = db.sequence("n").spans[1].segment
        (damaged / "chunks" / format.kv_array(segment, 0) / format.SHARD_KEY).unlink()
        (damaged / "chunks" / format.abstract_array(segment, "box", 0) / format.SHARD_KEY).unlink()
        found = key_maps(db, db.sequence("n"))
    assert np.isnan(cells(found.norms)).sum(1).tolist() == [6, 7]
    assert np.isnan(cells(found.widths)).sum(1).tolist() == [6, 6]
    assert len(found.problems) == 3


def test_keys_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    """Hostile, with digests that agree: a NaN and an infinity."""
    with opened(tmp_path / "a.kvdb") as db:
        writer = db.writer(
            identity=identity(), fidelity="exact", geometry=SMALL, parent=None, start=0, capacity=3, abstracts=("box", "sketch")
        )  # fmt: skip
        for layer in SMALL.layers:
            keys = np.full((2, 48, 8), struct.unpack("<H", struct.pack("<f", 1.0)[2:])[0], "<u2")
            keys[0, 3, 1] = 0x7FC0  # NaN
            keys[1, 20, 2] = 0x7F80  # infinity
            writer.append(layer, keys, keys)
        key = db.commit(writer, token_list(48)).sequence
        found = key_maps(db, db.sequence(key))
        for row in range(2):
            assert found.norms.values[row] == pytest.approx((8**0.5,) * 3)  # fifteen tokens of sixteen
            assert found.widths.values[row] == (None, None, 0.0)
