"""KV of sequences that codecs stored, from the tokens alone: what is written, and what must be read back, bit for bit.

Fidelity says which codecs it has been through, one after the other; each took the whole chunks but the first, and left a started one.
The codecs themselves are believed: here only what a store makes of their rows is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import Array, assert_abstracts_follow, identity, model_kv, read_kv

from kvdb import EXACT, KVDB, Geometry, Span
from kvdb.abstracts import ABSTRACTS
from kvdb.codecs import RAW, CodecPlan, RecordCodec
from kvdb.format import SegmentInfo
from kvdb.geometry import as_float32
from kvdb.reader import Reader
from kvdb.segments import Segment, codecs_of

KV = dict[int, Array]
"""Of each layer (2, kv_heads, tokens, head_dim): keys, then values."""


def kv_of(geometry: Geometry, tokens: Array, fidelity: str) -> KV:
    found = {layer: np.stack(kv) for layer, kv in model_kv(geometry, tokens, 0, len(tokens), salt=EXACT).items()}
    for codec in (RecordCodec.parse(part) for part in fidelity.split(" ") if part != EXACT):
        for kv in found.values():
            _go_through(codec, kv, geometry)
    return found


def _go_through(codec: RecordCodec, kv: Array, geometry: Geometry) -> None:
    ct, (_, heads, tokens, dim) = geometry.chunk_tokens, kv.shape
    for start in range(ct, geometry.grid_floor(tokens), ct):
        records = np.ascontiguousarray(
            kv[:, :, start : start + ct].swapaxes(0, 1)
        )  # [kv_heads, 2, chunk_tokens, head_dim]
        out = np.empty((2, heads, ct, dim), geometry.storage_dtype)
        codec.decode(codec.encode(records, geometry.dtype), np.arange(heads), out, geometry.dtype)
        kv[:, :, start : start + ct] = out


def stops(geometry: Geometry, tokens: int, segment_tokens: int) -> list[int]:
    """Where the segments of a sequence end that is stored with a lossy codec."""
    whole = range(geometry.chunk_tokens, geometry.grid_floor(tokens), segment_tokens)
    return sorted({min(geometry.chunk_tokens, tokens), *whole, geometry.grid_floor(tokens) or tokens, tokens})


def store(db: KVDB, tokens: Array, name: str | None, codec: str, *, geometry: Geometry, segment_tokens: int) -> None:
    """Store a sequence that shares nothing with any other, as a live cache does whose codec is a lossy one."""
    plan, kv, start = CodecPlan.parse(codec), kv_of(geometry, tokens, EXACT), 0
    last: Segment | None = None
    recorded: str | None = None
    for stop in stops(geometry, len(tokens), segment_tokens):
        writer = db.writer(
            identity=identity(),
            fidelity=codec,
            geometry=geometry,
            parent=None if last is None else last.info.segment,
            start=start,
            capacity=geometry.chunks(stop - start),
            codec=RAW if start == 0 or stop % geometry.chunk_tokens else plan,
        )
        for layer, (keys, values) in kv.items():
            writer.append(layer, keys[:, start:stop], values[:, start:stop])
        last, recorded = db.commit(writer, tokens[start:stop], replaces=recorded)
        start = stop
    assert last is not None
    db.put_sequence(last, len(tokens), name=name, replaces=recorded)


def codec_of(db: KVDB, spans: tuple[Span, ...]) -> str:
    """What all segments of a sequence are stored with, but for its first chunk and a started one."""
    infos = [segment.info for segment in db.segments(spans)]
    alone = [_plan(info) for info in infos if _is_alone(info)]
    assert all(plan.lossless for plan in alone), f"the first chunk, or a started one, is stored with {alone}"
    found = {str(_plan(info)) for info in infos if not _is_alone(info)} or {str(RAW)}
    assert len(found) == 1, f"one sequence is stored with {sorted(found)}"
    return found.pop()


def _plan(info: SegmentInfo) -> CodecPlan:
    return CodecPlan.of_groups(info.geometry, codecs_of(info))


def _is_alone(info: SegmentInfo) -> bool:
    ct = info.geometry.chunk_tokens
    return info.tokens < ct or (info.start == 0 and info.tokens == ct)


def assert_reads_back(db: KVDB, tokens: Array, spans: tuple[Span, ...]) -> None:
    """Spans hold exactly what `tokens` gives at the fidelity of each segment, whatever the read mode, and its abstracts."""
    known: dict[str, KV] = {}
    assert np.array_equal(db.tokens(spans), tokens[: sum(span.stop - span.start for span in spans)])
    reader = db.reader()
    try:
        for segment, span in zip(db.segments(spans), spans, strict=True):
            info, count = segment.info, span.stop - span.start
            if info.fidelity not in known:
                known[info.fidelity] = kv_of(info.geometry, tokens, info.fidelity)
            for layer, kv in known[info.fidelity].items():
                found = np.stack(read_kv(reader, segment, layer, count))
                expected = np.ascontiguousarray(kv[:, :, info.start : info.start + count])
                assert np.array_equal(found.view(np.uint8), expected.view(np.uint8)), f"layer {layer} from {info.start}"
            if all(codec.key.lossless for codec in codecs_of(info)):
                assert_abstracts_follow(reader, segment)
            else:
                _assert_abstracts_are_exact(reader, segment, kv_of(info.geometry, tokens, EXACT))
    finally:
        reader.close()


def _assert_abstracts_are_exact(reader: Reader, segment: Segment, exact: KV) -> None:
    """Abstracts of keys that a codec rounded are those of the keys before."""
    info, geometry = segment.info, segment.info.geometry
    for layer, kv in exact.items():
        chunks: Any = as_float32(np.ascontiguousarray(kv[:, :, info.start : info.stop]), geometry.dtype)
        keys, values = chunks.reshape(2, -1, info.chunks, geometry.chunk_tokens, kv.shape[3])
        for name in info.abstracts:
            found = reader.stored_abstract(segment, name, layer)
            assert np.array_equal(found, ABSTRACTS[name].build(keys, info.tokens, geometry.dtype, values)), name
