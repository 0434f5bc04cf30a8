"""A generation whose stored KV goes through uploads, with memory for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import opened
from tiny_models import greedy, prompt, tiny
from torch import Tensor

from kvdb.runtime import attach
from kvdb.runtime.staging import Staging
from kvdb.runtime.uploads import Left

pytestmark = pytest.mark.usefixtures("single_thread")


class Watched:
    """Copies at once, and looks whether the buffer is left alone until somebody has asked for it."""

    def __init__(self) -> None:
        self.checked = 0

    def room(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.uint8)

    def begin(self, host: Tensor) -> tuple[Tensor, Left]:
        return host.clone(), Unchanged(self, host)


class Unchanged:
    def __init__(self, copies: Watched, host: Tensor) -> None:
        self._copies, self._host, self._before = copies, host, host.clone()

    def synchronize(self) -> None:
        assert torch.equal(self._host, self._before)
        self._copies.checked += 1


@pytest.mark.parametrize("rule", [{"exact": True}, {"budget": 0.3}, {"mass": 0.9}], ids=lambda rule: next(iter(rule)))
@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_a_session_through_uploads_answers_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any], codec: str
) -> None:
    model, ids, copies = tiny("llama"), prompt(1300), Watched()
    monkeypatch.setattr("kvdb.runtime.layers.can_compile", lambda _: False)  # as on a device
    answers = []
    for through in (None, copies):
        monkeypatch.setattr(Staging, "of", lambda dtype, device, through=through: Staging(dtype, device, None, through))
        with opened(tmp_path / f"s{through is None}") as db, attach(model, db, codec=codec, **rule) as kv:
            answers.append(greedy(model, ids, kv.cache(ids), 8))
    assert torch.equal(*answers)
    assert copies.checked > 10
