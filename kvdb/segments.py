"""Writing segments: KV of all layers streams into one file per layer group, then is sealed and never changed.

    writer = SegmentWriter(...)            # in tmp/<writer>/, readable at once through a Reader
    writer.append(layer, keys, values)     # any layer order; each layer's tokens in order
    entry = writer.seal(token_ids)         # index, metadata: complete, but still invisible
    writer.publish(chunks_folder)          # rename, fsync of files and folders; the entry's commit comes after

A writer reserves `capacity` chunk slots per layer up front (a sparse file), so that a layer is contiguous whatever the
order of writes, and a run that is cut short seals what it has.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from kvdb import files, format
from kvdb.abstracts import ABSTRACTS, build_all
from kvdb.arrays import ARRAY_OVERHEAD, AbstractWriter, ArrayWriter, abstract_bytes
from kvdb.blocks import BlockFile, BlockWriter
from kvdb.codecs import RAW, BlockForm, RecordCodec
from kvdb.entries import SegmentEntry
from kvdb.errors import Damaged, InvalidInput, Unsupported
from kvdb.format import CodecSpec, SegmentInfo
from kvdb.geometry import SEGMENT_TOKENS, Geometry
from kvdb.identity import EXACT, Identity, check_fidelity
from kvdb.prefix import Tokens

Array = np.ndarray[Any, np.dtype[Any]]


_AS_IS: Final = CodecSpec(name="raw")
_BY_GROUP: Final = "groups"
_LARGE_BYTES: Final = 4 << 20
"""Segments above this are forced to disk before the write lock is taken; for smaller ones a round of flushes less counts more."""


class Segment(NamedTuple):
    """A segment and the folder its arrays lie in: all a reader needs.

    seals    array name -> digest of its digests, as the catalog has them; None while it is being written
    changes  as in the catalog
    """

    info: SegmentInfo
    folder: Path
    seals: dict[str, str] | None = None
    changes: int = 0

    @classmethod
    def stored(cls, entry: SegmentEntry, chunks: Path) -> Segment:
        """As the catalog has it."""
        return cls(entry.info, chunks, entry.seals, entry.changes)


def codecs_of(info: SegmentInfo) -> tuple[RecordCodec, ...]:
    """The codec of each layer group.

    raises  Unsupported for one that this version does not know; Damaged for what no version writes
    """
    if info.cipher is not None:
        raise Unsupported(f"segment {info.segment}: cipher {info.cipher!r}, expected none; upgrade kvdb")
    if unknown := [a for a in info.abstracts if a not in ABSTRACTS]:
        raise Unsupported(
            f"segment {info.segment}: abstracts {unknown}, expected some of {sorted(ABSTRACTS)}; upgrade kvdb"
        )
    name, config, groups = info.codec.name, info.codec.config, info.geometry.groups
    if name == _AS_IS.name and not config and not info.packed:
        return (RAW.usual,) * len(groups)
    if name != _BY_GROUP or set(config) != {_BY_GROUP}:
        raise Unsupported(
            f"segment {info.segment}: codec {name!r} of {sorted(config)}, expected {_AS_IS.name!r} or {_BY_GROUP!r}; upgrade kvdb"
        )
    try:
        codecs = tuple(RecordCodec.from_spec(spec) for spec in config[_BY_GROUP])
        for g, codec in zip(groups, codecs, strict=True):
            codec.check(info.geometry.chunk_tokens, g.head_dim, info.geometry.dtype)
        _check_packed(info, codecs)
    except Unsupported as e:
        raise Unsupported(f"segment {info.segment}: {e}") from e
    except (InvalidInput, TypeError, ValueError) as e:
        raise Damaged(f"segment {info.segment}: codec {config[_BY_GROUP]!r:.200}: {e}; run 'kvdb repair'") from e
    if info.fidelity == EXACT and not all(codec.lossless for codec in codecs):
        raise Damaged(
            f"segment {info.segment}: fidelity {EXACT!r} with a lossy codec, expected another; run 'kvdb repair'"
        )
    return codecs


def _check_packed(info: SegmentInfo, codecs: tuple[RecordCodec, ...]) -> None:
    """raises  InvalidInput for blocks that cannot be, and payloads that are larger than theirs"""
    most = [_packed_room(info.geometry, group, codec, info.capacity) for group, codec in enumerate(codecs)]
    packed = info.packed or (0,) * len(codecs)
    if len(packed) != len(most) or not all(
        0 <= n <= room and (n > 0) == (room > 0) for n, room in zip(packed, most, strict=True)
    ):
        raise InvalidInput(f"packed is {info.packed}, expected bytes up to {most}")


def _packed_room(geometry: Geometry, group: int, codec: RecordCodec, capacity: int) -> int:
    """Most bytes that the blocks of a group take; 0 where its rows lie in the file one by one.

    raises  InvalidInput for blocks that are too large
    """
    if codec.blocks is None:
        return 0
    form = BlockForm.of(geometry, group, capacity, codec.blocks.tokens)
    codec.blocks.check(form)
    return len(geometry.groups[group].layers) * form.count(capacity) * form.most_stored


def block_form(info: SegmentInfo, group: int) -> BlockForm:
    """Of a group whose rows are compressed in blocks."""
    blocks = codec_of(info, group).blocks
    assert blocks is not None
    return BlockForm.of(info.geometry, group, info.capacity, blocks.tokens)


def block_file(info: SegmentInfo, group: int, fd: int, path: Path) -> BlockFile:
    """The blocks of a group whose rows are compressed, in its open file.

    raises  Damaged for an index that no version writes
    """
    codec, form, place = codec_of(info, group).blocks, block_form(info, group), layout(info, group)
    assert codec is not None
    where, layers = f"segment {info.segment}, file {path}", len(info.geometry.groups[group].layers)
    index = files.pread(fd, place.file_bytes - place.index_offset, place.index_offset)
    try:
        places = format.block_places(index, layers, place.payload_bytes, form, info.chunks, info.capacity)
    except Damaged as e:
        raise Damaged(f"{where}: {e}; run 'kvdb repair'") from e
    return BlockFile(fd, where, codec, form, places)


def codec_of(info: SegmentInfo, group: int) -> RecordCodec:
    """The codec of a layer group; raises as `codecs_of`."""
    return codecs_of(info)[group]


def _spec(codecs: tuple[RecordCodec, ...]) -> CodecSpec:
    if all(codec == RAW.usual for codec in codecs):
        return _AS_IS
    return CodecSpec(name=_BY_GROUP, config={_BY_GROUP: [codec.spec() for codec in codecs]})


def _packed(geometry: Geometry, codecs: tuple[RecordCodec, ...], capacity: int) -> tuple[int, ...]:
    """`SegmentInfo.packed` before anything is written: room for the worst."""
    rooms = tuple(_packed_room(geometry, group, codec, capacity) for group, codec in enumerate(codecs))
    return rooms if any(rooms) else ()


def row_bytes(info: SegmentInfo, group: int) -> int:
    """Stored bytes of one record of `group`."""
    g, geometry = info.geometry.groups[group], info.geometry
    return codec_of(info, group).row_bytes(geometry.chunk_tokens, g.head_dim, geometry.dtype)


def payload_bytes(info: SegmentInfo) -> int:
    """Bytes of KV that the chunks of a segment take on disk."""
    total = 0
    for group, g in enumerate(info.geometry.groups):
        rows = len(g.layers) * info.chunks * g.kv_heads * row_bytes(info, group)
        total += rows if codec_of(info, group).blocks is None else info.packed[group]
    return total


def layout(info: SegmentInfo, group: int) -> format.ShardLayout:
    packed = None
    if codec_of(info, group).blocks is not None:
        packed = info.packed[group], block_form(info, group).count(info.capacity)
    return format.shard_layout(info.geometry, group, info.capacity, info.tokens, row_bytes(info, group), packed)


def abstract_layout(info: SegmentInfo, group: int, name: str) -> format.AbstractLayout:
    return format.abstract_layout(info.geometry, group, info.capacity, ABSTRACTS[name])


def reserved_bytes(
    geometry: Geometry, codecs: tuple[RecordCodec, ...], abstracts: tuple[str, ...], capacity: int
) -> int:
    """Most that the files of a segment of `capacity` chunks can occupy, folders and metadata included. codecs: of each layer group."""
    total, ct = 0, geometry.chunk_tokens
    for group, (g, codec) in enumerate(zip(geometry.groups, codecs, strict=True)):
        row, packed = codec.row_bytes(ct, g.head_dim, geometry.dtype), None
        if room := _packed_room(geometry, group, codec, capacity):
            packed = room, capacity
        total += format.shard_layout(geometry, group, capacity, capacity * ct, row, packed).file_bytes + ARRAY_OVERHEAD
    return total + sum(abstract_bytes(geometry, name, capacity) for name in abstracts)


class SegmentWriter:
    """One segment in the making. Not thread-safe; abandon it with `discard`."""

    def __init__(
        self,
        folder: Path,
        *,
        segment: str,
        identity: Identity,
        fidelity: str,
        geometry: Geometry,
        codecs: tuple[RecordCodec, ...],
        abstracts: tuple[str, ...],
        parent: str | None,
        start: int,
        capacity: int,
    ) -> None:
        if start % geometry.chunk_tokens or not 1 <= capacity <= geometry.chunks(SEGMENT_TOKENS):
            raise InvalidInput(
                f"segment {segment}: start={start}, capacity={capacity} chunks, expected start on the grid of "
                f"{geometry.chunk_tokens} and at most {SEGMENT_TOKENS} tokens"
            )
        self.identity, self.codecs = identity, codecs
        self.info = SegmentInfo(
            segment=segment,
            identity=identity.digest().hex(),
            fidelity=check_fidelity(fidelity),
            parent=parent,
            start=start,
            tokens=capacity * geometry.chunk_tokens,
            capacity=capacity,
            geometry=geometry,
            codec=_spec(codecs),
            abstracts=abstracts,
            created=files.now(),
            packed=_packed(geometry, codecs, capacity),
        )
        self.folder = folder
        self.written = dict.fromkeys(geometry.layers, 0)  # tokens per layer
        self.entry: SegmentEntry | None = None  # once sealed
        self._arrays: list[ArrayWriter] = []
        self._blocks: dict[int, BlockWriter] = {}  # of groups whose rows are compressed
        self._abstracts: dict[str, AbstractWriter] = {}
        self._sections: list[format.Sections] = [{} for _ in geometry.groups]
        self._digests = [np.zeros(len(g.layers) * capacity * g.kv_heads, "<u8") for g in geometry.groups]
        try:
            for group in range(len(geometry.groups)):
                size = layout(self.info, group).payload_bytes
                self._arrays.append(ArrayWriter(folder, format.kv_array(segment, group), size))
                if (blocks := codecs[group].blocks) is not None:
                    layers, form = len(geometry.groups[group].layers), block_form(self.info, group)
                    self._blocks[group] = BlockWriter(self._arrays[group], blocks, form, layers, capacity)
            for name in abstracts:
                self._abstracts[name] = AbstractWriter(folder, self.info, name)
        except BaseException:
            self.discard()
            raise

    @property
    def segment(self) -> Segment:
        """For reading back what is already written, before and after sealing (until `publish` moves it); compressed blocks after it."""
        return Segment(self.info, self.folder)

    def codec_of(self, layer: int) -> RecordCodec:
        return self.codecs[self.info.geometry.locate(layer)[0]]

    @property
    def capacity_tokens(self) -> int:
        return self.info.capacity * self.info.geometry.chunk_tokens

    def append(self, layer: int, keys: Array, values: Array, abstracts: dict[str, Array] | None = None) -> None:
        """Write the next tokens of one layer.

        keys, values  (kv_heads, tokens, head_dim) in the storage dtype; only the last append of a layer may end inside
                      a chunk
        abstracts     as for `append_rows`, where another segment has them; None: they are made
        raises        InvalidInput for a wrong shape or dtype, or more tokens than reserved; NotFinite for numbers that the layer's codec
                      cannot keep; StorageFull
        """
        geometry = self.info.geometry
        group, ct = geometry.locate(layer)[0], geometry.chunk_tokens
        g, codec = geometry.groups[group], self.codecs[group]
        tokens, done = keys.shape[1], self.written[layer]
        if keys.shape != (g.kv_heads, tokens, g.head_dim) or values.shape != keys.shape or tokens == 0:
            raise InvalidInput(
                f"layer {layer}: keys {keys.shape}, values {values.shape}, "
                f"expected ({g.kv_heads}, tokens > 0, {g.head_dim}) twice"
            )
        if {keys.dtype, values.dtype} != {geometry.storage_dtype}:
            raise InvalidInput(
                f"layer {layer}: keys {keys.dtype}, values {values.dtype}, expected {geometry.storage_dtype} twice; a cast "
                "would change their meaning"
            )
        if done % ct or done + tokens > self.capacity_tokens:
            raise InvalidInput(
                f"layer {layer}: {tokens} tokens after {done}, expected a whole number of chunks before them and at "
                f"most {self.capacity_tokens} in all"
            )
        chunks, (full, rest) = geometry.chunks(tokens), divmod(tokens, ct)
        records = np.empty((chunks, g.kv_heads, 2, ct, g.head_dim), geometry.storage_dtype)
        by_token = records.transpose(1, 2, 0, 3, 4)  # [kv_heads, 2, chunks, chunk_tokens, head_dim]
        for kv, plane in enumerate((keys, values)):
            by_token[:, kv, :full] = plane[:, : full * ct].reshape(g.kv_heads, full, ct, g.head_dim)
            by_token[:, kv, full:, :rest] = plane[:, None, full * ct :]
            # Padding must not widen the range that a lossy codec spreads its codes over.
            by_token[:, kv, full:, rest:] = 0 if codec.lossless else plane[:, None, -1:]
        rows = codec.encode(records.reshape(chunks * g.kv_heads, 2, ct, g.head_dim), geometry.dtype)
        if abstracts is None:
            abstracts = build_all(self.info.abstracts, by_token[:, 0], by_token[:, 1], tokens, geometry.dtype)
        self.append_rows(layer, rows, abstracts, tokens)

    def append_rows(self, layer: int, rows: Array, abstracts: dict[str, Array], tokens: int) -> None:
        """Write the next tokens of one layer as they are to be stored: what `append` encodes, or another segment holds.

        rows       (chunks * kv_heads, row_bytes) uint8
        abstracts  for each name (planes, chunks, kv_heads, row_bytes) uint8
        """
        geometry = self.info.geometry
        group, layer_row = geometry.locate(layer)
        heads, chunk = geometry.groups[group].kv_heads, self.written[layer] // geometry.chunk_tokens
        first = (layer_row * self.info.capacity + chunk) * heads
        self._digests[group][first : first + len(rows)] = format.record_digests(self.info.segment, first, rows)
        if group in self._blocks:
            self._blocks[group].write(layer_row, rows)
        else:
            self._arrays[group].write(rows, first * rows.shape[1])
        for name, planes in abstracts.items():
            self._abstracts[name].write(layer, chunk, planes)
        self.written[layer] += tokens

    def keep(self, tokens: int) -> None:
        """Forget what layers hold beyond the first `tokens`, a whole number of chunks: an interrupted pass leaves some
        layers ahead of others. Their bytes stay in the files, in slots that the index does not name.

        raises  InvalidInput when a layer holds less
        """
        geometry = self.info.geometry
        if tokens % geometry.chunk_tokens or tokens > min(self.written.values()):
            raise InvalidInput(
                f"segment {self.info.segment}: keep {tokens} tokens, expected a whole number of chunks and at most "
                f"{min(self.written.values())}, which every layer holds"
            )
        for g, digests in zip(geometry.groups, self._digests, strict=True):
            digests.reshape(len(g.layers), -1)[:, tokens // geometry.chunk_tokens * g.kv_heads :] = 0
        self.written = dict.fromkeys(geometry.layers, tokens)

    def seal(self, token_ids: Tokens, *, durable: bool = True) -> SegmentEntry:
        """Complete the files. All layers must hold exactly `len(token_ids)` tokens.

        durable  False: leave it to the system when the bytes reach the disk; otherwise many are forced there now, and few
                 by `publish`, in one go with the folders
        raises   InvalidInput when a layer lags; StorageFull; OSError from fsync (final: discard the writer)
        """
        tokens = len(token_ids)
        if tokens == 0 or set(self.written.values()) != {tokens}:
            raise InvalidInput(
                f"segment {self.info.segment}: layers hold {sorted(set(self.written.values()))} tokens, "
                f"expected {tokens} > 0 in each"
            )
        places, packed = {}, list(self.info.packed)
        for group, blocks in self._blocks.items():
            packed[group], places[group] = blocks.finish(self.info.geometry.chunks(tokens))
        self.info = msgspec.structs.replace(self.info, tokens=tokens, packed=tuple(packed))
        token_bytes = np.ascontiguousarray(token_ids, "<u4")
        seals: dict[str, str] = {}
        for group in range(len(self.info.geometry.groups)):
            array, place = self._arrays[group], layout(self.info, group)
            digests = self._digests[group]
            array.write(digests, place.digests_offset)
            self._sections[group] = {"digests": format.section(place.digests_offset, digests)}
            seals[format.kv_array(self.info.segment, group)] = self._sections[group]["digests"][2]
            if group == 0:
                array.write(token_bytes, place.tokens_offset)
                self._sections[group]["tokens"] = format.section(place.tokens_offset, token_bytes)
            if group in places:
                index = format.block_index(places[group])
            else:
                row = row_bytes(self.info, group)
                index = format.shard_index(self.info.geometry, group, self.info.capacity, self.info.chunks, row)
            array.write(np.frombuffer(index, np.uint8), place.index_offset)
            if group in places:
                array.shorten(place.file_bytes)
            self._describe(group)
        for abstract in self._abstracts.values():
            seals |= abstract.seal(self.info)
        disk_bytes = sum(files.tree_bytes(self.folder / array) for array in self.info.array_names())
        if durable and disk_bytes > _LARGE_BYTES:
            files.fsync_trees([self.folder / array for array in self.info.array_names()])
        self.entry = SegmentEntry(info=self.info, seals=seals, disk_bytes=disk_bytes)
        return self.entry

    def _describe(self, group: int) -> None:
        kv = msgspec.structs.replace(self.info, abstracts=())  # they may change, this file does not
        metadata = format.kv_metadata(kv, self.identity, group, self.codecs[group], self._sections[group])
        self._arrays[group].describe(metadata)

    def reparent(self, parent: str) -> None:
        """The segment before this one has another id now, after a compaction."""
        self.info = msgspec.structs.replace(self.info, parent=parent)
        if self.entry is not None:
            self.entry = msgspec.structs.replace(self.entry, info=self.info)
            for group, array in enumerate(self._arrays):
                files.unlink(array.folder / format.METADATA_KEY)
                self._describe(group)
                files.fsync_trees([array.folder])

    def publish(self, chunks: Path, *, durable: bool = True) -> None:
        """Move the sealed arrays into the store. Still invisible: the catalog decides what exists."""
        for array in self.info.array_names():
            files.rename(self.folder / array, chunks / array)
        if durable:
            files.fsync_trees([chunks / array for array in self.info.array_names()], also=[chunks])
        self._close()  # not before: an error of writing is kept for those who have the file open

    def discard(self) -> None:
        """Remove everything; never fails on what is already gone."""
        self._close()
        for array in self.info.array_names():
            files.remove_tree(self.folder / array)

    def _close(self) -> None:
        for array in self._arrays:
            array.close()
        for abstract in self._abstracts.values():
            abstract.close()


def new_segment_id() -> str:
    """128 random bits: names are never reused, so a map of an evicted file can never show another's bytes."""
    return os.urandom(16).hex()
