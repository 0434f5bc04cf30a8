"""Something that may crash, hang or eat memory, done in a forked child: what became of it.

Fork from a process with few pages and one thread: `python("...")` of helpers, not pytest's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from helpers import finish, python

PATIENCE_S = 30
MEMORY_BYTES = 512 << 20
"""More address space than the child has when it begins."""


class Ended(NamedTuple):
    """How a child ended. harm: "crashed", "hung", "untyped", or None; answer: what it returned, or what it died of."""

    harm: str | None
    answer: Any


def in_child(act: Callable[[], Any]) -> Ended:
    """Do `act` in a child of bounded memory and time; it returns something JSON can say."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _act(act, writing)
    os.close(writing)
    child = os.pidfd_open(pid)
    try:
        said = _said(reading)
        hung = said is None or not select.select([child], [], [], PATIENCE_S)[0]
        if hung:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(child)
        os.close(reading)
    if hung:
        return Ended("hung", f"more than {PATIENCE_S} s")
    if status != 0 or not said:
        return Ended("crashed", f"status {status}")
    return Ended(*json.loads(said))


def _act(act: Callable[[], Any], writing: int) -> None:
    """In the child."""
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = Ended(None, act())
    except BaseException:
        answer = Ended("untyped", traceback.format_exc()[-3000:])
    with contextlib.suppress(OSError):
        os.write(writing, json.dumps(answer).encode()[: 1 << 16])
    os._exit(0)


def _said(reading: int) -> bytes | None:
    """All the child says until it ends; None when it takes too long."""
    said = b""
    while select.select([reading], [], [], PATIENCE_S)[0]:
        part = os.read(reading, 1 << 16)
        if not part:
            return said
        said += part
    return None


def trials(module: str, folder: Path, count: int, *arguments: str) -> list[Any]:
    """What `main(folder, first, stop, step, *arguments)` of a harness prints, a line of JSON per seed below `count`: two
    processes share the seeds."""
    code = f"import sys; from {module} import main; main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])"
    running = []
    for first in range(2):
        (folder / str(first)).mkdir(parents=True)
        running.append(python(code, str(folder / str(first)), str(first), str(count), "2", *arguments))
    try:
        with ThreadPoolExecutor(len(running)) as pool:  # both at once: one that is not read waits when its pipe is full
            said = list(pool.map(lambda process: finish(process, 24 * 3600), running))
        lines = [json.loads(line) for text in said for line in text.splitlines()]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert sorted(seed for seed, *_ in lines) == list(range(count))
    return lines
