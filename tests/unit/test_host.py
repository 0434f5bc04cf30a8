"""The host tier: whatever is leased is what the file holds, within the budget, for many threads, and when a device fails or stalls."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import finish, python, takes_direct
from hypothesis import given
from hypothesis import strategies as st

from kvdb import files
from kvdb.arrivals import Arrival, FileRows, RowFile
from kvdb.available import available_bytes
from kvdb.errors import Damaged, InvalidInput, Stalled, Unsupported
from kvdb.host import HostTier, Lease
from kvdb.replacement import REPLACEMENT
from kvdb.requests import REQUESTS, Ticket
from kvdb.slots import SlotTable

Array = np.ndarray[Any, np.dtype[Any]]
Make = Callable[..., RowFile]
POISON = 0xEE
PATIENCE_S = 20.0


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Files of rows that are noise (and never poison), open for direct reads."""
    if not takes_direct(tmp_path):
        pytest.skip(
            f"{tmp_path} is on a file system without O_DIRECT, expected one with it, such as ext4; see --basetemp"
        )
    made: list[RowFile] = []

    def row_file(row_bytes: int, rows: int, seed: int = 0) -> RowFile:
        path = tmp_path / f"{len(made)}"
        noise = np.random.default_rng(seed).integers(0, POISON, rows * row_bytes, np.uint8)
        path.write_bytes(noise.tobytes())
        fd = files.open_read(path)
        align = files.make_direct(fd, path)
        made.append(
            RowFile(
                key=files.content_of(fd),
                fd=fd,
                row_bytes=row_bytes,
                rows=rows,
                align=align,
                segment="any",
                where=f"file {path}",
                path=path,
            )
        )
        return made[-1]

    yield row_file
    for file in made:
        files.close(file.fd)


@pytest.fixture
def pipe() -> Iterator[tuple[RowFile, int]]:
    """A file that never answers, until something is written to the other end."""
    out, into = os.pipe()
    yield stalled_file(out), into
    os.close(into)
    os.close(out)


def stalled_file(fd: int) -> RowFile:
    return RowFile(
        key=(-1, -1, -1),
        fd=fd,
        row_bytes=4096,
        rows=8,
        align=512,
        segment="stalled",
        where="file stalled",
        path=Path("stalled"),
    )


def content(file: RowFile) -> Array:
    return np.fromfile(file.path, np.uint8).reshape(-1, file.row_bytes)


def lease_of(tier: HostTier, file: RowFile, rows: Array, *, only_slots: bool = False) -> Lease:
    return tier.lease([FileRows(file, rows)], only_slots=only_slots)


def contents(lease: Lease) -> Array:
    """What it must give."""
    return np.concatenate([content(file)[rows] for file, rows in lease.wanted])


def shown(tier: HostTier, lease: Lease) -> Array:
    """What a lease gives, part by part."""
    found = np.zeros((len(lease.slots), lease.pool.row_bytes), np.uint8)
    filled = np.zeros(len(found), int)
    for memory, which, places in tier.parts(lease, PATIENCE_S):
        found[places] = memory[which]
        filled[places] += 1
    assert (filled == 1).all(), "a row in no part, or in several"
    return found


def read(tier: HostTier, file: RowFile, rows: list[int] | Array) -> Array:
    lease = lease_of(tier, file, np.array(rows, np.int64))
    try:
        return shown(tier, lease)
    finally:
        tier.release(lease)


def poison(tier: HostTier) -> None:
    """Overwrite what no row is in and nobody has leased."""
    for pool in tier._pools.values():
        free = pool.table._free[: pool.table.free]
        pool.view[free] = POISON


def resident_bytes(tier: HostTier) -> int:
    return sum(
        int(files.resident_pages(pool._base, 0, -(-len(pool._base) // mmap.PAGESIZE)).sum()) * mmap.PAGESIZE
        for pool in tier._pools.values()
    )


@pytest.mark.parametrize("policy", REPLACEMENT)
@given(data=st.data())
def test_what_is_leased_is_what_the_file_holds_whatever_is_evicted(
    tmp_path_factory: pytest.TempPathFactory, policy: str, data: st.DataObject
) -> None:
    """Rows of several sizes, most of them no whole blocks, in a budget for few of them; slots are poisoned as they become free."""
    folder = tmp_path_factory.mktemp("rows")
    if not takes_direct(folder):
        pytest.skip(
            f"{folder} is on a file system without O_DIRECT, expected one with it, such as ext4; see --basetemp"
        )
    opened, held = [], []
    budget = data.draw(st.integers(0, 40)) << 12
    tier = HostTier(budget, policy)
    for number, row in enumerate(
        data.draw(st.lists(st.sampled_from([64, 512, 1536, 2624, 4096, 70_000]), min_size=1, max_size=4))
    ):
        path = folder / f"{number}"
        path.write_bytes(np.random.default_rng(number).integers(0, POISON, 24 * row, np.uint8).tobytes())
        fd = files.open_read(path)
        align = files.make_direct(fd, path)
        opened.append(
            RowFile(
                key=(0, number, 0),
                fd=fd,
                row_bytes=row,
                rows=24,
                align=align,
                segment="any",
                where=f"file {path}",
                path=path,
            )
        )
    for _ in range(data.draw(st.integers(1, 8))):
        some = data.draw(st.lists(st.sampled_from(opened), min_size=1, unique_by=id))
        file = some[0]
        wanted = [
            FileRows(each, np.array(data.draw(st.lists(st.integers(0, 23), max_size=10)), np.int64))
            for each in some
            if each.row_bytes == file.row_bytes
        ]
        rows = wanted[0].rows
        act = data.draw(st.sampled_from(["read", "hold", "let go", "expect", "forget", "drop", "weigh"]))
        if act == "read":
            lease = tier.lease(wanted)
            assert np.array_equal(shown(tier, lease), contents(lease))
            tier.release(lease)
        elif act == "hold":
            lease = tier.lease(wanted)
            tier.wait(lease, PATIENCE_S)
            held.append(lease)
        elif act == "let go" and held:
            tier.release(held.pop())
        elif act == "expect":
            tier.release(tier.lease(wanted, only_slots=data.draw(st.booleans())))
        elif act == "forget":
            tier.forget(file, rows)
        elif act == "drop":
            tier.drop(file)
        elif act == "weigh":
            rows = np.unique(rows)
            tier.weigh(file, rows, np.ones(len(rows)))
        poison(tier)
        for lease in held:
            assert np.array_equal(shown(tier, lease), contents(lease))
        assert tier.used_bytes <= budget
    for lease in held:
        tier.release(lease)
    tier.close()
    for file in opened:
        files.close(file.fd)


def test_memory_never_exceeds_the_budget(make: Make) -> None:
    """As the system counts it, while rows of four sizes take each other's place."""
    tier, rng = HostTier(4 << 20), np.random.default_rng(0)
    opened = [make(row, (6 << 20) // row, seed) for seed, row in enumerate((512, 2624, 8192, 65536))]
    for step in range(80):
        file = opened[step // 5 % 4]
        rows = rng.integers(0, file.rows, (1 << 20) // file.row_bytes)
        assert np.array_equal(read(tier, file, rows), content(file)[rows])
        assert tier.used_bytes <= 4 << 20
        assert resident_bytes(tier) <= 4 << 20
    stats = tier.stats()
    assert stats["evicted"] > 0
    assert stats["bytes"] > 3 << 20
    assert min(pool.used_bytes for pool in tier._pools.values()) >= 1 << 19  # no size is starved
    tier.close()


def test_what_is_in_memory_is_not_read_again(make: Make) -> None:
    file, tier = make(4096, 64), HostTier(1 << 20)
    first = lease_of(tier, file, np.array([3, 9, 3, 10]))
    again = lease_of(tier, file, np.array([10, 9, 11]))  # two of them on their way
    assert (first.fetched, again.fetched) == (3 * 4096, 4096)
    for lease in (again, first):
        assert np.array_equal(shown(tier, lease), contents(lease))
        tier.release(lease)
    assert {k: v for k, v in tier.stats().items() if k != "bytes"} == {
        "hits": 2, "misses": 5, "admitted": 4, "evicted": 0, "budget_bytes": 1 << 20, "policy": "lru",
    }  # fmt: skip
    tier.close()


def test_rows_that_follow_each_other_are_read_together(make: Make) -> None:
    asked = []
    tier, file = HostTier(8 << 20), make(4096, 1000)
    read(tier, file, [999])
    ticket = tier._sending().ticket
    tier._sending().ticket = lambda fd, *reads: asked.append(len(reads[0])) or ticket(fd, *reads)  # type: ignore[method-assign]
    assert np.array_equal(read(tier, file, np.arange(200)), content(file)[:200])
    coded = make(2624, 1000)
    assert np.array_equal(
        read(tier, coded, np.arange(0, 400, 4)), content(coded)[:400:4]
    )  # 10 496 apart: no block in common
    assert np.array_equal(read(tier, coded, np.arange(500, 520)), content(coded)[500:520])
    assert asked[0] <= 2  # their slots are in several slabs
    assert asked[1:] == [100, 1]
    tier.close()


def test_a_read_larger_than_the_budget_works(make: Make) -> None:
    for budget in (0, 4096, 64 << 10):
        file, tier = make(8192, 600), HostTier(budget)
        rows = np.random.default_rng(1).integers(0, 600, 1500)
        assert np.array_equal(read(tier, file, rows), content(file)[rows])
        assert tier.used_bytes <= budget
        tier.close()


def test_threads_read_what_the_files_hold(make: Make) -> None:
    """While they evict each other's rows, and wait for each other's reads."""
    opened = [make(4096, 300, 1), make(2624, 300, 2)]
    wanted = [content(file) for file in opened]
    tier, wrong = HostTier(1 << 20), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                which = int(rng.integers(2))
                rows = rng.integers(0, 300, 40)
                if rng.integers(3) == 0:
                    tier.release(lease_of(tier, opened[which], rng.integers(0, 300, 40)))
                if not np.array_equal(read(tier, opened[which], rows), wanted[which][rows]):
                    wrong.append((seed, rows))
        except BaseException as e:
            wrong.append((seed, e))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert tier.stats()["evicted"] > 0
    for pool in tier._pools.values():
        assert not pool.table._pins.any()
        assert not pool.arrival.any()
    tier.close()


def test_a_device_that_does_not_answer_stalls_one_read_and_no_others(make: Make, pipe: tuple[RowFile, int]) -> None:
    stuck, into = pipe
    tier, well = HostTier(32 * 4096), make(4096, 100)
    lease = lease_of(tier, stuck, np.array([5]))
    with pytest.raises(Stalled, match="1 of 1 reads are not over"):
        tier.wait(lease, 0.05)
    tier.release(lease)
    for first in range(0, 100, 20):  # all other slots are used again and again
        rows = np.arange(first, first + 20)
        assert np.array_equal(read(tier, well, rows), content(well)[rows])
        poison(tier)
    again = lease_of(tier, stuck, np.array([5, 5]))
    assert again.fetched == 0
    with pytest.raises(Stalled):
        tier.wait(again, 0.05)
    os.write(into, bytes(range(256)) * 16)
    assert np.array_equal(shown(tier, again), np.tile(np.arange(256, dtype=np.uint8), (2, 16)))
    tier.release(again)
    tier.close()


def test_threads_that_wait_for_the_same_stalled_read_all_have_their_deadline(pipe: tuple[RowFile, int]) -> None:
    stuck, into = pipe
    tier, said = HostTier(1 << 20), []

    def work() -> None:
        lease = lease_of(tier, stuck, np.array([1]))
        try:
            tier.wait(lease, 0.2)
        except Stalled as e:
            said.append(str(e))
        tier.release(lease)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(said) == 3
    os.write(into, bytes(4096))
    assert not read(tier, stuck, [1]).any()
    tier.close()


def test_closing_does_not_wait_for_a_device_that_never_answers(pipe: tuple[RowFile, int]) -> None:
    stuck, into = pipe
    tier = HostTier(1 << 20)
    lease = lease_of(tier, stuck, np.array([1]))
    tier.release(lease)
    tier.close(0.05)
    os.write(into, bytes(4096))


def test_a_descriptor_that_is_still_read_through_is_closed_when_that_is_over() -> None:
    out, into = os.pipe()
    tier, stuck = HostTier(1 << 20), stalled_file(out)
    tier.release(lease_of(tier, stuck, np.array([0])))
    assert tier.retire(stuck)
    os.fstat(out)
    os.write(into, bytes(4096))
    read(tier, stuck, [0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(out)
    assert not tier.retire(stuck)
    os.close(into)
    tier.close()


@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize("row", [4096, 2624])
def test_a_device_error_is_told_and_tried_again(make: Make, row: int, budget: int) -> None:
    file, tier = make(row, 20), HostTier(budget)
    fd, file.fd = file.fd, os.open(file.path, os.O_WRONLY)  # EBADF of every read, as EIO would be
    for _ in range(2):
        with pytest.raises(OSError, match="Bad file descriptor") as e:
            read(tier, file, [4, 7])
        assert (e.value.errno, e.value.filename) == (errno.EBADF, str(file.path))
    os.close(file.fd)
    file.fd = fd
    assert np.array_equal(read(tier, file, [7, 4]), content(file)[[7, 4]])
    tier.close()


@pytest.mark.parametrize("trouble", [OSError(errno.ENOMEM, "No memory"), KeyboardInterrupt()])
def test_what_could_not_be_sent_is_waited_for_by_nobody(
    make: Make, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    file, tier = make(4096, 600), HostTier(8 << 20)
    requests, calls = tier._sending(), 0
    real = requests.send

    def send(ticket: Ticket) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # of three pieces
            raise trouble
        real(ticket)

    monkeypatch.setattr(requests, "send", send)
    with pytest.raises(type(trouble)):
        lease_of(tier, file, np.arange(600))
    lease = lease_of(tier, file, np.arange(600))
    assert lease.fetched == (600 - 256) * 4096
    assert np.array_equal(shown(tier, lease), content(file))
    tier.release(lease)
    assert not any(pool.table._pins.any() for pool in tier._pools.values())
    tier.close()


class Interrupt:
    """KeyboardInterrupt where a signal may come: at the n-th beginning of a function or end of one of C's. Not where Python ignores it: in
    finalizers, and in generators that are let go."""

    def __init__(self, n: int) -> None:
        self.left, self.came = n, False

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if (
            event in ("call", "c_return")
            and frame.f_code.co_name not in ("__del__", "<genexpr>")
            and argument is not sys.setprofile
        ):
            self.left -= 1
            if self.left == 0:
                self.came = True
                raise KeyboardInterrupt

    def during(self, act: Callable[[], object]) -> bool:
        sys.setprofile(self)
        try:
            act()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        return self.came


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("row", [4096, 2624])
def test_an_interrupt_anywhere_leaves_no_wrong_row_and_nothing_pinned(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: str, row: int
) -> None:
    """While rows are leased, some of them there and some for which there is no slot, waited for and released."""
    try:
        REQUESTS[kind]().close()
    except Unsupported as why:
        pytest.skip(str(why))
    monkeypatch.setattr("kvdb.host.best_requests", REQUESTS[kind])
    monkeypatch.setattr("kvdb.host._PIECE_ROWS", 5)
    file, other, count = make(row, 40), make(row, 40, 1), 0
    wanted, rows = content(file), np.arange(24)
    while True:
        count += 7  # of about 1700 places, and each takes 3 ms
        tier = HostTier(20 * row + (8 << 10))
        read(tier, file, [0, 1, 30])

        def use(tier: HostTier = tier) -> None:
            lease = tier.lease([FileRows(file, rows), FileRows(other, rows[:3])])
            try:
                tier.wait(lease, PATIENCE_S)
            finally:
                tier.release(lease)

        came = Interrupt(count).during(use)
        for some in (rows[:10], np.arange(40)[::-1], rows):
            lease = lease_of(tier, file, some)
            assert np.array_equal(shown(tier, lease), wanted[some]), count
            tier.release(lease)
            poison(tier)
        end = time.monotonic() + PATIENCE_S / 4
        while (
            tier._arrivals and time.monotonic() < end
        ):  # what only the interrupted call would have used may still be coming
            tier._reap()
        assert tier._arrivals == {}, count
        assert not any(pool.table._pins.any() for pool in tier._pools.values()), count
        tier.close(PATIENCE_S)
        if not came:
            break
    assert count > 100


@pytest.mark.parametrize("act", ["release", "drop", "retire", "forgotten"])
def test_the_garbage_collector_may_let_go_while_we_hold_the_lock(
    make: Make, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """A finalizer runs at any allocation: here of the bookkeeping of a lease, under the lock."""
    file, tier = make(4096, 20), HostTier(1 << 20)
    leases = [lease_of(tier, file, np.array([3, 4]))]
    tier.wait(leases[0], PATIENCE_S)

    class Cycle: ...

    ends: dict[str, Callable[[], object]] = {
        "release": lambda: tier.release(leases[0]),
        "drop": lambda: tier.drop(file),
        "retire": lambda: tier.retire(file),
        "forgotten": leases.clear,
    }
    lookup = SlotTable.lookup

    def collecting(*given: Any) -> Any:
        monkeypatch.setattr(SlotTable, "lookup", lookup)
        cycle = Cycle()
        cycle.itself = cycle  # type: ignore[attr-defined]
        weakref.finalize(cycle, ends[act])
        del cycle
        gc.collect()
        return lookup(*given)

    monkeypatch.setattr(SlotTable, "lookup", collecting)
    said: list[bool] = []
    thread = threading.Thread(
        target=lambda: said.append(np.array_equal(read(tier, file, [5, 3]), content(file)[[5, 3]])), daemon=True
    )
    thread.start()
    thread.join(PATIENCE_S / 4)
    assert said == [True], "it waits for itself"
    if act in ("drop", "retire"):
        tier.release(leases.pop())
    tier.stats()
    assert not any(pool.table._pins.any() for pool in tier._pools.values())
    assert tier.absent_bytes(file) == (20 if act == "drop" else 17) * 4096
    tier.close()


@pytest.mark.parametrize("trouble", [OSError(errno.ENOMEM, "No memory"), KeyboardInterrupt()])
def test_slots_of_reads_that_went_off_stay_pinned_whatever_became_of_the_call(
    pipe: tuple[RowFile, int], make: Make, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    """Sending fails after the device has the read: what it writes later must not land in another row's slot."""
    (stuck, into), well, tier = pipe, make(4096, 200), HostTier(64 * 4096)
    requests = tier._sending()
    real: Callable[[Ticket], None] = requests.send

    def send(ticket: Ticket) -> None:
        monkeypatch.setattr(requests, "send", real)
        real(ticket)
        raise trouble

    monkeypatch.setattr(requests, "send", send)
    with pytest.raises(type(trouble)):
        lease_of(tier, stuck, np.array([2]))
    for first in range(0, 200, 50):
        rows = np.arange(first, first + 50)
        lease = lease_of(tier, well, rows)
        tier.wait(lease, PATIENCE_S)
        if first == 150:
            os.write(into, bytes([POISON]) * 4096)
            assert (read(tier, stuck, [2]) == POISON).all()
        assert np.array_equal(shown(tier, lease), content(well)[rows])
        tier.release(lease)
    tier.close()


def test_what_nobody_will_wait_for_takes_no_memory_beside_the_budget(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    private: list[Arrival] = []
    pieces = HostTier._pieces

    def watched(*given: Any) -> list[Arrival]:
        begun = pieces(*given)
        private.extend(arrival for arrival in begun if arrival.pool is None)
        return begun

    monkeypatch.setattr(HostTier, "_pieces", watched)
    file, tier = make(4096, 100), HostTier(16 * 4096)
    lease = lease_of(tier, file, np.arange(100), only_slots=True)
    assert (private, lease.fetched) == ([], 16 * 4096)
    tier.release(lease)
    assert np.array_equal(read(tier, file, np.arange(100)), content(file))
    assert private  # of what is waited for
    tier.close()


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e10])
def test_a_deadline_may_be_as_far_away_as_one_likes(make: Make, timeout_s: float) -> None:
    file, tier = make(4096, 20), HostTier(1 << 20)
    lease = lease_of(tier, file, np.arange(20))
    tier.wait(lease, timeout_s)
    assert np.array_equal(shown(tier, lease), content(file))
    tier.release(lease)
    tier.close()


@pytest.mark.parametrize("row", [4096, 2624])
def test_a_file_that_was_cut_is_damaged_where_it_was_cut(make: Make, row: int) -> None:
    file, tier = make(row, 20), HostTier(1 << 20)
    whole = file.path.read_bytes()
    os.truncate(file.path, 10 * row + 100)
    with pytest.raises(Damaged, match=rf"file {file.path}: \d+ bytes at {10 * row}, expected {row}"):
        read(tier, file, [8, 9, 10])
    assert read(tier, file, [9, 8]).tobytes() == whole[9 * row : 10 * row] + whole[8 * row : 9 * row]
    file.path.write_bytes(whole)
    assert np.array_equal(read(tier, file, np.arange(20)), content(file))
    tier.close()


def test_a_child_of_fork_starts_with_an_empty_tier(tmp_path: Path, make: Make) -> None:
    code = """
import os, sys
sys.path.append(sys.argv[1])
from test_host import *
path, rows = Path(sys.argv[2]), np.arange(20)
fd = files.open_read(path)
file = RowFile(key=(1, 1, 1), fd=fd, row_bytes=4096, rows=20, align=files.make_direct(fd, path), segment="any", where="file", path=path)
tier = HostTier(1 << 20)
held = lease_of(tier, file, rows)
tier.wait(held, 20)
tier.release(lease_of(tier, stalled_file(os.pipe()[0]), np.array([0])))  # something is always in flight
pid = os.fork()
if pid == 0:
    assert tier.stats()["bytes"] == 0
    assert np.array_equal(held.pool.view[held.slots], content(file))  # what was leased is still good
    tier.release(held)
    lease = lease_of(tier, file, rows)
    assert lease.fetched == 20 * 4096
    assert np.array_equal(shown(tier, lease), content(file))
    tier.release(lease)
    tier.close()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lease_of(tier, file, rows).fetched)
tier.close(0.1)
"""
    file = make(4096, 20)
    assert finish(python(code, str(Path(__file__).parent), str(file.path))) == "7 0\n"


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"policy 'best', expected one of \['importance', 'lfu', 'lru'\]"):
        HostTier(0, "best")


def test_a_limit_of_address_space_counts() -> None:
    code = """
import resource, sys
sys.path.append(sys.argv[1])
from test_host import *
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + (64 << 20),) * 2)
print(0 < available_bytes() <= 64 << 20)
"""
    assert finish(python(code, str(Path(__file__).parent))) == "True\n"


def test_memory_is_available_up_to_the_least_limit(tmp_path: Path) -> None:
    meminfo, membership, groups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups"
    assert available_bytes() > 0
    nothing = available_bytes(meminfo, membership, groups)
    assert nothing == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   80 kB\n")
    membership.write_text("12:cpu:/old\n0::/a/b\n")
    (groups / "a" / "b").mkdir(parents=True)
    assert available_bytes(meminfo, membership, groups) == 80 << 10
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    (groups / "a" / "b" / "memory.current").write_text("5\n")
    (groups / "a" / "memory.max").write_text("70000\n")
    (groups / "a" / "memory.current").write_text("60000\n")
    assert available_bytes(meminfo, membership, groups) == 10_000
    (groups / "a" / "memory.stat").write_text("anon 1\ninactive_file 3000\nactive_file 1000\nactive_anon 7\n")
    assert available_bytes(meminfo, membership, groups) == 14_000
    (groups / "a" / "memory.current").write_text("80000\n")
    assert available_bytes(meminfo, membership, groups) == 0
