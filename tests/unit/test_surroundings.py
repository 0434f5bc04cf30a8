"""What a store runs on is what the system says of it, and nothing is written to find out; every advice comes for its reason, and only for it."""

from __future__ import annotations

import errno
import inspect
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import assert_healthy, extend, opened, token_list

from kvdb import KVDB, files, machine, place
from kvdb.advice import MIN_FREE, advise
from kvdb.available import first_version_limit_bytes, group_limit_bytes
from kvdb.errors import InvalidInput, NewerFormat, NotAStore, StoreError, StoreNotFound, Unsupported
from kvdb.machine import Machine, Tried, look_at_machine, numba_cache, versions
from kvdb.mounts import mount_of
from kvdb.place import FsyncCost, Place, fsync_cost, look_at_place
from kvdb.sizes import parse_bytes
from kvdb.surroundings import Accelerator, Reading, Surroundings, look_around

GOOD_MACHINE = Machine(
    system="Linux", kernel="6.18", architecture="x86_64", python="3.11.7", cores=4, usable_cores=4, page_bytes=4096, memory_bytes=8 << 30,
    available_bytes=4 << 30, group_limit_bytes=None, first_version_limit_bytes=None, overcommit=0, huge_pages="madvise",
    io_uring=Tried(True), in_flight="io_uring", locked_bytes=8 << 20, open_files=20_000, address_space_bytes=None,
    versions={"numba": "0.63", "triton": None}, numba_cache="/var/cache",
)  # fmt: skip
GOOD_PLACE = Place(
    path="/data/a store", file_system="ext4", mount_options=("rw",), network=False, read_only=False, writable=True, free_bytes=1 << 40,
    free_files=1_000_000, locks=Tried(True), maps=Tried(True), direct=Tried(True), direct_align=512,
)  # fmt: skip
GOOD_READING = Reading(mode="mmap", why="it fits", stored_bytes=1 << 30, shared=True)
GOOD_GPU = Accelerator(build="cuda 12.8", cuda=True, device="a GPU", memory_bytes=1 << 34, threads=4)
GOOD_FSYNC = FsyncCost(folder="/data", times=20, median_ms=0.2, worst_ms=1.0)
GOOD = Surroundings(machine=GOOD_MACHINE, place=GOOD_PLACE, reading=GOOD_READING, fsync=GOOD_FSYNC)

WRONG: list[tuple[str, str, Any, str, str]] = [
    # part, field, value, level, what it is about
    ("place", "network", True, "unsafe", "file system"),
    ("place", "locks", Tried(False, "flock: given to two at once"), "unsafe", "locks"),
    ("place", "maps", Tried(False, "No such device"), "unsafe", "maps"),
    ("place", "read_only", True, "unsafe", "disk"),
    ("place", "writable", False, "unsafe", "permissions"),
    ("place", "free_bytes", MIN_FREE - 1, "unsafe", "disk"),
    ("place", "free_files", 10, "unsafe", "disk"),
    ("place", "direct", Tried(False, "Invalid argument"), "slow", "direct reads"),
    ("place", "file_system", "tmpfs", "note", "file system"),
    ("fsync", "median_ms", 30.0, "slow", "fsync"),
    ("reading", "shared", False, "slow", "readers"),
    ("reading", "stored_bytes", 5 << 30, "slow", "memory"),
    ("machine", "system", "Windows", "unsafe", "system"),
    ("machine", "first_version_limit_bytes", 1 << 30, "slow", "memory"),
    ("machine", "overcommit", 2, "note", "overcommit"),
    ("machine", "address_space_bytes", 1 << 33, "slow", "address space"),
    ("machine", "open_files", 256, "slow", "open files"),
    ("machine", "io_uring", Tried(False, "io_uring: Operation not permitted"), "slow", "io_uring"),
    ("machine", "huge_pages", "never", "slow", "huge pages"),
    ("machine", "versions", {"numba": None, "triton": None}, "slow", "numba"),
    ("machine", "numba_cache", None, "slow", "numba"),
]


def test_nothing_is_advised_where_nothing_is_wrong() -> None:
    assert advise(GOOD) == []


@pytest.mark.parametrize(
    ("part", "field", "value", "level", "about"), WRONG, ids=[f"{w[0]}.{w[1]}={w[2]}" for w in WRONG]
)
def test_each_thing_that_is_wrong_is_told_alone_with_what_to_do(
    part: str, field: str, value: Any, level: str, about: str
) -> None:
    changed = msgspec.structs.replace(getattr(GOOD, part), **{field: value})
    (finding,) = advise(msgspec.structs.replace(GOOD, **{part: changed}))
    assert (finding.level, finding.about) == (level, about)
    assert finding.what
    assert finding.do or level == "note"
    assert "STORE" not in finding.do


def test_the_worst_comes_first_and_commands_name_the_store_quoted() -> None:
    poor = msgspec.structs.replace(GOOD_MACHINE, huge_pages="never", overcommit=2)
    full = msgspec.structs.replace(GOOD_PLACE, free_bytes=0)
    findings = advise(msgspec.structs.replace(GOOD, machine=poor, place=full, broken="catalog: bad"))
    assert [finding.level for finding in findings] == ["unsafe", "unsafe", "slow", "note"]
    assert "kvdb evict '/data/a store' --to SIZE" in findings[0].do
    assert findings[1].do == "kvdb repair '/data/a store'"


def test_a_gpu_is_judged_by_what_decodes_on_it() -> None:
    (finding,) = advise(msgspec.structs.replace(GOOD, accelerator=GOOD_GPU))
    assert finding.about == "triton"
    fewer = msgspec.structs.replace(GOOD_MACHINE, usable_cores=2, versions={"numba": "1", "triton": "3.5"})
    (finding,) = advise(msgspec.structs.replace(GOOD, machine=fewer, accelerator=GOOD_GPU))
    assert (finding.about, finding.do) == ("threads", "kvdb ask --threads 2, or OMP_NUM_THREADS=2")
    none = msgspec.structs.replace(GOOD_GPU, cuda=False)
    assert [f.about for f in advise(msgspec.structs.replace(GOOD, accelerator=none))] == ["GPU"]


def test_what_writers_leave_free_is_what_opening_leaves_free() -> None:
    assert parse_bytes("", inspect.signature(KVDB.open).parameters["min_free"].default) == MIN_FREE


# -- the machine


def test_the_machine_is_what_the_system_says() -> None:
    found = look_at_machine()
    assert found.cores == os.cpu_count()
    assert found.usable_cores == len(os.sched_getaffinity(0))
    assert found.page_bytes == mmap.PAGESIZE
    assert f"MemTotal:{found.memory_bytes >> 10:>15} kB" in Path("/proc/meminfo").read_text().splitlines()[0]
    assert 0 < found.available_bytes <= found.memory_bytes
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert found.open_files == (None if soft == resource.RLIM_INFINITY else soft)
    assert found.in_flight == ("io_uring" if found.io_uring.works else "threads")
    assert found.versions["kvdb"]
    assert msgspec.json.decode(msgspec.json.encode(found), type=Machine) == found


def test_a_package_that_is_not_there_has_no_version() -> None:
    import numpy

    assert versions(("numpy", "no-such-package-of-ours")) == {
        "numpy": numpy.__version__,
        "no-such-package-of-ours": None,
    }


def test_a_refused_ring_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise Unsupported("io_uring: Operation not permitted, expected a kernel that has it")

    monkeypatch.setitem(machine.REQUESTS, "io_uring", refuse)  # type: ignore[arg-type]
    found = look_at_machine()
    assert found.io_uring == Tried(False, "io_uring: Operation not permitted, expected a kernel that has it")
    assert found.in_flight == "threads"


def test_the_first_folder_that_can_be_written_keeps_compiled_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "not" / "yet"))
    assert numba_cache() == tmp_path / "not" / "yet"
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert numba_cache() is None
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused = Path(machine.__file__).resolve().parent
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(refused) and real(path, mode))
    assert numba_cache() == tmp_path / "cache" / "numba"


def test_who_has_no_home_or_may_not_look_there_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(Path, "home", no_home)
    assert numba_cache() is None
    real = os.stat

    def refuse(path: Any, **how: Any) -> os.stat_result:
        if Path(os.fsdecode(path)).is_relative_to(tmp_path / "closed" / "in"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, **how)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "closed" / "in"))
    assert numba_cache() is None


def test_limits_of_both_versions_of_control_groups_are_found(tmp_path: Path) -> None:
    membership, groups = tmp_path / "cgroup", tmp_path / "groups"
    (groups / "a" / "b").mkdir(parents=True)
    (groups / "memory" / "job").mkdir(parents=True)
    membership.write_text("4:memory:/job\n0::/a/b\n")
    (groups / "a" / "memory.max").write_text("1000\n")
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    assert group_limit_bytes(membership, groups) == 1000
    assert first_version_limit_bytes(membership, groups) is None
    (groups / "memory" / "memory.limit_in_bytes").write_text(f"{1 << 62}\n")  # what stands for no limit
    assert first_version_limit_bytes(membership, groups) is None
    (groups / "memory" / "job" / "memory.limit_in_bytes").write_text("2000\n")
    assert first_version_limit_bytes(membership, groups) == 2000
    membership.write_text("3:cpu,memory,io:/job/deeper/still\n")
    assert first_version_limit_bytes(membership, groups) == 2000
    membership.write_text("5:name=memory:/job\n")
    assert first_version_limit_bytes(membership, groups) is None
    membership.write_text("")
    assert (group_limit_bytes(membership, groups), first_version_limit_bytes(membership, groups)) == (None, None)


# -- the place


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "a.kvdb"
    with opened(path) as db:
        extend(db, token_list(60), name="n")
    return path


def content(root: Path) -> dict[str, bytes]:
    """Every file but LMDB's table of readers, which a reader's lock is."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock.mdb"
    }


def test_a_store_is_looked_at_and_stays_as_it_is(store: Path) -> None:
    before, beside = content(store), sorted(store.parent.iterdir())
    found = look_around(store)
    assert content(store) == before
    assert sorted(store.parent.iterdir()) == beside
    assert found.place is not None
    assert found.place.writable
    assert found.place.locks == found.place.maps == Tried(True)
    assert found.place.file_system == mount_of(store).kind
    assert abs(found.place.free_bytes - shutil.disk_usage(store).free) < 1 << 30
    assert found.reading is not None
    with KVDB.open(store, "r") as db:
        assert (found.reading.mode, found.reading.stored_bytes) == (db.read_mode, db.info()["disk_bytes"])
    assert (found.reading.shared, found.broken, found.fsync) == (True, "", None)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Surroundings) == found


def test_while_somebody_writes_it_is_looked_at_all_the_same(store: Path) -> None:
    with KVDB.open(store) as db:
        with db.catalog.locked():
            found = look_around(store)
        assert found.reading is not None
        assert_healthy(db)


def test_an_fsync_is_measured_beside_the_store_and_nothing_stays(store: Path) -> None:
    before, beside = content(store), sorted(store.parent.iterdir())
    cost = fsync_cost(store)
    assert cost.folder == str(store.parent)
    assert 0 < cost.median_ms <= cost.worst_ms
    assert content(store) == before
    assert sorted(store.parent.iterdir()) == beside


def test_an_fsync_that_fails_leaves_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    beside = sorted(store.parent.iterdir())
    monkeypatch.setattr(files, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        fsync_cost(store)
    assert sorted(store.parent.iterdir()) == beside


def test_where_nothing_may_be_written_no_fsync_is_measured(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InvalidInput, match="leave out --probe"):
        fsync_cost(store)


def test_an_empty_folder_is_a_place_without_a_store(tmp_path: Path) -> None:
    found = look_around(tmp_path)
    assert found.place is not None
    assert (found.reading, found.broken) == (None, "")
    assert found.place.maps.works is found.place.direct.works is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_store_is_said_to_be_and_the_rest_is_told(store: Path) -> None:
    data = next(store.rglob("data.mdb"))
    data.write_bytes(data.read_bytes()[:5000])
    found = look_around(store)
    assert found.place is not None
    assert "data.mdb" in found.broken or "catalog" in found.broken
    assert [f.about for f in advise(found) if f.level == "unsafe"] == ["store"]


def test_files_of_a_store_that_is_refused_are_not_opened(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store / "kvdb.json").unlink()
    os.mkfifo(store / "kvdb.json")
    monkeypatch.setattr(place, "_opened", lambda file: pytest.fail(f"{file} was opened"))
    found = look_around(store)
    assert found.place is not None
    assert "kvdb.json" in found.broken
    assert found.place.maps.works is found.place.direct.works is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_not_write_to_the_table_of_readers_is_told_so(store: Path) -> None:
    """As another user, who may read all of a store and write nothing. The folders above are pytest's, closed to others."""
    with tempfile.TemporaryDirectory() as above:
        moved = Path(above) / "a.kvdb"
        shutil.copytree(store, moved)
        KVDB.open(moved).close()
        Path(above).chmod(0o755)
        for path in (moved, *moved.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        asks = "import os, sys\nfrom pathlib import Path\nfrom kvdb.surroundings import look_around\n"
        asks += "look_around(Path(sys.argv[1]))\n"  # modules are not for others to read, perhaps
        asks += "os.setuid(65534)\nprint(look_around(Path(sys.argv[1])).reading.shared)"
        told = subprocess.run([sys.executable, "-c", asks, str(moved)], capture_output=True, text=True, check=False)
    assert (told.stdout, told.stderr) == ("False\n", "")


def test_what_is_no_store_or_a_newer_one_is_an_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        look_around(tmp_path / "none")
    with pytest.raises(NotAStore):
        look_around(tmp_path)
    header = next(store.glob("*.json"))
    header.write_text(header.read_text().replace('"format":1', '"format":99').replace('"format": 1', '"format": 99'))
    with pytest.raises(NewerFormat):
        look_around(store)


def test_a_store_that_readers_may_not_write_themselves_down_in_is_looked_at_all_the_same(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvdb.store.may_lock", lambda path: False)
    found = look_around(store)
    assert found.reading is not None
    assert (found.reading.shared, found.reading.mode) == (False, "mmap")
    assert [f.about for f in advise(found) if f.about == "readers"] == ["readers"]


def test_without_locks_is_no_remedy_for_anything_else(store: Path) -> None:
    with KVDB.open_untrusted(store), pytest.raises(StoreError, match="already open"):
        look_around(store)


def test_locks_that_keep_nobody_out_are_noticed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: None)
    assert place._locks(store) == Tried(False, "flock: given to two at once")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    assert place._locks(store) == Tried(False, "flock: No locks available")


def test_a_lock_that_somebody_else_has_alone_is_a_lock(store: Path) -> None:
    fd = files.lock(store, timeout_s=0, create=False)
    try:
        assert place._locks(store) == Tried(True)
    finally:
        files.close(fd)


def test_what_cannot_be_mapped_or_read_directly_is_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(files, "mmap", refuse)
    monkeypatch.setattr(files, "make_direct", refuse)
    found = look_at_place(store, next(store.glob("*.json")))
    assert found.maps == found.direct == Tried(False, "No such device")
    assert found.direct_align is None


def test_a_mount_is_told_with_its_options(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw,relatime 0 0\nhost:/x {tmp_path} nfs4 ro,nolock 0 0\n")
    assert mount_of(tmp_path, mounts) == ("nfs4", ("ro", "nolock"))
    assert mount_of(tmp_path, mounts).network
    assert mount_of(Path("/"), mounts) == ("ext4", ("rw", "relatime"))
    assert mount_of(tmp_path, tmp_path / "none") == ("", ())
