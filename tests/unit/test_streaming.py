"""Writes happen in order on one thread, at most `depth` wait, and after an error nothing more is written.

No test waits for a clock: a gate (threading.Event) holds the writing thread still.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from helpers import finish, python

from kvdb.errors import StorageFull
from kvdb.runtime.streaming import WriteBehind
from kvdb.runtime.timeline import Timeline

LONG_S = 60.0  # only reached when a test fails


@pytest.fixture
def behind() -> Iterator[WriteBehind]:
    made = WriteBehind(Timeline(), depth=3)
    yield made
    made.close()


def fail() -> None:
    raise StorageFull("disk: full")


def settle(behind: WriteBehind) -> None:
    """Until the thread has run everything handed to it so far; takes nothing off the queue."""
    for _, future in list(behind._pending):
        future.exception(LONG_S)


def test_writes_happen_in_the_order_of_submission(behind: WriteBehind) -> None:
    done: list[int] = []
    for i in range(50):
        behind.submit(i % 4, lambda i=i: done.append(i))  # type: ignore[misc]
    behind.wait()
    assert done == list(range(50))


def test_writes_happen_on_another_thread_and_always_the_same(behind: WriteBehind) -> None:
    threads: list[int] = []
    for layer in range(8):
        behind.submit(layer, lambda: threads.append(threading.get_ident()))
    behind.wait()
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_waiting_for_a_layer_waits_for_all_its_writes(behind: WriteBehind) -> None:
    done: list[str] = []
    behind.submit(0, lambda: done.append("0a"))
    behind.submit(1, lambda: done.append("1"))
    behind.submit(0, lambda: done.append("0b"))
    behind.wait(0)
    assert done == ["0a", "1", "0b"]


def test_waiting_for_another_layer_does_not_wait(behind: WriteBehind) -> None:
    gate = threading.Event()
    behind.submit(0, lambda: gate.wait(LONG_S) and None)
    behind.wait(1)  # would hang for LONG_S otherwise, and then the assertion below fails
    still_pending = not behind._pending[0][1].done()
    gate.set()
    behind.wait()
    assert still_pending


def test_never_more_than_depth_writes_are_pending(behind: WriteBehind) -> None:
    gate, submitted = threading.Event(), threading.Semaphore(0)

    def submit_all() -> None:
        for layer in range(5):
            behind.submit(layer, lambda: gate.wait(LONG_S) and None)
            submitted.release()

    other = threading.Thread(target=submit_all)
    other.start()
    for _ in range(3):
        assert submitted.acquire(timeout=LONG_S)
    fourth_waits = not submitted.acquire(timeout=0.2)  # the gate is shut: no wait is long enough
    gate.set()
    other.join(LONG_S)
    behind.wait()
    assert fourth_waits


def test_an_error_is_raised_at_the_next_wait_for_its_layer(behind: WriteBehind) -> None:
    behind.submit(0, fail)
    with pytest.raises(StorageFull, match="disk: full"):
        behind.wait(0)


def test_an_error_is_raised_at_the_next_submit(behind: WriteBehind) -> None:
    behind.submit(0, fail)
    settle(behind)
    with pytest.raises(StorageFull, match="disk: full"):
        behind.submit(1, lambda: None)


def test_an_error_is_raised_again_and_again(behind: WriteBehind) -> None:
    behind.submit(0, fail)
    for _ in range(3):
        with pytest.raises(StorageFull):
            behind.wait()
    with pytest.raises(StorageFull):
        behind.wait(7)


def test_nothing_is_written_after_an_error(behind: WriteBehind) -> None:
    gate, written = threading.Event(), []

    def fail_late() -> None:
        gate.wait(LONG_S)
        fail()

    behind.submit(0, fail_late)
    behind.submit(1, lambda: written.append(1))  # queued before the error is known
    behind.submit(2, lambda: written.append(2))
    gate.set()
    settle(behind)
    with pytest.raises(StorageFull):
        behind.wait()
    assert written == []


def test_abandoning_writes_nothing_more_and_raises_nothing(behind: WriteBehind) -> None:
    gate, written = threading.Event(), []
    behind.submit(0, lambda: gate.wait(LONG_S) and None)
    behind.submit(1, lambda: written.append(1))
    behind.submit(2, fail)
    threading.Timer(0.05, gate.set).start()
    behind.abandon()
    assert written == []
    behind.wait()  # no error is left behind


def test_after_abandoning_it_can_be_used_again(behind: WriteBehind) -> None:
    behind.submit(0, fail)
    behind.abandon()
    written: list[int] = []
    behind.submit(0, lambda: written.append(1))
    behind.wait()
    assert written == [1]


def test_letting_go_waits_for_nothing_and_ends_after_the_write_under_way(behind: WriteBehind) -> None:
    gate, begun, ended, written = threading.Event(), threading.Event(), threading.Event(), []

    def slow() -> None:
        begun.set()
        gate.wait(LONG_S)
        written.append("slow")

    behind.submit(0, slow)
    behind.submit(1, lambda: written.append("never"))
    begun.wait(LONG_S)

    def then() -> None:
        written.append("then")
        ended.set()

    behind.let_go(then)
    assert written == []
    gate.set()
    assert ended.wait(LONG_S)
    assert written == ["slow", "then"]


def test_letting_go_where_nothing_was_written_ends_at_once(behind: WriteBehind) -> None:
    ended: list[str] = []
    behind.let_go(lambda: ended.append("then"))
    assert ended == ["then"]


def test_closing_twice_is_fine_and_undoes_nothing(behind: WriteBehind) -> None:
    written: list[int] = []
    behind.submit(0, lambda: written.append(1))
    behind.wait()
    behind.close()
    behind.close()
    assert written == [1]


def test_in_a_forked_child_going_on_is_an_error_and_closing_waits_for_nobody() -> None:
    said = finish(
        python(
            """
import os, threading
from kvdb.errors import InvalidInput
from kvdb.runtime.streaming import WriteBehind
from kvdb.runtime.timeline import Timeline
behind, gate, written = WriteBehind(Timeline()), threading.Event(), []
behind.submit(0, gate.wait)
behind.submit(1, lambda: written.append(1))
pid = os.fork()
if pid == 0:
    for act in (lambda: behind.submit(0, print), behind.wait):
        try:
            act()
        except InvalidInput as error:
            print(error, flush=True)
    behind.close()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
gate.set()
behind.wait()
print(written)
behind.close()
"""
        )
    )
    assert said.count("made before this process was forked") == 2
    assert said.endswith("0\n[1]\n")
