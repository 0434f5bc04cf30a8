"""Bytes on disk, as pure functions: Zarr v3 metadata, shard index, digests, descriptions. No I/O; see FORMAT.md.

A segment is one Zarr array per layer group, `<segment>.kv<group>`, and one per abstract and group,
`<segment>.<abstract><group>`. An abstract's file holds layer after layer, in it plane after plane, and nothing else. The KV
array is one shard file, laid out as

    payload   capacity slots per layer, layer after layer; a slot is a chunk: its records, head after head
    digests   xxh3-64 of every record, u64, same order as the payload
    tokens    token ids, u32 (group 0 only)
    index     Zarr's shard index: (offset, length) u64 per inner chunk, then its crc32c

Zarr readers find chunks through the index and ignore what lies between payload and index.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import google_crc32c
import msgspec
import numpy as np
import xxhash

from kvdb.abstracts import Abstract
from kvdb.codecs import BlockForm, RecordCodec
from kvdb.errors import Damaged, InvalidInput
from kvdb.geometry import SEGMENT_TOKENS, Geometry
from kvdb.identity import Identity

FORMAT_VERSION = 1
"""Of the store as a whole: what kvdb.json says."""
ARRAY_VERSION = 0
"""Of the arrays in chunks/, counted apart: they have not changed since format 0."""
SHARD_KEY = "c.0.0.0.0.0"
"""The only chunk key of every array here: one shard, or one plain chunk, over the whole array; five dimensions."""
METADATA_KEY = "zarr.json"
_HEX = frozenset("0123456789abcdef")
ABSENT = 0xFFFF_FFFF_FFFF_FFFF
"""Offset and length, in a shard index, of an inner chunk that is not there."""
_ZARR_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "uint8": "uint8"}


class CodecSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What stores the records of a segment: "raw", or "groups" with, for each layer group, what `RecordCodec.spec` gives."""

    name: str
    config: dict[str, Any] = {}


class SegmentInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """All there is to know about a segment but its bytes. Stored in the catalog and in the attributes of KV arrays.

    start, tokens  it holds positions [start, start + tokens) of every sequence through it; start is on the chunk grid
    capacity       chunk slots per layer in the file, >= chunks(tokens)
    parent         segment holding the positions before `start` (None at 0): parents lead back to position 0
    abstracts      those it has now. They may change: the catalog tells, and KV arrays' attributes leave them out
    cipher         how rows are encrypted after the codec; None: they are not. No cipher is defined yet
    packed         bytes of the payload of each layer group whose rows are compressed in blocks, 0 of others; left out where no group's are
    """

    segment: str
    identity: str
    fidelity: str
    parent: str | None
    start: int
    tokens: int
    capacity: int
    geometry: Geometry
    codec: CodecSpec
    created: float
    abstracts: tuple[str, ...] = ()
    cipher: str | None = None
    packed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ids = (self.segment, self.parent) if self.parent is not None else (self.segment,)
        if (
            not all(len(i) == 32 and set(i) <= _HEX for i in ids)
            or len(self.identity) != 64
            or set(self.identity) - _HEX
        ):
            raise InvalidInput(
                f"segment {self.segment!r}: parent {self.parent!r}, identity {self.identity!r}, expected 32, 32 and 64 "
                "hex digits"
            )
        ct, slots = self.geometry.chunk_tokens, self.geometry.chunks(SEGMENT_TOKENS)
        if not (0 < self.tokens <= self.capacity * ct and 0 < self.capacity <= slots):
            raise InvalidInput(
                f"segment {self.segment}: {self.tokens} tokens in {self.capacity} slots of {ct}, expected 1..{slots} slots "
                "that hold them"
            )
        if self.start < 0 or self.start % ct or (self.parent is None) != (self.start == 0):
            raise InvalidInput(
                f"segment {self.segment}: start {self.start}, parent {self.parent}, expected a start on the grid of {ct} "
                "and a parent exactly when it is not 0"
            )
        if not math.isfinite(self.created):
            raise InvalidInput(f"segment {self.segment}: created {self.created}, expected a time")
        names = set(self.abstracts)
        if len(names) != len(self.abstracts) or not all(name.isidentifier() and len(name) <= 64 for name in names):
            raise InvalidInput(f"segment {self.segment}: abstracts {self.abstracts!r}, expected different names")

    @property
    def stop(self) -> int:
        return self.start + self.tokens

    @property
    def chunks(self) -> int:
        return self.geometry.chunks(self.tokens)

    def array_names(self) -> list[str]:
        """Folder names of all arrays, KV arrays first."""
        groups = range(len(self.geometry.groups))
        names = [kv_array(self.segment, group) for group in groups]
        return names + [abstract_array(self.segment, a, group) for a in self.abstracts for group in groups]


def kv_array(segment: str, group: int) -> str:
    return f"{segment}.kv{group}"


def abstract_array(segment: str, abstract: str, group: int) -> str:
    return f"{segment}.{abstract}{group}"


class ShardLayout(NamedTuple):
    """Byte offsets inside a KV shard file."""

    payload_bytes: int
    digests_offset: int
    tokens_offset: int
    index_offset: int
    file_bytes: int


def shard_layout(
    geometry: Geometry, group: int, capacity: int, tokens: int, row_bytes: int, packed: tuple[int, int] | None = None
) -> ShardLayout:
    """Where everything lies in the shard of `group`.

    row_bytes  stored bytes of one record, from the codec
    packed     of rows that are compressed in blocks: bytes of all blocks, and blocks of a layer
    """
    layers, heads = len(geometry.groups[group].layers), geometry.groups[group].kv_heads
    records = layers * capacity * heads
    payload, per_layer = packed or (records * row_bytes, capacity)
    digests = payload + -payload % 8
    token_ids = digests + 8 * records
    index = token_ids + (4 * tokens if group == 0 else 0)
    return ShardLayout(payload, digests, token_ids, index, index + 16 * layers * per_layer + 4)


def shard_index(geometry: Geometry, group: int, capacity: int, chunks: int, row_bytes: int) -> bytes:
    """Zarr v3 shard index over (layer, chunk): `chunks` of `capacity` slots are present."""
    layers = len(geometry.groups[group].layers)
    slot = geometry.groups[group].kv_heads * row_bytes
    index = np.full((layers, capacity, 2), ABSENT, "<u8")
    places = np.arange(layers)[:, None] * capacity + np.arange(chunks)[None, :]
    index[:, :chunks, 0] = places * slot
    index[:, :chunks, 1] = slot
    return block_index(index)


def block_index(places: np.ndarray[Any, np.dtype[np.uint64]]) -> bytes:
    """Zarr v3 shard index: places (layers, inner chunks, 2) u64, offset and length."""
    body = places.tobytes()
    return body + struct.pack("<I", google_crc32c.value(body))


def block_places(data: bytes, layers: int, payload: int, form: BlockForm, chunks: int, capacity: int) -> Any:
    """Where the blocks of the first `chunks` chunks of each layer lie: inverse of `block_index`.

    payload  bytes of all blocks; none lies outside, or is larger than a block can be, and together they are no larger
    raises   Damaged for anything else
    """
    body, per_layer = data[:-4], form.count(capacity)
    if len(body) != 16 * layers * per_layer or struct.unpack("<I", data[-4:])[0] != google_crc32c.value(body):
        raise Damaged(f"shard index of {len(data)} bytes does not match its crc32c, expected it to")
    places = np.frombuffer(body, "<u8").reshape(layers, per_layer, 2)
    offsets, lengths = places[:, : form.count(chunks)].reshape(-1, 2).T
    wrong = (
        (lengths > form.most_stored)
        | (lengths > payload)
        | (offsets > np.uint64(payload) - np.minimum(lengths, payload))
    )
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        raise Damaged(
            f"shard index: a block of {int(lengths[at])} bytes at {int(offsets[at])}, expected it within {payload} and at most "
            f"{form.most_stored}"
        )
    if int(lengths.sum()) > payload:
        raise Damaged(f"shard index: blocks of {int(lengths.sum())} bytes, expected at most {payload} in all")
    return places


Sections = dict[str, tuple[int, int, str]]
"""What lies between payload and index, by name: offset, bytes, xxh3-64 in hex."""


def section(offset: int, data: Any) -> tuple[int, int, str]:
    return offset, memoryview(data).nbytes, xxhash.xxh3_64_hexdigest(data)


def place_seed(segment: str) -> int:
    """Digest seed of record 0 of a segment; record r adds r. Binds a digest to its place."""
    return xxhash.xxh3_64_intdigest(segment.encode())


def record_digests(segment: str, first_record: int, rows: np.ndarray[Any, np.dtype[np.uint8]]) -> Any:
    """xxh3-64 of stored records, each seeded with its place.

    first_record  number of rows[0] in its shard: (layer row * capacity + chunk) * kv_heads + head
    rows          (n, row_bytes) uint8, contiguous
    returns       (n,) little-endian u64
    """
    seed, digest = place_seed(segment) + first_record, xxhash.xxh3_64_intdigest
    return np.array([digest(row, (seed + i) & ABSENT) for i, row in enumerate(rows)], "<u8")


def kv_metadata(info: SegmentInfo, identity: Identity, group: int, codec: RecordCodec, sections: Sections) -> bytes:
    """zarr.json of a KV array: one shard, inner chunk = one chunk or one block of one layer. Records that are stored as they are show as
    numbers (layer, head, kv, token, dim), others as rows of bytes (layer, plane, chunk, head, byte)."""
    g, ct, layers = info.geometry.groups[group], info.geometry.chunk_tokens, len(info.geometry.groups[group].layers)
    compressed: list[dict[str, Any]] = []
    if codec.stored_as_is:
        together, count = ct, info.capacity  # tokens of an inner chunk, and how many of these a layer has room for
        if codec.blocks is not None:
            form = BlockForm.of(info.geometry, group, info.capacity, codec.blocks.tokens)
            together, count, compressed = form.tokens, form.count(info.capacity), codec.blocks.zarr(form)
        names, dtype = ["layer", "head", "kv", "token", "dim"], info.geometry.dtype
        inner = [1, g.kv_heads, 2, together, g.head_dim]
        shape = [layers, g.kv_heads, 2, info.tokens, g.head_dim]
        whole = [layers, g.kv_heads, 2, count * together, g.head_dim]
    else:
        row = codec.row_bytes(ct, g.head_dim, info.geometry.dtype)
        inner, names, dtype = [1, 1, 1, g.kv_heads, row], ["layer", "plane", "chunk", "head", "byte"], "uint8"
        shape, whole = [layers, 1, info.chunks, g.kv_heads, row], [layers, 1, info.capacity, g.kv_heads, row]
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": inner,
            "codecs": [little, *compressed],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    return _array_metadata(
        shape=shape,
        chunk_shape=whole,
        dimension_names=names,
        dtype=dtype,
        codecs=[sharding],
        attributes={
            "format": ARRAY_VERSION,
            "info": msgspec.to_builtins(info),
            "identity": msgspec.to_builtins(identity),
            "group": group,
            "sections": sections,
        },
    )


class AbstractLayout(NamedTuple):
    """Sizes inside an abstract's file: a layer is `planes` planes, a plane is the rows of all slots."""

    row_bytes: int
    plane_bytes: int
    layer_bytes: int
    file_bytes: int


def abstract_layout(geometry: Geometry, group: int, capacity: int, abstract: Abstract) -> AbstractLayout:
    g = geometry.groups[group]
    row = abstract.row_bytes(geometry.chunk_tokens, g.head_dim, geometry.storage_dtype.itemsize)
    plane = capacity * g.kv_heads * row
    layer = abstract.planes * plane
    return AbstractLayout(row, plane, layer, len(g.layers) * layer)


def abstract_metadata(info: SegmentInfo, group: int, abstract: Abstract, digests: list[str]) -> bytes:
    """zarr.json of an abstract: a single plain chunk of layers, each in the abstract's own form.

    digests  xxh3-64 in hex of every plane, layer after layer
    """
    geometry, layers = info.geometry, len(info.geometry.groups[group].layers)
    form = abstract.form(info.chunks, geometry, group)
    return _array_metadata(
        shape=[layers, *form.shape],
        chunk_shape=[layers, *abstract.form(info.capacity, geometry, group).shape],
        dimension_names=["layer", *form.dimensions],
        dtype=form.dtype,
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}],
        attributes={
            "format": ARRAY_VERSION,
            "segment": info.segment,
            "abstract": abstract.name,
            "group": group,
            "dtype": info.geometry.dtype,
            "layer_xxh3": digests,
        },
    )


def _array_metadata(
    *,
    shape: list[int],
    chunk_shape: list[int],
    dimension_names: list[str],
    dtype: str,
    codecs: list[dict[str, Any]],
    attributes: dict[str, Any],
) -> bytes:
    stored = _ZARR_DTYPES[dtype]
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0 if stored.startswith("uint") else 0.0,
        "codecs": codecs,
        "dimension_names": dimension_names,
        "attributes": {"kvdb": attributes},
    }
    return msgspec.json.format(msgspec.json.encode(metadata), indent=1)


def group_metadata() -> bytes:
    """zarr.json of the hierarchy's root."""
    return msgspec.json.encode({"zarr_format": 3, "node_type": "group", "attributes": {}})


class KVAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """What a KV array says of itself, parsed back."""

    format: int
    info: SegmentInfo
    identity: Identity
    group: int
    sections: Sections


def parse_kv_metadata(data: bytes, where: str) -> KVAttributes:
    """Inverse of `kv_metadata`'s attributes.

    raises  Damaged when the JSON is not what `kv_metadata` writes
    """
    try:
        return msgspec.convert(msgspec.json.decode(data)["attributes"]["kvdb"], KVAttributes)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise Damaged(f"{where}: unreadable metadata ({e}), expected a KVDB array; run 'kvdb verify'") from e


def abstract_seal(digests: list[str]) -> str:
    """One digest over those of an abstract's planes."""
    return xxhash.xxh3_64_hexdigest("|".join(digests).encode())


def abstract_digests(data: bytes, where: str) -> list[str]:
    """The digests in an abstract's zarr.json: of every plane, layer after layer.

    raises  Damaged when the JSON is not what `abstract_metadata` writes
    """
    try:
        return msgspec.convert(msgspec.json.decode(data)["attributes"]["kvdb"]["layer_xxh3"], list[str])
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise Damaged(f"{where}: unreadable metadata ({e}), expected a KVDB abstract; run 'kvdb verify'") from e
