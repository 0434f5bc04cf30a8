"""What a trace of a generation tells is what the generation did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import prompt, tiny

from kvdb import KVDB
from kvdb.errors import InvalidInput
from kvdb.runtime import attach
from kvdb.runtime.timeline import STAGES

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize("rule", [{"exact": True}, {"budget": 0.2}], ids=lambda rule: next(iter(rule)))
def test_a_generation_is_traced_from_its_prefix_to_its_last_step(tmp_path: Path, rule: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(1300)
    with KVDB.open(tmp_path / "s") as db:
        with attach(model, db, exact=True) as kv:
            kv.save(kv.cache(ids[:, :1200]))
        with attach(model, db, trace=tmp_path / "t.json", **rule) as kv:
            cache = kv.cache(ids)
            model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
            kv.save(cache, name="n")
            stats = cache.stats()
    document = json.loads((tmp_path / "t.json").read_text())
    found: list[dict[str, Any]] = document["traceEvents"]
    seconds = dict.fromkeys(STAGES, 0.0)
    for event in found:
        seconds[event["name"]] += event["dur"] / 1e6
    assert seconds == pytest.approx(stats["stage_seconds"], abs=1e-6)
    selecting = {"score", "estimate"} if "budget" in rule else set()
    used = {"restore", "step", "tail", "read", "attend", "write", "commit"}
    assert used | selecting <= {event["name"] for event in found} <= {*STAGES} - ({"score", "estimate"} - selecting)
    layers = {event["args"].get("layer") for event in found if event["name"] == "attend"}
    assert layers == set(range(model.config.num_hidden_layers))  # type: ignore[union-attr,arg-type]
    after_prefill = [event for event in found if event["ts"] > max(e["ts"] for e in found if e["name"] == "restore")]
    for layer in (
        layers if selecting else ()
    ):  # what is missing is asked for before anything else that can be done meanwhile
        order = [e["name"] for e in sorted(after_prefill, key=lambda e: e["ts"]) if e["args"].get("layer") == layer]
        assert "score read estimate attend" in " ".join(order)
    steps = [event for event in found if event["name"] == "step"]
    assert len(steps) == 1 + 4  # a block of prefill, and the tokens
    for event in found:
        if event["name"] in ("tail", "score", "read", "attend", "estimate") and event["ts"] >= steps[0]["ts"]:
            assert any(s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] + 1 for s in steps)
    read = sum(event["args"].get("bytes", 0) for event in found if event["name"] == "read")
    assert read == stats["restore_bytes_read"] + stats["prefill_bytes_read"] + stats["kv_bytes_read"]
    assert 0 <= stats["kv_bytes_fetched"] <= read + (64 << 10)


def test_a_trace_needs_a_folder(tmp_path: Path) -> None:
    with KVDB.open(tmp_path / "s") as db, pytest.raises(InvalidInput, match="in a folder that does not exist"):
        attach(tiny("llama"), db, trace=tmp_path / "none" / "t.json")
