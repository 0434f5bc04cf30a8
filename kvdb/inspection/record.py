"""One chunk of one layer: where its records lie, and what the keys and values in them are like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from kvdb.entries import Sequence
from kvdb.errors import Damaged, InvalidInput
from kvdb.geometry import as_float32
from kvdb.inspection import planes
from kvdb.reader import Reader
from kvdb.segments import codec_of

if TYPE_CHECKING:
    from kvdb.store import KVDB

Array = np.ndarray[Any, np.dtype[Any]]


class Spread(NamedTuple):
    """Of the L2 norms of a head's vectors."""

    least: float
    mean: float
    most: float


class Box(NamedTuple):
    """How far the keys of a record reach, channel by channel.

    width    mean over the channels of max - min; `widest` is the channel where that is largest
    reach    the key number farthest from 0, which is in `channel`
    """

    width: float
    widest: int
    channel: int
    reach: float


class RecordFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One KV head's part of a chunk. Numbers are those that are read back, which a lossy codec has changed.

    file            path below the store's folder
    offset, nbytes  there; of records that are compressed together, those of their block
    digest          xxh3-64 in hex, as it must be
    wrong           why it cannot be read; then there is nothing about its numbers
    """

    head: int
    file: str | None = None
    offset: int | None = None
    nbytes: int | None = None
    digest: str | None = None
    box: Box | None = None
    key_norms: Spread | None = None
    value_norms: Spread | None = None
    wrong: str | None = None


class ChunkFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Positions [start, stop) of a sequence in one layer; records by KV head."""

    layer: int
    chunk: int
    start: int
    stop: int
    segment: str
    fidelity: str
    codec: str
    dtype: str
    records: list[RecordFacts]


def chunk_of(db: KVDB, sequence: Sequence, layer: int, chunk: int) -> ChunkFacts:
    """Every byte that is asked for is compared with its digest.

    chunk   of the sequence, whichever segment it lies in
    raises  InvalidInput for a layer or chunk that is not there; Damaged where segment or files are missing
    """
    holding = planes.held(sequence.spans, db.segments(sequence.spans))
    geometry = holding[0].segment.info.geometry
    geometry.locate(layer)
    chunks = geometry.chunks(sequence.tokens)
    if not 0 <= chunk < chunks:
        raise InvalidInput(f"chunk {chunk}: the sequence has {chunks} chunks, expected 0..{chunks - 1}")
    start = chunk * geometry.chunk_tokens
    part = planes.at(holding, start)
    stop = min(start + geometry.chunk_tokens, part.stop)
    info = part.segment.info
    group = info.geometry.locate(layer)[0]
    reader = db.reader()
    try:
        heads = range(info.geometry.groups[group].kv_heads)
        records = [_record(db, reader, part, layer, head, start, stop) for head in heads]
    finally:
        reader.close()
    return ChunkFacts(
        layer=layer,
        chunk=chunk,
        start=start,
        stop=stop,
        segment=info.segment,
        fidelity=info.fidelity,
        codec=str(codec_of(info, group)),
        dtype=info.geometry.dtype,
        records=records,
    )


def _record(db: KVDB, reader: Reader, part: planes.Held, layer: int, head: int, start: int, stop: int) -> RecordFacts:
    info = part.segment.info
    g = info.geometry.groups[info.geometry.locate(layer)[0]]
    record = (start - info.start) // info.geometry.chunk_tokens * g.kv_heads + head
    place = reader.place_of(part.segment, layer, record)
    found = RecordFacts(
        head=head,
        file=str(place.path.relative_to(db.path)),
        offset=place.offset,
        nbytes=place.nbytes,
        digest=None if place.digest is None else f"{place.digest:016x}",
    )
    out = np.empty((2, 1, info.geometry.chunk_tokens, g.head_dim), info.geometry.storage_dtype)
    try:
        reader.read(part.segment, layer, np.array([record]), out)
    except Damaged as e:
        return msgspec.structs.replace(found, wrong=str(e))
    keys, values = as_float32(out[:, 0, : stop - start], info.geometry.dtype)
    return msgspec.structs.replace(found, box=_box(keys), key_norms=_norms(keys), value_norms=_norms(values))


def _box(keys: Array) -> Box:
    """keys (tokens, head_dim) float32"""
    widths = keys.max(axis=0) - keys.min(axis=0)
    channel = int(np.abs(keys).max(axis=0).argmax())
    reach = float(keys[np.abs(keys[:, channel]).argmax(), channel])
    return Box(float(widths.mean()), int(widths.argmax()), channel, reach)


def _norms(vectors: Array) -> Spread:
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return Spread(float(norms.min()), float(norms.mean()), float(norms.max()))
