"""The stored part of one sequence, while a generation runs: what is sealed, what is being written, how to read both.

A history is a run of whole chunks: chunk k holds positions [16k, 16k + 16). The tokens after the last whole chunk are the
business of the layers' tails. New chunks stream into a segment in flight; when it is full it is committed and becomes one
more sealed part. Without a writable store nothing is ever appended and the tails hold everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvdb import forks
from kvdb.abstracts import ABSTRACTS, build_all
from kvdb.codecs import RAW, CodecPlan, RecordCodec
from kvdb.entries import Span
from kvdb.errors import Damaged
from kvdb.format import SegmentInfo
from kvdb.geometry import SEGMENT_TOKENS, Geometry
from kvdb.identity import EXACT, Identity, joined_fidelity
from kvdb.reader import Reader, Wanted
from kvdb.runtime.device_cache import DeviceCache, Rows
from kvdb.runtime.fetching import Run
from kvdb.runtime.gather import Lent
from kvdb.runtime.selection import Resident, Selector
from kvdb.runtime.staging import Array, Coded, Staging, storage_view
from kvdb.runtime.streaming import WriteBehind
from kvdb.runtime.timeline import Timeline
from kvdb.segments import Segment, SegmentWriter, codec_of, payload_bytes, row_bytes
from kvdb.store import KVDB

FLUSH_TOKENS = 1024
"""A tail that long moves to disk."""


class Part(NamedTuple):
    """Chunks [first, first + chunks) of the sequence, stored as the leading chunks of a segment."""

    segment: Segment
    first: int
    chunks: int

    @property
    def stop(self) -> int:
        return self.first + self.chunks


class Share(NamedTuple):
    """Records of one segment in a read, and which of it they are; None: all, in order."""

    segment: Segment
    records: Array
    columns: Array | None


class Chosen(NamedTuple):
    """Records of one segment among chosen chunks, (kv_heads, n) of them, and the places they are chosen in, counted row after row."""

    segment: Segment
    records: Array
    places: Array


class History:
    """Stored chunks of one row of a batch.

    abstracts         what new segments are summarised by
    tokens            ids of every token computed so far, tail included; the cache appends to it
    codec             what each layer of new segments is stored with
    reader            all rows of a batch share it; another one takes its place between steps only
    """

    def __init__(
        self,
        db: KVDB,
        identity: Identity,
        geometry: Geometry,
        reader: Reader,
        staging: Staging,
        abstracts: tuple[str, ...],
        codec: CodecPlan,
        model_label: str,
        timeline: Timeline,
        device_tier: DeviceCache | None = None,
    ) -> None:
        self._device_tier = device_tier
        self.db, self.identity, self.geometry = db, identity, geometry
        self.abstracts, self.codec, self.model_label = abstracts, codec, model_label
        self.tokens: list[int] = []
        self._fidelities: list[tuple[int, str]] = [(0, EXACT)]  # from a position on, how KV is computed
        self.reader, self._staging, self._timeline = reader, staging, timeline
        groups = {layer: geometry.groups[geometry.locate(layer)[0]] for layer in geometry.layers}
        self._heads = {layer: np.arange(group.kv_heads)[:, None] for layer, group in groups.items()}
        self._dims = {layer: group.head_dim for layer, group in groups.items()}
        self._behind = WriteBehind(timeline)
        self._sealed: list[Part] = []
        self._last: Segment | None = None  # holds the last stored token; may hold no whole chunk of this sequence
        self.stored_tokens = 0
        self._writer: SegmentWriter | None = None
        self._writing = codec  # of the segment in flight
        self._submitted: dict[int, int] = {}  # layer -> tokens handed to the writer
        self._resident: dict[
            int, tuple[int, Resident]
        ] = {}  # layer -> chunks, and their abstracts in the selector's form
        self._sizes: dict[tuple[str, tuple[int, ...]], int] = {}  # segment, layers -> stored bytes of a chunk
        self._codecs: dict[tuple[str, int], RecordCodec] = {}  # segment, layer -> what its rows decode with
        self._recorded: str | None = None  # key under which this sequence was last recorded, unnamed
        forks.watch(self)

    def after_fork(self) -> None:
        self._writer, self._submitted = None, {}  # the parent goes on with it

    # -- state

    @property
    def sealed_chunks(self) -> int:
        return self._sealed[-1].stop if self._sealed else 0

    def chunks(self, layer: int) -> int:
        """Whole chunks of this layer that `read` can deliver."""
        return self.sealed_chunks + self._submitted.get(layer, 0) // self.geometry.chunk_tokens

    def stored_bytes(self) -> int:
        """Bytes of KV that the sequence has on disk; of compressed blocks, its part of them."""
        started = self.stored_tokens - self.sealed_chunks * self.geometry.chunk_tokens
        whole = sum(part.chunks / part.segment.info.chunks * payload_bytes(part.segment.info) for part in self._sealed)
        return round(whole) + started * self.geometry.token_bytes

    def absent_bytes(self, starts: Array) -> Array:
        """Bytes of what is sealed from each of these chunks on that are not in memory, as far as can be told: (n,) float64."""
        absent = np.zeros(len(starts))
        for part in self._sealed:
            of_chunk = self.reader.absent_bytes(part.segment) / part.segment.info.chunks
            absent += of_chunk * (part.stop - starts).clip(0, part.chunks)
        return absent

    def sealed_runs(self, layer: int, start: int) -> list[Run]:
        """The sealed records of a layer from chunk `start` on, in order."""
        heads = len(self._heads[layer])
        return [
            Run(part.segment, layer, max(0, start - part.first) * heads, part.chunks * heads)
            for part in self._sealed
            if part.stop > start
        ]

    def chunk_bytes(self, layers: tuple[int, ...]) -> int:
        """Bytes of rows of the whole chunks of some layers, compressed or not."""
        return sum(part.chunks * self._chunk_bytes(part.segment.info, layers) for part in self._sealed)

    def _chunk_bytes(self, info: SegmentInfo, layers: tuple[int, ...]) -> int:
        key = (info.segment, layers)
        if key not in self._sizes:
            groups = [info.geometry.locate(layer)[0] for layer in layers]
            self._sizes[key] = sum(info.geometry.groups[group].kv_heads * row_bytes(info, group) for group in groups)
        return self._sizes[key]

    @property
    def resident_bytes(self) -> int:
        return sum(t.nbytes for _, resident in self._resident.values() for t in resident)

    # -- restoring

    def restore(self, spans: tuple[Span, ...], segments: list[Segment], tokens: list[int]) -> None:
        """Take over a stored prefix: `tokens` lie in `spans` of `segments`.

        raises  Damaged when a file is missing or short, naming the sequences concerned
        """
        for span, segment in zip(spans, segments, strict=True):
            with self._naming(segment):
                self.reader.open(segment)
            self._take(segment, segment.info.start + span.stop)
            if segment.info.fidelity != EXACT:
                self.mark_approximate(segment.info.start, segment.info.fidelity)
        self.tokens = tokens

    def open_in(self, reader: Reader) -> None:
        """Open all that is read here in another reader, that it may go on with (`reader`).

        raises  Damaged where something was deleted since this one opened it
        """
        for segment in (*(part.segment for part in self._sealed), self._last):
            if segment is not None:
                reader.open(segment)

    def _take(self, segment: Segment, stop: int) -> None:
        """Positions up to `stop` are stored now, the last of them in `segment`."""
        ct = self.geometry.chunk_tokens
        first = segment.info.start // ct
        if stop // ct > first:
            self._sealed.append(Part(segment, first, stop // ct - first))
        self._last, self.stored_tokens = segment, stop

    @contextlib.contextmanager
    def _naming(self, *segments: Segment) -> Iterator[None]:
        """Damage found in the block, in one of the segments, names the sequences it concerns."""
        try:
            yield
        except Damaged as e:
            concerned = {e.segment} if e.segment else {segment.info.segment for segment in segments}
            names = [s.name or s.key for s in self.db.sequences() if any(p.segment in concerned for p in s.spans)]
            raise Damaged(f"sequence {', '.join(names) or '?'}: {e}", segment=e.segment) from e

    def last_tokens(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V of positions [start, stop) of one layer, each (kv_heads, tokens, head_dim): a copy.

        `stop` may lie inside the chunk after the last whole one, if the last segment holds it.
        """
        ct = self.geometry.chunk_tokens
        first, last = start // ct, self.geometry.chunks(stop)
        parts = list(self._sealed)
        if last > self.sealed_chunks and self._last is not None:
            parts.append(Part(self._last, self._last.info.start // ct, last - self._last.info.start // ct))
        k, v = self._read_run(parts, layer, first, last)
        wanted = slice(start - first * ct, stop - first * ct)
        return k[:, wanted].clone(), v[:, wanted].clone()

    # -- reading

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V of chunks [start, stop), each (kv_heads, tokens, head_dim). Valid until the next read."""
        self._behind.wait(layer)
        return self._read_run(self._parts(layer), layer, start, stop)

    def lend(self, layer: int, chunks: Tensor, counts: Tensor | None) -> Iterator[tuple[Lent, Array]]:
        """Chosen chunks per KV head, part by part, each to be used before the next one is asked for; and which of them it has.

        chunks  (kv_heads, n), the first `counts` (kv_heads,) of them; None: all
        returns records, and (kv_heads, n) of bool, whose true places are theirs, row after row
        """
        self._behind.wait(layer)
        as_is: list[Chosen] = []
        coded: list[Chosen] = []
        for chosen in self._chosen(self._parts(layer), chunks, counts):
            (as_is if self._codec(chosen.segment, layer).stored_as_is else coded).append(chosen)
        if as_is:
            yield from self._lend_as_is(layer, as_is, chunks.shape)
        for each in coded:
            yield self._lend_decoded(layer, each, chunks.shape)

    def _lend_as_is(self, layer: int, chosen: list[Chosen], shape: Sequence[int]) -> Iterator[tuple[Lent, Array]]:
        """Where records lie: a part may be of several segments."""
        lending = self.reader.lend(layer, [Wanted(each.segment, each.records) for each in chosen])
        every = np.concatenate([each.places for each in chosen])
        size, segments = self.geometry.chunk_tokens * self._dims[layer], [each.segment for each in chosen]
        while True:
            with self._reading(layer), self._naming(*segments):
                found = next(lending, None)
            if found is None:
                return
            stored, which, of = found
            inside, at = _by_place(shape, every[of], which * stored.shape[1])
            numbers = stored.reshape(-1)
            yield Lent(numbers, numbers, at, at + size, _starts(inside), self.geometry.chunk_tokens), inside

    def _lend_decoded(self, layer: int, chosen: Chosen, shape: Sequence[int]) -> tuple[Lent, Array]:
        """In the staging buffer."""
        segment, records, places = chosen
        tokens, dim, count = self.geometry.chunk_tokens, self._dims[layer], len(records)
        with self._reading(layer), self._naming(segment):
            decoded = self._staging.read_into(
                (2, count, tokens, dim), lambda out: self.reader.read(segment, layer, records, out)
            )
        inside, key_at = _by_place(shape, places, np.arange(count) * tokens * dim)
        numbers = storage_view(decoded).reshape(-1)
        return Lent(numbers, numbers, key_at, key_at + count * tokens * dim, _starts(inside), tokens), inside

    def expect(self, layer: int, chunks: Tensor, counts: Tensor | None) -> None:
        """Begin to bring in chunks that may be chosen soon: as in `lend`. What is not sealed yet is left alone."""
        wanted = []
        for segment, records, _ in self._chosen(self._sealed, chunks, counts):
            if self._device_tier is not None:
                records = self._device_tier.absent(self._rows(segment, layer, records), self._shape(layer))
            wanted.append(Wanted(segment, records))
        with self._naming(*(segment for segment, _ in wanted)):
            self.reader.expect(layer, wanted)

    def weigh(self, layer: int, chunks: Tensor, counts: Tensor | None, weights: Tensor) -> None:
        """Say what chunks are worth to tiers that look at it: as in `lend`; weights (kv_heads, n)."""
        for segment, records, places in self._chosen(self._sealed, chunks, counts):
            of_records = weights.cpu().numpy().reshape(-1)[places]
            self.reader.weigh(segment, layer, records, of_records)
            if self._device_tier is not None:
                self._device_tier.weigh(self._rows(segment, layer, records), self._shape(layer), of_records)

    @staticmethod
    def _chosen(parts: list[Part], chunks: Tensor, counts: Tensor | None) -> Iterator[Chosen]:
        """What each part has of chosen chunks."""
        wanted = chunks.cpu().numpy()
        heads, n = wanted.shape
        asked = np.ones((heads, n), bool) if counts is None else np.arange(n) < counts.cpu().numpy()[:, None]
        for part in parts:
            places = np.flatnonzero(asked & (wanted >= part.first) & (wanted < part.stop))
            if len(places):
                yield Chosen(part.segment, (wanted.reshape(-1)[places] - part.first) * heads + places // n, places)

    def select(self, layer: int, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of chosen chunks per KV head: chunks (kv_heads, n) -> (kv_heads, n * chunk_tokens, head_dim) twice."""
        self._behind.wait(layer)
        return self._gather(self._parts(layer), layer, chunks.cpu().numpy(), selected=True)

    def select_each(self, layer: int, chunks: Tensor, counts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """K and V of the first `counts` chunks of every KV head: for each head (tokens, head_dim) twice.

        chunks (kv_heads, n), counts (kv_heads,)
        """
        self._behind.wait(layer)
        wanted = np.arange(chunks.shape[1]) < counts.cpu().numpy()[:, None]
        heads = np.broadcast_to(self._heads[layer], wanted.shape)
        both = self._read_records(self._parts(layer), layer, chunks.cpu().numpy()[wanted], heads[wanted], selected=True)
        each = both.split(counts.tolist(), 1)
        return [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in each]

    def _parts(self, layer: int) -> list[Part]:
        if self._writer is None or not self._submitted.get(layer):
            return self._sealed
        flying = Part(self._writer.segment, self.sealed_chunks, self._submitted[layer] // self.geometry.chunk_tokens)
        return [*self._sealed, flying]

    def _read_run(self, parts: list[Part], layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        heads = len(self._heads[layer])
        return self._gather(parts, layer, np.broadcast_to(np.arange(start, stop), (heads, stop - start)))

    def _gather(self, parts: list[Part], layer: int, chunks: Array, *, selected: bool = False) -> tuple[Tensor, Tensor]:
        """chunks (kv_heads, n): which to read for each KV head; every one lies in one of `parts`."""
        heads, n = chunks.shape
        of_heads = np.broadcast_to(self._heads[layer], chunks.shape).ravel()
        both = self._read_records(parts, layer, chunks.ravel(), of_heads, selected=selected)
        k, v = both.view(2, heads, n * self.geometry.chunk_tokens, self._dims[layer])
        return k, v

    def _read_records(self, parts: list[Part], layer: int, chunks: Array, of_heads: Array, *, selected: bool) -> Tensor:
        """Chunk chunks[i] of KV head of_heads[i], for every i: (2, n, chunk_tokens, head_dim), K first."""
        shares = list(self._shares(parts, layer, chunks, of_heads))
        with self._reading(layer):
            if self._device_tier is not None and (selected or self._all_fits(self._device_tier, layer)):
                return self._through(self._device_tier, shares, layer, len(chunks))
            return self._read_shares(shares, layer, len(chunks))

    def _all_fits(self, tier: DeviceCache, layer: int) -> bool:
        """Whether dense attention finds there at the next step what it reads at this one: of less than all, it would find nothing."""
        shape = self._shape(layer)
        alike = [other for other, dim in self._dims.items() if dim == shape[1]]
        return tier.holds(shape, sum(self.chunks(other) * len(self._heads[other]) for other in alike))

    def _through(self, tier: DeviceCache, shares: list[Share], layer: int, records: int) -> Tensor:
        """As `_read_shares`, of records that the device tier may have."""
        shape, parts = self._shape(layer), list[Tensor]()
        for segment, wanted, _ in shares:

            def read(missing: Array, segment: Segment = segment) -> Tensor:
                return self._read_shares([Share(segment, missing, None)], layer, len(missing))

            parts.append(tier.gather(self._rows(segment, layer, wanted), shape, read))
        if len(parts) == 1:
            return parts[0]
        out = torch.empty((2, records, *shape), dtype=parts[0].dtype, device=parts[0].device)
        for share, part in zip(shares, parts, strict=True):
            assert share.columns is not None
            out[:, torch.from_numpy(share.columns).to(out.device)] = part
        return out

    def _shape(self, layer: int) -> tuple[int, int]:
        return self.geometry.chunk_tokens, self._dims[layer]

    def _rows(self, segment: Segment, layer: int, wanted: Array) -> Rows:
        return Rows((segment.info.segment, layer), segment.info.capacity * len(self._heads[layer]), wanted)

    @contextlib.contextmanager
    def _reading(self, layer: int) -> Iterator[None]:
        before = self.reader.bytes_read
        with self._timeline.span("read", layer) as span:
            yield
            span.bytes = self.reader.bytes_read - before

    def _read_shares(self, shares: list[Share], layer: int, records: int) -> Tensor:
        shape = (2, records, self.geometry.chunk_tokens, self._dims[layer])
        if self._staging.decodes(self._codec(share.segment, layer) for share in shares):
            return self._staging.read_coded(shape, [self._coded(share, layer, shape) for share in shares])

        def fill(out: Array) -> None:
            for segment, records, columns in shares:
                some = out if columns is None else np.empty((2, len(columns), *shape[2:]), out.dtype)
                with self._naming(segment):
                    self.reader.read(segment, layer, records, some)
                if columns is not None:
                    out[:, columns] = some

        return self._staging.read_into(shape, fill)

    def _shares(self, parts: list[Part], layer: int, chunks: Array, of_heads: Array) -> Iterator[Share]:
        """What each part has of what `_read_records` is asked for."""
        heads = len(self._heads[layer])
        for part in parts:
            records = (chunks - part.first) * heads + of_heads
            if len(parts) == 1:
                yield Share(part.segment, records, None)
                return
            columns = np.flatnonzero((chunks >= part.first) & (chunks < part.stop))
            if len(columns) == len(chunks):
                yield Share(part.segment, records, None)
                return
            if len(columns):
                yield Share(part.segment, records[columns], columns)

    def _coded(self, share: Share, layer: int, shape: tuple[int, int, int, int]) -> Coded:
        segment, records, columns = share
        codec = self._codec(segment, layer)

        def fill(rows: Array) -> None:
            with self._naming(segment):
                self.reader.rows(segment, layer, records, rows)

        row_bytes = codec.row_bytes(*shape[2:], self.geometry.dtype)
        return Coded(codec, row_bytes, np.arange(shape[1]) if columns is None else columns, fill)

    def _codec(self, segment: Segment, layer: int) -> RecordCodec:
        key = (segment.info.segment, layer)
        if key not in self._codecs:
            self._codecs[key] = codec_of(segment.info, segment.info.geometry.locate(layer)[0])
        return self._codecs[key]

    def resident(self, layer: int, selector: Selector) -> Resident:
        """The abstracts of every whole chunk of a layer, in the selector's form; loaded once, extended as chunks come."""
        chunks = self.chunks(layer)
        done, have = self._resident.get(layer, (0, ()))
        if done < chunks:
            self._behind.wait(layer)
            with self._timeline.span("abstracts", layer):
                have = self._loaded(layer, selector, done, have)
            self._resident[layer] = chunks, have
        return have

    def _loaded(self, layer: int, selector: Selector, done: int, have: Resident) -> Resident:
        """Abstracts of the first `done` chunks of a layer, and those of all that came after them."""
        made = [have] if done else []
        for part in self._parts(layer):
            if part.stop > done:
                fresh = slice(max(0, done - part.first), part.chunks)
                stored = {
                    name: self._abstract(part, layer, name, planes, fresh)
                    for name, planes in selector.abstracts.items()
                }
                prepared = selector.prepare(stored, self.geometry.chunk_tokens, self._dims[layer])
                made.append(tuple(t.to(self._staging.device) for t in prepared))
        return made[0] if len(made) == 1 else selector.join(made)

    def _abstract(self, part: Part, layer: int, name: str, planes: int | None, chunks: slice) -> Array:
        """An abstract of some chunks of a part, as `Reader.abstract` gives it; made from the keys where none is stored."""
        whole = self._stored_abstract(part.segment, layer, name, planes)
        if whole is not None:
            stored = whole[:, chunks]
        else:
            run = self._read_run([part], layer, part.first + chunks.start, part.first + chunks.stop)
            ct, dtype = self.geometry.chunk_tokens, self.geometry.dtype
            keys, values = (storage_view(t.cpu()).reshape(len(t), -1, ct, t.shape[-1]) for t in run)
            stored = build_all([name], keys, values, keys.shape[1] * ct, dtype)[name][:planes]
        return ABSTRACTS[name].load(stored, self._dims[layer], self.geometry.dtype).copy()

    def _stored_abstract(self, segment: Segment, layer: int, name: str, planes: int | None) -> Array | None:
        """None where a segment has no such abstract, or has lost it since it was found."""
        if name not in segment.info.abstracts:
            return None
        try:
            with self._naming(segment):
                return self.reader.stored_abstract(segment, name, layer, planes)
        except Damaged:
            if segment.seals is None or self.db.agrees([segment]):
                raise
            return None

    # -- writing

    def mark_approximate(self, position: int, fidelity: str) -> None:
        """From this position on, KV is computed under this fidelity or after such KV, beside what is known already."""
        last = self._fidelities[-1][1]
        if (both := joined_fidelity(last, fidelity)) != last:
            self._fidelities.append((position, both))

    def room(self, layer: int, tokens: int, expected_tokens: int) -> int:
        """How many of the next `tokens` tokens of a layer may be appended now; opens a segment if none is in flight.

        expected_tokens  what is likely to come in all, to reserve space for
        returns          0 when the segment in flight is full or of another fidelity: commit it first
        """
        ct = self.geometry.chunk_tokens
        start = self.sealed_chunks * ct + self._submitted.get(layer, 0)
        extent, fidelity, codec = self._extent(start, tokens)
        if self._writer is None:
            reserve = max(extent, expected_tokens) if extent == tokens else extent
            self._begin(start, min(self.geometry.chunks(reserve), SEGMENT_TOKENS // ct), fidelity, codec)
        assert self._writer is not None
        if (fidelity, codec) != (self._writer.info.fidelity, self._writing):
            return 0
        return min(extent, self._writer.capacity_tokens - self._submitted[layer])

    def _extent(self, start: int, tokens: int) -> tuple[int, str, CodecPlan]:
        """Tokens from `start` that one fidelity and one codec cover, in whole chunks unless all of them, and these."""
        found, count = EXACT, tokens
        for position, fidelity in self._fidelities:
            if position >= start + tokens:
                break
            if whole := self.geometry.grid_floor(max(0, position - start)):
                count = whole
                break
            found = fidelity
        if self.codec.lossless:
            return count, found, self.codec
        # The first chunk stays as it is: every position rests attention on it. So does a started one, until it is whole: it is read
        # back and written again by each turn that goes on from it.
        whole, found = self.geometry.grid_floor(count), joined_fidelity(found, str(self.codec))
        if start == 0:
            return min(count, self.geometry.chunk_tokens), found, RAW
        return (whole, found, self.codec) if whole else (count, found, RAW)

    def _begin(self, start: int, capacity: int, fidelity: str, codec: CodecPlan) -> None:
        self._writing = codec
        self._writer = self.db.writer(
            identity=self.identity,
            fidelity=fidelity,
            geometry=self.geometry,
            parent=self._sealed[-1].segment.info.segment if self._sealed else None,
            start=start,
            capacity=capacity,
            codec=codec,
            abstracts=self.abstracts,
        )
        self._submitted = dict.fromkeys(self.geometry.layers, 0)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Hand tokens of one layer to the segment in flight: (kv_heads, tokens, head_dim), never written to again."""
        assert self._writer is not None
        writer, keys, values = self._writer, storage_view(k.detach().cpu()), storage_view(v.detach().cpu())
        self._submitted[layer] += keys.shape[1]
        self._behind.submit(layer, lambda: writer.append(layer, keys, values))

    @property
    def full(self) -> bool:
        """Whether every layer has filled the segment in flight."""
        return self._writer is not None and min(self._submitted.values()) == self._writer.capacity_tokens

    def commit(self) -> None:
        """Commit what every layer has written to the segment in flight, if anything, and record the sequence."""
        writer = self._writer
        if writer is None:
            return
        try:
            self._behind.wait()
        except BaseException:
            self.discard()
            raise
        start = writer.info.start
        tokens = min(*writer.written.values(), len(self.tokens) - start)
        if max(writer.written.values()) != tokens:  # an interrupted step: some layers, or all, are ahead
            tokens = self.geometry.grid_floor(max(0, tokens))
            writer.keep(tokens)
        if tokens <= 0:
            self.discard()
            return
        ids = np.asarray(self.tokens, "<u4")
        try:
            with self._timeline.span("commit"):
                segment, self._recorded = self.db.commit(
                    writer, ids[start : start + tokens], model=self.model_label, replaces=self._recorded
                )
        except BaseException:
            self.discard()
            raise
        if segment.info.segment != writer.info.segment:  # another writer's was adopted
            self.reader.forget(writer.info.segment)
        self._writer, self._submitted = None, {}
        self._take(segment, start + tokens)

    def record(self, name: str | None, *, ttl_s: float | None = None) -> str | None:
        """Make the sequence that ends with the last segment known to the store, under a name or unnamed, for `ttl_s` seconds.

        Its own unnamed beginnings are replaced. Returns its key, None when nothing is stored.
        """
        if self._last is None:
            return None
        key = self.db.put_sequence(
            self._last, self.stored_tokens, name=name, model=self.model_label, replaces=self._recorded, ttl_s=ttl_s
        )
        self._recorded = key if name is None else None
        return key

    def discard(self) -> None:
        """Drop the segment in flight; what is committed stays."""
        writer, self._writer, self._submitted = self._writer, None, {}
        self._behind.abandon()
        if writer is not None:
            self.reader.forget(writer.info.segment)
            writer.discard()

    def close(self) -> None:
        self.discard()
        self._behind.close()

    def let_go(self) -> None:
        """As `close`, for a finalizer: waits for nothing."""
        writer, self._writer = self._writer, None
        self._behind.let_go(writer.discard if writer is not None else lambda: None)


def _by_place(shape: Sequence[int], places: Array, values: Array) -> tuple[Array, Array]:
    """Which places of `shape` are among `places`, of bool, and the values of those, (n,) each, row after row."""
    inside, spread = np.zeros(shape, bool), np.empty(shape, np.int64)
    inside.reshape(-1)[places] = True
    spread.reshape(-1)[places] = values
    return inside, spread[inside]


def _starts(inside: Array) -> Array:
    """How many true places are in the rows before each row, and in all: (rows + 1,)."""
    return np.concatenate(([0], np.cumsum(inside.sum(1))))
