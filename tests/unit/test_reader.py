"""Every reader: bytes asked for are delivered and counted, or an error names where."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import TWO_GROUPS, Array, assert_healthy, extend, flip, model_kv, read_kv, skip_where_refused, token_list
from hypothesis import given
from hypothesis import strategies as st

from kvdb import KVDB, files
from kvdb.errors import Damaged, InvalidInput
from kvdb.geometry import as_float32
from kvdb.mapped import MmapReader, _resident, _runs
from kvdb.reader import Reader, Verified, Wanted
from kvdb.readers import READERS
from kvdb.segments import Segment, layout

TOKENS = token_list(50)


@pytest.fixture
def segment(tmp_path: Path) -> Iterator[Segment]:
    with KVDB.open(tmp_path / "s") as db:
        yield extend(db, TOKENS, geometry=TWO_GROUPS, spare=2).last


@pytest.fixture(params=READERS.values(), ids=READERS)
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reader]:
    skip_where_refused(request.param, tmp_path)
    found: Reader = request.param()
    yield found
    found.close()
    found.close()


def shard(segment: Segment, group: int) -> Path:
    return segment.folder / f"{segment.info.segment}.kv{group}" / "c.0.0.0.0.0"


def test_records_come_in_the_order_asked_for_and_may_repeat(segment: Segment, reader: Reader) -> None:
    keys, values = model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact")[3]
    records = np.array([13, 0, 13, 7])
    out = np.full((2, 4, 16, 80), 7, "<f2")
    reader.read(segment, 3, records, out)
    for i, (chunk, head) in enumerate(divmod(r, 5) for r in records.tolist()):
        assert np.array_equal(out[0, i], keys[head, chunk * 16 : chunk * 16 + 16])
        assert np.array_equal(out[1, i], values[head, chunk * 16 : chunk * 16 + 16])
    assert reader.bytes_read == 4 * 2 * 16 * 80 * 2


def test_padding_of_the_last_chunk_is_zeros(segment: Segment, reader: Reader) -> None:
    out = np.full((2, 1, 16, 24), 7, "<f2")
    reader.read(segment, 1, np.array([3]), out)
    assert not out[:, :, 2:].any()
    assert out[:, :, :2].any()


def test_no_records_cost_nothing(segment: Segment, reader: Reader) -> None:
    reader.read(segment, 0, np.empty(0, np.int64), np.empty((2, 0, 16, 80), "<f2"))
    assert reader.bytes_read == 0


@pytest.mark.parametrize("record", [-1, 4 * 5, 10**9])
def test_a_record_outside_the_segment_is_refused(segment: Segment, reader: Reader, record: int) -> None:
    with pytest.raises(InvalidInput, match=r"records .*expected 0\.\.19"):
        reader.read(segment, 0, np.array([record]), np.empty((2, 1, 16, 80), "<f2"))


def test_a_layer_without_kv_is_refused(segment: Segment, reader: Reader) -> None:
    with pytest.raises(InvalidInput, match="layer 2: not stored"):
        reader.read(segment, 2, np.array([0]), np.empty((2, 1, 16, 80), "<f2"))


def test_the_box_of_each_record_is_its_least_and_greatest_key(segment: Segment, reader: Reader) -> None:
    for layer, (keys, _) in model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact").items():
        box = reader.abstract(segment, "box", layer)
        exact = as_float32(keys, "float16")
        for chunk in range(4):
            part = exact[:, chunk * 16 : chunk * 16 + 16]
            assert np.array_equal(box[chunk, :, 0], part.min(axis=1))
            assert np.array_equal(box[chunk, :, 1], part.max(axis=1))


@pytest.mark.parametrize("group", [0, 1])
def test_a_missing_shard_is_damage_and_names_segment_layer_and_file(
    segment: Segment, reader: Reader, group: int
) -> None:
    shard(segment, group).unlink()
    with pytest.raises(Damaged, match=rf"segment {segment.info.segment}, layer {group}, file {shard(segment, group)}"):
        reader.open(segment)


@pytest.mark.parametrize(("kept", "layer"), [(0.0, 0), (0.4, 0), (0.6, 3)])
def test_a_truncated_shard_is_damage_and_names_the_first_layer_cut(
    segment: Segment, reader: Reader, kept: float, layer: int
) -> None:
    path = shard(segment, 0)
    size = int(layout(segment.info, 0).payload_bytes * kept)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Damaged, match=rf"layer {layer}, file {path}: {size} bytes"):
        reader.read(segment, 0, np.array([0]), np.empty((2, 1, 16, 80), "<f2"))


def test_an_abstract_that_is_missing_or_short_is_damage(segment: Segment, reader: Reader) -> None:
    path = segment.folder / f"{segment.info.segment}.box0" / "c.0.0.0.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Damaged, match="layer 3, box abstract"):
        reader.abstract(segment, "box", 3)
    reader.close()
    path.unlink()
    with pytest.raises(Damaged, match=rf"file {path}: No such file"):
        reader.abstract(segment, "box", 0)


def test_an_open_reader_keeps_its_bytes_when_the_sequence_is_deleted(tmp_path: Path, reader: Reader) -> None:
    with KVDB.open(tmp_path / "s") as db:
        stored = extend(db, TOKENS, geometry=TWO_GROUPS)
        reader.open(stored.last)
        db.delete(stored.key)
        db.gc()  # not only its entry: the files are gone
        assert not list(tmp_path.rglob("c.0.0.0.0.0"))
        for layer, (keys, _) in model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact").items():
            assert np.array_equal(read_kv(reader, stored.last, layer, 50)[0], keys)
        reader.forget(stored.last.info.segment)
        with pytest.raises(Damaged):
            reader.open(stored.last)
        assert_healthy(db)


@pytest.mark.parametrize("still_there", [True, False])
def test_after_page_faults_the_kernel_is_asked_what_it_has(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, still_there: bool
) -> None:
    """Only then, and until it has had everything for a while; and what it has not is asked for together."""
    monkeypatch.setattr(MmapReader, "DOUBTS", 3)
    faults, asked, populated = 0, 0, 0
    real = files.populate

    def resident_pages(_: object, offset: int, count: int) -> Array:
        nonlocal asked
        asked += 1
        return np.full(count, still_there)

    def populate(*place: Any) -> None:
        nonlocal populated
        populated += 1
        real(*place)

    monkeypatch.setattr(files, "resident_pages", resident_pages)
    monkeypatch.setattr(files, "populate", populate)
    monkeypatch.setattr(files, "major_faults", lambda: faults)
    reader, counts = MmapReader(), []
    for step in range(10):
        faults += step == 4
        asked = populated = 0
        keys = read_kv(reader, segment, 0, 50)[0]
        assert np.array_equal(keys, model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact")[0][0])
        counts.append((asked > 0, populated > 0))
    reader.close()
    doubts = [(True, False)] * 3 + [(False, False)] * 3 if still_there else [(True, True)] * 6
    assert counts == [(True, True)] + [(False, False)] * 3 + doubts


@pytest.mark.parametrize("doubted", [False, True])
def test_what_could_not_be_brought_is_tried_again_where_it_can_fail(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, doubted: bool
) -> None:
    """And never taken for seen: touching it would end the process."""
    real, calls = files.populate, 0

    def populate(*place: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise OSError(errno.EFAULT, "Bad address")
        real(*place)

    reader = MmapReader()
    reader.open(segment)
    reader._doubts = 50 * doubted
    monkeypatch.setattr(files, "populate", populate)
    monkeypatch.setattr(files, "resident_pages", lambda _, offset, count: np.ones(count, bool))  # it may say so
    for _ in range(2):
        with pytest.raises(Damaged, match="Bad address"):
            read_kv(reader, segment, 0, 50)
    assert np.array_equal(read_kv(reader, segment, 0, 50)[0], model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact")[0][0])
    assert calls == 3
    reader.close()


def test_where_the_kernel_does_not_tell_everything_counts_as_gone(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "tells_residence", lambda fd: False)
    monkeypatch.setattr(files, "resident_pages", lambda *_: pytest.fail("asked"))
    reader = MmapReader()
    for doubts in (0, 5, 5):
        reader._doubts = doubts
        assert np.array_equal(
            read_kv(reader, segment, 0, 50)[0], model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact")[0][0]
        )
    reader.close()


def test_the_kernel_tells_of_files_that_are_ones_own_or_writable(tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        assert files.tells_residence(file.fileno())


def test_the_kernel_knows_what_is_in_memory(tmp_path: Path) -> None:
    path, size = tmp_path / "hole", 1 << 20
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, size)
        with files.mmap(fd, size) as map_:
            assert not files.resident_pages(map_, 0, size // mmap.PAGESIZE).any()
            files.populate(map_, mmap.PAGESIZE, 3 * mmap.PAGESIZE)
            assert files.resident_pages(map_, mmap.PAGESIZE, 3).all()
    finally:
        os.close(fd)


def test_what_is_in_memory_is_lent_while_the_rest_arrives(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked for what is gone before anything is lent, and waited for only when the rest has been used."""
    calls: list[str] = []
    waits, begins = files.populate, files.will_need
    monkeypatch.setattr(files, "populate", lambda *place: (calls.append("waited"), waits(*place)))
    monkeypatch.setattr(files, "will_need", lambda *place: (calls.append("begun"), begins(*place)))
    reader, records = MmapReader(), np.array([7, 0, 19, 3, 0])
    whole = reader.rows(segment, 0, records)  # has seen them all
    row, gone = whole.shape[1], {0, 19}

    def resident_pages(_: object, offset: int, count: int) -> Array:
        away = {
            page for n in gone for page in range(n * row // mmap.PAGESIZE, ((n + 1) * row - 1) // mmap.PAGESIZE + 1)
        }
        return np.array([offset // mmap.PAGESIZE + page not in away for page in range(count)])

    monkeypatch.setattr(files, "resident_pages", resident_pages)
    reader._doubts, expected = 9, {"late": [1, 2, 4], "there": [0, 3]}
    calls.clear()
    parts = reader.lend(0, [Wanted(segment, records)])
    stored, which, of = next(parts)
    assert (of.tolist(), set(calls)) == (expected["there"], {"begun"})
    assert np.array_equal(stored[which].view(np.uint8), whole[[0, 3]])
    stored, which, of = next(parts)
    assert of.tolist() == expected["late"]
    assert "waited" in calls
    assert np.array_equal(stored[which].view(np.uint8), whole[[1, 2, 4]])
    assert next(parts, None) is None
    reader.close()


def test_what_is_expected_is_begun_and_not_waited_for(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not taken for seen: it may fail."""
    begun: list[int] = []
    monkeypatch.setattr(files, "will_need", lambda _, offset, length: begun.append(length))
    monkeypatch.setattr(files, "resident_pages", lambda _, offset, count: np.zeros(count, bool))
    reader = MmapReader()
    with monkeypatch.context() as waiting:
        waiting.setattr(files, "populate", lambda *_: pytest.fail("waited"))
        reader.expect(0, [Wanted(segment, np.arange(5))])
        reader.expect(0, [Wanted(segment, np.arange(0))])
    assert sum(begun) >= 5 * reader.rows(segment, 0, np.arange(1)).nbytes
    assert not reader._open[segment.info.segment, 0].seen[1:5].any()
    with pytest.raises(InvalidInput, match=r"records 99\.\.99"):
        reader.expect(0, [Wanted(segment, np.array([99]))])
    reader.close()


@given(
    rows=st.sets(st.integers(0, 3000), min_size=1, max_size=40),
    row=st.sampled_from([100, 4096, 5000, 20_000]),
    seed=st.integers(0, 99),
)
def test_rows_are_in_memory_whose_pages_all_are(rows: set[int], row: int, seed: int) -> None:
    """However far apart; and those that are not are told as runs that cover them and nothing more than the beginning of a page."""
    there = np.random.default_rng(seed).random(3001 * row // mmap.PAGESIZE + 2) < 0.9
    array: Any = SimpleNamespace(base=object(), row=row, told=True)
    wanted = np.array(sorted(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            files,
            "resident_pages",
            lambda _, offset, count: there[offset // mmap.PAGESIZE : offset // mmap.PAGESIZE + count],
        )
        found = _resident(array, wanted)
    for i, number in enumerate(wanted.tolist()):
        first, last = number * row // mmap.PAGESIZE, ((number + 1) * row - 1) // mmap.PAGESIZE
        assert found[i] == there[first : last + 1].all()
    runs = _runs(wanted, row)
    assert all(start % mmap.PAGESIZE == 0 for start, _ in runs)
    covered = {n for n in range(3001) if any(start <= n * row and (n + 1) * row <= stop for start, stop in runs)}
    assert rows <= covered
    assert all(any(stop == (n + 1) * row for n in rows) for _, stop in runs)
    assert len(runs) == sum(n + 1 not in rows for n in rows)


def read_one(reader: Reader, segment: Segment) -> None:
    """Record (chunk 2, head 3) of layer 3."""
    reader.read(segment, 3, np.array([2 * 5 + 3]), np.empty((2, 1, 16, 80), "<f2"))


def place_of_one(segment: Segment) -> int:
    """Where its bytes begin: layer 3 is row 1 of group 0."""
    return ((segment.info.capacity + 2) * 5 + 3) * TWO_GROUPS.record_bytes(0)


@pytest.mark.parametrize("kind", READERS.values(), ids=READERS)
@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_damaged_record_is_told_with_its_place_and_both_digests(
    segment: Segment, kind: type[Reader], verify: str
) -> None:
    skip_where_refused(kind, segment.folder)
    path, at = shard(segment, 0), place_of_one(segment)
    flip(path, at + 77, bit=3)
    reader = kind(verify)
    with pytest.raises(
        Damaged,
        match=rf"segment {segment.info.segment}, layer 3, chunk 2, head 3, file {path}, offset {at}: "
        r"xxh3 is 0x[0-9a-f]{16}, expected 0x[0-9a-f]{16}",
    ):
        read_one(reader, segment)
    keys, _ = read_kv(reader, segment, 0, 50)  # a layer that is not damaged
    assert np.array_equal(keys, model_kv(TWO_GROUPS, TOKENS, 0, 50, salt="exact")[0][0])
    reader.close()


@pytest.mark.parametrize("kind", READERS.values(), ids=READERS)
def test_records_are_verified_as_often_as_was_asked_for(segment: Segment, kind: type[Reader]) -> None:
    skip_where_refused(kind, segment.folder)
    verified = Verified()
    first, again, always, never = (kind(v, verified) for v in ("first", "first", "always", "never"))
    another_handles = kind("first")
    for reader in (first, again, always, never):
        read_one(reader, segment)
    flip_in_place(shard(segment, 0), place_of_one(segment))
    always.forget(segment.info.segment)  # what it has in memory of its own is not damaged
    for trusting in (first, again, never):  # verified once for all readers of a handle
        read_one(trusting, segment)
    with pytest.raises(Damaged, match="chunk 2, head 3"):
        read_one(always, segment)
    with pytest.raises(Damaged, match="chunk 2, head 3"):
        read_one(another_handles, segment)
    for reader in (first, again, always, never, another_handles):
        reader.close()


def flip_in_place(path: Path, offset: int) -> None:
    """As `helpers.flip`, for a file that is open."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("section", ["digests", "abstract"])
def test_digests_that_do_not_match_their_seal_are_damage(segment: Segment, reader: Reader, section: str) -> None:
    if section == "digests":
        flip(shard(segment, 0), layout(segment.info, 0).digests_offset + 8)
        with pytest.raises(Damaged, match="digests at"):
            reader.open(segment)
    else:
        path = segment.folder / f"{segment.info.segment}.box0"
        flip(path / "c.0.0.0.0.0", 3)
        with pytest.raises(Damaged, match="layer 0, box abstract"):
            reader.abstract(segment, "box", 0)


def test_a_file_cut_after_it_was_opened_is_damage_on_first_touch(segment: Segment, reader: Reader) -> None:
    reader.open(segment)
    os.truncate(shard(segment, 0), 4096)
    with pytest.raises(Damaged, match=str(shard(segment, 0))):
        read_one(reader, segment)
