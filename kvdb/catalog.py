"""The catalog: what exists. LMDB behind typed entries; nothing else in KVDB touches LMDB.

Rules: every entry carries an xxh3-64 over key and value, because LMDB pages have no checksum; values are copied out of a
transaction, never handed out as views; one environment per path per process; lmdb's errors become KVDB's here. A
segment or sequence is visible from the commit of one write transaction on, and from nothing else.
"""

from __future__ import annotations

import contextlib
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import lmdb
import msgspec
import numpy as np
import xxhash

from kvdb import prefix
from kvdb.errors import Damaged, SequenceNotFound, StorageFull, StoreError
from kvdb.format import SegmentInfo
from kvdb.identity import EXACT, Identity
from kvdb.prefix import Tokens

MAP_BYTES: Final = 64 << 30
"""Address space reserved for the catalog; the file grows only as needed."""
_TABLES: Final = ("identities", "segments", "tokens", "tree", "sequences", "names")
_T = TypeVar("_T")


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens [start, stop) of a segment, counted inside the segment."""

    segment: str
    start: int
    stop: int


class Sequence(msgspec.Struct, frozen=True, kw_only=True):
    """A token list known to the store. `key` follows from identity, spans and name: the same entry is stored once."""

    key: str
    name: str | None
    identity: str
    tokens: int
    fidelity: str
    spans: tuple[Span, ...]
    created: float
    last_used: float
    model: str


class Found(NamedTuple):
    """Longest stored prefix of a token list: how many tokens, and where they lie."""

    tokens: int
    spans: tuple[Span, ...]


def sequence_key(identity: str, spans: tuple[Span, ...], name: str | None) -> str:
    h = xxhash.xxh3_128(identity.encode())
    for span in spans:
        h.update(f"|{span.segment}:{span.start}:{span.stop}".encode())
    if name is not None:
        h.update(b"|" + name.encode(errors="surrogatepass"))
    return h.hexdigest()


class _Environment:
    """An open LMDB environment and its tables; shared by every handle on the same path in this process."""

    def __init__(self, path: Path, *, readonly: bool) -> None:
        self.readonly, self.pid = readonly, os.getpid()
        with _translated(path):
            self.env = lmdb.open(
                str(path), map_size=MAP_BYTES, max_dbs=len(_TABLES), mode=0o700, readonly=readonly,
                create=not readonly, readahead=False, max_readers=1024,
            )  # fmt: skip
            self.db = {t: self.env.open_db(t.encode(), dupsort=t == "tree", create=not readonly) for t in _TABLES}
        if not readonly:
            for name in ("data.mdb", "lock.mdb"):
                with contextlib.suppress(FileNotFoundError):
                    os.chmod(path / name, 0o600)


_ENVIRONMENTS: weakref.WeakValueDictionary[tuple[str, bool, int], _Environment] = weakref.WeakValueDictionary()


def _environment(path: Path, *, readonly: bool) -> _Environment:
    """LMDB allows one environment per path per process: a second handle joins the first."""
    key = (os.path.realpath(path), os.getpid())
    for mode in (readonly, False):
        env = _ENVIRONMENTS.get((key[0], mode, key[1]))
        if env is not None:
            return env
    other = _ENVIRONMENTS.get((key[0], True, key[1]))
    if other is not None:
        raise StoreError(
            f"{path}: already open read-only in this process, expected no other handle; close it before opening for writing"
        )
    env = _Environment(path, readonly=readonly)
    _ENVIRONMENTS[(key[0], readonly, key[1])] = env
    return env


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError) as e:
        raise StorageFull(f"{path}: {e}, expected room for the catalog; nothing was committed, free space") from e
    except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PageNotFoundError) as e:
        raise Damaged(f"{path}: {e}, expected a readable catalog; run 'kvdb verify'") from e
    except lmdb.Error as e:
        if "No space left" in str(e):
            raise StorageFull(f"{path}: {e}, expected room for the catalog; nothing was committed, free space") from e
        raise StoreError(f"{path}: {e}, expected a usable catalog") from e


def _sealed(key: bytes, value: bytes) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(value, seed=xxhash.xxh3_64_intdigest(key))) + value


def _unsealed(table: str, key: bytes, entry: bytes) -> bytes:
    value = entry[8:]
    expected = xxhash.xxh3_64_intdigest(value, seed=xxhash.xxh3_64_intdigest(key))
    if len(entry) < 8 or struct.unpack_from("<Q", entry)[0] != expected:
        raise Damaged(
            f"catalog table {table}, entry {key.hex()}: xxh3 of {len(entry)} bytes does not match, expected "
            f"{expected:#018x}; run 'kvdb verify'"
        )
    return value


class Transaction:
    """Reads and writes inside one LMDB transaction."""

    def __init__(self, env: _Environment, txn: lmdb.Transaction) -> None:
        self._env, self._txn = env, txn

    # -- entries

    def _get(self, table: str, key: bytes, kind: type[_T]) -> _T | None:
        entry = self._txn.get(key, db=self._env.db[table])
        if entry is None:
            return None
        try:
            return msgspec.msgpack.decode(_unsealed(table, key, bytes(entry)), type=kind)
        except msgspec.MsgspecError as e:
            raise Damaged(f"catalog table {table}, entry {key.hex()}: {e}, expected a {kind.__name__}") from e

    def _put(self, table: str, key: bytes, value: object) -> None:
        self._txn.put(key, _sealed(key, msgspec.msgpack.encode(value)), db=self._env.db[table])

    def _keys(self, table: str) -> list[bytes]:
        return [bytes(k) for k in self._txn.cursor(db=self._env.db[table]).iternext(keys=True, values=False)]

    # -- identities and segments

    def identity(self, digest: str) -> Identity | None:
        return self._get("identities", bytes.fromhex(digest), Identity)

    def identities(self) -> dict[str, Identity]:
        """Every readable identity by its digest; damaged ones are left to `check`."""
        found: dict[str, Identity] = {}
        for key in self._keys("identities"):
            with contextlib.suppress(Damaged):
                if (identity := self.identity(key.hex())) is not None:
                    found[key.hex()] = identity
        return found

    def segment(self, segment: str) -> SegmentInfo | None:
        return self._get("segments", bytes.fromhex(segment), SegmentInfo)

    def segment_ids(self) -> list[str]:
        return [key.hex() for key in self._keys("segments")]

    def tokens(self, segment: str) -> Tokens:
        """Token ids of a segment, (tokens,) uint32."""
        data = self._get("tokens", bytes.fromhex(segment), bytes)
        if data is None:
            raise Damaged(f"segment {segment}: no token ids in the catalog; run 'kvdb verify'")
        return np.frombuffer(data, "<u4")

    def add_segment(self, info: SegmentInfo, identity: Identity, token_ids: Tokens) -> None:
        """Make a published segment visible, and reachable by prefix. Its parent must be in the catalog."""
        key = bytes.fromhex(info.segment)
        digest = bytes.fromhex(info.identity)
        if self.identity(info.identity) is None:
            self._put("identities", digest, identity)
        self._put("segments", key, info)
        self._put("tokens", key, np.ascontiguousarray(token_ids, "<u4").tobytes())
        for node in self._nodes(info):
            self._txn.put(node, _sealed(node, _node_value(info)), dupdata=True, db=self._env.db["tree"])

    def remove_segment(self, info: SegmentInfo) -> None:
        for node in self._nodes(info):
            self._txn.delete(node, _sealed(node, _node_value(info)), db=self._env.db["tree"])
        key = bytes.fromhex(info.segment)
        self._txn.delete(key, db=self._env.db["segments"])
        self._txn.delete(key, db=self._env.db["tokens"])

    def _nodes(self, info: SegmentInfo) -> list[bytes]:
        """Tree keys of the blocks that hold this segment's tokens."""
        path = self.path_tokens(info.segment)
        keys = prefix.block_keys(bytes.fromhex(info.identity), path[: info.stop - 1])
        return keys[info.start // prefix.BLOCK_TOKENS :]

    # -- prefixes

    def path(self, segment: str) -> list[SegmentInfo]:
        """The segment and its ancestors, oldest first."""
        chain: list[SegmentInfo] = []
        wanted: str | None = segment
        while wanted is not None:
            info = self.segment(wanted)
            if info is None or (chain and info.start >= chain[-1].start):
                raise Damaged(f"segment {segment}: ancestor {wanted} is missing or misplaced; run 'kvdb verify'")
            chain.append(info)
            wanted = info.parent
        return chain[::-1]

    def path_tokens(self, segment: str) -> Tokens:
        """Token ids from position 0 to the end of the segment."""
        chain = self.path(segment)
        stops = [info.start for info in chain[1:]] + [chain[-1].stop]
        parts = [self.tokens(info.segment)[: stop - info.start] for info, stop in zip(chain, stops, strict=True)]
        return np.concatenate(parts)

    def find(self, identity: str, tokens: Tokens, *, exact: bool) -> Found:
        """Longest stored prefix of `tokens`. With `exact`, only through segments of fidelity EXACT.

        Zero case: Found(0, ()). Token ids are compared, whatever the keys say.
        """
        candidates: list[str] = []
        for node in prefix.block_keys(bytes.fromhex(identity), tokens):
            here = [c for c, is_exact in self._listed(node) if is_exact or not exact]
            if not here:
                break
            candidates = here
        best, best_path = 0, list[SegmentInfo]()
        for candidate in candidates:
            n = prefix.common_prefix(self.path_tokens(candidate), tokens)
            if n > best:
                best, best_path = n, self.path(candidate)
        return Found(best, spans_of(best_path, best))

    def _listed(self, node: bytes) -> list[tuple[str, bool]]:
        cursor = self._txn.cursor(db=self._env.db["tree"])
        if not cursor.set_key(node):
            return []
        values = [_unsealed("tree", node, bytes(value)) for value in cursor.iternext_dup()]
        return [(value[1:].hex(), value[0] == 1) for value in values]

    # -- sequences

    def put_sequence(self, sequence: Sequence) -> None:
        """Insert or update; a name moves to its newest sequence, the older one stays as an unnamed one."""
        if sequence.name is not None:
            older = self.named(sequence.name)
            if older is not None and older.key != sequence.key:
                self.remove_sequence(older)
                key = sequence_key(older.identity, older.spans, None)
                if self.find_sequence(key) is None:
                    self._put("sequences", bytes.fromhex(key), msgspec.structs.replace(older, key=key, name=None))
            self._put("names", _name_key(sequence.name), sequence.key)
        previous = self.find_sequence(sequence.key)
        if previous is not None:
            sequence = msgspec.structs.replace(sequence, created=previous.created)
        self._put("sequences", bytes.fromhex(sequence.key), sequence)

    def sequences(self) -> list[Sequence]:
        """All sequences, oldest first."""
        found = [self._get("sequences", key, Sequence) for key in self._keys("sequences")]
        return sorted((s for s in found if s is not None), key=lambda s: (s.created, s.key))

    def named(self, name: str) -> Sequence | None:
        key = self._get("names", _name_key(name), str)
        return None if key is None else self._get("sequences", bytes.fromhex(key), Sequence)

    def find_sequence(self, key: str) -> Sequence | None:
        return self._get("sequences", bytes.fromhex(key), Sequence)

    def sequence(self, name_or_key: str) -> Sequence:
        """By name, else by key or a unique beginning of one.

        raises  SequenceNotFound
        """
        found = self.named(name_or_key)
        if found is None and len(name_or_key) >= 4:
            matches = [s for s in self.sequences() if s.key.startswith(name_or_key)]
            found = matches[0] if len(matches) == 1 else None
        if found is None:
            names = sorted(s.name for s in self.sequences() if s.name)[:8]
            raise SequenceNotFound(
                f"sequence {name_or_key!r}: not in the store, expected a name or key such as {names}; run 'kvdb ls'"
            )
        return found

    def remove_sequence(self, sequence: Sequence) -> None:
        self._txn.delete(bytes.fromhex(sequence.key), db=self._env.db["sequences"])
        if sequence.name is not None:
            self._txn.delete(_name_key(sequence.name), db=self._env.db["names"])

    def remove_unreferenced(self) -> list[SegmentInfo]:
        """Remove and return the segments that no sequence passes through, children before parents."""
        live = {span.segment for s in self.sequences() for span in s.spans}
        dead = [info for i in self.segment_ids() if i not in live and (info := self.segment(i)) is not None]
        dead.sort(key=lambda info: -info.start)
        for info in dead:
            self.remove_segment(info)
        return dead


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


def _node_value(info: SegmentInfo) -> bytes:
    return (b"\1" if info.fidelity == EXACT else b"\0") + bytes.fromhex(info.segment)


def _name_key(name: str) -> bytes:
    """Names may be longer than LMDB keys and hold any characters: they are hashed, never used as paths."""
    return xxhash.xxh3_128_digest(name.encode(errors="surrogatepass"))


class Catalog:
    """Handle on a store's LMDB environment."""

    def __init__(self, path: Path, *, readonly: bool, create: bool = False) -> None:
        """create: make an empty catalog if there is none; otherwise a missing one is Damaged, never silently empty."""
        self.path, self.readonly = path, readonly
        if not create and not (path / "data.mdb").exists():
            raise Damaged(f"{path}: no data.mdb, expected the store's catalog; restore it, the chunks are untouched")
        self._env: _Environment | None = _environment(path, readonly=readonly)

    @property
    def closed(self) -> bool:
        return self._env is None

    @contextlib.contextmanager
    def begin(self, *, write: bool = False) -> Iterator[Transaction]:
        """A transaction: committed (and synced) when the block ends well, else aborted."""
        if self._env is None:
            raise StoreError(f"{self.path}: the store is closed, expected an open one; open it again")
        if self._env.pid != os.getpid():
            raise StoreError(
                f"{self.path}: opened in process {self._env.pid}, used in {os.getpid()}; open it again here"
            )
        with _translated(self.path), self._env.env.begin(write=write) as txn:
            yield Transaction(self._env, txn)

    def file_bytes(self) -> int:
        return os.stat(self.path / "data.mdb").st_blocks * 512

    def close(self) -> None:
        self._env = None
