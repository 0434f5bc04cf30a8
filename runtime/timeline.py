"""Where the time of a generation goes: seconds by stage, always; and every span, for a trace that is asked for.

A span costs about a microsecond, and a decoding step has a few per layer. A trace is a file in the Trace Event Format of Chrome, which
`chrome://tracing` and Perfetto show as a time line: a row for each thread, a bar for each stage, with its layer and bytes.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec

from kvdb import files, forks

STAGES: Final = (
    "restore",
    "recompute",
    "fetch",
    "step",
    "tail",
    "predict",
    "abstracts",
    "score",
    "read",
    "attend",
    "estimate",
    "wait",
    "write",
    "commit",
)
"""
restore    a stored prefix is opened, and the started chunk and windows are read
recompute  the first tokens of a stored prefix are computed again, by steps of their own, while the rest is fetched
fetch      on another thread: the rest of such a prefix is brought into memory
step       a forward pass of the model, all that follows included
tail       attention over the newest tokens, in memory
predict    the next layer's query is predicted, and what it would choose is asked for ahead
abstracts  abstracts of a layer come into memory, once each
score      the selector scores records, and the stop rule chooses
read       chosen records are brought where attention can read them, compared with their digests, and decoded
attend     attention over them
estimate   attention over what is not read, as far as it is estimated
wait       for the thread that writes: it is behind
write      on that thread: KV is encoded, summarised and written
commit     a full segment becomes visible
"""
MOST_SPANS: Final = 1_000_000
"""What comes after is counted and left out: a trace of 100 MB is as much as one can look at."""


class Trace:
    """Spans of all caches of an attachment. Thread-safe."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, int | None, int, int, int, int]] = []  # stage, layer, bytes, thread, start, stop
        self._left_out = 0

    def note(self, stage: str, layer: int | None, count: int, start: int, stop: int) -> None:
        if len(self._spans) < MOST_SPANS:
            self._spans.append((stage, layer, count, threading.get_ident(), start, stop))
        else:
            self._left_out += 1

    def write(self, path: Path) -> None:
        """A new file, or another one's place. Times are microseconds since the first span began.

        raises  StorageFull, OSError
        """
        spans = self._spans[:]
        first = min((start for *_, start, _ in spans), default=0)
        process = os.getpid()
        events: list[dict[str, Any]] = [
            {
                "name": stage, "cat": "kvdb", "ph": "X", "pid": process, "tid": thread, "ts": (start - first) / 1e3,
                "dur": (stop - start) / 1e3, "args": _arguments(layer, count),
            }
            for stage, layer, count, thread, start, stop in spans
        ]  # fmt: skip
        document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"spans_left_out": self._left_out}}
        with files.translated(path):
            path.write_bytes(msgspec.json.encode(document))


def _arguments(layer: int | None, count: int) -> dict[str, int]:
    return {name: value for name, value in (("layer", layer), ("bytes", count or None)) if value is not None}


class Timeline:
    """Seconds by stage of one cache."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._trace, self._lock = trace, threading.Lock()
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def span(self, stage: str, layer: int | None = None) -> Span:
        """A context manager around one of `STAGES`."""
        return Span(self, stage, layer)

    def note(self, stage: str, layer: int | None, count: int, start: int, stop: int) -> None:
        """Nanoseconds of `time.perf_counter_ns`."""
        with self._lock:
            self.seconds[stage] += (stop - start) / 1e9
        if self._trace is not None:
            self._trace.note(stage, layer, count, start, stop)


class Span:
    """bytes: what went through the stage; whoever knows it sets it. seconds: once it has ended."""

    __slots__ = ("_layer", "_stage", "_start", "_timeline", "bytes", "seconds")

    def __init__(self, timeline: Timeline, stage: str, layer: int | None) -> None:
        self._timeline, self._stage, self._layer, self.bytes = timeline, stage, layer, 0

    def __enter__(self) -> Span:
        self._start = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop = time.perf_counter_ns()
        self.seconds = (stop - self._start) / 1e9
        self._timeline.note(self._stage, self._layer, self.bytes, self._start, stop)
