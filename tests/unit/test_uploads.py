"""A staging buffer is written to only when what it held has left it. The device is memory here, whose copies take a while."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from kvdb.runtime.uploads import DEPTH, Left, UploadRing

POISON = 0xA5


class Late:
    """Copies that begin after a random delay, each in its own thread; what is there before is poison."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.on_their_way: list[threading.Thread] = []
        self.most = 0

    def room(self, count: int) -> Tensor:
        return torch.full((count,), POISON, dtype=torch.uint8)

    def begin(self, host: Tensor) -> tuple[Tensor, Left]:
        sent = torch.full_like(host, POISON)
        delay = float(self._random.random()) / 500

        def copy() -> None:
            time.sleep(delay)
            sent.copy_(host)

        thread = threading.Thread(target=copy)
        thread.start()
        self.on_their_way.append(thread)
        self.most = max(self.most, sum(each.is_alive() for each in self.on_their_way))
        return sent, Joined(thread)


class Joined:
    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def synchronize(self) -> None:
        self._thread.join()


def send_many(seed: int) -> tuple[int, int]:
    """Sends patterns through a ring: how many arrived wrong, and how many were on their way at once."""
    copies, rng = Late(seed), np.random.default_rng(seed)
    ring, sent = UploadRing(copies), list[tuple[Tensor, int]]()
    for number in range(120):
        count = int(rng.integers(1, 5000))
        sent.append((ring.send(count, lambda out, number=number: out.fill(number)), number))  # type: ignore[misc]
        assert len(sent[-1][0]) == count
    for thread in copies.on_their_way:
        thread.join()
    return sum(not bool((tensor == number).all()) for tensor, number in sent), copies.most


@pytest.mark.parametrize("seed", range(3))
def test_what_is_sent_arrives_whatever_the_delays(seed: int) -> None:
    wrong, at_once = send_many(seed)
    assert wrong == 0
    assert 2 <= at_once <= DEPTH  # it does overlap, and never with a buffer in use


def test_a_buffer_that_is_not_waited_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Joined, "synchronize", lambda self: None)
    assert send_many(0)[0] > 0
