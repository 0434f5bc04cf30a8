"""Another codec for a stored sequence: its KV is written anew, as segments of its own, and then the old ones go.

What others share stays as it is, so that nobody else's KV changes. Abstracts are carried over: they are those of the keys as they
were computed. Rows of layers whose codec does not change are copied byte for byte; all others are decoded, each record compared with
its digest, and encoded. New segments are committed one after the other; until the last one is, the sequence is what it was,
and one transaction then leads it, with its name, its pin and its age, to the new segments.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvdb import entries
from kvdb.codecs import RAW, CodecPlan
from kvdb.entries import Sequence, Span
from kvdb.errors import Damaged, InvalidInput, NotFinite, SequenceNotFound
from kvdb.format import SegmentInfo
from kvdb.geometry import Geometry, LayerGroup, div_ceil
from kvdb.identity import EXACT, joined_fidelity
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.segments import Segment, SegmentWriter, codec_of, codecs_of

if TYPE_CHECKING:
    from kvdb.store import KVDB

_LONGEST_S: Final = 6 * 3600.0
"""What a run that was killed leaves behind goes after so many seconds."""


class _Piece(NamedTuple):
    """Tokens [start, stop) of a segment, and what shall store them."""

    segment: Segment
    start: int
    stop: int
    codec: CodecPlan


def recode(db: KVDB, name_or_key: str, codec: CodecPlan) -> int:
    """See `KVDB.recode`."""
    while True:
        with db.catalog.begin() as txn:
            sequence = txn.sequence(name_or_key)
            segments = [Segment.stored(entry, db.path / "chunks") for entry in txn.span_entries(sequence.spans)]
        try:
            return _recode(db, sequence, segments, codec)
        except Damaged:
            if db.holds(sequence.spans) and db.agrees(segments):
                raise  # and not merged, deleted or given other abstracts meanwhile


def _recode(db: KVDB, sequence: Sequence, segments: list[Segment], codec: CodecPlan) -> int:
    with db.catalog.begin() as txn:
        identity, now = txn.identity(sequence.identity), txn.now()
    if identity is None:
        raise Damaged(f"identity {sequence.identity}: not in the catalog, expected it; run 'kvdb repair'")
    done = 0  # spans at the beginning that are stored so already
    while done < len(segments) and _settled(segments[done].info, codec):
        done += 1
    if done == len(segments):
        return 0
    last, temporary = segments[done - 1] if done else None, None
    source, tokens = segments[-1].info.segment, db.tokens(sequence.spans)
    left = _LONGEST_S if sequence.expires is None else min(_LONGEST_S, max(1.0, sequence.expires - now))
    pieces = [
        p
        for span, segment in zip(sequence.spans[done:], segments[done:], strict=True)
        for p in _pieces(segment, span, codec)
    ]
    reader = READERS[db.read_mode]("always")
    try:
        for piece in pieces:
            info, start = piece.segment.info, piece.segment.info.start + piece.start
            writer = db.writer(
                identity=identity,
                fidelity=joined_fidelity(EXACT if last is None else last.info.fidelity, _fidelity(info, codec)),
                geometry=_merged(info.geometry),
                parent=None if last is None else last.info.segment,
                start=start,
                capacity=info.geometry.chunks(piece.stop - piece.start),
                codec=piece.codec,
                abstracts=info.abstracts,
                keep=[source, *([] if last is None else [last.info.segment])],
            )
            try:
                _copy(reader, writer, piece)
            except BaseException:
                db.abandon(writer)
                raise
            ids = tokens[start : start + piece.stop - piece.start]
            # On disk before what it replaces goes, however the store was opened.
            last, key = db.commit(
                writer, ids, model=sequence.model, replaces=temporary, ttl_s=left, durable=True, keep=[source]
            )
            temporary = key if last.info.segment == writer.info.segment else None  # else it is somebody's own
        assert last is not None
        _lead(db, sequence, last, temporary)
    except BaseException:
        if temporary is not None:
            with contextlib.suppress(SequenceNotFound, InvalidInput):
                db.delete(temporary)
        raise
    finally:
        reader.close()
    return len(segments) - done


def _settled(info: SegmentInfo, codec: CodecPlan) -> bool:
    """Whether a segment needs no other codec. The first chunk of a sequence and a started one are never stored with a lossy one."""
    ct = info.geometry.chunk_tokens
    alone = not codec.lossless and (info.tokens < ct or (info.start == 0 and info.tokens == ct))
    return _plan(info) == (RAW if alone else _fitting(codec, info))


def _pieces(segment: Segment, span: Span, codec: CodecPlan) -> list[_Piece]:
    """What becomes a segment each: whole chunks; the first one, on which every position rests attention; and a started one, which a lossy
    codec would change again at each turn."""
    if codec.lossless:
        return [_Piece(segment, span.start, span.stop, codec)]
    geometry, first = segment.info.geometry, span.start
    if segment.info.start + span.start == 0:
        first = min(span.stop, geometry.chunk_tokens)
    whole = max(first, geometry.grid_floor(span.stop))
    pieces = [
        _Piece(segment, span.start, first, RAW),
        _Piece(segment, first, whole, codec),
        _Piece(segment, whole, span.stop, RAW),
    ]
    return [piece for piece in pieces if piece.stop > piece.start]


def _fidelity(info: SegmentInfo, codec: CodecPlan) -> str:
    """Of what a segment's KV becomes. Who has lost something to this codec before, and is not stored with it, loses more."""
    if codec.lossless or _settled(info, codec):
        return info.fidelity
    label = joined_fidelity(EXACT, str(codec))
    again = label in info.fidelity.split(" ")
    return joined_fidelity(info.fidelity, f"{label} again" if again else label)


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


def _copy(reader: Reader, writer: SegmentWriter, piece: _Piece) -> None:
    """Append what a piece holds. Abstracts are carried over, but where a piece ends inside a chunk, and where keys that lost something
    are from now on the keys: what bounds them must be made of them."""
    info, ct = piece.segment.info, piece.segment.info.geometry.chunk_tokens
    first, count = piece.start // ct, piece.stop - piece.start
    chunks = div_ceil(count, ct)
    cut = piece.stop != info.tokens and count % ct > 0
    for layer in info.geometry.layers:
        group = info.geometry.locate(layer)[0]
        g, old, new = info.geometry.groups[group], codec_of(info, group), writer.codec_of(layer)
        records = np.arange(first * g.kv_heads, (first + chunks) * g.kv_heads)
        built = None
        if not cut and (old.key.lossless or not new.key.lossless):
            built = {
                name: reader.stored_abstract(piece.segment, name, layer)[:, first : first + chunks]
                for name in info.abstracts
            }
        if (old.key, old.value) == (new.key, new.value) and built is not None:
            writer.append_rows(layer, reader.rows(piece.segment, layer, records), built, count)
            continue
        out = np.empty((2, len(records), ct, g.head_dim), info.geometry.storage_dtype)
        reader.read(piece.segment, layer, records, out)
        by_head = out.reshape(2, chunks, g.kv_heads, ct, g.head_dim).swapaxes(1, 2)
        k, v = by_head.reshape(2, g.kv_heads, chunks * ct, g.head_dim)[:, :, :count]
        try:
            writer.append(layer, k, v, built)
        except NotFinite as e:
            raise NotFinite(f"segment {info.segment}, layer {layer}: {e}") from e


def _lead(db: KVDB, sequence: Sequence, last: Segment, temporary: str | None) -> None:
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
            if temporary is not None and (made := txn.find_sequence(temporary)) is not None:
                txn.remove_sequence(made)
            spans = entries.spans_of(txn.path(last.info.segment), sequence.tokens)
            used = txn.use(sequence.spans[-1].segment)
            txn.rewrite_spans(current, spans)
            txn.set_use(last.info.segment, used)
            dead = txn.remove_unreferenced([current])
        db.space.dispose(array for info in dead for array in info.array_names())
    db.space.enforce(keep=last.info.segment)
