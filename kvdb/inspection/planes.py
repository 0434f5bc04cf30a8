"""Keys and values of a sequence by position, decoded, whatever segments and codecs they lie in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kvdb.entries import Span
from kvdb.errors import Damaged, InvalidInput
from kvdb.geometry import as_float32, div_ceil
from kvdb.reader import Reader
from kvdb.segments import Segment

Array = np.ndarray[Any, np.dtype[Any]]


class Held(NamedTuple):
    """A segment and the positions [start, stop) of a sequence that lie in it."""

    segment: Segment
    start: int
    stop: int


def held(spans: tuple[Span, ...], segments: list[Segment]) -> list[Held]:
    """Of each segment behind spans, in order.

    raises  Damaged where there are none
    """
    if not spans:
        raise Damaged("sequence: no segments, expected at least one; run 'kvdb verify'")
    found, position = [], 0
    for span, segment in zip(spans, segments, strict=True):
        found.append(Held(segment, position, position + span.stop - span.start))
        position = found[-1].stop
    return found


def at(holding: list[Held], position: int) -> Held:
    """The segment that holds a position.

    raises  InvalidInput for one beyond the end
    """
    for part in holding:
        if part.start <= position < part.stop:
            return part
    raise InvalidInput(f"position {position}: beyond the end, expected 0..{holding[-1].stop - 1 if holding else 0}")


def read(reader: Reader, holding: list[Held], layer: int, start: int, stop: int) -> tuple[Array, Array]:
    """Keys and values of positions [start, stop), (kv_heads, tokens, head_dim) float32 each.

    start, stop  any, inside the sequence; at least one token
    raises       Damaged, InvalidInput as `Reader.read`
    """
    parts = [
        _read(reader, part.segment, layer, max(start, part.start) - part.start, min(stop, part.stop) - part.start)
        for part in holding
        if part.start < stop and start < part.stop
    ]
    keys, values = (np.concatenate(planes, axis=1) for planes in zip(*parts, strict=True))
    return keys, values


def _read(reader: Reader, segment: Segment, layer: int, start: int, stop: int) -> tuple[Array, Array]:
    """Of tokens [start, stop) of one segment."""
    info = segment.info
    group, ct = info.geometry.groups[info.geometry.locate(layer)[0]], info.geometry.chunk_tokens
    first, chunks = start // ct, div_ceil(stop, ct) - start // ct
    records = np.arange(first * group.kv_heads, (first + chunks) * group.kv_heads)
    out = np.empty((2, len(records), ct, group.head_dim), info.geometry.storage_dtype)
    reader.read(segment, layer, records, out)
    by_head = out.reshape(2, chunks, group.kv_heads, ct, group.head_dim).swapaxes(1, 2)
    whole = by_head.reshape(2, group.kv_heads, chunks * ct, group.head_dim)
    keys, values = as_float32(whole[:, :, start - first * ct : stop - first * ct], info.geometry.dtype)
    return keys, values
