"""Seconds by stage, and a trace that a browser can show: what is in it is what happened."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from kvdb.runtime import timeline
from kvdb.runtime.timeline import STAGES, Timeline, Trace


def events(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text())
    assert document["otherData"] == {"spans_left_out": 0}
    found: list[dict[str, Any]] = document["traceEvents"]
    return found


def test_spans_are_told_with_thread_layer_and_bytes(tmp_path: Path) -> None:
    trace = Trace()
    of_one, of_other = Timeline(trace), Timeline(trace)
    with of_one.span("step"), of_one.span("read", 3) as span:
        span.bytes = 77
    other = threading.Thread(target=lambda: of_other.note("write", 1, 0, 10, 2_000_010))
    other.start()
    other.join()
    trace.write(tmp_path / "t.json")
    read, step, write = events(tmp_path / "t.json")
    assert (read["name"], read["args"], step["args"], write["args"]) == (
        "read",
        {"layer": 3, "bytes": 77},
        {},
        {"layer": 1},
    )
    assert (write["ts"], write["dur"]) == (0, 2_000)
    assert step["ts"] <= read["ts"]
    assert read["ts"] + read["dur"] <= step["ts"] + step["dur"] + 1e-3
    assert len({read["tid"], step["tid"], write["tid"]}) == 2
    assert of_one.seconds["read"] <= of_one.seconds["step"]
    assert of_other.seconds == dict.fromkeys(STAGES, 0.0) | {"write": 0.002}


def test_a_trace_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST_SPANS", 5)
    trace = Trace()
    for number in range(9):
        trace.note("read", number, 0, number, number + 1)
    trace.write(tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    assert [event["args"]["layer"] for event in document["traceEvents"]] == [0, 1, 2, 3, 4]
    assert document["otherData"] == {"spans_left_out": 4}


def test_an_error_inside_a_span_is_timed_and_raised() -> None:
    of = Timeline()
    with pytest.raises(ValueError, match="x"), of.span("read", 0):
        raise ValueError("x")
    assert of.seconds["read"] > 0
