"""The write lock: one holder over threads and processes, released when its holder dies, waited for only so long."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import finish, python

from kvdb.errors import StoreLocked
from kvdb.lock import WriteLock

HOLDER = """
import sys
from pathlib import Path
from kvdb.lock import WriteLock
with WriteLock(Path(sys.argv[1]), timeout_s=0).held():
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "write.lock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it reads a line."""
    process = python(HOLDER, str(path))
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def assert_free(path: Path) -> None:
    with WriteLock(path, timeout_s=10).held():
        pass


def test_a_thread_may_take_it_again_inside(path: Path) -> None:
    lock = WriteLock(path, timeout_s=0)
    with lock.held():
        with lock.held(), lock.held():
            pass
        with pytest.raises(StoreLocked, match="in use"):
            WriteLock(path, timeout_s=0).held().__enter__()
    assert_free(path)


def test_a_block_that_fails_gives_it_back(path: Path) -> None:
    lock = WriteLock(path, timeout_s=0)
    with pytest.raises(ZeroDivisionError), lock.held(), lock.held():
        raise ZeroDivisionError
    assert_free(path)


def test_another_thread_waits_and_gives_up_in_time(path: Path) -> None:
    lock = WriteLock(path, timeout_s=0.05)
    refused = []

    def other() -> None:
        try:
            with lock.held():
                pass
        except StoreLocked as error:
            refused.append(str(error))

    with lock.held():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in refused[0]
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(refused) == 1


def test_threads_take_turns(path: Path) -> None:
    lock, inside, most = WriteLock(path, timeout_s=30), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(50):
            with lock.held():
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_another_process_is_waited_for(path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(StoreLocked, match=str(path)), WriteLock(path, timeout_s=0.05).held():
        pass
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert_free(path)


def test_a_killed_holder_lets_go(path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    assert_free(path)


def test_a_stopped_holder_is_told_as_a_lock_and_not_waited_for(path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(StoreLocked, match=r"in use for 0\.05 s"), WriteLock(path, timeout_s=0.05).held():
        pass
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert_free(path)


def test_a_child_forked_inside_holds_nothing_and_keeps_nothing(path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from kvdb.errors import StoreLocked
from kvdb.lock import WriteLock
lock = WriteLock(Path(sys.argv[1]), timeout_s=0)
ready, go = os.pipe(), os.pipe()
with lock.held():
    child = os.fork()
    if child == 0:
        try:
            lock.held().__enter__()
        except StoreLocked:
            os.write(ready[1], b"refused")
        os.read(go[0], 1)
        os._exit(0)
    print(os.read(ready[0], 7).decode())
with WriteLock(Path(sys.argv[1]), timeout_s=10).held():
    print("free")  # though the child lives on
os.write(go[1], b"x")
print(os.waitpid(child, 0)[1])
"""
    assert finish(python(code, str(path))).split() == ["refused", "free", "0"]
