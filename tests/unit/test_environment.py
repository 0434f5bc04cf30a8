"""The LMDB environment: damage to its file is an error and no signal, it grows in time, and it recovers.

What may end the interpreter is tried in a child process that forks for each trial; the verdict on a signal is its number.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest
from helpers import finish, python

from kvdb import environment
from kvdb.environment import DATA, Environment, check_meta_pages
from kvdb.errors import Damaged, StoreError, StoreLocked

PAGE = 4096
ENTRIES = 400
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
META_FIELDS = {
    "page number": (0, 8), "page flags": (10, 2), "magic": (16, 4), "version": (20, 4), "address": (24, 8),
    "map size": (32, 8), "page size": (40, 4), "free flags": (44, 2), "free depth": (46, 2), "free branches": (48, 8),
    "free leaves": (56, 8), "free overflows": (64, 8), "free entries": (72, 8), "free root": (80, 8),
    "main flags": (92, 2), "main depth": (94, 2), "main branches": (96, 8), "main leaves": (104, 8),
    "main overflows": (112, 8), "main entries": (120, 8), "main root": (128, 8), "last page": (136, 8),
    "transaction": (144, 8),
}  # fmt: skip
"""Name -> (offset in a meta page, bytes), with the page header before."""

TRIALS = """
import json, os, sys
from pathlib import Path
from kvdb import environment as module
from kvdb.environment import environment
from kvdb.errors import KVDBError

if "unguarded" in sys.argv:
    module.check_meta_pages = lambda path: None
    module.Environment.check_structure = lambda self: None

def read(path):
    env = environment(path, readonly=False, durable=False)
    with env.transaction(write=False) as raw, raw.cursor(db=env.db["tokens"]) as cursor:
        entries = [(bytes(key), bytes(value[:200])) for key, value in cursor]
    expected = [(b"%08d" % i, (b"%08d" % i) * 25) for i in range(len(entries))]
    return "right" if entries == expected and len(entries) in (0, 200, 400) else "wrong"

def trial(path):
    child = os.fork()
    if child == 0:
        try:
            verdict = read(path)
        except KVDBError as e:
            verdict = type(e).__name__
        except BaseException as e:
            sys.stderr.write(repr(e))
            os._exit(99)
        os._exit(["right", "wrong", "Damaged", "StorageFull", "StoreError"].index(verdict))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    return ["right", "wrong", "Damaged", "StorageFull", "StoreError"][code] if code < 5 else "another error"

path = Path(sys.argv[1])
whole = (path / "data.mdb").read_bytes()
found = []
for damage in json.load(sys.stdin):
    data = bytearray(whole)
    if "size" in damage:
        del data[damage["size"]:]
    for offset, bit in damage.get("flips", []):
        data[offset] ^= 1 << bit
    (path / "data.mdb").unlink()
    (path / "data.mdb").write_bytes(data)
    found.append(trial(path))
print(json.dumps(found))
"""


def put(env: Environment, first: int, stop: int, *, size: int = 200) -> None:
    with env.transaction(write=True) as raw:
        for i in range(first, stop):
            raw.put(b"%08d" % i, (b"%08d" % i) * (size // 8), db=env.db["tokens"])


def held(env: Environment) -> list[int]:
    with env.transaction(write=False) as raw, raw.cursor(db=env.db["tokens"]) as cursor:
        return [int(bytes(key)) for key in cursor.iternext(values=False)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "catalog").mkdir()
    return tmp_path / "catalog"


@pytest.fixture
def env(path: Path) -> Iterator[Environment]:
    found = environment.environment(path, readonly=False, durable=False)
    yield found
    found.env.close()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an environment after two transactions, its sparse tail cut off."""
    path = tmp_path_factory.mktemp("filled")
    env = environment.environment(path, readonly=False, durable=False)
    for first in range(0, ENTRIES, 200):
        put(env, first, first + 200)
    last = env.env.info()["last_pgno"]
    env.env.close()
    os.truncate(path / DATA, (last + 1) * PAGE)
    (path / "lock.mdb").unlink()
    return path


def verdicts(filled: Path, scratch: Path, damages: list[dict[str, object]], *planted: str) -> list[str]:
    shutil.copytree(filled, scratch / "damaged")
    process = python(TRIALS, str(scratch / "damaged"), *planted)
    out, err = process.communicate(json.dumps(damages), timeout=600)
    assert process.returncode == 0, err
    assert err == ""
    found: list[str] = json.loads(out)
    assert len(found) == len(damages)
    return found


# -- the guard


def test_a_file_cut_anywhere_is_damage_and_no_signal(filled: Path, tmp_path: Path) -> None:
    size = (filled / DATA).stat().st_size
    cuts = sorted({page + shift for page in range(0, size, PAGE) for shift in (0, 159, PAGE - 1)})
    found = verdicts(filled, tmp_path, [{"size": cut} for cut in [*cuts, size]])
    assert dict(zip(cuts, found, strict=False)) == dict.fromkeys(cuts, "Damaged")
    assert found[-1] == "right"


def test_without_the_guard_a_cut_file_ends_the_process(filled: Path, tmp_path: Path) -> None:
    found = verdicts(filled, tmp_path, [{"size": 3 * PAGE}], "unguarded")
    assert found == [f"signal {signal.SIGBUS.value}"]


def test_a_changed_field_of_a_meta_page_is_damage_or_harmless_and_no_signal(filled: Path, tmp_path: Path) -> None:
    flips = [
        (name, page * PAGE + offset + bit // 8, bit % 8)
        for page in (0, 1)
        for name, (offset, size) in META_FIELDS.items()
        for bit in (range(8 * size) if NIGHTLY else (0, 1, 4 * size + 1, 8 * size - 1))
    ]
    found = verdicts(filled, tmp_path, [{"flips": [(offset, bit)]} for _, offset, bit in flips])
    by_field = {name: Counter(v for v, f in zip(found, flips, strict=True) if f[0] == name) for name in META_FIELDS}
    assert set(found) <= {"right", "Damaged", "StoreError"}, by_field
    for name in ("magic", "version", "page size"):
        assert set(by_field[name]) == {"Damaged"}, name


def test_a_catalog_that_fell_back_to_an_older_transaction_is_damage(filled: Path) -> None:
    data = filled / DATA
    sound = data.read_bytes()
    ids = [int.from_bytes(sound[page * PAGE + 144 :][:8], "little") for page in (0, 1)]
    newest = ids.index(max(ids))
    fallen = []
    for bit in range(64):
        number = ids[newest] ^ 1 << bit
        data.write_bytes(sound[: newest * PAGE + 144] + number.to_bytes(8, "little") + sound[newest * PAGE + 152 :])
        try:
            check_meta_pages(data)
        except Damaged:
            continue
        fallen.append(number)
    data.write_bytes(sound)
    assert all(abs(number - ids[1 - newest]) == 1 for number in fallen)  # one bit of 64 gives another neighbour
    assert len(fallen) <= 1


def test_only_a_catalog_that_was_relaxed_may_have_meta_pages_far_apart(filled: Path) -> None:
    data = filled / DATA
    sound = data.read_bytes()
    old = (int.from_bytes(sound[144:152], "little") + 40).to_bytes(8, "little")
    data.write_bytes(sound[:144] + old + sound[152:])
    (filled / environment.RELAXED).touch()
    check_meta_pages(data)
    (filled / environment.RELAXED).unlink()
    with pytest.raises(Damaged, match="expected an even and an odd one, neighbours"):
        check_meta_pages(data)
    data.write_bytes(sound)


@pytest.mark.parametrize("length", [0, 1, 159, 160, PAGE, 2 * PAGE - 1])
def test_the_guard_names_the_file_and_the_remedy(tmp_path: Path, filled: Path, length: int) -> None:
    (tmp_path / DATA).write_bytes((filled / DATA).read_bytes()[:length])
    with pytest.raises(Damaged, match=rf"{tmp_path / DATA}.*--rebuild"):
        check_meta_pages(tmp_path / DATA)


def test_the_guard_lets_a_sound_file_pass(filled: Path) -> None:
    check_meta_pages(filled / DATA)


# -- one environment per path


def test_a_path_has_one_environment_however_it_is_spelled(path: Path, env: Environment) -> None:
    (path.parent / "link").symlink_to(path)
    for spelling in (path, path.parent / "link", path.parent / "." / "catalog"):
        assert environment.environment(spelling, readonly=False, durable=True) is env
        assert environment.environment(spelling, readonly=True, durable=True) is env


def test_an_environment_that_is_open_for_reading_is_not_written_to(filled: Path, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "c")
    reading = environment.environment(tmp_path / "c", readonly=True, durable=True)
    with pytest.raises(StoreError, match="read-only in this process"):
        environment.environment(tmp_path / "c", readonly=False, durable=True)
    reading.env.close()


# -- growth


@pytest.fixture
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps that are soon too small, so that tests need not write 64 MiB."""
    monkeypatch.setattr(environment, "_HEADROOM", 1 << 20)
    monkeypatch.setattr(Environment, "_wanted", staticmethod(lambda used: max(2 << 20, 4 * used + (1 << 20))))


@pytest.mark.usefixtures("small_maps")
def test_more_is_written_than_the_first_map_held(path: Path) -> None:
    env = environment.environment(path, readonly=False, durable=False)
    first = env.env.info()["map_size"]
    for i in range(200):
        put(env, i, i + 1, size=100_000)
    assert held(env) == list(range(200))
    assert env.env.info()["map_size"] > 20_000_000 > first
    env.env.close()


@pytest.mark.usefixtures("small_maps")
def test_what_another_process_has_grown_is_read_and_written_here(path: Path) -> None:
    env = environment.environment(path, readonly=False, durable=False)
    put(env, 0, 1)
    before = env.env.info()["map_size"]
    code = """
import sys
from pathlib import Path
from kvdb.environment import environment
env = environment(Path(sys.argv[1]), readonly=False, durable=False)
for i in range(1, 100):
    with env.transaction(write=True) as raw:
        raw.put(b"%08d" % i, bytes(100_000), db=env.db["tokens"])
"""
    finish(python(code, str(path)))
    assert held(env) == list(range(100))
    put(env, 100, 101)
    assert held(env) == list(range(101))
    assert env.env.info()["map_size"] > before
    env.env.close()


@pytest.mark.usefixtures("small_maps")
def test_growth_waits_for_open_snapshots_and_gives_up_in_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment.environment(path, readonly=False, durable=False)
    monkeypatch.setattr(environment, "_TIMEOUT_S", 0.05)
    put(env, 0, 5, size=200_000)
    refused = []

    def write() -> None:
        try:
            put(env, 5, 6)
        except StoreLocked as e:
            refused.append(str(e))

    with env.transaction(write=False):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert "cannot grow before" in refused[0]
    put(env, 5, 6)
    assert held(env) == list(range(6))
    env.env.close()


def test_the_file_keeps_a_tail_that_takes_no_room(path: Path, env: Environment) -> None:
    put(env, 0, 10)
    used = (env.env.info()["last_pgno"] + 1) * PAGE
    found = (path / DATA).stat()
    assert found.st_size >= used + (1 << 20)
    assert found.st_blocks * 512 <= used + PAGE


# -- peers that died, and commits that failed


def reader_of(path: Path) -> subprocess.Popen[str]:
    """A process inside a read transaction."""
    code = """
import sys
from pathlib import Path
from kvdb.environment import environment
env = environment(Path(sys.argv[1]), readonly=True, durable=True)
with env.transaction(write=False):
    print("reading", flush=True)
    sys.stdin.readline()
"""
    process = python(code, str(path))
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    return process


def test_slots_of_killed_readers_are_used_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *a, **options: real(*a, **options | {"max_readers": 4}))
    env = environment.environment(path, readonly=False, durable=False)
    put(env, 0, 3)
    readers = [reader_of(path) for _ in range(3)]
    for reader in readers:
        reader.send_signal(signal.SIGKILL)
        reader.communicate()
    assert env.env.info()["num_readers"] >= 3
    seen: list[list[int]] = []
    threads = [threading.Thread(target=lambda: seen.append(held(env))) for _ in range(4)]
    for thread in threads:
        thread.start()
        thread.join()
    assert seen == [[0, 1, 2]] * 4
    env.env.close()


def test_a_failed_commit_is_told_and_the_next_one_goes_well(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from kvdb.environment import environment
from kvdb.errors import KVDBError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
env = environment(Path(sys.argv[1]), readonly=False, durable=True)
def put(key, size):
    env.ready()
    with env.transaction(write=True) as raw:
        raw.put(key, bytes(size), db=env.db["tokens"])
put(b"before", 100)
used = (env.env.info()["last_pgno"] + 1) * 4096
resource.setrlimit(resource.RLIMIT_FSIZE, (used + 4096, resource.RLIM_INFINITY))
try:
    put(b"too long", 500_000)
except KVDBError as e:
    print(type(e).__name__)  # LMDB says EIO for a short write
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
put(b"after", 500_000)
with env.transaction(write=False) as raw, raw.cursor(db=env.db["tokens"]) as cursor:
    print(*(bytes(key).decode() for key in cursor.iternext(values=False)))
"""
    (tmp_path / "catalog").mkdir()
    assert finish(python(code, str(tmp_path / "catalog"))).splitlines() == ["StoreError", "after before"]


def put_and_fail(env: Environment) -> None:
    with env.transaction(write=True) as raw:
        raw.put(b"%08d" % 9, b"x", db=env.db["tokens"])
        raise ZeroDivisionError


def test_a_transaction_that_raises_leaves_nothing(env: Environment) -> None:
    put(env, 0, 2)
    with pytest.raises(ZeroDivisionError):
        put_and_fail(env)
    assert held(env) == [0, 1]
