"""Maps of a stored sequence: how long its keys are, and how wide the boxes around them, by layer and position.

A map has a row for each layer and at most `COLUMNS` columns of neighbouring chunks, so that it stays small however long the sequence
is. Widths are of every record, from the stored boxes, where there are any. Norms need the keys: where a column has several chunks, the
middle one is read for all of them. What is damaged leaves its cells empty.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from kvdb.abstracts import Box, Sketch
from kvdb.abstracts.sketch import corners
from kvdb.entries import Sequence, Span
from kvdb.errors import Damaged, Unsupported
from kvdb.geometry import as_float32, div_ceil
from kvdb.reader import Reader
from kvdb.segments import Segment
from kvdb.store import KVDB

Array = np.ndarray[Any, np.dtype[Any]]

COLUMNS: Final = 128
_FROM_KEYS: Final = "keys"


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers by row and column.

    rows    what each row stands for: layers, ascending
    bounds  column c stands for [bounds[c], bounds[c + 1]), of tokens or of steps
    values  a tuple for each row; None: nothing is known there
    """

    rows: tuple[int, ...]
    bounds: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


class KeyMaps(msgspec.Struct, frozen=True, kw_only=True):
    """Maps of one sequence, in units of keys.

    norms         mean Euclidean norm of the keys, over the KV heads and tokens that were read
    widths        mean of hi - lo over the elements of the head dimension and the KV heads, over records
    sources       what widths come from: abstracts, or "keys" where none with boxes is stored
    tokens        of the sequence
    tokens_read   of how many the keys were read
    problems      what could not be read, one for each segment and source
    """

    norms: Grid
    widths: Grid
    sources: tuple[str, ...]
    tokens: int
    tokens_read: int
    problems: tuple[str, ...]


def key_maps(db: KVDB, sequence: Sequence, columns: int = COLUMNS) -> KeyMaps:
    """Both maps of a sequence.

    raises  Damaged when a segment is not in the catalog, or there is none
    cost    reads the stored boxes of all its records, and at most `columns` chunks of KV of each layer
    """
    segments = db.segments(sequence.spans)
    if not segments:
        raise Damaged(f"sequence {sequence.key}: no segments, expected at least one; run 'kvdb verify'")
    layers = tuple(sorted({layer for segment in segments for layer in segment.info.geometry.layers}))
    made = _Maps(layers, _bounds(sequence, segments, columns))
    reader = db.reader()
    try:
        for span, segment in zip(sequence.spans, segments, strict=True):
            made.add(reader, span, segment)
            reader.forget(segment.info.segment)
    finally:
        reader.close()
    return made.finished(sequence.tokens)


def _bounds(sequence: Sequence, segments: list[Segment], columns: int) -> Array:
    """Where columns begin, on the chunk grid, and where the last one ends: (columns + 1,) int64."""
    chunk_tokens = segments[0].info.geometry.chunk_tokens
    chunks = div_ceil(sequence.tokens, chunk_tokens)
    count = min(columns, chunks)
    bounds: Array = np.arange(count + 1, dtype=np.int64) * chunks // count * chunk_tokens
    bounds[-1] = sequence.tokens
    return bounds


class _Sums:
    """Sums and counts by layer row and column; what is not finite is left out."""

    def __init__(self, rows: int, columns: int) -> None:
        self._sums, self._counts = np.zeros((rows, columns)), np.zeros((rows, columns), np.int64)

    def add(self, row: int, columns: Array, values: Array) -> None:
        """values (n,) belong to columns (n,)"""
        finite = np.isfinite(values)
        np.add.at(self._sums[row], columns[finite], values[finite])
        np.add.at(self._counts[row], columns[finite], 1)

    def means(self) -> tuple[tuple[float | None, ...], ...]:
        with np.errstate(invalid="ignore", over="ignore"):
            means = self._sums / np.maximum(self._counts, 1)
        known = (self._counts > 0) & np.isfinite(means)
        return tuple(
            tuple(mean if there else None for mean, there in zip(*both, strict=True))
            for both in zip(means.tolist(), known.tolist(), strict=True)
        )


class _Maps:
    """Both maps in the making."""

    def __init__(self, layers: tuple[int, ...], bounds: Array) -> None:
        self._layers, self._bounds = layers, bounds
        self._norms, self._widths = (_Sums(len(layers), len(bounds) - 1) for _ in range(2))
        self._sources: dict[str, None] = {}
        self._problems: dict[tuple[str, str], str] = {}
        self._read = 0

    def finished(self, tokens: int) -> KeyMaps:
        bounds = tuple(self._bounds.tolist())
        norms, widths = (
            Grid(rows=self._layers, bounds=bounds, values=sums.means()) for sums in (self._norms, self._widths)
        )
        return KeyMaps(
            norms=norms,
            widths=widths,
            sources=tuple(self._sources),
            tokens=tokens,
            tokens_read=self._read,
            problems=tuple(self._problems.values()),
        )

    def add(self, reader: Reader, span: Span, segment: Segment) -> None:
        info = segment.info
        source = next((name for name in (Box.name, Sketch.name) if name in info.abstracts), _FROM_KEYS)
        self._sources[source] = None
        chosen = self._chosen(span, segment)
        self._read += int(_tokens_in(chosen, span, info.geometry.chunk_tokens).sum())
        for layer in info.geometry.layers:
            row = self._layers.index(layer)
            if source != _FROM_KEYS:
                self._add_boxes(reader, span, segment, layer, row, source)
            self._add_keys(reader, span, segment, layer, row, chosen, widths=source == _FROM_KEYS)

    def _columns(self, positions: Array) -> Array:
        columns: Array = np.searchsorted(self._bounds, positions, "right") - 1
        return columns

    def _chosen(self, span: Span, segment: Segment) -> Array:
        """Chunks of the segment whose keys are read: those in the middle of a column, (n,) int64."""
        info = segment.info
        middles = (self._bounds[:-1] + self._bounds[1:] - 1) // 2 - info.start
        chosen: Array = middles[(middles >= 0) & (middles < span.stop)] // info.geometry.chunk_tokens
        return chosen

    def _add_boxes(self, reader: Reader, span: Span, segment: Segment, layer: int, row: int, source: str) -> None:
        geometry = segment.info.geometry
        chunks = geometry.chunks(span.stop)
        try:
            loaded = reader.abstract(segment, source, layer, planes=1)
        except (Damaged, Unsupported, OSError) as e:
            self._problems.setdefault((segment.info.segment, source), str(e))
            return
        with np.errstate(invalid="ignore", over="ignore"):
            widths = _box_widths(loaded, source, geometry.groups[geometry.locate(layer)[0]].head_dim)[:chunks]
        self._widths.add(row, self._columns(segment.info.start + np.arange(chunks) * geometry.chunk_tokens), widths)

    def _add_keys(
        self, reader: Reader, span: Span, segment: Segment, layer: int, row: int, chosen: Array, *, widths: bool
    ) -> None:
        parts = [chosen]
        while parts:
            chunks = parts.pop()
            if not len(chunks):
                continue
            try:
                keys = _keys(reader, segment, layer, chunks)
            except (Damaged, Unsupported, OSError) as e:
                self._problems.setdefault((segment.info.segment, _FROM_KEYS), str(e))
                if len(chunks) > 1:  # what is whole beside what is damaged is shown
                    parts += [chunks[: len(chunks) // 2], chunks[len(chunks) // 2 :]]
                continue
            self._add_read(span, segment, row, chunks, keys, widths=widths)

    def _add_read(self, span: Span, segment: Segment, row: int, chunks: Array, keys: Array, *, widths: bool) -> None:
        """keys (chunks, kv_heads, chunk_tokens, head_dim) float32"""
        chunk_tokens = segment.info.geometry.chunk_tokens
        columns = self._columns(segment.info.start + chunks * chunk_tokens)
        there = np.arange(chunk_tokens) < _tokens_in(chunks, span, chunk_tokens)[:, None]  # [chunks, chunk_tokens]
        with np.errstate(invalid="ignore", over="ignore"):
            norms = np.sqrt((keys.astype(np.float64) ** 2).sum(-1)).mean(1)  # [chunks, chunk_tokens], over KV heads
            self._norms.add(row, np.repeat(columns, there.sum(1)), norms[there])
            if widths:
                wide = there[:, None, :, None]
                spread = np.where(wide, keys, -np.inf).max(2) - np.where(wide, keys, np.inf).min(2)
                self._widths.add(row, columns, spread.mean((1, 2)))


def _tokens_in(chunks: Array, span: Span, chunk_tokens: int) -> Array:
    """How many tokens of each chunk are of the span."""
    tokens: Array = np.minimum(span.stop - chunks * chunk_tokens, chunk_tokens)
    return tokens


def _keys(reader: Reader, segment: Segment, layer: int, chunks: Array) -> Array:
    """(chunks, kv_heads, chunk_tokens, head_dim) float32; raises as `Reader.read`"""
    geometry = segment.info.geometry
    g = geometry.groups[geometry.locate(layer)[0]]
    records = (chunks[:, None] * g.kv_heads + np.arange(g.kv_heads)).reshape(-1)
    out = np.empty((2, len(records), geometry.chunk_tokens, g.head_dim), geometry.storage_dtype)
    reader.read(segment, layer, records, out)
    return as_float32(out[0], geometry.dtype).reshape(len(chunks), g.kv_heads, geometry.chunk_tokens, g.head_dim)


def _box_widths(loaded: Array, source: str, head_dim: int) -> Array:
    """Mean width of each chunk's boxes, (chunks,) float64; not finite where a box is unknown.

    loaded  what `Reader.abstract` gives: a box, or the first plane of a sketch
    """
    if source == Box.name:
        return np.asarray((loaded[:, :, 1].astype(np.float64) - loaded[:, :, 0]).mean((1, 2)))
    box, scale = corners(loaded[0], head_dim)
    cells = (box[..., head_dim:].astype(np.int16) - box[..., :head_dim]).mean(-1)  # [chunks, kv_heads]
    return np.asarray((cells * scale).mean(-1))
