"""Generations with a device tier, beside the same without one; the device is memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import opened
from tiny_models import greedy, prompt, tiny

from kvdb.errors import InvalidInput
from kvdb.runtime import attach

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("rule", [{"budget": 0.2}, {"mass": 0.9}, {"exact": True}], ids=lambda rule: next(iter(rule)))
@pytest.mark.parametrize("budget", [400_000, 1 << 23])
def test_answers_are_the_same_and_less_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, rule: dict[str, Any], budget: int
) -> None:
    """Two turns over segments of a few sizes, some of it coded."""
    monkeypatch.setattr("kvdb.runtime.layers.can_compile", lambda _: False)  # as on a device
    model, ids = tiny(architecture), prompt(2300)
    answers, read, tiers = [], [], []
    for size in (None, budget):
        monkeypatch.setattr(sys.modules["kvdb.runtime.attach"], "device_bytes", lambda *_, size=size: size)
        with opened(tmp_path / f"s{size}") as db, attach(model, db, codec="int4;0=raw", fidelity="any", **rule) as kv:
            first = kv.cache(ids[:, :1500])
            answers.append(greedy(model, ids[:, :1500], first, 12))
            kv.save(first)
            second = kv.cache(ids)
            answers.append(greedy(model, ids, second, 24))
            read.append(second.stats()["kv_bytes_read"])
            tiers.append(second.stats()["device_tier"])
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[3])
    assert tiers[0] is None
    if "exact" in rule and budget < 1 << 20:
        assert tiers[1]["hits"] == 0  # of less than everything, dense attention would find nothing
        assert read[1] == read[0]
    else:
        assert tiers[1]["hits"] > 0
        assert read[1] < read[0]


def test_on_a_cpu_there_is_none(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db, pytest.raises(InvalidInput, match="expected none"):
        attach(tiny("llama"), db, device_budget="1GiB")
