"""What stands in the catalog, as values, and how an entry is framed. Pure: no LMDB here.

Every entry is `u64 xxh3(value, seed = xxh3(key)) + value`: LMDB's pages carry no checksum, and an entry that moved to
another key must not verify. Totals over a table's frames show that entries are missing or stale.

What there may be tens of thousands of is left alone by the garbage collector (`gc=False`: nothing in it leads back to itself), which
otherwise takes half the time of listing them.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
import xxhash

from kvdb.errors import Damaged, InvalidInput
from kvdb.format import SegmentInfo

ENTRY_BYTES: Final = 1 << 20
"""No entry is longer: a damaged length must not become a read beyond the file."""
_T = TypeVar("_T")


class Span(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens [start, stop) of a segment, counted inside the segment."""

    segment: str
    start: int
    stop: int


class Sequence(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A token list known to the store. `key` follows from identity, spans and name: the same entry is stored once.

    root             digest over the spans and the seals of their segments: the KV this entry was made for
    created          store time, seconds
    expires          store time from which it may go, pinned or not; None: never
    pinned           never evicted
    last_used, hits  of the segment it ends in; filled in when read
    """

    key: str
    name: str | None
    identity: str
    tokens: int
    fidelity: str
    spans: tuple[Span, ...]
    created: float
    model: str
    root: str = ""
    expires: float | None = None
    pinned: bool = False
    last_used: float = 0.0
    hits: int = 0

    @property
    def protected(self) -> bool:
        """Whether retention must leave it alone unless told otherwise."""
        return self.pinned or self.name is not None


class SegmentEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A segment in the catalog.

    seals       array name -> xxh3 of its digests: binds the files to this entry
    disk_bytes  what its files occupied when they were published, or its abstracts changed
    changes     how often its abstracts have changed: one that has its first ones back is not the entry it was
    """

    info: SegmentInfo
    seals: dict[str, str]
    disk_bytes: int
    changes: int = 0

    def __post_init__(self) -> None:
        if self.seals.keys() != set(self.info.array_names()):  # they become paths
            raise InvalidInput(
                f"segment {self.info.segment}: seals of {sorted(self.seals)}, expected those of {sorted(self.info.array_names())}"
            )


class Use(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How often, and when last (store time), a segment was reused."""

    last_used: float
    hits: int


UNUSED: Final = Use(last_used=0.0, hits=0)


def with_use(sequence: Sequence, use: Use) -> Sequence:
    """A sequence with the use of the segment it ends in filled in."""
    return msgspec.structs.replace(sequence, last_used=max(use.last_used, sequence.created), hits=use.hits)


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Number of a table's entries and the sum of their frames' digests, modulo 2^64."""

    count: int = 0
    root: int = 0

    def adding(self, entry: bytes) -> Totals:
        return Totals(count=self.count + 1, root=(self.root + frame_digest(entry)) % (1 << 64))

    def removing(self, entry: bytes) -> Totals:
        return Totals(count=self.count - 1, root=(self.root - frame_digest(entry)) % (1 << 64))


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What the catalog's segments are now: files' bytes, arrays, tokens, KV bytes; and what was done since the store was made."""

    segment_bytes: int = 0
    arrays: int = 0
    tokens: int = 0
    kv_bytes: int = 0
    segments_written: int = 0
    tokens_written: int = 0
    bytes_written: int = 0
    bytes_compacted: int = 0
    segments_evicted: int = 0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that hold for every handle. size_cap: bytes of everything in the store's folder; None: none."""

    size_cap: int | None = None


class Found(NamedTuple):
    """Longest stored prefix of a token list: how many tokens, and where they lie."""

    tokens: int
    spans: tuple[Span, ...]


def framed(key: bytes, value: bytes) -> bytes:
    """raises  InvalidInput for a value longer than an entry may be"""
    if len(value) + 8 > ENTRY_BYTES:
        raise InvalidInput(
            f"catalog entry {key.hex()}: {len(value)} bytes, expected at most {ENTRY_BYTES - 8}; compact the sequence first"
        )
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(value, seed=xxhash.xxh3_64_intdigest(key))) + value


def unframed(table: str, key: bytes, entry: Any) -> bytes:
    """The value of an entry as LMDB shows it (any buffer).

    raises  Damaged
    """
    if not 8 <= len(entry) <= ENTRY_BYTES:
        raise Damaged(
            f"catalog table {table}, entry {key.hex()}: {len(entry)} bytes, expected 8..{ENTRY_BYTES}; run 'kvdb repair'"
        )
    data = bytes(entry)
    expected = xxhash.xxh3_64_intdigest(data[8:], seed=xxhash.xxh3_64_intdigest(key))
    if frame_digest(data) != expected:
        raise Damaged(
            f"catalog table {table}, entry {key.hex()}: xxh3 is {frame_digest(data):#018x}, expected {expected:#018x}; "
            "run 'kvdb repair'"
        )
    return data[8:]


def frame_digest(entry: bytes) -> int:
    digest: int = struct.unpack_from("<Q", entry)[0]
    return digest


def decode(table: str, key: bytes, value: bytes, kind: type[_T]) -> _T:
    """raises  Damaged"""
    try:
        return msgspec.msgpack.decode(value, type=kind)
    except (ValueError, RecursionError) as e:
        raise Damaged(
            f"catalog table {table}, entry {key.hex()}: {e}, expected a {getattr(kind, '__name__', kind)}; run 'kvdb repair'"
        ) from e


def sequence_key(identity: str, spans: tuple[Span, ...], name: str | None) -> str:
    h = xxhash.xxh3_128(identity.encode())
    for span in spans:
        h.update(f"|{span.segment}:{span.start}:{span.stop}".encode())
    if name is not None:
        h.update(b"|" + name.encode(errors="surrogatepass"))
    return h.hexdigest()


def spans_root(spans: tuple[Span, ...], entries: list[SegmentEntry]) -> str:
    """Digest over spans and the seals of their segments, in order."""
    h = xxhash.xxh3_128()
    for span, entry in zip(spans, entries, strict=True):
        h.update(f"|{span.segment}:{span.start}:{span.stop}".encode())
        for array, seal in sorted(entry.seals.items()):
            h.update(f"|{array}={seal}".encode())
    return h.hexdigest()


def spans_of(path: list[SegmentInfo], tokens: int) -> tuple[Span, ...]:
    """Spans of the first `tokens` tokens along a path of segments (oldest first); none for 0 tokens."""
    if tokens == 0:
        return ()
    stops = [info.start for info in path[1:]] + [tokens]
    return tuple(
        Span(segment=info.segment, start=0, stop=min(stop, tokens) - info.start)
        for info, stop in zip(path, stops, strict=True)
        if min(stop, tokens) > info.start
    )


def name_key(name: str) -> bytes:
    """Names may be longer than LMDB keys and hold any characters: they are hashed, never used as paths."""
    return xxhash.xxh3_128_digest(name.encode(errors="surrogatepass"))


def check_name(name: str) -> str:
    """A name that a sequence may have. Raises InvalidInput."""
    if not (name.strip() and name.isprintable() and len(name) <= 512):
        raise InvalidInput(f"sequence: name is {name!r}, expected 1..512 printable characters")
    return name
