"""Damaged stores: check() finds and names it, readers refuse what is missing or short, other sequences still read.

`check` compares every byte with a digest or with what the catalog says, so any flipped bit in any file but LMDB's own pages is
found; the place it names is the place that was flipped. LMDB's entries have their own test (unit/test_catalog.py).

Below that, seeded trials damage any file of a store in any way; `damage.py` says how, and judges them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from faults.forked import Ended, trials
from faults.tally import Tally, counts
from faults.workload import Violation
from helpers import (
    TWO_GROUPS,
    assert_healthy,
    assert_reads_back,
    extend,
    finish,
    flip,
    identity,
    opened,
    python,
    skip_where_refused,
    token_list,
)
from hypothesis import given
from hypothesis import strategies as st

from kvdb import KVDB, format
from kvdb.errors import Damaged
from kvdb.format import SegmentInfo
from kvdb.readers import READERS
from kvdb.segments import layout

GOOD, BAD = token_list(40, 1), token_list(50)


class Case:
    """A store with one sequence to be damaged and one to stay whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with opened(root) as db:
            extend(db, GOOD, name="good", geometry=TWO_GROUPS)
            self.info: SegmentInfo = extend(db, BAD, name="bad", geometry=TWO_GROUPS, spare=1).last.info

    def copy(self, target: Path) -> Path:
        return Path(shutil.copytree(self.root, target))

    def file(self, root: Path, array: str, name: str = "c.0.0.0.0.0") -> Path:
        return root / "chunks" / f"{self.info.segment}.{array}" / name


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("damage") / "s")


def find_flip(case: Case, root: Path, group: int, offset: int, bit: int) -> None:
    """The judge: a flip in the payload is found, alone, and named by segment, layer, chunk, head and offset."""
    path = case.file(root, f"kv{group}")
    flip(path, offset, bit)
    g = TWO_GROUPS.groups[group]
    row = TWO_GROUPS.record_bytes(group)
    chunk_of_layer, head = divmod(offset // row, g.kv_heads)
    layer_row, chunk = divmod(chunk_of_layer, case.info.capacity)
    with KVDB.open(root, "r") as db:
        problems = db.check()
        assert [p.kind for p in problems] == ["record"]
        where = f"layer {g.layers[layer_row]}, chunk {chunk}, head {head}, offset {offset // row * row}"
        assert problems[0].loc == f"segment {case.info.segment}, file {path}, {where}"
        assert re.fullmatch(r"xxh3 is 0x[0-9a-f]{16}, expected 0x[0-9a-f]{16}", problems[0].message)
        assert_reads_back(db, GOOD, db.sequence("good").spans)
    flip(path, offset, bit)


@given(data=st.data(), group=st.integers(0, 1), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_record_is_found_and_named(case: Case, data: st.DataObject, group: int, bit: int) -> None:
    g, row = TWO_GROUPS.groups[group], TWO_GROUPS.record_bytes(group)
    layer = data.draw(st.integers(0, len(g.layers) - 1))
    inside = data.draw(st.integers(0, case.info.chunks * g.kv_heads * row - 1))
    find_flip(case, case.root, group, layer * case.info.capacity * g.kv_heads * row + inside, bit)


def test_the_judge_sees_that_digests_are_not_compared(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvdb.check._check_shard", lambda *_: iter(()))
    with pytest.raises(AssertionError):
        find_flip(case, case.copy(tmp_path / "s"), 0, 0, 0)


def test_the_judge_sees_that_digests_are_not_bound_to_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap_records(root: Path) -> list[str]:
        case = Case(root)
        path, row = case.file(root, "kv0"), TWO_GROUPS.record_bytes(0)
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        digests = data[layout(case.info, 0).digests_offset :].view()
        for array, step in ((data, row), (digests, 8)):
            array[: 2 * step] = np.concatenate((array[step : 2 * step], array[:step])).copy()
        path.write_bytes(data.tobytes())
        metadata = case.file(root, "kv0", "zarr.json")
        old = re.search(rb'"digests": \[\s*\d+,\s*\d+,\s*"(\w+)"', metadata.read_bytes())
        assert old is not None
        records = len(TWO_GROUPS.groups[0].layers) * case.info.capacity * TWO_GROUPS.groups[0].kv_heads
        new = xxhash.xxh3_64_hexdigest(digests[: 8 * records].tobytes()).encode()
        metadata.write_bytes(metadata.read_bytes().replace(old[1], new))
        with KVDB.open(root, "r") as db:
            return [p.kind for p in db.check()]

    assert swap_records(tmp_path / "bound") == ["seal", "record", "record"]
    monkeypatch.setattr("kvdb.format.place_seed", lambda segment: 0)
    real = format.record_digests
    monkeypatch.setattr(
        "kvdb.format.record_digests",
        lambda segment, first, rows: np.concatenate([real(segment, 0, r[None]) for r in rows]).astype("<u8"),
    )
    assert swap_records(tmp_path / "unbound") == ["seal"]


@pytest.mark.parametrize("array", ["kv0", "kv1", "box0", "box1"])
def test_a_flipped_bit_anywhere_in_a_data_file_is_found(case: Case, tmp_path: Path, array: str) -> None:
    root = case.copy(tmp_path / "s")
    path = case.file(root, array)
    payload = layout(case.info, int(array[-1])).payload_bytes if array.startswith("kv") else 0
    size = path.stat().st_size
    assert size > payload
    offsets = range(payload, size) if array.startswith("kv") else range(0, size, 97)
    sample = np.random.default_rng(0).permutation(list(offsets))[:40].tolist()
    for offset in [*sample, size - 1]:
        flip(path, offset, offset % 8)
        with KVDB.open(root, "r") as db:
            assert any(str(path) in p.loc for p in db.check()), offset
        flip(path, offset, offset % 8)
    with KVDB.open(root, "r") as db:
        assert_healthy(db)


@pytest.mark.parametrize("array", ["kv0", "kv1", "box0"])
def test_a_flipped_bit_of_metadata_is_found_unless_json_ignores_it(case: Case, tmp_path: Path, array: str) -> None:
    root = case.copy(tmp_path / "s")
    path = case.file(root, array, "zarr.json")
    data = path.read_bytes()
    offsets = [i for i, byte in enumerate(data) if byte not in b" \n"]
    for offset in np.random.default_rng(0).permutation(offsets)[:60].tolist():
        flip(path, offset, offset % 7)
        with KVDB.open(root, "r") as db:
            assert any(p.loc.startswith(f"segment {case.info.segment}") for p in db.check()), offset
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["c.0.0.0.0.0", "zarr.json"])
@pytest.mark.parametrize("array", ["kv0", "kv1", "box0", "box1"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short by one", "long by one"])
def test_a_missing_or_resized_file_is_found(case: Case, tmp_path: Path, array: str, name: str, damage: str) -> None:
    root = case.copy(tmp_path / "s")
    path = case.file(root, array, name)
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "short by one": data[:-1], "long by one": data + b"x"}[damage])
    with KVDB.open(root, "r") as db:
        problems = db.check()
        assert problems
        assert all(p.loc.startswith(f"segment {case.info.segment}, file ") for p in problems)


@pytest.mark.parametrize("read_mode", READERS)
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
@pytest.mark.parametrize("group", [0, 1])
def test_a_missing_or_short_shard_is_refused_and_others_still_read(
    case: Case, tmp_path: Path, group: int, damage: str, read_mode: str
) -> None:
    skip_where_refused(READERS[read_mode], tmp_path)
    root = case.copy(tmp_path / "s")
    path = case.file(root, f"kv{group}")
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[: len(data) // 2] if damage == "half" else b"")
    with KVDB.open(root, "r", read_mode=read_mode) as db:
        reader = db.reader()
        with pytest.raises(Damaged, match=rf"segment {case.info.segment}, layer \d, file {path}: .*expected"):
            reader.open(db.segments(db.sequence("bad").spans)[0])
        reader.close()
        assert_reads_back(db, GOOD, db.sequence("good").spans)
    with opened(root) as db:  # deleting is the way out
        db.delete("bad")
        extend(db, BAD, geometry=TWO_GROUPS, name="bad")
        assert_reads_back(db, BAD, db.match(identity(), BAD).spans)


# -- seeded trials


def damaged(scratch: Path, damage: str, count: int, plant: str = "") -> list[tuple[str, Ended]]:
    """What was done and how the look at it ended, for seeds 0..count."""
    lines = trials("faults.damage", scratch, count, damage, plant)
    return [(f"seed {seed}, {what}", Ended(*ended)) for seed, what, ended in lines]


def judge(tally: Tally, found: list[tuple[str, Ended]]) -> None:
    outcomes: Counter[str] = Counter()
    for point, ended in found:
        violation = None
        if ended.harm is not None:
            violation = Violation(ended.harm, str(ended.answer))
        elif ended.answer["violations"]:
            violation = Violation("torn", "; ".join(ended.answer["violations"][:3]))
        else:
            outcomes[next((o for o in ("error", "miss") if ended.answer["outcome"].get(o)), "correct")] += 1
        tally.add(point, violation)
    tally.name += f" ({outcomes['correct']} read whole, {outcomes['error']} typed errors, {outcomes['miss']} misses)"
    tally.assert_clean(len(found))


@pytest.mark.slow
def test_no_damaged_byte_is_read_nothing_crashes_and_others_read_whole(scratch: Path, tally: Tally) -> None:
    judge(tally, damaged(scratch, "harm", counts(10_000, one_in=30)))


@pytest.mark.slow
def test_what_is_missing_is_never_zeros(scratch: Path, tally: Tally) -> None:
    judge(tally, damaged(scratch, "take away", counts(1_000)))


def test_a_shard_cut_anywhere_is_refused(scratch: Path, tally: Tally) -> None:
    judge(tally, damaged(scratch, "cut", counts(200)))


@pytest.mark.parametrize(("plant", "damage"), [("no digest check", "harm"), ("no size check", "cut")])
def test_the_trials_see_a_planted_bug(scratch: Path, plant: str, damage: str) -> None:
    found = damaged(scratch, damage, 40, plant)
    assert any(ended.harm is not None or ended.answer["violations"] for _, ended in found)


def special(scratch: Path, what: str, plant: str = "") -> Ended:
    code = "import sys; from faults.damage import special; special(*sys.argv[1:])"
    return Ended(*json.loads(finish(python(code, str(scratch), what, plant))))


@pytest.mark.parametrize("read_mode", READERS)
def test_a_shard_cut_after_it_was_opened_is_an_error_at_the_first_touch(scratch: Path, read_mode: str) -> None:
    skip_where_refused(READERS[read_mode], scratch)
    ended = special(scratch, read_mode)
    assert ended.harm is None
    assert re.match(r"segment \w{32}, .*file .*expected", ended.answer)


def test_without_asking_first_it_ends_the_process(scratch: Path) -> None:
    assert special(scratch, "mmap", "no first touch") == ("crashed", "status -7")


def test_a_page_that_lmdb_would_die_of_is_an_error(scratch: Path) -> None:
    ended = special(scratch, "branches")
    assert ended.harm is None
    assert set(ended.answer["outcome"]) == {"error"}
    assert "data.mdb" in ended.answer["problems"][0]


def test_without_the_walk_over_its_pages_it_ends_the_process(scratch: Path) -> None:
    assert special(scratch, "branches", "no page walk").harm == "crashed"
