"""What is particular to one way to have reads in flight: the layouts of io_uring, and what happens where the system refuses it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import finish, python

from kvdb.errors import Stalled, Unsupported
from kvdb.requests import Ticket, Uring, ring
from kvdb.requests.base import NAP_S
from kvdb.requests.ring import CQE, SQE, GetEvents, Offsets, Params, Ring, Timespec

HEADER = Path("/usr/include/linux/io_uring.h")
SECOND_NAMES = {"flags_or_overflow": "overflow", "dropped_or_cqes": "cqes", "array_or_flags": "flags"}
FIRST_NAMES = {"flags_or_overflow": "flags", "dropped_or_cqes": "dropped", "array_or_flags": "array"}


def fields(structure: type[ctypes.Structure], names: dict[str, str], c_name: str) -> dict[str, int]:
    """What C calls each field of a structure, and the size of all, with our numbers."""
    offsets = {
        f"offsetof(struct {c_name}, {names.get(f[0], f[0])})": getattr(structure, f[0]).offset
        for f in structure._fields_
    }
    return offsets | {f"sizeof(struct {c_name})": ctypes.sizeof(structure)}


def columns(dtype: np.dtype[np.void], c_name: str) -> dict[str, int]:
    assert dtype.fields is not None
    offsets = {f"offsetof(struct {c_name}, {name})": field[1] for name, field in dtype.fields.items()}
    return offsets | {f"sizeof(struct {c_name})": dtype.itemsize}


OURS = (
    columns(SQE, "io_uring_sqe")
    | columns(CQE, "io_uring_cqe")
    | fields(Params, {}, "io_uring_params")
    | fields(Offsets, FIRST_NAMES, "io_sqring_offsets")
    | fields(Offsets, SECOND_NAMES, "io_cqring_offsets")
    | {"offsetof(struct io_uring_getevents_arg, ts)": GetEvents.ts.offset}
    | {"sizeof(struct io_uring_getevents_arg)": ctypes.sizeof(GetEvents)}
    | {"sizeof(struct __kernel_timespec)": ctypes.sizeof(Timespec)}
    | {"IORING_OP_READ": ring.OP_READ, "IORING_OFF_SQES": ring.AT_SQES, "IORING_OFF_SQ_RING": ring.AT_RINGS}
    | {"IORING_SETUP_CLAMP": ring.SETUP_CLAMP, "IORING_ENTER_GETEVENTS": ring.ENTER_GETEVENTS}
    | {"IORING_ENTER_EXT_ARG": ring.ENTER_EXT_ARG, "SYS_io_uring_setup": ring.SETUP, "SYS_io_uring_enter": ring.ENTER}
    | {f"IORING_FEAT_{name}": bit for bit, name in ring.FEATURES.items()}
)


@pytest.mark.skipif(not HEADER.exists() or shutil.which("cc") is None, reason="no cc, or no linux/io_uring.h")
def test_layouts_and_numbers_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({name}));\n' for name in OURS)
    (tmp_path / "a.c").write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <sys/syscall.h>\n#include <linux/io_uring.h>\n"
        f"int main(void) {{ {lines} return 0; }}\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "a", tmp_path / "a.c"], check=True)
    theirs = subprocess.run([tmp_path / "a"], check=True, capture_output=True, text=True).stdout.split()
    assert dict(zip(OURS, map(int, theirs), strict=True)) == OURS


def a_ring(entries: int) -> Ring:
    try:
        return Ring(entries)
    except Unsupported as why:
        pytest.skip(str(why))


def test_every_mark_comes_back_once_however_often_the_ring_has_gone_round(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)))
    fd, queue, rng = os.open(tmp_path / "f", os.O_RDONLY), a_ring(8), np.random.default_rng(0)
    room = np.zeros(8, np.uint8)
    for turn in range(200):
        count = int(rng.integers(0, 9))
        offsets, marks = rng.integers(0, 256, count), rng.integers(0, 2**64, count, np.uint64)
        queue.put(np.full(count, fd), offsets, np.ones(count, np.int64), room.ctypes.data + np.arange(count), marks)
        assert queue.unsent == count
        queue.send()
        assert queue.unsent == 0
        found: list[int] = []
        while len(found) < count:
            queue.sleep(count - len(found), 30.0)
            taken, results = queue.peek()
            assert np.array_equal(queue.peek()[0][: len(taken)], taken)
            queue.drop(len(taken))
            assert (results == 1).all(), turn
            found += taken.tolist()
        assert sorted(found) == sorted(marks.tolist())
        assert room[:count].tolist() == offsets.tolist()
    os.close(fd)


def test_what_is_waited_for_goes_before_what_was_sent_ahead() -> None:
    """Two reads are in flight, of a pipe that says nothing; one of them ends."""
    a_ring(1)
    (end, pen), room, one = os.pipe(), np.zeros(6, np.uint8), np.ones(6, np.int64)
    with Uring(depth=2) as requests:
        ahead = requests.submit(end, one, one, room.ctypes.data + np.arange(6), room)
        zero = os.open("/dev/zero", os.O_RDONLY)
        wanted = requests.submit(zero, one[:1], one[:1], np.full(1, room.ctypes.data), room)
        with pytest.raises(Stalled):
            requests.wait(wanted, 0.1)
        os.write(pen, b"x")
        assert requests.wait(wanted, 30.0).tolist() == [1]
        assert not requests.done(ahead)
        os.write(pen, b"xxxxx")
        assert requests.wait(ahead, 30.0).tolist() == [1] * 6
    for fd in (end, pen, zero):
        os.close(fd)


def a_read(requests: Uring, fd: int, room: np.ndarray[Any, Any]) -> Ticket:
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    return requests.submit(fd, zero, one, np.full(1, room.ctypes.data), room)


def test_a_result_that_another_thread_takes_before_we_sleep_is_not_slept_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between seeing that a read is not over and going to sleep for it."""
    a_ring(1)
    (end, pen), room = os.pipe(), np.zeros(1, np.uint8)
    with Uring() as requests:
        ticket, queue = a_read(requests, end, room), requests._queue
        assert queue is not None
        sleep, slept = Ring.sleep, []

        def before(asked: Ticket | None, *given: Any) -> None:
            os.write(pen, b"x")
            while not requests.done(ticket):
                pass
            type(queue)._sleep(queue, asked, *given)

        def counting(ring: Ring, count: int, timeout_s: float | None) -> None:
            slept.append(timeout_s)
            sleep(ring, count, timeout_s)

        monkeypatch.setattr(queue, "_sleep", before)
        monkeypatch.setattr(Ring, "sleep", counting)
        assert requests.wait(ticket, 30.0).tolist() == [1]
        assert slept == []
    os.close(end)
    os.close(pen)


def test_no_sleep_is_longer_than_a_nap(monkeypatch: pytest.MonkeyPatch) -> None:
    a_ring(1)
    (end, pen), room, slept = os.pipe(), np.zeros(1, np.uint8), []
    sleep = Ring.sleep

    def counting(ring: Ring, count: int, timeout_s: float | None) -> None:
        slept.append(timeout_s)
        sleep(ring, count, timeout_s)

    monkeypatch.setattr(Ring, "sleep", counting)
    with Uring() as requests:
        ticket = a_read(requests, end, room)
        with pytest.raises(Stalled):
            requests.wait(ticket, 0.2)
        os.write(pen, b"x")
        requests.wait(ticket, 30.0)
    assert len(slept) >= 4
    assert all(timeout_s is not None and timeout_s <= NAP_S for timeout_s in slept)
    os.close(end)
    os.close(pen)


@pytest.mark.parametrize("lost", [True, False], ids=["a read that is never over", "reads that wait for room"])
def test_it_sleeps_where_nothing_can_be_done_and_not_where_something_can(
    monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    try:
        requests = Uring(depth=2)
    except Unsupported as why:
        pytest.skip(str(why))
    slept: list[float] = []
    real, room, (out, into) = Ring.sleep, np.empty(64, np.uint8), os.pipe()
    monkeypatch.setattr(
        Ring, "sleep", lambda self, count, timeout_s: (slept.append(timeout_s), real(self, count, timeout_s))
    )
    os.write(into, bytes(64))
    reads = np.arange(64)
    with requests:
        ticket = requests.submit(out, np.zeros(64, np.int64), np.ones(64, np.int64), room.ctypes.data + reads, room)
        requests.wait(ticket, 20)
        looked = len(slept)
        if lost:
            ticket.left = 1
            with pytest.raises(Stalled):
                requests.wait(ticket, 0.1)
            assert len(slept) > looked
            ticket.left = 0
        else:
            assert looked < 16  # of 32 times that the queue is full
    os.close(out)
    os.close(into)


def test_results_that_an_interrupt_kept_from_being_noted_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    a_ring(1)
    zero, room = os.open("/dev/zero", os.O_RDONLY), np.ones(1, np.uint8)
    with Uring() as requests:
        ticket, queue = a_read(requests, zero, room), requests._queue
        assert queue is not None

        def interrupted(*given: Any) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(queue, "_note", interrupted)
        with pytest.raises(KeyboardInterrupt):
            requests.wait(ticket, 30.0)
        assert requests.wait(ticket, 5.0).tolist() == [1]
    os.close(zero)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_put_that_was_interrupted_puts_each_read_once(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    a_ring(1)
    zero, room, ones = os.open("/dev/zero", os.O_RDONLY), np.ones(9, np.uint8), np.ones(9, np.int64)
    put, marked = Ring.put, []

    def noting(ring: Ring, fd: int, *given: Any) -> None:
        marked.extend(given[-1].tolist())
        put(ring, fd, *given)

    def interrupted(ring: Ring, *given: Any) -> None:
        monkeypatch.setattr(Ring, "put", noting)
        if when == "after":
            noting(ring, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Ring, "put", interrupted)
    with Uring(depth=4) as requests:
        ticket = requests.ticket(zero, ones, ones, room.ctypes.data + np.arange(9), room)
        with pytest.raises(KeyboardInterrupt):
            requests.send(ticket)
        assert ticket.begun
        assert requests.wait(ticket, 5.0).tolist() == [1] * 9
        assert len(marked) == len(set(marked)) == 9
        assert not room.any()
    os.close(zero)


REFUSING = """
import ctypes, errno, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
code = b"".join(struct.pack("<HBBI", *line) for line in (
    (0x20, 0, 0, 0),               # load the number of the call
    (0x15, 0, 1, 425),             # io_uring_setup, or skip one
    (0x06, 0, 0, 0x00050000 | int(sys.argv[1])),  # fail with this errno
    (0x06, 0, 0, 0x7FFF0000),      # allow
))
buffer = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0                      # no new privileges
assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0) == 0  # seccomp, by a filter
import numpy as np
from kvdb.errors import Unsupported
from kvdb.requests import Uring, best_requests
try:
    Uring()
except Unsupported as why:
    print(why)
room = np.zeros(3, np.uint8)
with best_requests() as requests:
    ticket = requests.submit(0, np.zeros(1, np.int64), np.full(1, 3), np.full(1, room.ctypes.data), room)
    print(requests.name)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the filter knows the calls of x86_64")
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_where_the_system_refuses_threads_read(number: int) -> None:
    said = finish(python(REFUSING, str(number)))
    assert said == (
        f"io_uring: {os.strerror(number)}, expected a kernel that has it and lets this process use it; read with threads\n"
        "threads\n"
    )


def test_a_ring_without_free_descriptors_is_refused_with_the_reason() -> None:
    said = finish(
        python(
            """
import resource
from kvdb.errors import Unsupported
from kvdb.requests import Uring
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 4096))
try:
    Uring()
except Unsupported as why:
    print(why)
"""
        )
    )
    assert said.startswith("io_uring: ")
