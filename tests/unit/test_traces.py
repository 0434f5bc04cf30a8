"""Where time went agrees with counting every microsecond; what `kvdb ask --trace` does not write is refused in words."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdb.errors import InvalidInput
from kvdb.inspection import traces
from kvdb.inspection.traces import load, summarise
from kvdb.runtime.timeline import STAGES

LENGTH_US = 4000
Event = dict[str, Any]


def span(name: str, start: int, stop: int, *, thread: int = 7, layer: int | None = None, count: int = 0) -> Event:
    arguments = {k: v for k, v in (("layer", layer), ("bytes", count or None)) if v is not None}
    return {
        "name": name,
        "cat": "kvdb",
        "ph": "X",
        "pid": 1,
        "tid": thread,
        "ts": start,
        "dur": stop - start,
        "args": arguments,
    }


def written(path: Path, events: list[Event], **more: Any) -> Path:
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", **more}))
    return path


def made_up(seed: int) -> list[Event]:
    """Steps that hold stages of layers, on one thread; writing beside it, on another."""
    random, events, at = np.random.default_rng(seed), [], 10
    for _ in range(8):
        begin = at
        for layer in range(3):
            for name in ("tail", "score", "read", "attend", "wait"):
                at += int(random.integers(1, 9))
                stop = at + int(random.integers(1, 30))
                events.append(span(name, at, stop, layer=layer, count=int(random.integers(1, 999)) * (name == "read")))
                at = stop
        at += 5
        events.append(span("step", begin, at))
        at += 3
    at = 0
    while at < LENGTH_US // 2:
        stop = at + int(random.integers(20, 90))
        events.append(
            span(str(random.choice(["write", "read", "commit"])), at, stop, thread=9, layer=int(random.integers(3)))
        )
        at = stop + int(random.integers(1, 40))
    return [events[i] for i in random.permutation(len(events))]


def covered(events: list[Event], stages: tuple[str, ...] | None, thread: int) -> np.ndarray[Any, Any]:
    """Whether in each microsecond a span of these stages goes on."""
    there = np.zeros(LENGTH_US, bool)
    for event in events:
        if event["tid"] == thread and (stages is None or event["name"] in stages):
            there[event["ts"] : event["ts"] + event["dur"]] = True
    return there


def innermost(events: list[Event], thread: int) -> list[Event | None]:
    """What goes on in each microsecond: the shortest span."""
    found: list[Event | None] = [None] * LENGTH_US
    for event in sorted((e for e in events if e["tid"] == thread), key=lambda e: -e["dur"]):
        for at in range(event["ts"], event["ts"] + event["dur"]):
            found[at] = event
    return found


@pytest.mark.parametrize("seed", range(4))
def test_times_are_those_of_counting_every_microsecond(tmp_path: Path, seed: int) -> None:
    events = made_up(seed)
    found = summarise(load(written(tmp_path / "t.json", events)), 128)
    inner = {thread: innermost(events, thread) for thread in (7, 9)}

    def own(of: Any) -> float:
        return sum(of(event) for each in inner.values() for event in each if event is not None) / 1e6

    for cost in found.stages:
        mine = [e for e in events if e["name"] == cost.stage]
        assert cost.own_seconds == pytest.approx(own(lambda e: e["name"] == cost.stage))  # noqa: B023
        assert (cost.spans, cost.seconds) == (len(mine), pytest.approx(sum(e["dur"] for e in mine) / 1e6))
        assert cost.median_s == pytest.approx(np.median([e["dur"] for e in mine]) / 1e6)
        assert cost.p99_s == pytest.approx(np.percentile([e["dur"] for e in mine], 99) / 1e6)
        assert cost.bytes == sum(e["args"].get("bytes", 0) for e in mine)
        assert cost.share == pytest.approx(cost.own_seconds / found.wall_seconds)
    for cost in found.layers:
        assert cost.own_seconds == pytest.approx(own(lambda e: e["args"].get("layer") == cost.layer))  # noqa: B023
    for cost in found.cells:
        place = (cost.stage, cost.layer)
        assert cost.own_seconds == pytest.approx(own(lambda e: (e["name"], e["args"].get("layer")) == place))  # noqa: B023
    assert {(c.stage, c.layer) for c in found.cells} == {
        (e["name"], e["args"]["layer"]) for e in events if "layer" in e["args"]
    }
    busy = [covered(events, None, thread) & ~covered(events, traces.WAITING, thread) for thread in (7, 9)]
    by_busy = sorted(t.busy_seconds for t in found.threads)
    assert by_busy == pytest.approx(sorted(each.sum() / 1e6 for each in busy))
    assert found.overlap_seconds == pytest.approx((busy[0] & busy[1]).sum() / 1e6)
    computing = {
        thread: np.array([e is not None and e["name"] in traces.COMPUTING for e in inner[thread]]) for thread in (7, 9)
    }
    for stages, hidden in ((traces.READING, found.reading), (traces.WRITING, found.writing)):
        seconds = [covered(events, stages, thread) for thread in (7, 9)]
        beside = (seconds[0] & computing[9]).sum() + (seconds[1] & computing[7]).sum()
        assert hidden.seconds == pytest.approx(sum(each.sum() for each in seconds) / 1e6)
        assert hidden.hidden_seconds == pytest.approx(beside / 1e6)
        assert hidden.share == pytest.approx(hidden.hidden_seconds / hidden.seconds)
    assert found.writing.hidden_seconds > 0  # else the figures above would all be 0, and agree


@pytest.mark.parametrize("columns", [128, 3])
def test_reads_by_layer_and_step_are_sums_over_the_spans_in_a_step(tmp_path: Path, columns: int) -> None:
    events = made_up(1)
    reads = summarise(load(written(tmp_path / "t.json", events)), columns).reads
    assert reads is not None
    steps = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "step")
    assert (reads.rows, reads.bounds[0], reads.bounds[-1], len(reads.bounds)) == ((0, 1, 2), 0, 8, min(columns, 8) + 1)
    for row, layer in enumerate(reads.rows):
        for column, (first, last) in enumerate(zip(reads.bounds, reads.bounds[1:], strict=False)):
            inside = [
                e["args"].get("bytes", 0)
                for e in events
                for start, stop in steps[first:last]
                if e["name"] == "read" and e["args"]["layer"] == layer and start <= e["ts"] < stop
            ]
            assert reads.values[row][column] == pytest.approx(sum(inside) / (last - first))


def test_every_stage_is_reading_writing_waiting_or_computing() -> None:
    kinds = (*traces.READING, *traces.WRITING, *traces.WAITING, *traces.COMPUTING)
    assert sorted(kinds) == sorted(STAGES)


def test_spans_that_overlap_without_nesting_take_no_time_twice(tmp_path: Path) -> None:
    events = [span("read", 0, 100), span("attend", 50, 150), span("attend", 60, 70, layer=1)]
    found = {c.stage: c for c in summarise(load(written(tmp_path / "t.json", events)), 8).stages}
    assert found["read"].own_seconds == pytest.approx(50e-6)
    assert found["attend"].own_seconds == pytest.approx(100e-6)


def test_a_trace_without_steps_or_of_no_length_has_no_map(tmp_path: Path) -> None:
    found = summarise(load(written(tmp_path / "t.json", [span("read", 5, 5, layer=0, count=9)])), 8)
    assert (found.wall_seconds, found.reads, found.stages[0].share, found.reading.share) == (0.0, None, 0.0, 0.0)


def test_other_programs_events_are_left_out(tmp_path: Path) -> None:
    other = {"name": "x", "ph": "B", "ts": 1, "pid": 1, "tid": 1}
    document = written(tmp_path / "t.json", [span("read", 0, 4), other], otherData={"spans_left_out": 3, "more": [1]})
    found = summarise(load(document), 8)
    assert (found.spans, found.spans_left_out) == (1, 3)


HOSTILE = {
    "nothing": b"",
    "no JSON": b"trace",
    "not UTF-8": b'{"traceEvents": [{"ph": "\xff"}]}',
    "another document": b'{"a": 1}',
    "a list": b"[]",
    "no spans": b'{"traceEvents": []}',
    "a span that is text": b'{"traceEvents": ["x"]}',
    "a name that is a number": b'{"traceEvents": [{"ph": "X", "cat": "kvdb", "name": 3}]}',
    "deep": b'{"traceEvents": ' + b"[" * 100_000,
    **{
        f"{field} {value}": json.dumps({"traceEvents": [{**span("read", 0, 4), field: json.loads(value)}]}).encode()
        for field, value in (
            ("ts", "-1"), ("ts", '"a"'), ("ts", "1e300"), ("dur", "-4"), ("dur", "1e13"), ("dur", "null"), ("tid", "1.5"),
            ("name", '""'), ("name", json.dumps("n" * 65)), ("args", '{"layer": -1}'),
            ("args", '{"layer": 4096}'), ("args", '{"bytes": -1}'), ("args", '{"layer": "0"}'), ("args", "[]"),
        )
    },
    "many threads": json.dumps({"traceEvents": [span("read", 0, 4, thread=t) for t in range(65)]}).encode(),
    "many stages": json.dumps({"traceEvents": [span(f"s{t}", 0, 4) for t in range(65)]}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_generation_writes_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(InvalidInput, match=r"t\.json.*expected") as refused:
        load(path)
    assert len(str(refused.value)) < 500


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "t.json", made_up(0))
    monkeypatch.setattr(traces, "MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(InvalidInput, match=r"more than 0 MiB, expected a trace of at most 1,000,000 spans"):
        load(path)
    monkeypatch.setattr(traces, "MOST_BYTES", path.stat().st_size)
    monkeypatch.setattr(traces, "MOST_SPANS", 10)
    with pytest.raises(InvalidInput, match="expected at most 10"):
        load(path)
    monkeypatch.setattr(traces, "MOST_OBJECTS", path.read_bytes().count(b"{") - 1)
    with pytest.raises(InvalidInput, match=r"objects, expected at most [\d,]+; a trace has at most 10 spans"):
        load(path)


def test_small_events_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    path, most = tmp_path / "t.json", traces.MOST_OBJECTS
    path.write_bytes(b'{"traceEvents":[' + b'{"ph":"M"},' * (most + 1) + b'{"ph":"M"}]}')
    assert path.stat().st_size < traces.MOST_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=r"t\.json: 3,000,003 objects"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < traces.MOST_BYTES + (16 << 20)  # what one read may take
    finally:
        tracemalloc.stop()


def test_a_million_spans_are_far_below_the_limits(tmp_path: Path) -> None:
    path = written(tmp_path / "t.json", made_up(0))
    data, spans = path.read_bytes(), len(load(path).stage)
    assert len(data) / spans * traces.MOST_SPANS < traces.MOST_BYTES
    assert data.count(b"{") / spans * traces.MOST_SPANS < traces.MOST_OBJECTS
    assert traces.MOST_BYTES == 256 << 20
