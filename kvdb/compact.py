"""Compaction: merge the small segments that appended turns leave, so that a long conversation reads as few files.

Only the end of a path is merged: segments that nothing else continues, up to the last one. Rows are copied as they are
stored, after their digests were compared; a started chunk that the next segment copied is left out. No token is lost:
where a segment ends in another branch than the next one is on, the run begins after it. A conversation of n turns keeps
O(log n) segments, and each token is copied O(log n) times. One transaction swaps the spans of every sequence; old ids
lead to the new one, so that a cache that is being continued elsewhere goes on.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvdb.codecs import CodecPlan
from kvdb.entries import SegmentEntry, Span, Use
from kvdb.errors import Damaged
from kvdb.format import SegmentInfo
from kvdb.geometry import SEGMENT_TOKENS
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.segments import Segment, SegmentWriter, codecs_of
from kvdb.transaction import Transaction

if TYPE_CHECKING:
    from kvdb.store import KVDB


def compact(db: KVDB, name_or_key: str | None) -> int:
    """Merge the end of one sequence's path, or of every sequence's; returns how many segments fewer there are."""
    with db.catalog.begin() as txn:
        wanted = txn.sequences() if name_or_key is None else [txn.sequence(name_or_key)]
        segments = txn.segments()
    saved = 0
    children = continued(segments)
    for run in dict.fromkeys(tuple(plan(segments, children, s.spans)) for s in wanted):
        with db.catalog.locked():
            saved += _merge(db, list(run))
    return saved


def continued(segments: dict[str, SegmentEntry]) -> Counter[str | None]:
    """How many segments continue each segment."""
    return Counter(entry.info.parent for entry in segments.values())


def plan(segments: dict[str, SegmentEntry], children: Counter[str | None], spans: tuple[Span, ...]) -> list[str]:
    """The segments at the end of a path that are worth merging, oldest first. children: as `continued` counts them.

    A segment is worth copying when what comes after it is at least half as long: whatever stays is longer than twice all
    that follows it, and every copy makes a token's segment at least half as long again.
    """
    last = segments[spans[-1].segment].info
    if children[last.segment]:
        return []
    path, worth, size = [last.segment], 1, last.tokens
    for span, after in reversed(list(pairwise(spans))):
        info, following = segments[span.segment].info, segments[after.segment].info
        tokens = following.start - info.start  # what the path uses of it
        if children[info.segment] != 1 or _kind(info) != _kind(last) or size + tokens > SEGMENT_TOKENS:
            break
        path.insert(0, info.segment)
        if tokens <= 2 * size:
            worth = len(path)
        size += tokens
    return path[-worth:]


def _kind(info: SegmentInfo) -> tuple[object, ...]:
    return info.identity, info.fidelity, info.geometry, info.codec, frozenset(info.abstracts), info.cipher


def _merge(db: KVDB, run: list[str]) -> int:
    """The caller holds the write lock, so that nothing is continued or deleted meanwhile."""
    if len(run) < 2:
        return 0
    with db.catalog.begin() as txn:
        segments = txn.segments()
        if not all(segment in segments for segment in run) or not _alone(segments, run):
            return 0  # somebody was faster
        old = [segments[segment] for segment in run]
        if any(_kind(entry.info) != _kind(old[0].info) for entry in old):  # some have other abstracts since
            return 0
        stops = [entry.info.start for entry in old[1:]] + [old[-1].info.stop]
        pieces = [(entry, stop - entry.info.start) for entry, stop in zip(old, stops, strict=True)]
        tokens = np.concatenate([txn.tokens(entry.info.segment)[:count] for entry, count in pieces])
        apart = 0  # segments up to the last whose end is another branch, which a merged one would not hold
        for i, entry in enumerate(old):
            own, start = txn.tokens(entry.info.segment), entry.info.start - old[0].info.start
            if not np.array_equal(own, tokens[start : start + len(own)]):
                apart = i + 1
        identity = txn.identity(old[0].info.identity)
    if apart:
        return _merge(db, run[apart:])
    first = old[0].info
    if identity is None:
        raise Damaged(f"identity {first.identity}: not in the catalog, expected it; run 'kvdb repair'")
    writer = db.writer(
        identity=identity,
        fidelity=first.fidelity,
        geometry=first.geometry,
        parent=first.parent,
        start=first.start,
        capacity=first.geometry.chunks(len(tokens)),
        codec=CodecPlan.of_groups(first.geometry, codecs_of(first)),
        abstracts=first.abstracts,
        keep=run[-1],
    )
    try:
        reader = READERS[db.read_mode]("always")
        try:
            for entry, count in pieces:
                _copy(reader, writer, Segment.stored(entry, db.path / "chunks"), count)
                reader.forget(entry.info.segment)  # a thousand turns are more files than a process may have open
        finally:
            reader.close()
        new = writer.seal(tokens)
        with db.write_transaction() as txn:
            txn.add_segment(new, identity, tokens)
            _swap(txn, old, new)
            txn.count(bytes_written=new.disk_bytes, bytes_compacted=new.disk_bytes)
            writer.publish(db.path / "chunks")
    except BaseException:
        db.abandon(writer)
        raise
    db.space.dispose(array for entry in old for array in entry.info.array_names())
    db.space.enforce(keep=new.info.segment)
    return len(run) - 1


def _alone(segments: dict[str, SegmentEntry], run: list[str]) -> bool:
    """Whether nothing but the run itself continues the run's segments."""
    continued = [entry.info.parent for segment, entry in segments.items() if segment not in run]
    return not set(continued) & set(run)


def _copy(reader: Reader, writer: SegmentWriter, segment: Segment, tokens: int) -> None:
    """Append the first `tokens` tokens of a stored segment, rows and abstracts as they are."""
    info = segment.info
    chunks = info.geometry.chunks(tokens)
    for layer in info.geometry.layers:
        heads = info.geometry.groups[info.geometry.locate(layer)[0]].kv_heads
        rows = reader.rows(segment, layer, np.arange(chunks * heads))
        built = {name: reader.stored_abstract(segment, name, layer)[:, :chunks] for name in info.abstracts}
        writer.append_rows(layer, rows, built, tokens)


def _swap(txn: Transaction, old: list[SegmentEntry], new: SegmentEntry) -> None:
    """Lead every sequence through the new segment, and the old ids to it."""
    gone = {entry.info.segment for entry in old}
    for sequence in txn.sequences():
        inside = [span for span in sequence.spans if span.segment in gone]
        if inside:  # they are its last ones: nothing else continues the run
            covered = sum(span.stop - span.start for span in inside)
            before = sequence.spans[: -len(inside)]
            txn.rewrite_spans(sequence, (*before, Span(segment=new.info.segment, start=0, stop=covered)))
    uses = [txn.use(entry.info.segment) for entry in old]
    txn.set_use(new.info.segment, Use(last_used=max(use.last_used for use in uses), hits=uses[-1].hits))
    for entry in reversed(old):
        txn.move(entry.info.segment, new.info.segment)
        txn.remove_segment(entry.info)
