"""What the contract of requests says, for every member: each read is what `pread` gives, none is waited for beyond its end, and no memory
is given back while a read may write to it."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from helpers import finish, python
from hypothesis import given
from hypothesis import strategies as st

from kvdb.errors import InvalidInput, Stalled, Unsupported
from kvdb.requests import REQUESTS, Requests, Ticket
from kvdb.requests.base import UNDER_WAY

PATIENCE_S = 30.0
FILE_BYTES = 300_007


@pytest.fixture(scope="module", params=REQUESTS.values(), ids=REQUESTS)
def kind(request: pytest.FixtureRequest) -> type[Requests]:
    try:
        request.param().close()
    except Unsupported as why:
        pytest.skip(str(why))
    kind: type[Requests] = request.param
    return kind


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, bytes]]:
    """(descriptor, content) of a file of an odd size."""
    path = tmp_path_factory.mktemp("requests") / "f"
    path.write_bytes(np.random.default_rng(0).bytes(FILE_BYTES))
    fd = os.open(path, os.O_RDONLY)
    yield fd, path.read_bytes()
    os.close(fd)


@contextlib.contextmanager
def silent_pipe() -> Iterator[tuple[int, int]]:
    """(read end, write end) of a pipe: a device that answers when the test writes."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


class Memory:
    """Room for reads of `sizes`, one behind the other, full of a byte that tells what was not written."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = np.array(sizes, np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.bytes = np.full(int(self.sizes.sum()) + 1, 0xEE, np.uint8)

    def submit(self, requests: Requests, fd: int, offsets: list[int]) -> Ticket:
        return requests.submit(fd, np.array(offsets, np.int64), self.sizes, self.starts + self.bytes.ctypes.data, self)

    def read(self, index: int) -> bytes:
        start = int(self.starts[index])
        return self.bytes[start : start + int(self.sizes[index])].tobytes()


def eventually(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


def assert_read(memory: Memory, offsets: list[int], content: bytes, results: Any) -> None:
    """As slices of the content are; what is behind the end of the file is not touched."""
    assert results.dtype == np.int64
    for index, (offset, size) in enumerate(zip(offsets, memory.sizes.tolist(), strict=True)):
        wanted = content[offset : offset + size]
        assert results[index] == len(wanted)
        assert memory.read(index) == wanted + b"\xee" * (size - len(wanted))


def random_reads(count: int, seed: int) -> tuple[Memory, list[int]]:
    rng = np.random.default_rng(seed)
    return Memory(rng.integers(0, 700, count).tolist()), rng.integers(0, FILE_BYTES + 500, count).tolist()


def test_a_member_is_in_the_table_under_its_name(kind: type[Requests]) -> None:
    assert REQUESTS[kind.name] is kind


@given(reads=st.lists(st.tuples(st.integers(0, FILE_BYTES + 9000), st.integers(0, 9000)), max_size=40))
def test_any_reads_are_slices_of_the_file(
    kind: type[Requests], file: tuple[int, bytes], reads: list[tuple[int, int]]
) -> None:
    """No read at all, reads of nothing, and reads past the end of the file among them."""
    fd, content = file
    offsets, memory = [offset for offset, _ in reads], Memory([size for _, size in reads])
    with kind() as requests:
        ticket = memory.submit(requests, fd, offsets)
        assert_read(memory, offsets, content, requests.wait(ticket, PATIENCE_S))
        assert requests.done(ticket)
        assert_read(memory, offsets, content, requests.wait(ticket, 0))


@pytest.mark.parametrize("depth", [3, None], ids=["narrow", "as it comes"])
def test_a_batch_may_be_larger_than_the_queue(
    kind: Callable[..., Requests], file: tuple[int, bytes], depth: int | None
) -> None:
    fd, content = file
    with kind() if depth is None else kind(depth=depth) as requests:
        memory, offsets = random_reads(5000, seed=1)
        assert_read(memory, offsets, content, requests.wait(memory.submit(requests, fd, offsets), PATIENCE_S))


def test_a_batch_comes_to_its_end_while_nobody_asks(kind: Callable[..., Requests], file: tuple[int, bytes]) -> None:
    fd, content = file
    with kind(depth=4) as requests:
        memory, offsets = Memory([100] * 500), list(range(500))
        ticket = memory.submit(requests, fd, offsets)
        wanted = b"".join(content[offset : offset + 100] for offset in offsets) + b"\xee"
        assert eventually(lambda: memory.bytes.tobytes() == wanted)
        assert_read(memory, offsets, content, requests.wait(ticket, PATIENCE_S))


def test_direct_reads_of_whole_blocks(kind: type[Requests], tmp_path: Path) -> None:
    content = np.random.default_rng(3).bytes(64 * 4096)
    (tmp_path / "f").write_bytes(content)
    try:
        fd = os.open(tmp_path / "f", os.O_RDONLY | os.O_DIRECT)
    except OSError as refused:
        pytest.skip(f"{tmp_path} is on a file system without O_DIRECT: {refused}")
    memory = Memory([4096] * 65)
    at = -memory.bytes.ctypes.data % 4096
    memory.starts = memory.starts[:64] + at
    memory.sizes = memory.sizes[:64]
    offsets = (np.random.default_rng(4).permutation(64) * 4096).tolist()
    with kind() as requests:
        assert_read(memory, offsets, content, requests.wait(memory.submit(requests, fd, offsets), PATIENCE_S))
    os.close(fd)


def test_what_a_read_fails_with_is_its_result(kind: type[Requests], file: tuple[int, bytes]) -> None:
    memory = Memory([10, 10])
    with kind() as requests:
        closed = os.dup(file[0])
        os.close(closed)
        assert requests.wait(memory.submit(requests, closed, [0, 5]), PATIENCE_S).tolist() == [-errno.EBADF] * 2
        nowhere = np.array([memory.bytes.ctypes.data, 8], np.int64)
        ticket = requests.submit(file[0], np.array([0, 0]), memory.sizes, nowhere, memory)
        assert requests.wait(ticket, PATIENCE_S).tolist() == [10, -errno.EFAULT]


def test_arrays_of_different_lengths_are_refused(kind: type[Requests], file: tuple[int, bytes]) -> None:
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with kind() as requests:
        with pytest.raises(InvalidInput, match=r"1 offsets, 2 sizes and 1 addresses, expected"):
            requests.submit(file[0], one, two, one, None)
        with pytest.raises(InvalidInput, match=r"reads: 2 descriptors, 1 offsets, 1 sizes"):
            requests.submit(np.full(2, file[0]), one, one, one, None)


def test_a_ticket_of_others_is_refused(kind: type[Requests], file: tuple[int, bytes]) -> None:
    with kind() as mine, kind() as other:
        ticket = Memory([1]).submit(mine, file[0], [0])
        for ask in (other.done, other.wait):
            with pytest.raises(InvalidInput, match="a ticket of other requests"):
                ask(ticket)


def test_threads_submit_and_wait_for_each_others_batches(kind: type[Requests], file: tuple[int, bytes]) -> None:
    fd, content = file
    given_: list[list[tuple[Ticket, Memory, list[int]]]] = [[] for _ in range(6)]
    start, wrong = threading.Barrier(6), []

    def act(who: int, requests: Requests) -> None:
        try:
            for batch in range(20):
                memory, offsets = random_reads(1 + 37 * (batch % 5), seed=1000 * who + batch)
                given_[who].append((memory.submit(requests, fd, offsets), memory, offsets))
                if batch % 3 == 0:
                    requests.wait(given_[who][-1][0], PATIENCE_S)
            start.wait(PATIENCE_S)
            for ticket, memory, offsets in given_[(who + 1) % 6]:
                assert_read(memory, offsets, content, requests.wait(ticket, PATIENCE_S))
        except BaseException as error:
            wrong.append(error)

    with kind() as requests:
        threads = [threading.Thread(target=act, args=(who, requests)) for who in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)


def test_reads_outlive_the_thread_that_submitted_them(kind: type[Requests]) -> None:
    """The kernel cancels some of a thread's reads when it ends."""
    memory, tickets = Memory([4, 4]), []
    with silent_pipe() as (end, pen), kind() as requests:
        thread = threading.Thread(target=lambda: tickets.append(memory.submit(requests, end, [0, 0])))
        thread.start()
        thread.join(PATIENCE_S)
        with pytest.raises(Stalled):
            requests.wait(tickets[0], 0.05)
        os.write(pen, b"abcdefgh")
        assert requests.wait(tickets[0], PATIENCE_S).tolist() == [4, 4]
        assert sorted(memory.read(i) for i in range(2)) == [b"abcd", b"efgh"]


@pytest.mark.parametrize("stuck", [1, 20])
def test_a_device_that_does_not_answer_is_waited_for_so_long_and_may_answer_later(
    kind: type[Requests], file: tuple[int, bytes], stuck: int
) -> None:
    """Other reads come meanwhile, whoever waits for them, and other threads run."""
    fd, content = file
    with silent_pipe() as (end, pen), kind() as requests:
        waiting = Memory([4] * stuck)
        ticket = waiting.submit(requests, end, [0] * stuck)
        began = time.monotonic()
        with pytest.raises(
            Stalled, match=rf"pipe:.*: {stuck} of {stuck} reads are not over after 0.[23]\d* s, expected all"
        ):
            requests.wait(ticket, 0.2)
        assert 0.2 <= time.monotonic() - began < PATIENCE_S
        assert not requests.done(ticket)
        found: list[Any] = []
        patient = threading.Thread(target=lambda: found.append(requests.wait(ticket, PATIENCE_S)))
        patient.start()
        for seed in range(10):
            memory, offsets = random_reads(1 + seed, seed)
            assert_read(memory, offsets, content, requests.wait(memory.submit(requests, fd, offsets), PATIENCE_S / 2))
        memory, offsets = random_reads(2, 99)
        other = memory.submit(requests, fd, offsets)
        assert eventually(lambda: requests.done(other))
        assert patient.is_alive()
        os.write(pen, b"abcd" * stuck)
        patient.join(PATIENCE_S)
        assert found[0].tolist() == [4] * stuck
        assert waiting.read(stuck - 1) == b"abcd"


def test_a_signal_ends_a_wait(kind: type[Requests]) -> None:
    class Rung(Exception):
        pass

    def ring(_: int, __: FrameType | None) -> None:
        raise Rung

    with silent_pipe() as (end, pen), kind() as requests:
        ticket = Memory([1]).submit(requests, end, [0])
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            with pytest.raises(Rung):
                requests.wait(ticket, PATIENCE_S)
        finally:
            signal.signal(signal.SIGALRM, before)
        os.write(pen, b"x")
        assert requests.wait(ticket, PATIENCE_S).tolist() == [1]


def test_memory_is_kept_until_the_last_read_is_over_and_no_longer(
    kind: type[Requests], file: tuple[int, bytes]
) -> None:
    with silent_pipe() as (end, pen), kind() as requests:
        memory = Memory([4])
        there = weakref.ref(memory)
        ticket = memory.submit(requests, end, [0])
        del memory
        gc.collect()
        assert there() is not None
        os.write(pen, b"abcd")
        requests.wait(ticket, PATIENCE_S)
        assert eventually(lambda: gc.collect() >= 0 and there() is None)


def test_close_waits_for_what_is_in_flight(kind: type[Requests], file: tuple[int, bytes]) -> None:
    memory, offsets = random_reads(20, seed=5)
    requests = kind()
    ticket = memory.submit(requests, file[0], offsets)
    requests.close(PATIENCE_S)
    requests.close()
    results = requests.wait(ticket, 0)
    for index, (offset, size) in enumerate(zip(offsets, memory.sizes.tolist(), strict=True)):
        wanted = file[1][offset : offset + size]
        if results[index] == -errno.ECANCELED:
            wanted = b""
        else:
            assert results[index] == len(wanted)
        assert memory.read(index) == wanted + b"\xee" * (size - len(wanted))
    with pytest.raises(InvalidInput, match="the requests are closed, expected them to be open"):
        memory.submit(requests, file[0], offsets)


def test_close_does_not_wait_for_ever_and_gives_back_no_memory(kind: type[Requests]) -> None:
    with silent_pipe() as (end, pen):
        requests, memory = kind(), Memory([4])
        there = weakref.ref(memory)
        ticket = memory.submit(requests, end, [0])
        with pytest.raises(Stalled):  # it is in flight
            requests.wait(ticket, 0.2)
        began = time.monotonic()
        requests.close(0.1)
        assert time.monotonic() - began < PATIENCE_S / 2
        with pytest.raises(Stalled):
            requests.wait(ticket, 0.01)
        assert ticket in UNDER_WAY
        del requests, memory, ticket
        gc.collect()
        assert there() is not None
        os.write(pen, b"abcd")  # a thread that waits for it ends


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e10])
def test_a_wait_may_be_as_long_as_one_likes(kind: type[Requests], file: tuple[int, bytes], timeout_s: float) -> None:
    with kind() as requests:
        memory, offsets = random_reads(50, seed=8)
        assert_read(memory, offsets, file[1], requests.wait(memory.submit(requests, file[0], offsets), timeout_s))


def test_a_ticket_that_could_not_be_sent_is_not_under_way(kind: type[Requests], file: tuple[int, bytes]) -> None:
    requests, memory = kind(), Memory([10])
    ticket = requests.ticket(
        file[0], np.zeros(1, np.int64), memory.sizes, memory.starts + memory.bytes.ctypes.data, memory
    )
    requests.close()
    with pytest.raises(InvalidInput, match="closed"):
        requests.send(ticket)
    assert not ticket.begun
    assert ticket not in UNDER_WAY


def test_where_no_thread_can_be_started_what_went_off_is_still_waited_for(
    kind: Callable[..., Requests], file: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More reads than fit at once, of which the rest is sent, or read, by a thread."""
    with kind(depth=3) as requests:
        memory, offsets = random_reads(100, seed=9)
        ticket = requests.ticket(
            file[0], np.array(offsets), memory.sizes, memory.starts + memory.bytes.ctypes.data, memory
        )

        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with contextlib.suppress(RuntimeError):
                requests.send(ticket)
        if ticket.begun:
            assert ticket in UNDER_WAY
        else:
            assert ticket not in UNDER_WAY
            requests.send(ticket)
        assert_read(memory, offsets, file[1], requests.wait(ticket, PATIENCE_S))


def descriptors_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "forgotten"])
def test_nothing_is_left_behind(kind: Callable[..., Requests], file: tuple[int, bytes], closes: bool) -> None:
    def use() -> None:
        requests, (memory, offsets) = kind(depth=4), random_reads(50, seed=6)
        requests.wait(memory.submit(requests, file[0], offsets), PATIENCE_S)
        if closes:
            requests.close(PATIENCE_S)

    use()
    gc.collect()
    assert eventually(lambda: "kvdb-" not in str([thread.name for thread in threading.enumerate()]))
    before = descriptors_and_threads()
    for _ in range(5):
        use()
    gc.collect()
    assert eventually(lambda: descriptors_and_threads() <= before)
    assert all(ticket.left for ticket in UNDER_WAY)


def test_a_child_reads_for_itself_and_takes_nothing_from_its_parent(kind: type[Requests], tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 64)
    said = finish(
        python(
            """
import os, sys, threading
import numpy as np
from kvdb.errors import InvalidInput
from kvdb.requests import REQUESTS
fd, (end, pen) = os.open(sys.argv[2], os.O_RDONLY), os.pipe()
requests = REQUESTS[sys.argv[1]]()

def submit(fd, count):
    room = np.zeros((count, 100), np.uint8)
    offsets = np.arange(count) * 7
    sizes = np.full(count, 100)
    return requests.submit(fd, offsets, sizes, room.ctypes.data + np.arange(count) * 100, room), room

def read_all():
    ticket, room = submit(fd, 300)
    assert (requests.wait(ticket, 30) == 100).all()
    assert (room == (np.arange(300)[:, None] * 7 + np.arange(100)) % 256).all()

def child():
    for ask in (requests.done, lambda ticket: requests.wait(ticket, 1)):
        try:
            ask(stuck)
        except InvalidInput as refused:
            assert "forked" in str(refused)
        else:
            raise AssertionError("a ticket of the parent was taken")
    for _ in range(20):
        read_all()
    requests.close()

read_all()
stuck, room = submit(end, 1)
waiting = threading.Thread(target=lambda: requests.wait(stuck, 30))
waiting.start()
pids = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        sys.exit(0)
    pids.append(pid)
for _ in range(20):
    read_all()
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
os.write(pen, b"x" * 100)
waiting.join(30)
assert requests.wait(stuck, 30).tolist() == [100] and (room == ord("x")).all()
requests.close()
print("read")
""",
            kind.name,
            str(tmp_path / "f"),
        )
    )
    assert said == "[0, 0, 0]\nread\n"


def test_a_process_ends_though_a_device_never_answers(kind: type[Requests]) -> None:
    said = finish(
        python(
            """
import os, sys
import numpy as np
from kvdb.requests import REQUESTS
end, pen = os.pipe()
room = np.zeros(4, np.uint8)
requests = REQUESTS[sys.argv[1]]()
ticket = requests.submit(end, np.zeros(1, np.int64), np.full(1, 4), np.full(1, room.ctypes.data), room)
print(requests.done(ticket))
""",
            kind.name,
        )
    )
    assert said == "False\n"
