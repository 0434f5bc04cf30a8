"""Another codec for a stored sequence: its KV is written anew, as segments of its own, and then the old ones go.

What others share stays as it is, so that nobody else's KV changes. Abstracts are carried over: they are those of the keys as they
were computed. Rows of layers whose codec does not change are copied byte for byte; all others are decoded, each record compared with
its digest, and encoded. New segments are committed one after the other; until the last one is, the sequence is what it was,
and one transaction then leads it, with its name, its pin and its age, to the new segments.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from kvdb import entries
from kvdb.codecs import CodecPlan
from kvdb.entries import Sequence, Span
from kvdb.errors import Damaged, NotFinite, SequenceNotFound
from kvdb.format import SegmentInfo
from kvdb.geometry import Geometry, LayerGroup, div_ceil
from kvdb.identity import joined_fidelity
from kvdb.reader import READERS, Reader
from kvdb.segments import Segment, SegmentWriter, codec_of, codecs_of

if TYPE_CHECKING:
    from kvdb.store import KVDB


def recode(db: KVDB, name_or_key: str, codec: CodecPlan) -> int:
    """See `KVDB.recode`."""
    with db.catalog.begin() as txn:
        sequence = txn.sequence(name_or_key)
        segments = [Segment.stored(entry, db.path / "chunks") for entry in txn.span_entries(sequence.spans)]
        identity = txn.identity(sequence.identity)
    if identity is None:
        raise Damaged(f"identity {sequence.identity}: not in the catalog, expected it; run 'kvdb repair'")
    done = 0  # spans at the beginning that are stored so already
    while done < len(segments) and _plan(segments[done].info) == _fitting(codec, segments[done].info):
        done += 1
    if done == len(segments):
        return 0
    last, temporary = segments[done - 1] if done else None, None
    tokens = db.tokens(sequence.spans)
    reader = READERS[db.read_mode]("always")
    try:
        for span, segment in zip(sequence.spans[done:], segments[done:], strict=True):
            info, start = segment.info, segment.info.start + span.start
            count = span.stop - span.start
            writer = db.writer(
                identity=identity,
                fidelity=info.fidelity if codec.lossless else joined_fidelity(info.fidelity, str(codec)),
                geometry=_merged(info.geometry),
                parent=None if last is None else last.info.segment,
                start=start,
                capacity=info.geometry.chunks(count),
                codec=codec,
                abstracts=info.abstracts,
            )
            try:
                _copy(reader, writer, segment, span)
            except BaseException:
                db.abandon(writer)
                raise
            reader.forget(info.segment)
            last, temporary = db.commit(writer, tokens[start : start + count], model=sequence.model, replaces=temporary)
        assert last is not None
        assert temporary is not None
        _lead(db, sequence, last, temporary)
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(SequenceNotFound):
                db.delete(temporary)
        raise
    finally:
        reader.close()
    return len(segments) - done


def _plan(info: SegmentInfo) -> CodecPlan:
    return CodecPlan.of_groups(info.geometry, codecs_of(info))


def _fitting(codec: CodecPlan, info: SegmentInfo) -> CodecPlan:
    """A plan as it reads back from a segment."""
    return CodecPlan.of_groups(*codec.grouped(_merged(info.geometry)))


def _merged(geometry: Geometry) -> Geometry:
    """Layers of one shape in one group, whatever stores them."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for layer in geometry.layers:
        g = geometry.groups[geometry.locate(layer)[0]]
        shapes.setdefault((g.kv_heads, g.head_dim), []).append(layer)
    groups = tuple(LayerGroup(layers=tuple(layers), kv_heads=h, head_dim=d) for (h, d), layers in shapes.items())
    return Geometry(dtype=geometry.dtype, chunk_tokens=geometry.chunk_tokens, groups=groups)


def _copy(reader: Reader, writer: SegmentWriter, segment: Segment, span: Span) -> None:
    """Append what a span holds of a segment. A chunk that the span ends in is the only one whose abstracts are made anew."""
    info, ct = segment.info, segment.info.geometry.chunk_tokens
    first, chunks = span.start // ct, div_ceil(span.stop - span.start, ct)
    whole = chunks if span.stop == info.tokens else (span.stop - span.start) // ct
    for layer in info.geometry.layers:
        group = info.geometry.locate(layer)[0]
        g, own = info.geometry.groups[group], writer.codecs[writer.info.geometry.locate(layer)[0]]
        built = {
            name: reader.stored_abstract(segment, name, layer)[:, first : first + whole] for name in info.abstracts
        }
        records = np.arange(first * g.kv_heads, (first + chunks) * g.kv_heads)
        tokens = min(span.stop, (first + whole) * ct) - span.start
        if own == codec_of(info, group) and whole:
            rows = reader.rows(segment, layer, records[: whole * g.kv_heads])
            writer.append_rows(layer, rows, built, tokens)
            if whole == chunks:
                continue
        out = np.empty((2, len(records), ct, g.head_dim), info.geometry.storage_dtype)
        reader.read(segment, layer, records, out)
        by_head = out.reshape(2, chunks, g.kv_heads, ct, g.head_dim).swapaxes(1, 2)
        k, v = by_head.reshape(2, g.kv_heads, chunks * ct, g.head_dim)[:, :, : span.stop - span.start]
        try:
            if own != codec_of(info, group) and whole:
                writer.append(layer, k[:, :tokens], v[:, :tokens], built)
            if whole < chunks:
                writer.append(layer, k[:, tokens:], v[:, tokens:])
        except NotFinite as e:
            raise NotFinite(f"segment {info.segment}, layer {layer}: {e}") from e


def _lead(db: KVDB, sequence: Sequence, last: Segment, temporary: str) -> None:
    """Lead a sequence to its new segments, and let go what only it used.

    raises  SequenceNotFound where it has gone meanwhile
    """
    with db.catalog.locked():
        with db.write_transaction() as txn:
            current = txn.find_sequence(sequence.key)
            if current is None or current.spans != sequence.spans:
                raise SequenceNotFound(
                    f"sequence {sequence.name or sequence.key}: gone meanwhile, expected it; look again with 'kvdb ls'"
                )
            if (made := txn.find_sequence(temporary)) is not None:
                txn.remove_sequence(made)
            spans = entries.spans_of(txn.path(last.info.segment), sequence.tokens)
            used = txn.use(sequence.spans[-1].segment)
            txn.rewrite_spans(current, spans)
            txn.set_use(last.info.segment, used)
            dead = txn.remove_unreferenced([current])
        db.space.dispose(array for info in dead for array in info.array_names())
    db.space.enforce(keep=last.info.segment)
