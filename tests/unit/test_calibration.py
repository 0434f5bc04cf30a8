"""A store is read in the way that suits it where it lies."""

from __future__ import annotations

import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TWO_GROUPS, assert_healthy, assert_reads_back, extend, takes_direct, token_list

from kvdb import KVDB, calibration, files
from kvdb.calibration import way_to_read
from kvdb.errors import InvalidInput, Unsupported
from kvdb.options import Options
from kvdb.requests import REQUESTS


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    shard = tmp_path / "chunks" / "a.kv0" / "c.0.0.0.0.0"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(range(256)) * (16 << 10))
    return tmp_path / "chunks"


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "available_bytes", lambda: 1 << 20)


def times(monkeypatch: pytest.MonkeyPatch, direct: float, mapped: float) -> None:
    monkeypatch.setattr(calibration, "_timed", lambda _, read: direct if read is calibration._direct else mapped)


def test_what_fits_into_memory_is_mapped(chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "available_bytes", lambda: 5 << 20)
    assert way_to_read(chunks, 5 << 20) == ("mmap", "5 MiB of KV fit into 5 MiB of memory", True)


@pytest.mark.parametrize(("direct", "mapped"), [(0.001, 0.002), (0.002, 0.001)])
def test_of_what_does_not_fit_the_faster_way_is_taken(
    chunks: Path, monkeypatch: pytest.MonkeyPatch, direct: float, mapped: float
) -> None:
    no_memory(monkeypatch)
    times(monkeypatch, direct, mapped)
    name, why, _ = way_to_read(chunks, 4 << 20)
    assert name == ("direct" if direct < mapped else "mmap")
    assert why.startswith("4 MiB of KV do not fit into 1 MiB of memory; 48 reads take ")
    assert f"{1e3 * direct:.1f} ms past" in why


def test_both_ways_are_tried_on_a_shard(chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not takes_direct(chunks):
        pytest.skip("no O_DIRECT here")
    no_memory(monkeypatch)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    assert "past the page cache" in way_to_read(chunks, 4 << 20).why
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_where_nothing_can_be_tried_it_is_mapped(tmp_path: Path, chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory(monkeypatch)
    assert way_to_read(tmp_path / "none", 4 << 20).name == "mmap"

    def refuse(*_: object) -> Any:
        raise Unsupported("no O_DIRECT")

    monkeypatch.setattr(files, "make_direct", refuse)
    assert way_to_read(chunks, 4 << 20) == ("mmap", "4 MiB of KV do not fit into 1 MiB of memory; no O_DIRECT", False)


def test_network_file_systems_are_not_mapped(chunks: Path, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nhost:/x {chunks} nfs4 rw 0 0\n")
    assert way_to_read(chunks, 1, mounts) == ("pread", "nfs4 is a network file system", False)
    assert way_to_read(tmp_path, 1, mounts).name == "mmap"
    assert way_to_read(chunks, 1, tmp_path / "none").name == "mmap"


def test_a_network_file_system_is_found_on_top_of_others_and_under_any_name(tmp_path: Path) -> None:
    mounts, place = tmp_path / "mounts", tmp_path / "données et autres"
    (place / "chunks").mkdir(parents=True)
    escaped = str(place).replace(" ", "\\040")
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nsystemd-1 {escaped} autofs rw 0 0\nhost:/x {escaped} nfs4 rw 0 0\n")
    assert way_to_read(place / "chunks", 1, mounts).name == "pread"


def test_reads_that_fail_are_not_taken_for_fast_ones(chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not takes_direct(chunks):
        pytest.skip("no O_DIRECT here")
    no_memory(monkeypatch)
    for kind in REQUESTS.values():

        def wait(self: Any, *args: Any, real: Any = kind.wait, **options: Any) -> Any:
            return np.full_like(real(self, *args, **options), -22)

        monkeypatch.setattr(kind, "wait", wait)
    name, why, _ = way_to_read(chunks, 4 << 20)
    assert name == "mmap"
    assert "reads past the page cache give [-22], expected 16384" in why


def test_a_shard_that_goes_meanwhile_is_passed_over(chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory(monkeypatch)
    (chunks / "b.kv0").mkdir()
    (chunks / "b.kv0" / "c.0.0.0.0.0").symlink_to(chunks / "gone")
    times(monkeypatch, 1, 2)
    assert way_to_read(chunks, 4 << 20).name == "direct"


def test_other_systems_read_by_position(chunks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert way_to_read(chunks, 1).name == "pread"


def test_a_store_that_does_not_fit_is_opened_accordingly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = token_list(200)
    with KVDB.open(tmp_path / "s") as db:
        extend(db, tokens, geometry=TWO_GROUPS, name="n")
        assert (db.info()["read_mode"], db.host) == ("mmap", None)
        assert "fit into" in db.info()["why_read_mode"]
    if not takes_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    monkeypatch.setattr("kvdb.reading.way_to_read", lambda chunks, stored: calibration.Way("direct", "because"))
    with KVDB.open(tmp_path / "s", host_budget="1MiB") as db:
        assert (db.info()["read_mode"], db.info()["why_read_mode"]) == ("direct", "because")
        assert db.host is not None
        assert db.host.budget_bytes == 1 << 20
        assert_reads_back(db, tokens, db.sequence("n").spans)
        assert db.host.stats()["misses"]
        assert_healthy(db)


def test_a_store_that_fits_no_more_is_read_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided for readers that are made from then on, once: an open one goes on as it began."""
    if not takes_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    available, asked = [1 << 30], list[int]()

    def way(chunks: Path, stored: int) -> calibration.Way:
        asked.append(stored)
        fits = stored <= available[0]
        return calibration.Way("mmap" if fits else "direct", f"{stored} of {available[0]}", fits)

    monkeypatch.setattr("kvdb.reading.way_to_read", way)
    monkeypatch.setattr("kvdb.reading.available_bytes", lambda: available[0])
    tokens = token_list(200)
    with KVDB.open(tmp_path / "s", host_budget="1MiB") as db:
        assert asked == [0]
        extend(db, tokens, geometry=TWO_GROUPS, name="n")
        with contextlib.closing(db.reader()) as before:
            assert (before.name, db.read_mode, len(asked)) == ("mmap", "mmap", 1)
            available[0] = db.info()["disk_bytes"] - 1
            with contextlib.closing(db.reader()) as after:
                assert (after.name, db.read_mode) == ("direct", "direct")
            assert asked == [0, available[0] + 1]
            available[0] = 1 << 30
            with contextlib.closing(db.reader()) as later:
                assert later.name == "direct"
            assert len(asked) == 2
            segment = db.segments(db.sequence("n").spans)[0]
            records, out = np.arange(2), np.empty((2, 2, 16, 80), np.float16)
            before.open(segment)
            before.read(segment, 0, records, out)
        assert_reads_back(db, tokens, db.sequence("n").spans)
        assert_healthy(db)


def test_of_many_threads_that_ask_at_once_one_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def way(chunks: Path, stored: int) -> calibration.Way:
        asked.append(stored)
        time.sleep(0.05 * (len(asked) > 1))
        return calibration.Way("mmap", "because", len(asked) == 1)

    monkeypatch.setattr("kvdb.reading.way_to_read", way)
    with KVDB.open(tmp_path / "s") as db, ThreadPoolExecutor(8) as threads:
        extend(db, token_list(64), geometry=TWO_GROUPS, name="n")
        monkeypatch.setattr("kvdb.reading.available_bytes", lambda: 0)
        for reader in threads.map(lambda _: db.reader(), range(8)):
            reader.close()
    assert len(asked) == 2


def test_options_are_checked() -> None:
    assert Options(mode="a").read_mode == "auto"
    with pytest.raises(InvalidInput, match="host_budget is 5 with read_mode 'mmap'"):
        Options(mode="a", read_mode="mmap", host_budget=5)
