"""Every abstract, as a segment keeps it: what `build` made is what readers get, plane by plane, wherever the segment goes.

A segment here has all abstracts of the table side by side, layers of two shapes and chunk slots that are reserved and never
used. The oracle is `build` itself, over the keys of a whole layer at once, or of each append for abstracts `of_blocks`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import (
    TWO_GROUPS,
    Array,
    assert_healthy,
    assert_reads_back,
    extend,
    flip,
    identity,
    model_kv,
    opened,
    token_list,
    write_segment,
)

from kvdb import KVDB
from kvdb.abstracts import ABSTRACTS, Abstract
from kvdb.errors import Damaged, InvalidInput
from kvdb.format import abstract_array
from kvdb.geometry import as_float32
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.repair import repair
from kvdb.segments import Segment, abstract_layout
from kvdb.untrusted import verify_untrusted

ALL = tuple(ABSTRACTS)
TOKENS = token_list(50)
DTYPE = TWO_GROUPS.dtype

every_abstract = pytest.mark.parametrize("abstract", ABSTRACTS.values(), ids=ABSTRACTS)
every_reader = pytest.mark.parametrize("kind", READERS.values(), ids=READERS)
every_plane = pytest.mark.parametrize(
    ("abstract", "plane"),
    [(a, p) for a in ABSTRACTS.values() for p in range(a.planes)],
    ids=lambda v: getattr(v, "name", v),
)


class Place(NamedTuple):
    root: Path
    segment: Segment

    def file(self, name: str, group: int = 0) -> Path:
        return self.segment.folder / abstract_array(self.segment.info.segment, name, group) / "c.0.0.0.0.0"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """50 tokens: three chunks and a started one, and two slots to spare."""
    root = tmp_path / "s"
    with opened(root) as db:
        writer = write_segment(db, TOKENS, geometry=TWO_GROUPS, spare=2, abstracts=ALL, append_tokens=32)
        segment = db.commit(writer, TOKENS).segment
        db.put_sequence(segment, len(TOKENS), name="n")
    return Place(root, segment)


def built(abstract: Abstract, tokens: Array, layer: int, starts: tuple[int, ...] = (0, 32)) -> Array:
    """The stored bytes of a layer's abstract, (planes, chunks, kv_heads, row_bytes), of runs that were appended from `starts` on, each
    up to the end of the chunk the next one starts in."""
    both = as_float32(np.stack(model_kv(TWO_GROUPS, tokens, 0, len(tokens), salt="exact")[layer]), DTYPE)
    _, heads, count, dim = both.shape
    chunks = TWO_GROUPS.chunks(count)
    padded = np.zeros((2, heads, chunks * 16, dim), np.float32)
    padded[:, :, :count] = both
    keys, values = padded.reshape(2, heads, chunks, 16, dim)
    if not abstract.of_blocks:
        return abstract.build(keys, count, DTYPE, values)
    rows = []
    for start, after in pairwise((*starts, count)):
        run, kept = slice(start // 16, -(-after // 16)), -(-after // 16) if after == count else after // 16
        rows.append(
            abstract.build(keys[:, run], after - start // 16 * 16, DTYPE, values[:, run])[:, : kept - start // 16]
        )
    return np.concatenate(rows, 1)


def dim_of(layer: int) -> int:
    return TWO_GROUPS.groups[TWO_GROUPS.locate(layer)[0]].head_dim


def assert_all_are(reader: Reader, segment: Segment, tokens: Array, starts: tuple[int, ...] = (0, 32)) -> None:
    for name, abstract in ABSTRACTS.items():
        for layer in TWO_GROUPS.layers:
            expected = built(abstract, tokens, layer, starts)
            assert np.array_equal(reader.stored_abstract(segment, name, layer), expected)
            for planes in range(1, abstract.planes + 1):
                assert np.array_equal(reader.stored_abstract(segment, name, layer, planes), expected[:planes])
                loaded = abstract.load(expected[:planes], dim_of(layer), DTYPE)
                assert np.array_equal(reader.abstract(segment, name, layer, planes), loaded)
            loaded = abstract.load(expected, dim_of(layer), DTYPE)
            assert np.array_equal(reader.abstract(segment, name, layer), loaded)


@every_reader
def test_a_reader_gets_the_first_planes_as_they_were_built(place: Place, kind: type[Reader]) -> None:
    reader = kind("always")
    assert_all_are(reader, place.segment, TOKENS)
    reader.close()


def test_an_abstract_can_be_read_before_its_segment_is_sealed(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer, reader = write_segment(db, TOKENS, geometry=TWO_GROUPS, abstracts=ALL), db.reader()
        assert_all_are(reader, writer.segment, TOKENS, (0,))
        reader.close()
        writer.discard()


@every_abstract
def test_the_file_is_layer_after_layer_and_plane_after_plane(place: Place, abstract: Abstract) -> None:
    info = place.segment.info
    for group, g in enumerate(TWO_GROUPS.groups):
        data = np.frombuffer(place.file(abstract.name, group).read_bytes(), np.uint8)
        assert len(data) == abstract_layout(info, group, abstract.name).file_bytes
        shaped = data.reshape(len(g.layers), abstract.planes, info.capacity, g.kv_heads, -1)
        for row, layer in enumerate(g.layers):
            assert np.array_equal(shaped[row, :, : info.chunks], built(abstract, TOKENS, layer))
            assert not shaped[row, :, info.chunks :].any()


@every_reader
@every_plane
@pytest.mark.parametrize("layer", [0, 3])
def test_a_flipped_bit_is_found_by_whoever_reads_its_plane_and_by_nobody_else(
    place: Place, kind: type[Reader], abstract: Abstract, plane: int, layer: int
) -> None:
    sizes = abstract_layout(place.segment.info, 0, abstract.name)
    row = TWO_GROUPS.locate(layer)[1]
    start = row * sizes.layer_bytes + plane * sizes.plane_bytes
    flip(place.file(abstract.name), start + 5)
    reader = kind()
    for planes in range(1, abstract.planes + 1):
        if planes <= plane:
            assert np.array_equal(
                reader.stored_abstract(place.segment, abstract.name, layer, planes),
                built(abstract, TOKENS, layer)[:planes],
            )
        else:
            with pytest.raises(Damaged, match=rf"layer {layer}, {abstract.name} abstract, .*, offset {start}: xxh3 is"):
                reader.stored_abstract(place.segment, abstract.name, layer, planes)
    other = 3 - layer
    assert np.array_equal(reader.stored_abstract(place.segment, abstract.name, other), built(abstract, TOKENS, other))
    reader.close()
    careless = kind("never")
    careless.abstract(place.segment, abstract.name, layer)
    careless.close()
    with KVDB.open(place.root, "r") as db:
        (problem,) = db.check()
        assert (problem.kind, problem.segment) == ("abstract", place.segment.info.segment)
        assert problem.loc.endswith(f"layer {layer}, plane {plane}, offset {start}")


@pytest.fixture(params=READERS.values(), ids=READERS)
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    found: Reader = request.param()
    yield found
    found.close()


@every_abstract
def test_planes_that_an_abstract_does_not_have_are_refused(place: Place, reader: Reader, abstract: Abstract) -> None:
    for planes in (-1, 0, abstract.planes + 1):
        with pytest.raises(
            InvalidInput, match=rf"{planes} planes of its {abstract.name}, expected 1\.\.{abstract.planes}"
        ):
            reader.abstract(place.segment, abstract.name, 0, planes)


def test_an_abstract_that_a_segment_does_not_have_is_refused(tmp_path: Path, reader: Reader) -> None:
    with opened(tmp_path / "s") as db:
        segment = extend(db, TOKENS, geometry=TWO_GROUPS).last
        for name in ("sketch", "median"):
            with pytest.raises(InvalidInput, match=rf"abstract '{name}', expected one of \('box',\)"):
                reader.abstract(segment, name, 0)


@every_abstract
def test_an_abstract_cut_inside_a_plane_still_has_the_planes_before(
    place: Place, reader: Reader, abstract: Abstract
) -> None:
    sizes = abstract_layout(place.segment.info, 0, abstract.name)
    path = place.file(abstract.name)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match=f"layer 3, {abstract.name} abstract.*expected {sizes.layer_bytes}"):
        reader.abstract(place.segment, abstract.name, 3)
    for planes in range(1, abstract.planes):
        found = reader.stored_abstract(place.segment, abstract.name, 3, planes)
        assert np.array_equal(found, built(abstract, TOKENS, 3)[:planes])


@pytest.mark.parametrize("turn", [16, 20])
def test_compaction_carries_abstracts_over_and_builds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    tokens = token_list(100)
    with opened(tmp_path / "s") as db:
        parent, start = None, 0
        for stop in range(turn, 101, turn):
            writer = write_segment(
                db, tokens[:stop], start=start, parent=parent, geometry=TWO_GROUPS, abstracts=ALL, spare=1
            )
            last = db.commit(writer, tokens[start:stop]).segment
            parent, start = last.info.segment, TWO_GROUPS.grid_floor(stop)
        stop = last.info.stop
        db.put_sequence(last, stop, name="n")
        for abstract in ABSTRACTS.values():
            monkeypatch.setattr(type(abstract), "build", None)
        assert db.compact("n") == 100 // turn - 1
        monkeypatch.undo()
        spans = db.sequence("n").spans
        assert_reads_back(db, tokens[:stop], spans)
        (segment,) = db.segments(spans)
        reader = db.reader()
        assert_all_are(reader, segment, tokens[:stop], tuple(range(0, stop, turn)))
        reader.close()


@every_abstract
def test_compaction_refuses_a_damaged_plane(tmp_path: Path, abstract: Abstract) -> None:
    tokens, parent = token_list(32), None
    with KVDB.open(tmp_path / "s") as db:
        for start in (0, 16):
            writer = write_segment(db, tokens[: start + 16], start=start, parent=parent, abstracts=ALL)
            last = db.commit(writer, tokens[start : start + 16]).segment
            parent = last.info.segment
        array = abstract_array(last.info.segment, abstract.name, 0)
        flip(last.folder / array / "c.0.0.0.0.0", abstract_layout(last.info, 0, abstract.name).layer_bytes - 1)
        with pytest.raises(Damaged, match=f"{abstract.name} abstract"):
            db.compact()
        assert len(db.check()) == 1


def test_an_export_carries_abstracts_and_an_import_checks_them(place: Place, tmp_path: Path) -> None:
    with opened(place.root) as db:
        db.export_sequence("n", tmp_path / "one.zip")
    with opened(tmp_path / "other") as db:
        db.import_sequence(tmp_path / "one.zip")
        (segment,) = db.segments(db.sequence("n").spans)
        assert segment.info.abstracts == ALL
        reader = db.reader()
        assert_all_are(reader, segment, TOKENS)
        reader.close()


@every_plane
def test_a_damaged_plane_is_neither_exported_nor_imported(
    place: Place, tmp_path: Path, abstract: Abstract, plane: int
) -> None:
    offset = plane * abstract_layout(place.segment.info, 0, abstract.name).plane_bytes
    with opened(place.root) as db:
        db.export_sequence("n", tmp_path / "one.zip")
    member = f"{abstract_array(place.segment.info.segment, abstract.name, 0)}/c.0.0.0.0.0"
    with zipfile.ZipFile(tmp_path / "one.zip") as one, zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        for name in one.namelist():
            data = bytearray(one.read(name))
            if name == member:
                data[offset] ^= 1
            other.writestr(name, bytes(data))
    with opened(tmp_path / "other") as db:
        with pytest.raises(Damaged, match=f"layer 0, plane {plane}.*nothing was imported"):
            db.import_sequence(tmp_path / "other.zip")
        assert db.sequences() == []
    flip(place.file(abstract.name), offset)
    with KVDB.open(place.root) as db, pytest.raises(Damaged, match=f"layer 0, plane {plane}.*nothing was exported"):
        db.export_sequence("n", tmp_path / "again.zip")


def test_a_catalog_made_anew_knows_every_abstract(place: Place) -> None:
    assert repair(place.root, apply=True, rebuild=True).remaining == []
    with opened(place.root) as db:
        (segment,) = db.segments(db.match(identity(), TOKENS).spans)
        assert (segment.info, segment.seals) == (place.segment.info, place.segment.seals)
        reader = db.reader()
        assert_all_are(reader, segment, TOKENS)
        reader.close()


def test_somebody_elses_store_with_every_abstract_can_be_looked_at(place: Place) -> None:
    assert verify_untrusted(place.root) == []
    flip(place.file("sketch", 1), 200)
    assert [problem.kind for problem in verify_untrusted(place.root)] == ["abstract"]


def test_a_writer_that_gives_up_layers_that_are_ahead_seals_their_abstracts(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = write_segment(db, TOKENS[:48], geometry=TWO_GROUPS, abstracts=ALL, append_tokens=16)
        writer.keep(32)
        segment, reader = db.commit(writer, TOKENS[:32]).segment, db.reader()
        db.put_sequence(segment, 32)
        assert_all_are(reader, segment, TOKENS[:32], (0, 16))
        reader.close()
        assert_healthy(db)
