"""KVDB: a store of KV on disk. Opens, finds prefixes, hands out writers, commits, lists, deletes.

The chain of a commit: payload -> index -> fsync -> rename -> fsync folder -> one synced LMDB transaction. Only the last
step makes anything visible; what a dead writer left is removed at the next open for writing.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self

import msgspec
import numpy as np

from kvdb import files, folder, format
from kvdb.catalog import Catalog, Found, Sequence, Span, Transaction, sequence_key, spans_of
from kvdb.check import check_store
from kvdb.codecs import Codec, Raw
from kvdb.errors import (
    Damaged,
    InvalidInput,
    PrefixDeleted,
    Problem,
    ReadOnly,
    StoreError,
    StoreLocked,
    StoreNotFound,
)
from kvdb.folder import Header
from kvdb.format import SegmentInfo
from kvdb.geometry import Geometry
from kvdb.identity import EXACT, Identity
from kvdb.prefix import Tokens
from kvdb.reader import READERS, Reader
from kvdb.retention import RETENTION
from kvdb.segments import Segment, SegmentWriter, new_segment_id

Mode = Literal["r", "r+", "a", "w", "w-"]
_MODES: Final = ("r", "r+", "a", "w", "w-")


class Match(NamedTuple):
    """Longest reusable prefix of a token list.

    reason  why it is not longer, in words
    """

    tokens: int
    spans: tuple[Span, ...]
    reason: str


class Committed(NamedTuple):
    """A segment that is visible now, and the key of the sequence that ends in it."""

    segment: Segment
    sequence: str


class KVDB:
    """An open store. Use `KVDB.open`; a context manager.

    path       folder of the store
    mode       "r" read only; "r+" existing store, read and write; "a" (default) create if missing;
               "w" create, replacing an existing store; "w-" create, fail if it exists
    salt       tenant salt: KV is only shared between handles with the same salt
    read_mode  "mmap" (default) or "pread" (network file systems)
    """

    def __init__(self, path: Path, header: Header, *, mode: Mode, salt: str, read_mode: str) -> None:
        self.path, self.header, self.mode, self.salt, self.read_mode = path, header, mode, salt, read_mode
        self.readonly = mode == "r"
        self._pid = os.getpid()
        self._workspace: Path | None = None
        self._workspace_lock: int | None = None
        self._held: int | None = folder.hold(path, exclusive=False)
        try:
            self.catalog = Catalog(path / "catalog", readonly=self.readonly)
            if not self.readonly:
                folder.sweep(path, self.catalog)
        except BaseException:
            files.close(self._held)
            raise

    # -- opening and closing

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: Mode = "a", *, salt: str = "", read_mode: str = "mmap") -> KVDB:
        """Open or create a store.

        raises  StoreNotFound, NotAStore, NewerFormat, Damaged; InvalidInput for an unknown mode; OSError for permissions
        """
        if mode not in _MODES:
            raise InvalidInput(f"KVDB.open: mode is {mode!r}, expected one of {_MODES}")
        if read_mode not in READERS:
            raise InvalidInput(f"KVDB.open: read_mode is {read_mode!r}, expected one of {sorted(READERS)}")
        root = Path(path)
        exists = folder.holds_store(root)
        if mode in ("r", "r+") and not exists:
            raise StoreNotFound(f"{root}: no store there, expected one for mode {mode!r}; use mode 'a' to create it")
        if mode == "w-" and exists:
            raise StoreError(f"{root}: a store is there, expected none for mode 'w-'; use mode 'a' to open it")
        if mode == "w" and exists:
            folder.read_header(root)  # refuses to replace what is no store or a newer one
            held = folder.hold(root, exclusive=True)  # no handle of any process may be left with removed files
            try:
                files.remove_tree(root)
            finally:
                files.close(held)
            exists = False
        if not exists:
            folder.create(root)
        return cls(root, folder.read_header(root), mode=mode, salt=salt, read_mode=read_mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store; closing twice is fine. Caches made from it must not be used any more."""
        if self._workspace is not None:
            if self._pid == os.getpid():  # a forked child must not remove its parent's
                files.remove_tree(self._workspace)
            self._workspace = None
        if self._workspace_lock is not None:
            files.close(self._workspace_lock)
            self._workspace_lock = None
        self.catalog.close()
        if self._held is not None:
            files.close(self._held)
            self._held = None

    def reader(self) -> Reader:
        """A reader of its own for one thread of generation; close it after use."""
        return READERS[self.read_mode]()

    # -- reading

    def find(self, identity: Identity, tokens: Tokens, *, exact: bool = True) -> tuple[Found, list[Segment]]:
        """Longest stored prefix of `tokens` and the segments it lies in, as of one moment.

        exact  only KV of fidelity "exact"
        """
        with self.catalog.begin() as txn:
            found = txn.find(identity.digest().hex(), tokens, exact=exact)
            return found, self._segments(txn, found.spans)

    def match(self, identity: Identity, tokens: Tokens, *, exact: bool = True) -> Match:
        """As `find`, with the reason why it is not longer instead of the segments.

        exact  only KV of fidelity "exact"
        """
        with self.catalog.begin() as txn:
            found = txn.find(identity.digest().hex(), tokens, exact=exact)
            return Match(found.tokens, found.spans, self._why(txn, identity, tokens, found, exact=exact))

    def _why(self, txn: Transaction, identity: Identity, tokens: Tokens, found: Found, *, exact: bool) -> str:
        if found.tokens == len(tokens):
            return "all tokens are stored"
        mine = identity.digest().hex()
        if exact and (other := txn.find(mine, tokens, exact=False)).tokens > found.tokens:
            return f"{other.tokens} tokens are stored, but not with fidelity {EXACT!r}"
        for digest, stored in txn.identities().items():
            if stored.salt != identity.salt:  # one tenant must not learn what another has stored
                continue
            if digest != mine and (other := txn.find(digest, tokens, exact=exact)).tokens > found.tokens:
                fields = ", ".join(identity.difference(stored))
                return f"{other.tokens} tokens are stored under another identity, which differs in: {fields}"
        if found.tokens == 0:
            return "no stored sequence of this identity begins with these tokens"
        return f"no stored sequence has token {tokens[found.tokens]} at position {found.tokens}"

    def segments(self, spans: tuple[Span, ...]) -> list[Segment]:
        """The segments behind spans, in order.

        raises  Damaged when one is not in the catalog
        """
        with self.catalog.begin() as txn:
            return self._segments(txn, spans)

    def _segments(self, txn: Transaction, spans: tuple[Span, ...]) -> list[Segment]:
        found = []
        for span in spans:
            info = txn.segment(span.segment)
            if info is None:
                raise Damaged(f"segment {span.segment}: not in the catalog, expected it; run 'kvdb verify'")
            found.append(Segment(info, self.path / "chunks"))
        return found

    def holds(self, spans: tuple[Span, ...]) -> bool:
        """Whether every segment behind spans is in the catalog."""
        with self.catalog.begin() as txn:
            return all(txn.segment(span.segment) is not None for span in spans)

    def tokens(self, spans: tuple[Span, ...]) -> Tokens:
        """Token ids of spans, (tokens,) uint32."""
        with self.catalog.begin() as txn:
            parts = [txn.tokens(span.segment)[span.start : span.stop] for span in spans]
        return np.concatenate(parts) if parts else np.empty(0, "<u4")

    def sequence(self, name_or_key: str) -> Sequence:
        """One sequence by name or key. Raises SequenceNotFound."""
        with self.catalog.begin() as txn:
            return txn.sequence(name_or_key)

    def identity(self, digest: str) -> Identity:
        """One identity by its digest in hex. Raises Damaged when no such entry is there."""
        with self.catalog.begin() as txn:
            found = txn.identity(digest)
        if found is None:
            raise Damaged(f"identity {digest}: not in the catalog, expected it; run 'kvdb verify'")
        return found

    def sequences(self) -> list[Sequence]:
        """All sequences, oldest first."""
        with self.catalog.begin() as txn:
            return txn.sequences()

    def info(self) -> dict[str, Any]:
        """Facts about the store as JSON-safe values; bytes are what files occupy on disk."""
        with self.catalog.begin() as txn:
            sequences, ids = txn.sequences(), txn.segment_ids()
            infos = [info for i in ids if (info := txn.segment(i)) is not None]
            identities = txn.identities()
        kv_bytes = sum(info.tokens * info.geometry.token_bytes for info in infos)
        return {
            "path": str(self.path),
            "format": self.header.format,
            "store": self.header.store,
            "created": self.header.created,
            "sequences": len(sequences),
            "segments": len(infos),
            "tokens": sum(info.tokens for info in infos),
            "identities": len(identities),
            "kv_bytes": kv_bytes,
            "disk_bytes": sum(self.segment_disk_bytes(info) for info in infos),
            "catalog_bytes": self.catalog.file_bytes(),
        }

    def segment_disk_bytes(self, info: SegmentInfo) -> int:
        """Bytes the segment's files occupy; missing files count as 0."""
        total = 0
        for array in info.array_names():
            with contextlib.suppress(FileNotFoundError):
                total += files.disk_bytes(self.path / "chunks" / array / format.SHARD_KEY)
        return total

    def check(self) -> list[Problem]:
        """Walk everything and return what is wrong: catalog, files, token ids, digest of every record."""
        return list(check_store(self.path, self.catalog))

    # -- writing

    def writer(
        self,
        *,
        identity: Identity,
        fidelity: str,
        geometry: Geometry,
        parent: str | None,
        start: int,
        capacity: int,
        codec: Codec | None = None,
        abstracts: tuple[str, ...] = ("box",),
    ) -> SegmentWriter:
        """Begin a segment of at most `capacity` chunks after `parent`, at position `start`.

        raises  ReadOnly in mode "r"; StorageFull
        """
        return SegmentWriter(
            self._own_workspace(),
            segment=new_segment_id(),
            identity=identity,
            fidelity=fidelity,
            geometry=geometry,
            codec=codec or Raw(),
            abstracts=abstracts,
            parent=parent,
            start=start,
            capacity=capacity,
        )

    def commit(
        self,
        writer: SegmentWriter,
        token_ids: Tokens,
        prefix_tokens: Tokens,
        *,
        model: str = "",
        replaces: str | None = None,
    ) -> Committed:
        """Seal a segment and make it visible, with the unnamed sequence that ends in it: one transaction, so that nobody
        can take the segment for unused. If another writer has stored the same tokens with the same identity, fidelity and
        codec meanwhile, theirs is adopted and this one discarded.

        token_ids        of the segment
        prefix_tokens    of all positions before it
        model, replaces  as for `put_sequence`
        """
        try:
            info = writer.seal(token_ids)
            with self.catalog.begin(write=True) as txn:
                _still_there(txn, info.parent)
                adopted = self._same(txn, info, np.concatenate((prefix_tokens, token_ids)))
                if adopted is None:
                    txn.add_segment(info, writer.identity, token_ids)  # may refuse: so before any file moves
                last = adopted or info
                key = _record(txn, last, last.stop, name=None, model=model, replaces=replaces)
                if adopted is None:
                    writer.publish(self.path / "chunks")
        except BaseException:
            self._abandon(writer)
            raise
        if adopted is not None:
            writer.discard()
        return Committed(Segment(last, self.path / "chunks"), key)

    def _abandon(self, writer: SegmentWriter) -> None:
        """Remove the files of a failed commit, unless it was interrupted after it had succeeded."""
        writer.discard()
        with self.catalog.begin() as txn:
            if txn.segment(writer.info.segment) is None:
                for array in writer.info.array_names():
                    files.remove_tree(self.path / "chunks" / array)

    @staticmethod
    def _same(txn: Transaction, info: SegmentInfo, tokens: Tokens) -> SegmentInfo | None:
        found = txn.find(info.identity, tokens, exact=info.fidelity == EXACT)
        if found.tokens != len(tokens) or not found.spans:
            return None
        other = txn.segment(found.spans[-1].segment)
        same = other is not None and (other.start, other.parent, other.tokens, other.fidelity, other.codec) == (
            info.start, info.parent, info.tokens, info.fidelity, info.codec,
        )  # fmt: skip
        return other if same else None

    def put_sequence(
        self,
        last: Segment,
        tokens: int,
        *,
        name: str | None = None,
        model: str = "",
        replaces: str | None = None,
    ) -> str:
        """Record the sequence that ends in segment `last` with `tokens` tokens in all, and return its key.

        name      None for a sequence that may be evicted; a name moves to its newest sequence
        model     what to show people; not part of the identity
        replaces  key of an unnamed sequence that this one continues, to be forgotten
        raises    InvalidInput for an empty name or a token count outside `last`; ReadOnly
        """
        self._writable()
        if not last.info.start < tokens <= last.info.stop:
            raise InvalidInput(
                f"sequence: {tokens} tokens, expected {last.info.start + 1}..{last.info.stop}, the positions of its "
                f"last segment {last.info.segment}"
            )
        if name is not None:
            check_name(name)
        with self.catalog.begin(write=True) as txn:
            _still_there(txn, last.info.segment)
            return _record(txn, last.info, tokens, name=name, model=model, replaces=replaces)

    def touch(self, identity: Identity, spans: tuple[Span, ...]) -> None:
        """Note that the sequence with exactly these spans was used now; nothing happens if there is none."""
        self._writable()
        with self.catalog.begin(write=True) as txn:
            sequence = txn.find_sequence(sequence_key(identity.digest().hex(), spans, None))
            if sequence is not None:
                txn.put_sequence(msgspec.structs.replace(sequence, last_used=files.now()))

    def delete(self, name_or_key: str) -> int:
        """Forget a sequence and the segments only it used; returns bytes of files removed.

        raises  SequenceNotFound, ReadOnly
        """
        self._writable()
        with self.catalog.begin(write=True) as txn:
            txn.remove_sequence(txn.sequence(name_or_key))
            dead = txn.remove_unreferenced()
        return self._unlink(dead)

    def evict(self, target_bytes: int, *, policy: str = "lru") -> list[Sequence]:
        """Delete unnamed sequences in the policy's order until KV files occupy at most `target_bytes`.

        returns  the sequences deleted; fewer bytes may be freed than hoped, since prefixes are shared
        raises   InvalidInput for an unknown policy; ReadOnly
        """
        self._writable()
        if policy not in RETENTION:
            raise InvalidInput(f"evict: policy is {policy!r}, expected one of {sorted(RETENTION)}")
        with self.catalog.begin(write=True) as txn:
            dead = txn.remove_unreferenced()
        self._unlink(dead)
        evicted: list[Sequence] = []
        for sequence in RETENTION[policy].order(self.sequences()):
            if self.info()["disk_bytes"] <= target_bytes:
                break
            with self.catalog.begin(write=True) as txn:
                if txn.find_sequence(sequence.key) is None:  # deleted or given a name since it was listed
                    continue
                txn.remove_sequence(sequence)
                dead = txn.remove_unreferenced()
            self._unlink(dead)
            evicted.append(sequence)
        return evicted

    def _unlink(self, dead: list[SegmentInfo]) -> int:
        """After the entries are gone: a reader that has the files open keeps its bytes."""
        freed = 0
        for info in dead:
            freed += self.segment_disk_bytes(info)
            for array in info.array_names():
                files.remove_tree(self.path / "chunks" / array)
        return freed

    # -- housekeeping

    def _writable(self) -> None:
        if self.readonly:
            raise ReadOnly(f"{self.path}: opened with mode 'r', expected a writable store; open it with 'r+' or 'a'")

    def _own_workspace(self) -> Path:
        self._writable()
        if self.catalog.closed:
            raise StoreError(f"{self.path}: the store is closed, expected an open one; open it again")
        while self._workspace is None:
            workspace = self.path / "tmp" / f"{os.getpid()}-{os.urandom(8).hex()}"
            with contextlib.suppress(FileNotFoundError, StoreLocked):  # swept before it was locked: another name
                files.mkdir(workspace)
                fd = files.lock(workspace / "lock", timeout_s=0)
                if (workspace / "lock").exists():
                    self._workspace, self._workspace_lock = workspace, fd
                else:
                    files.close(fd)
        return self._workspace


def _record(
    txn: Transaction, last: SegmentInfo, tokens: int, *, name: str | None, model: str, replaces: str | None
) -> str:
    """Enter the sequence of the first `tokens` tokens on the path to `last`."""
    _still_there(txn, last.parent)
    path = txn.path(last.segment)
    spans = spans_of(path, tokens)
    used = {span.segment for span in spans}
    approximate = [info.fidelity for info in path if info.segment in used and info.fidelity != EXACT]
    now = files.now()
    sequence = Sequence(
        key=sequence_key(last.identity, spans, name),
        name=name,
        identity=last.identity,
        tokens=tokens,
        fidelity=approximate[-1] if approximate else EXACT,
        spans=spans,
        created=now,
        last_used=now,
        model=model,
    )
    older = None if replaces in (None, sequence.key) else txn.find_sequence(replaces or "")
    if older is not None and older.name is None:
        txn.remove_sequence(older)
    txn.put_sequence(sequence)
    return sequence.key


def _still_there(txn: Transaction, segment: str | None) -> None:
    """raises  PrefixDeleted when somebody has deleted what a writer builds on"""
    if segment is not None and txn.segment(segment) is None:
        raise PrefixDeleted(
            f"segment {segment}: deleted or evicted since the cache was made, expected it to stay; make the cache again"
        )


def check_name(name: str) -> str:
    """A name that a sequence may have. Raises InvalidInput."""
    if not (name.strip() and name.isprintable() and len(name) <= 512):
        raise InvalidInput(f"sequence: name is {name!r}, expected 1..512 printable characters")
    return name
