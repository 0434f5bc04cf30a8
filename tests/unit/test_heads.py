"""Work on heads shared out over threads: each head once, whoever takes it, and nobody left at work when it returns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdb.runtime import heads as module
from kvdb.runtime.gather import Gather, Lent
from kvdb.runtime.heads import LEAST_BYTES, over_heads
from kvdb.runtime.selection.centroid_sums import of_unread
from kvdb.runtime.selection.sketch_scores import of_boxes, of_codes

MUCH = 100 * LEAST_BYTES


@pytest.fixture
def threads() -> Iterator[None]:
    """Four of torch's, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@given(heads=st.integers(1, 70), read_bytes=st.integers(0, 10 * LEAST_BYTES), threads=st.integers(1, 8))
def test_each_head_is_run_once(heads: int, read_bytes: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen: list[int] = []
        over_heads(heads, read_bytes, lambda h: seen.extend(range(h.start, h.stop)))
    finally:
        torch.set_num_threads(before)
    assert sorted(seen) == list(range(heads))


@pytest.mark.usefixtures("threads")
def test_other_threads_take_pieces() -> None:
    everyone = threading.Barrier(4, timeout=60)
    seen = set[int]()

    def run(h: slice) -> None:
        if h.start < 4:  # the first pieces, one of each thread
            everyone.wait()
        seen.add(threading.get_ident())

    over_heads(16, MUCH, run)
    assert len(seen) == 4


@pytest.mark.usefixtures("threads")
def test_small_work_asks_nobody() -> None:
    seen = []
    over_heads(16, LEAST_BYTES, lambda h: seen.append((h, threading.get_ident())))
    assert seen == [(slice(0, 16), threading.get_ident())]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bad", ["mine", "another's"])
def test_an_error_is_raised_when_all_are_done(bad: str) -> None:
    me, working = threading.get_ident(), set[int]()
    both = threading.Barrier(2, timeout=60)
    met = set[int]()

    def run(h: slice) -> None:
        who = threading.get_ident()
        working.add(who)
        try:
            if who not in met and len(met) < 2:
                met.add(who)
                both.wait()  # one of them is mine, or it would not have come here first
            if (who == me) == (bad == "mine"):
                raise ZeroDivisionError
            time.sleep(0.01)
        finally:
            working.discard(who)

    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError):
        over_heads(16, MUCH, run)
    assert not working


@pytest.mark.usefixtures("threads")
def test_an_interrupt_waits_for_whoever_is_at_work() -> None:
    torch.set_num_threads(2)
    me, others = threading.get_ident(), threading.Event()
    left = []

    def run(h: slice) -> None:
        if threading.get_ident() == me:
            others.wait(60)
            return
        others.set()
        for _ in range(3):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        left.append(h)

    with pytest.raises(KeyboardInterrupt):
        over_heads(2, MUCH, run)
    assert len(left) == 1


def test_no_interrupt_leaves_anybody_at_work_or_the_threads_unusable() -> None:
    """Hundreds of them, at any step."""
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    interrupts, late = map(int, ended.stdout.split())
    assert interrupts > 100
    assert late == 0


INTERRUPTED = """
import faulthandler, random, signal, time, torch
from kvdb.runtime.heads import over_heads

faulthandler.dump_traceback_later(60, exit=True)
torch.set_num_threads(3)
signal.signal(signal.SIGALRM, signal.default_int_handler)
random.seed(0)
left, late, interrupts, end = [False], [], 0, time.monotonic() + 4

def run(h):
    time.sleep(0.0001)
    if left[0]:
        late.append(h)

def work():
    while True:
        over_heads(8, 8 << 20, run)

while time.monotonic() < end:
    left[0] = False
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-4, 4e-3))
        work()
    except KeyboardInterrupt:
        left[0] = True
    interrupts += 1
    time.sleep(0.002)
left[0] = False
over_heads(8, 8 << 20, run)
print(interrupts, len(late))
"""


@pytest.mark.usefixtures("threads")
def test_where_no_thread_can_be_had_who_has_the_work_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module, "_HELPERS", module._Helpers())
    monkeypatch.setattr(threading.Thread, "start", refuse)
    seen: list[int] = []
    over_heads(16, MUCH, lambda h: seen.extend(range(h.start, h.stop)))
    assert seen == list(range(16))


def test_a_thread_that_outlives_the_main_one_goes_on() -> None:
    script = """
import threading, time, torch
from kvdb.runtime.heads import over_heads
torch.set_num_threads(2)
def work():
    for i in range(5):
        over_heads(4, 8 << 20, lambda h: time.sleep(0.02))
    print("done")
threading.Thread(target=work).start()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.stdout, ended.stderr) == ("done\n", "")


@pytest.mark.usefixtures("threads")
def test_a_child_of_a_fork_has_threads_of_its_own() -> None:
    over_heads(16, MUCH, lambda h: None)
    assert len(module._HELPERS.threads) >= 3
    child = os.fork()
    if child == 0:
        seen: list[int] = []
        over_heads(16, MUCH, lambda h: seen.extend(range(h.start, h.stop)))
        os._exit(0 if sorted(seen) == list(range(16)) and len(module._HELPERS.threads) == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_loops_give_the_same_to_the_bit(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seed = torch.get_num_threads(), torch.Generator().manual_seed(heads)
    try:
        torch.set_num_threads(1)
        alone = _everything(heads, seed.manual_seed(1))
        monkeypatch.setattr(module, "LEAST_BYTES", 1)
        torch.set_num_threads(3)
        together = _everything(heads, seed.manual_seed(1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def _everything(heads: int, seed: torch.Generator) -> list[torch.Tensor]:
    """What each of the loops makes of the same input."""
    group, dim, chunks, tokens = 3, 32, 40, 16

    def whole(*shape: int, low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=seed, dtype=dtype)

    q = torch.randn(heads, group, dim, generator=seed)
    boxes, scales = (
        whole(heads, chunks, 2 * dim, low=-127, high=128, dtype=torch.int8),
        torch.rand(heads, chunks, generator=seed),
    )
    codes = whole(heads, chunks, 3, 2 * dim, low=0, high=256, dtype=torch.uint8)
    rows = torch.stack([torch.randperm(chunks, generator=seed)[:20] for _ in range(heads)])
    lse = of_codes(q, (boxes, scales, codes, torch.full((chunks,), tokens, dtype=torch.int32)), rows, 3)
    logits = of_boxes(torch.randn(heads, group, 2 * dim, generator=seed), boxes, scales)
    owners = whole(heads, chunks, tokens, low=0, high=chunks, dtype=torch.int32)
    sizes = torch.stack([torch.bincount(each.flatten(), minlength=chunks) for each in owners]).int()
    unread = of_unread(logits, owners, sizes, rows, None, boxes[..., :dim].contiguous(), scales)
    assert unread is not None
    size = tokens * dim
    kv = torch.randn(heads * chunks * 2 * size, generator=seed).numpy()
    key_at = (np.arange(heads)[:, None] * chunks + rows.numpy()).ravel() * 2 * size
    gather = Gather(q, "float32")
    measured = gather.add_measured(Lent(kv, kv, key_at, key_at + size, np.arange(heads + 1) * 20, tokens))
    return [lse, logits, *unread, gather.finish(), torch.from_numpy(measured)]
