"""Looking into a store that somebody else made, in a process of its own that may do little and be lost.

The child may read, and answer through a pipe: no file it writes may have a byte, and memory, processor time, descriptors
and processes are bounded. It takes no lock and leaves the store as it is, down to times of modification. What ends it, a
signal or the end of the time given, is a finding like any other.

Not a sandbox against a bug in CPython, NumPy or LMDB itself: the child runs as the same user. Only kinds and words of
problems come back, and they come from the store: show them, do not act on them.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from kvdb.errors import KVDBError, Problem
from kvdb.store import KVDB

MEMORY_BYTES: Final = 4 << 30
"""Address space of the child: its libraries take a quarter of a GiB, the catalog's map at least four times its file."""
_DESCRIPTORS: Final = 64
_PROBLEMS: Final = 1_000
_WORDS: Final = 2_000
_ANSWER_BYTES: Final = 16 << 20


def verify_untrusted(
    path: str | os.PathLike[str], *, timeout_s: float = 60.0, memory_bytes: int = MEMORY_BYTES
) -> list[Problem]:
    """What `check` finds in a store, or why it could not be looked at; empty: nothing is wrong.

    Nothing about the store raises. Of many problems the first thousand are told.
    """
    store = os.path.abspath(path)
    arguments = [store, str(math.ceil(timeout_s)), str(memory_bytes)]
    with subprocess.Popen(
        # -P and cwd: a folder called kvdb in the store must not be imported; -B: importing writes nothing
        [sys.executable, "-P", "-B", "-m", "kvdb.untrusted", *arguments],
        cwd="/",
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        deadline = time.monotonic() + timeout_s
        try:
            answer = _answer(child, deadline)
            if answer is not None and len(answer) < _ANSWER_BYTES:
                child.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            answer = None
        finally:
            child.kill()
    if answer is None:
        return [Problem(store, "hang", f"looking at it took more than {timeout_s:g} s, expected an end")]
    if child.returncode != 0:
        return [Problem(store, "crash", f"looking at it ended with status {child.returncode}, expected an answer")]
    try:
        return msgspec.json.decode(answer, type=list[Problem])
    except msgspec.MsgspecError as e:
        return [Problem(store, "crash", f"no answer from the process that looked at it ({e}), expected one")]


def _answer(child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """What the child says until it closes its end, or until it is too much; None when that takes too long."""
    assert child.stdout is not None
    said = bytearray()
    while len(said) < _ANSWER_BYTES:
        if not select.select([child.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
            return None
        part = os.read(child.stdout.fileno(), 1 << 16)
        if not part:
            break
        said += part
    return bytes(said)


def look(path: Path) -> list[Problem]:
    """As `verify_untrusted`, in this process."""
    try:
        with KVDB.open_untrusted(path) as db:
            return db.check()
    except (KVDBError, OSError, MemoryError) as e:
        return [Problem(str(path), getattr(e, "kind", "unreadable"), str(e) or type(e).__name__)]


def confine(timeout_s: int, memory_bytes: int) -> None:
    """Give up, for good, what looking at a store does not need."""
    bounds = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: timeout_s + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _DESCRIPTORS,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in bounds.items():
        hard = resource.getrlimit(what)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(what, (value, value))


def main() -> None:
    path, timeout_s, memory_bytes = sys.argv[1:]
    confine(int(timeout_s), int(memory_bytes))
    found = [
        Problem(p.loc[:_WORDS], p.kind, p.message[:_WORDS], p.segment and p.segment[:_WORDS])
        for p in look(Path(path))[:_PROBLEMS]
    ]
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
