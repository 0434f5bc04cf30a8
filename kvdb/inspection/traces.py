"""What a time line of a generation says: where time went by stage and layer, and what happened side by side.

The file is what `kvdb ask --trace` writes, in the Trace Event Format of Chrome; it may come from anybody, so its size, types and
numbers are looked at before anything is added up. A span lies inside others of its thread: a step holds all that a layer does. *Own* time
leaves out what is nested in it, so that the own times of a thread add up to what the thread did.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import numpy as np

from kvdb.errors import InvalidInput
from kvdb.inspection.maps import Grid

Array = np.ndarray[Any, np.dtype[Any]]

MOST_BYTES: Final = 256 << 20
"""Larger files are refused: a million spans are 150 MB."""
MOST_SPANS: Final = 1_000_000
MOST_OBJECTS: Final = 3 * MOST_SPANS
"""JSON objects in a file; a span is two. They are counted before any is decoded: the smallest take twenty times their bytes in memory."""
STEP: Final = "step"
READING: Final = ("restore", "fetch", "abstracts", "read")
WRITING: Final = ("write", "commit")
WAITING: Final = ("wait",)
COMPUTING: Final = (STEP, "recompute", "tail", "predict", "score", "attend", "estimate")
"""Stages by what a thread does in them; of a step, what none of the others takes."""
_LONGEST_US: Final = 1e12
"""Times beyond eleven days are no generation's."""
_MOST_LAYERS, _MOST_THREADS, _STAGE_LENGTH, _MOST_STAGES = 4_096, 64, 64, 64


class _Arguments(msgspec.Struct):
    layer: Annotated[int, msgspec.Meta(ge=0, lt=_MOST_LAYERS)] | None = None
    bytes: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0


class _Event(msgspec.Struct):
    ph: str
    name: str = ""
    cat: str = ""
    tid: int = 0
    ts: float = 0.0
    dur: float = 0.0
    args: _Arguments = msgspec.field(default_factory=_Arguments)


class _Other(msgspec.Struct):
    spans_left_out: Annotated[int, msgspec.Meta(ge=0)] = 0


class _Document(msgspec.Struct):
    traceEvents: list[_Event]
    otherData: _Other = msgspec.field(default_factory=_Other)


class Spans(NamedTuple):
    """Every span of a trace, in the order of (thread, start, longest first). Arrays are (spans,) int64, times nanoseconds.

    names     stages in the order of their first span; `stage` indexes them
    layer     -1 where the stage is no layer's
    own       duration without what is nested in it
    left_out  spans that the trace had no room for
    """

    names: tuple[str, ...]
    stage: Array
    thread: Array
    layer: Array
    start: Array
    stop: Array
    own: Array
    bytes: Array
    left_out: int


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Spans of a stage, of a layer, or of both.

    stage, layer     None: of all, and for layers also of what is no layer's
    seconds          of whole spans; own_seconds: without what is nested in them
    share            own_seconds of the time line's length
    median_s, p99_s  of whole spans, for a layer alone of own times
    """

    stage: str | None
    layer: int | None
    spans: int
    seconds: float
    own_seconds: float
    share: float
    median_s: float
    p99_s: float
    bytes: int


class Busy(msgspec.Struct, frozen=True, kw_only=True):
    """A thread, numbered as their first spans begin, and how long it was in any stage but waiting."""

    thread: int
    spans: int
    busy_seconds: float
    share: float


class Hidden(msgspec.Struct, frozen=True, kw_only=True):
    """Of the seconds in some stages, those in which another thread computed."""

    seconds: float
    hidden_seconds: float
    share: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace says.

    wall_seconds       from the first span's start to the last one's end
    overlap_seconds    in which two threads or more were busy
    reading, writing   how much of them was hidden behind computing. What the system reads ahead is no span: it shows as a shorter read
    stages, layers     each by own seconds, the most first; by layer
    cells              of each stage of each layer
    reads              bytes read by layer and step; None where no step or no read of a layer is in it
    """

    wall_seconds: float
    spans: int
    spans_left_out: int
    steps: int
    overlap_seconds: float
    reading: Hidden
    writing: Hidden
    threads: tuple[Busy, ...]
    stages: tuple[Cost, ...]
    layers: tuple[Cost, ...]
    cells: tuple[Cost, ...]
    reads: Grid | None


def load(path: Path) -> Spans:
    """The spans of a file.

    raises  InvalidInput for anything that `kvdb ask --trace` does not write; OSError
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise InvalidInput(
            f"{path}: more than {MOST_BYTES >> 20} MiB, expected a trace of at most {MOST_SPANS:,} spans"
        )
    if (objects := data.count(b"{")) > MOST_OBJECTS:
        raise InvalidInput(
            f"{path}: {objects:,} objects, expected at most {MOST_OBJECTS:,}; a trace has at most {MOST_SPANS:,} spans"
        )
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, ValueError, RecursionError) as e:
        raise InvalidInput(f"{path}: {e}, expected a trace that 'kvdb ask --trace' wrote") from e
    events = [event for event in document.traceEvents if event.ph == "X" and event.cat == "kvdb"]
    if not events:
        raise InvalidInput(f"{path}: no span of KVDB, expected a trace that 'kvdb ask --trace' wrote")
    _check(path, events)
    return _arranged(events, document.otherData.spans_left_out)


def _check(path: Path, events: list[_Event]) -> None:
    """raises  InvalidInput for spans that no generation has"""
    if len(events) > MOST_SPANS:
        raise InvalidInput(f"{path}: {len(events):,} spans, expected at most {MOST_SPANS:,}")
    for number, event in enumerate(events):
        if not (0 <= event.ts <= _LONGEST_US and 0 <= event.dur <= _LONGEST_US):
            raise InvalidInput(
                f"{path}, span {number}: ts {event.ts}, dur {event.dur}, expected microseconds, 0 to {_LONGEST_US:.0f}"
            )
        if not 0 < len(event.name) <= _STAGE_LENGTH:
            raise InvalidInput(
                f"{path}, span {number}: name {event.name[:80]!r}, expected 1..{_STAGE_LENGTH} characters"
            )
    for what, count, most in (
        ("threads", len({event.tid for event in events}), _MOST_THREADS),
        ("stages", len({event.name for event in events}), _MOST_STAGES),
    ):
        if count > most:
            raise InvalidInput(f"{path}: {count:,} {what}, expected at most {most:,}")


def _arranged(events: list[_Event], left_out: int) -> Spans:
    events.sort(key=lambda event: event.ts)
    names = {name: i for i, name in enumerate(dict.fromkeys(event.name for event in events))}
    threads = {thread: i for i, thread in enumerate(dict.fromkeys(event.tid for event in events))}
    columns = np.array(
        [
            (
                names[event.name], threads[event.tid], -1 if event.args.layer is None else event.args.layer,
                round(event.ts * 1e3), round(event.ts * 1e3) + round(event.dur * 1e3), event.args.bytes,
            )
            for event in events
        ],
        np.int64,
    ).T  # fmt: skip
    order = np.lexsort((-columns[4], columns[3], columns[1]))
    stage, thread, layer, start, stop, count = columns[:, order]
    return Spans(tuple(names), stage, thread, layer, start, stop, _own(thread, start, stop), count, left_out)


def _own(thread: Array, start: Array, stop: Array) -> Array:
    """Durations without what is directly nested in them; never below 0, however spans overlap."""
    own = (stop - start).tolist()
    around: list[int] = []  # spans of this thread that have not ended yet
    threads, starts, stops = thread.tolist(), start.tolist(), stop.tolist()
    for i, begins in enumerate(starts):
        while around and (threads[around[-1]] != threads[i] or stops[around[-1]] <= begins):
            around.pop()
        if around:
            own[around[-1]] -= min(stops[i], stops[around[-1]]) - begins
        around.append(i)
    return np.maximum(np.array(own, np.int64), 0)


def summarise(spans: Spans, columns: int) -> Summary:
    """columns: most that the map of reads has"""
    wall, names = int(spans.stop.max() - spans.start.min()), spans.names
    stages = [_cost(spans, each, wall, stage=names[i]) for i, each in _grouped(spans.stage)]
    layers = [_cost(spans, each, wall, layer=layer) for layer, each in _grouped(spans.layer) if layer >= 0]
    places = np.where(spans.layer < 0, -1, spans.layer * len(names) + spans.stage)
    cells = [
        _cost(spans, each, wall, stage=names[place % len(names)], layer=place // len(names))
        for place, each in _grouped(places)
        if place >= 0
    ]
    waiting = _of(spans, WAITING)
    busy = [
        _where(_union(spans, mine & ~waiting), _union(spans, mine & waiting), _ONLY_FIRST)
        for mine in (spans.thread == thread for thread in range(int(spans.thread.max()) + 1))
    ]
    return Summary(
        wall_seconds=wall / 1e9,
        spans=len(spans.stage),
        spans_left_out=spans.left_out,
        steps=int(_of(spans, (STEP,)).sum()),
        overlap_seconds=_overlap(busy) / 1e9,
        reading=_hidden(spans, READING),
        writing=_hidden(spans, WRITING),
        threads=tuple(
            Busy(
                thread=thread,
                spans=int((spans.thread == thread).sum()),
                busy_seconds=_measure(times) / 1e9,
                share=_share(_measure(times), wall),
            )
            for thread, times in enumerate(busy)
        ),
        stages=tuple(sorted(stages, key=lambda cost: -cost.own_seconds)),
        layers=tuple(layers),
        cells=tuple(cells),
        reads=_reads(spans, columns),
    )


def _grouped(keys: Array) -> Iterator[tuple[int, Array]]:
    """Each key, ascending, and where it stands."""
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order])) + 1
    for where in np.split(order, begins):
        yield int(keys[where[0]]), where


def _of(spans: Spans, stages: Iterable[str]) -> Array:
    """(spans,) bool"""
    wanted = set(stages)
    return np.isin(spans.stage, [i for i, name in enumerate(spans.names) if name in wanted])


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _cost(spans: Spans, which: Array, wall: int, *, stage: str | None = None, layer: int | None = None) -> Cost:
    own, whole = spans.own[which], (spans.stop - spans.start)[which]
    each = own if stage is None else whole
    return Cost(
        stage=stage,
        layer=layer,
        spans=len(which),
        seconds=float(whole.sum()) / 1e9,
        own_seconds=float(own.sum()) / 1e9,
        share=_share(float(own.sum()), wall),
        median_s=float(np.median(each)) / 1e9,
        p99_s=float(np.percentile(each, 99)) / 1e9,
        bytes=sum(spans.bytes[which].tolist()),
    )


# -- sets of times: (n, 2) int64, disjoint and ascending


def _union(spans: Spans, mask: Array) -> Array:
    """When any of these spans goes on."""
    return _merged(np.stack((spans.start[mask], spans.stop[mask]), axis=1))


def _merged(times: Array) -> Array:
    if not len(times):
        return times
    times = times[np.argsort(times[:, 0], kind="stable")]
    reach = np.maximum.accumulate(times[:, 1])
    begins = np.flatnonzero(np.r_[True, times[1:, 0] > reach[:-1]])
    return np.stack((times[begins, 0], reach[np.r_[begins[1:] - 1, len(times) - 1]]), axis=1)


def _measure(times: Array) -> int:
    return int((times[:, 1] - times[:, 0]).sum())


_ONLY_FIRST, _BOTH = 1, 3


def _where(first: Array, second: Array, level: int) -> Array:
    """The times in the first set alone, or in both."""
    times = np.concatenate((first.reshape(-1), second.reshape(-1)))
    steps = np.concatenate((np.tile((1, -1), len(first)), np.tile((2, -2), len(second))))
    order = np.argsort(times, kind="stable")
    times, levels = times[order], np.cumsum(steps[order])[:-1]
    kept = (levels == level) & (times[1:] > times[:-1])
    return np.stack((times[:-1][kept], times[1:][kept]), axis=1)


def _overlap(busy: list[Array]) -> int:
    """How long two sets or more go on."""
    times = np.concatenate([times.reshape(-1) for times in busy])
    order = np.argsort(times, kind="stable")
    level = np.cumsum(np.tile((1, -1), len(times) // 2)[order])[:-1]
    return int(np.diff(times[order])[level >= 2].sum())


def _hidden(spans: Spans, stages: tuple[str, ...]) -> Hidden:
    """On one thread computing and other stages exclude each other, so what goes on beside a stage is on other threads."""
    wanted, computing = _of(spans, stages), _of(spans, COMPUTING)
    threads = [spans.thread == thread for thread in range(int(spans.thread.max()) + 1)]
    computes = _merged(
        np.concatenate(
            [_where(_union(spans, computing & mine), _union(spans, ~computing & mine), _ONLY_FIRST) for mine in threads]
        )
    )
    there = [_union(spans, wanted & mine) for mine in threads]
    total = sum(map(_measure, there))
    hidden = sum(_measure(_where(times, computes, _BOTH)) for times in there)
    return Hidden(seconds=total / 1e9, hidden_seconds=hidden / 1e9, share=_share(hidden, total))


def _reads(spans: Spans, columns: int) -> Grid | None:
    """Bytes read for each layer in each step, by columns of neighbouring steps: the mean of a column's steps."""
    steps = np.flatnonzero(_of(spans, (STEP,)))
    reads = np.flatnonzero(_of(spans, READING) & (spans.layer >= 0) & (spans.bytes > 0))
    if not len(steps) or not len(reads):
        return None
    steps = steps[np.argsort(spans.start[steps], kind="stable")]
    step = np.searchsorted(spans.start[steps], spans.start[reads], "right") - 1
    inside = (step >= 0) & (spans.start[reads] < spans.stop[steps][step])
    step, reads = step[inside], reads[inside]
    layers, row = np.unique(spans.layer[reads], return_inverse=True)
    count = min(columns, len(steps))
    bounds = np.arange(count + 1) * len(steps) // count
    sums = np.zeros((len(layers), count))
    np.add.at(sums, (row, np.searchsorted(bounds, step, "right") - 1), spans.bytes[reads].astype(np.float64))
    means = sums / np.diff(bounds)
    return Grid(rows=tuple(layers.tolist()), bounds=tuple(bounds.tolist()), values=tuple(map(tuple, means.tolist())))
