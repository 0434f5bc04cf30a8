"""Facts about stored sequences: bytes raw, on disk and shared, codecs by layer, segments. One sequence, or all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from kvdb.codecs import CodecPlan
from kvdb.entries import SegmentEntry, Sequence
from kvdb.errors import Damaged, Unsupported
from kvdb.format import SegmentInfo
from kvdb.inspection.snapshot import Snapshot
from kvdb.reader import Reader
from kvdb.segments import Segment, abstract_layout, codecs_of, payload_bytes

if TYPE_CHECKING:
    from kvdb.store import KVDB


class Facts(NamedTuple):
    """What a list shows of a sequence; None where its segments cannot be read.

    layers        with stored KV
    kv_bytes      of its tokens as the model made them, shared parts included
    disk_bytes    of the files of its segments, abstracts included; a segment that it uses in part counts whole
    shared_bytes  those of segments that other sequences pass through, too: what stays if it goes
    codecs        as `CodecPlan.parse` takes them, each once, in the order of its segments
    """

    sequence: Sequence
    layers: int | None
    kv_bytes: int | None
    disk_bytes: int | None
    shared_bytes: int | None
    codecs: tuple[str, ...] | None


class SegmentFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One segment of a sequence; None where its entry cannot be read.

    start, stop    positions of the sequence that lie in it
    holds          tokens it has in all
    kv_bytes       of these positions as the model made them
    payload_bytes  of all its KV as it is stored
    disk_bytes     of its files
    codecs         (layers, codec), such as ("0-1", "raw")
    abstracts      name -> bytes
    shared_by      other sequences through it
    wrong          why it cannot be read; None: its files are there and whole in size (no record is read for that)
    """

    segment: str
    start: int
    stop: int
    holds: int | None = None
    fidelity: str | None = None
    kv_bytes: int | None = None
    payload_bytes: int | None = None
    disk_bytes: int | None = None
    codecs: list[tuple[str, str]] = []
    abstracts: dict[str, int] = {}
    shared_by: int = 0
    wrong: str | None = None


def listed(snap: Snapshot) -> list[Facts]:
    """Facts about every sequence, oldest first."""
    shapes = _Shapes()
    return [_facts(snap, sequence, shapes) for sequence in snap.sequences]


def facts_of(snap: Snapshot, sequence: Sequence) -> Facts:
    return _facts(snap, sequence, _Shapes())


def _facts(snap: Snapshot, sequence: Sequence, known: _Shapes) -> Facts:
    entries = snap.entries(sequence.spans)
    if not entries:
        return Facts(sequence, None, None, None, None, None)
    shapes = [known.of(entry.info) for entry in entries]
    return Facts(
        sequence,
        shapes[0].layers,
        sum((s.stop - s.start) * shape.token_bytes for s, shape in zip(sequence.spans, shapes, strict=True)),
        sum(entry.disk_bytes for entry in entries),
        sum(entry.disk_bytes for entry in entries if snap.passing[entry.info.segment] > 1),
        tuple(dict.fromkeys(shape.codec for shape in shapes)),
    )


def segments_of(db: KVDB, snap: Snapshot, sequence: Sequence) -> Iterator[SegmentFacts]:
    """Facts about the segments of a sequence, in order. Their files are opened, no KV is read."""
    position, reader = 0, db.reader()
    try:
        for span in sequence.spans:
            stop = position + span.stop - span.start
            entry = snap.segments.get(span.segment)
            if entry is None:
                yield SegmentFacts(segment=span.segment, start=position, stop=stop, wrong="not in the catalog")
            else:
                yield _segment_facts(snap, entry, position, stop, _wrong(reader, db, entry))
            reader.forget(span.segment)  # a long conversation is more files than a process may have open
            position = stop
    finally:
        reader.close()


def codec_layers(info: SegmentInfo) -> list[tuple[str, str]]:
    """(layers, codec) by codec, that of the first layer first: [("0-1", "raw"), ("2-29", "int4")].

    raises  as `codecs_of`
    """
    of = {
        layer: str(codec) for g, codec in zip(info.geometry.groups, codecs_of(info), strict=True) for layer in g.layers
    }
    found: dict[str, list[int]] = {}
    for layer in sorted(of):
        found.setdefault(of[layer], []).append(layer)
    return [(ranges(layers), codec) for codec, layers in found.items()]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as people write them: "0-2, 5"."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _segment_facts(snap: Snapshot, entry: SegmentEntry, start: int, stop: int, wrong: str | None) -> SegmentFacts:
    info = entry.info
    try:
        payload, codecs, abstracts = payload_bytes(info), codec_layers(info), _abstracts(info)
    except (Damaged, Unsupported) as e:
        payload, codecs, abstracts, wrong = None, [], {}, str(e)
    return SegmentFacts(
        segment=info.segment,
        start=start,
        stop=stop,
        holds=info.tokens,
        fidelity=info.fidelity,
        kv_bytes=(stop - start) * info.geometry.token_bytes,
        payload_bytes=payload,
        disk_bytes=entry.disk_bytes,
        codecs=codecs,
        abstracts=abstracts,
        shared_by=snap.passing[info.segment] - 1,
        wrong=wrong,
    )


def _abstracts(info: SegmentInfo) -> dict[str, int]:
    groups = range(len(info.geometry.groups))
    return {name: sum(abstract_layout(info, g, name).file_bytes for g in groups) for name in info.abstracts}


def _wrong(reader: Reader, db: KVDB, entry: SegmentEntry) -> str | None:
    try:
        reader.open(Segment.stored(entry, db.path / "chunks"))
    except (Damaged, Unsupported) as e:
        return str(e)
    return None


class _Shape(NamedTuple):
    layers: int
    token_bytes: int
    codec: str


class _Shapes:
    """What segments of one geometry and codec have in common, computed once: there may be tens of thousands of them."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, bytes], _Shape] = {}

    def of(self, info: SegmentInfo) -> _Shape:
        key = info.geometry, msgspec.msgpack.encode(info.codec)
        if key not in self._known:
            try:
                codec = str(CodecPlan.of_groups(info.geometry, codecs_of(info)))
            except (Damaged, Unsupported):
                codec = "unreadable"
            self._known[key] = _Shape(len(info.geometry.layers), info.geometry.token_bytes, codec)
        return self._known[key]
