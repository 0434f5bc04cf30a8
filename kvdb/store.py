"""KVDB: a store of KV on disk. Opens, finds prefixes, hands out writers, commits, lists, deletes.

The chain of a commit: payload -> index -> rename -> fsync of files and folders -> one synced LMDB transaction. Only the last
step makes anything visible; what a dead writer left is removed at the next open for writing.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np

from kvdb import compact, files, folder, forks, manifests, portable, recode, repair, summarise
from kvdb.catalog import Catalog
from kvdb.check import check_store
from kvdb.codecs import RAW, CodecPlan
from kvdb.entries import Found, Limits, SegmentEntry, Sequence, Span, check_name
from kvdb.environment import may_lock
from kvdb.errors import (
    Damaged,
    InvalidInput,
    OlderFormat,
    PrefixDeleted,
    Problem,
    ReadOnly,
    SequenceNotFound,
    StorageFull,
    StoreError,
    StoreLocked,
    StoreNotFound,
)
from kvdb.format import FORMAT_VERSION, SegmentInfo
from kvdb.geometry import Geometry
from kvdb.host import HostTier
from kvdb.identity import EXACT, Identity
from kvdb.options import AUTO, Mode, Options
from kvdb.prefix import Tokens
from kvdb.reader import Reader
from kvdb.reading import Reading
from kvdb.retention import RETENTION
from kvdb.segments import Segment, SegmentWriter, new_segment_id, reserved_bytes
from kvdb.sizes import parse_bytes
from kvdb.space import Keep, Space, has_expired
from kvdb.transaction import Transaction

UNLIMITED: Final = "unlimited"
_NAME_BYTES: Final = 16 << 10
"""Room a name takes: its manifest, and its entry."""


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
    """An open store. Use `KVDB.open`; a context manager."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.options = path, options
        self.mode, self.salt = options.mode, options.salt
        self.readonly = options.mode == "r"
        self.durable = options.durability == "commit"
        self._workspace: Path | None = None
        self._workspace_lock: int | None = None
        self._making_workspace = threading.Lock()
        self._used: dict[str, int] = {}  # segment -> hits since the last write transaction
        self._held: int | None = folder.hold(path, exclusive=False, timeout_s=options.lock_timeout_s)
        opened = contextlib.ExitStack()
        opened.callback(files.close, self._held)
        with opened:
            self.header = folder.read_header(path)  # it may have been replaced while we waited
            self.catalog = Catalog(
                path / "catalog",
                readonly=self.readonly,
                durable=self.durable,
                names=path / manifests.NAMES,
                lock=options.lock,
                unlisted=self.readonly and options.lock and not may_lock(path / "catalog"),
                lock_timeout_s=options.lock_timeout_s,
            )
            self.space = Space(
                path,
                self.catalog,
                floor=options.min_free,
                grace_s=options.grace_s,
                retention=RETENTION[options.retention],
                settle=self._note_use,
            )
            opened.callback(self.catalog.close)
            self._reading = Reading(path / "chunks", options, self._stored_bytes)
            if not self.readonly:
                self._tidy()
            opened.pop_all()
        forks.watch(self)

    def _stored_bytes(self) -> int:
        with contextlib.suppress(Damaged), self.catalog.begin() as txn:  # what only figures need stops no reader
            return txn.counters().segment_bytes
        return 0

    def after_fork(self) -> None:
        """In a child: the workspace, and what is not written down yet, are the parent's."""
        if self._workspace_lock is not None:
            files.close(self._workspace_lock)
        self._workspace, self._workspace_lock, self._used = None, None, {}
        self._making_workspace = threading.Lock()

    # -- opening and closing

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Mode = "a",
        *,
        salt: str = "",
        read_mode: str | None = None,
        verify: str = "first",
        durability: str = "commit",
        size_cap: int | str | None = None,
        min_free: int | str = "64MiB",
        retention: str = "lru",
        grace_s: float = 10.0,
        lock_timeout_s: float = 30.0,
        host_budget: int | str | None = None,
        host_policy: str = "lru",
        read_deadline_s: float = 30.0,
    ) -> KVDB:
        """Open or create a store.

        mode        "r" read only; "r+" existing store, read and write; "a" (default) create if missing;
                    "w" create, replacing an existing store; "w-" create, fail if it exists
        salt        tenant salt: KV is only shared between handles with the same salt
        read_mode   "mmap", "pread" (network file systems, macOS), "direct": past the page cache, many reads at a time, into memory of our
                    own; or "auto" (default): by map as long as the store's KV fits into memory, else whichever of "mmap" and "direct"
                    is faster here
        verify      compare records with their digests "always", "first" time each is read (default), or "never"
        durability  "commit": on disk when a commit returns; "relaxed": a power failure may lose the last commits, and
                    never more; `sync` and `close` make them durable
        size_cap    most the store may occupy, "50GB" say, all its files counted; remembered in the store, "unlimited" takes
                    it away. Unnamed sequences go first to keep it
        min_free    what writes leave free on the disk
        retention   which unnamed KV goes first
        grace_s     how long deleted files stay readable, unless room is needed
        lock_timeout_s  how long to wait for another writer
        host_budget  with read_mode "direct": most that its memory may take for all readers together, "1GiB" say; a quarter of what
                    is available when not given
        host_policy  which records leave it first: "lru", "lfu" or "importance"
        read_deadline_s  with read_mode "direct": how long a read waits for the device before it is Stalled
        raises      StoreNotFound, NotAStore, NewerFormat, OlderFormat, Damaged, StoreLocked; Unsupported on systems other
                    than Linux and macOS; InvalidInput for an unknown option; OSError for permissions
        """
        options = Options(
            mode=mode,
            salt=salt,
            read_mode=read_mode or AUTO,
            verify=verify,
            durability=durability,
            min_free=parse_bytes("KVDB.open: min_free", min_free),
            retention=retention,
            grace_s=grace_s,
            lock_timeout_s=lock_timeout_s,
            host_budget=None if host_budget is None else parse_bytes("KVDB.open: host_budget", host_budget),
            host_policy=host_policy,
            read_deadline_s=read_deadline_s,
        )
        if size_cap not in (None, UNLIMITED):
            size_cap = parse_bytes("KVDB.open: size_cap", size_cap)
        root = repair.at(path)
        _make_ready(root, mode)
        header = folder.read_header(root)
        if header.format < FORMAT_VERSION:
            if mode == "r":
                raise OlderFormat(
                    f"{root}: store of format {header.format}, expected {FORMAT_VERSION}; open it once with mode 'r+', which "
                    "upgrades it"
                )
            repair.upgrade(root)
        db = cls(root, options)
        if size_cap is not None:
            try:
                db.set_size_cap(size_cap)
            except BaseException:
                db.close()
                raise
        return db

    @classmethod
    def open_untrusted(cls, path: str | os.PathLike[str]) -> KVDB:
        """Open a store to look at, without the locks and files that readers of a live one leave in it."""
        root = repair.at(path)
        _make_ready(root, "r")
        return cls(root, Options(mode="r", read_mode="pread", lock=False))

    def _tidy(self) -> None:
        """What an opener for writing owes the store: leftovers removed, limits kept."""
        folder.make_parts(self.path)
        folder.force(self.path)
        with contextlib.suppress(
            Damaged, StorageFull
        ):  # reading goes on: `check` tells what is damaged, deleting makes room
            folder.sweep(self.path, self.catalog)
            self.space.reap()
            self.catalog.ballast()
            with self.catalog.begin() as txn:
                unsynced = set(txn.unsynced().values()) - {files.moment().boot}
                due = txn.next_expiry()
                expired = due is not None and due <= txn.now()
            if unsynced:
                repair.drop_lost(self.path, self.catalog)
                folder.sweep(self.path, self.catalog)  # as many arrays may have been left over as were lost
            if expired:
                self.space.evict(0)
            self.space.enforce()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store; closing twice is fine. Caches made from it must not be used any more."""
        if not self.catalog.closed and not self.readonly:
            with contextlib.suppress(StoreError, Damaged, OSError):  # only statistics: not worth waiting or failing for
                if self._used:
                    with self.catalog.locked(timeout_s=0), self.write_transaction():
                        pass
            with contextlib.suppress(
                StoreError, Damaged, OSError
            ):  # the last commits then stay what they were: relaxed
                if not self.durable:
                    self.sync()
        if self._workspace is not None:
            files.remove_tree(self._workspace)
            self._workspace = None
        if self._workspace_lock is not None:
            files.close(self._workspace_lock)
            self._workspace_lock = None
        self._reading.close()
        self.catalog.close()
        if self._held is not None:
            files.close(self._held)
            self._held = None

    def sync(self) -> None:
        """Force to disk what was committed with durability "relaxed". Nothing to do otherwise."""
        self._writable()
        boot = files.moment().boot
        with self.catalog.locked():
            with self.catalog.begin() as txn:
                waiting = [s for s, written in txn.unsynced().items() if written == boot]
                infos = [entry.info for s in waiting if (entry := txn.entry(s)) is not None]
            if waiting:
                chunks = self.path / "chunks"
                arrays = [chunks / array for info in infos for array in info.array_names()]
                files.fsync_trees([array for array in arrays if array.exists()])  # what is gone is for `check` to tell
                files.fsync_dir(chunks)
                with self.catalog.begin(write=True) as txn:
                    for segment in waiting:
                        txn.mark_synced(segment)
            self.catalog.sync()

    @property
    def grows_freely(self) -> bool:
        """Whether what is written pushes nothing out: writable, and without a size cap."""
        if self.readonly:
            return False
        with self.catalog.begin() as txn:
            return txn.limits().size_cap is None

    def reader(self) -> Reader:
        """A reader of its own for one thread of generation; close it after use."""
        return self._reading.reader()

    @property
    def host(self) -> HostTier | None:
        """Memory of our own for records that are read past the page cache; None: they are not."""
        return self._reading.host

    @property
    def read_mode(self) -> str:
        """How readers read that are made now: a name of `kvdb.readers.READERS`."""
        return self._reading.way.name

    @property
    def why_read_mode(self) -> str:
        """Why, in words."""
        return self._reading.way.why

    # -- reading

    def find(
        self, identity: Identity, tokens: Tokens, *, exact: bool = True, accepted: Collection[str] = ()
    ) -> tuple[Found, list[Segment]]:
        """Longest stored prefix of `tokens` and the segments it lies in, as of one moment.

        exact     only KV of fidelity "exact", or one of `accepted`; False: of any
        accepted  fidelities that will do as well as "exact", such as "int4"
        """
        with self.catalog.begin() as txn:
            found = txn.find(identity.digest().hex(), tokens, accepted=_fidelities(exact, accepted))
            return found, self._segments(txn, found.spans)

    def match(self, identity: Identity, tokens: Tokens, *, exact: bool = True, accepted: Collection[str] = ()) -> Match:
        """As `find`, with the reason why it is not longer instead of the segments."""
        fidelities = _fidelities(exact, accepted)
        with self.catalog.begin() as txn:
            found = txn.find(identity.digest().hex(), tokens, accepted=fidelities)
            return Match(found.tokens, found.spans, self._why(txn, identity, tokens, found, fidelities))

    def _why(
        self, txn: Transaction, identity: Identity, tokens: Tokens, found: Found, accepted: Collection[str] | None
    ) -> str:
        if found.tokens == len(tokens):
            return "all tokens are stored"
        mine = identity.digest().hex()
        if accepted is not None and (other := txn.find(mine, tokens, accepted=None)).tokens > found.tokens:
            return f"{other.tokens} tokens are stored, but not with fidelity {' or '.join(map(repr, accepted))}"
        for digest, stored in txn.identities().items():
            if stored.salt != identity.salt:  # one tenant must not learn what another has stored
                continue
            if digest != mine and (other := txn.find(digest, tokens, accepted=accepted)).tokens > found.tokens:
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
        return [Segment.stored(entry, self.path / "chunks") for entry in txn.span_entries(spans)]

    def holds(self, spans: tuple[Span, ...]) -> bool:
        """Whether every segment behind spans is in the catalog."""
        with self.catalog.begin() as txn:
            return all(txn.segment(span.segment) is not None for span in spans)

    def agrees(self, segments: Iterable[Segment]) -> bool:
        """Whether the catalog has sealed segments as they are here: none deleted, merged or given other abstracts since."""
        with self.catalog.begin() as txn:
            now = [(segment, txn.entry(segment.info.segment)) for segment in segments]
        return all(entry is not None and Segment.stored(entry, segment.folder) == segment for segment, entry in now)

    def tokens(self, spans: tuple[Span, ...]) -> Tokens:
        """Token ids of spans, (tokens,) uint32."""
        with self.catalog.begin() as txn:
            parts = [txn.tokens(span.segment)[span.start : span.stop] for span in spans]
        return np.concatenate(parts) if parts else np.empty(0, "<u4")

    def sequence(self, name_or_key: str) -> Sequence:
        """One sequence by name or key.

        raises  SequenceNotFound, also for one that has expired; Damaged when its KV is not the one it was made for
        """
        with self.catalog.begin() as txn:
            found = txn.sequence(name_or_key)
            if has_expired(found, txn.now()):
                raise SequenceNotFound(f"sequence {name_or_key!r}: expired, expected a live one; save it again")
            txn.check_root(found)
            return found

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
            count = {table: txn.totals(table).count for table in ("sequences", "names", "segments", "identities")}
            counters, limits = txn.counters(), txn.limits()
        return {
            "path": str(self.path),
            "format": self.header.format,
            "store": self.header.store,
            "created": self.header.created,
            "sequences": count["sequences"],
            "named": count["names"],
            "segments": count["segments"],
            "tokens": counters.tokens,
            "identities": count["identities"],
            "read_mode": self.read_mode,
            "why_read_mode": self.why_read_mode,
            "kv_bytes": counters.kv_bytes,
            "disk_bytes": counters.segment_bytes,
            "catalog_bytes": self.catalog.file_bytes(),
            "used_bytes": self.space.used_bytes(),
            "size_cap": limits.size_cap,
            "segments_written": counters.segments_written,
            "tokens_written": counters.tokens_written,
            "bytes_written": counters.bytes_written,
            "bytes_compacted": counters.bytes_compacted,
            "segments_evicted": counters.segments_evicted,
        }

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
        codec: CodecPlan = RAW,
        abstracts: tuple[str, ...] = ("box",),
        keep: Keep = None,
    ) -> SegmentWriter:
        """Begin a segment of at most `capacity` chunks after `parent`, at position `start`.

        codec   what each layer is stored with; KV of a lossy one is not `exact`
        keep    segment, or segments, that making room must leave alone, with their ancestors; None: the parent
        raises  ReadOnly in mode "r"; StorageFull when the cap or the disk has no room for it, even after eviction; InvalidInput for a
                codec that does not fit the geometry, or a lossy one with fidelity "exact"
        """
        workspace = self.own_workspace()
        if fidelity == EXACT and not codec.lossless:
            raise InvalidInput(
                f"segment: fidelity {EXACT!r} with codec {codec}, expected a lossless one, or another fidelity"
            )
        geometry, codecs = codec.grouped(geometry)
        with self.catalog.locked():  # until its files stand there, full size, no other writer counts this room as free
            with self.catalog.begin() as txn:
                parent = None if parent is None else txn.current(parent)
            self.space.make_room(reserved_bytes(geometry, codecs, abstracts, capacity), keep=keep or parent)
            return SegmentWriter(
                workspace,
                segment=new_segment_id(),
                identity=identity,
                fidelity=fidelity,
                geometry=geometry,
                codecs=codecs,
                abstracts=abstracts,
                parent=parent,
                start=start,
                capacity=capacity,
            )

    def commit(
        self,
        writer: SegmentWriter,
        token_ids: Tokens,
        *,
        model: str = "",
        replaces: str | None = None,
        ttl_s: float | None = None,
        durable: bool | None = None,
        keep: Collection[str] = (),
    ) -> Committed:
        """Seal a segment and make it visible, with the unnamed sequence that ends in it: one transaction, so that nobody
        can take the segment for unused. If another writer has stored the same tokens with the same identity, fidelity and
        codec meanwhile, theirs is adopted and this one discarded.

        token_ids               of the segment
        model, replaces, ttl_s  as for `put_sequence`
        durable                 force the segment to disk, or leave that to the system; None: as the store was opened
        keep                    segments that must stay under the cap, with their ancestors, beside this one
        raises                  PrefixDeleted, StorageFull, StoreLocked, InvalidInput; the writer is discarded then
        """
        adopted = None
        durable = self.durable if durable is None else durable
        try:
            writer.seal(token_ids, durable=durable)
            with self.write_transaction() as txn:
                self._settle_parent(txn, writer)
                assert writer.entry is not None
                entry = writer.entry
                adopted = self._same(txn, entry.info, token_ids)
                if adopted is None:
                    txn.add_segment(entry, writer.identity, token_ids)  # may refuse: so before any file moves
                    if not durable:
                        txn.mark_unsynced(entry.info.segment, files.moment().boot)
                    txn.count(segments_written=1, tokens_written=entry.info.tokens, bytes_written=entry.disk_bytes)
                last = adopted or entry
                key = txn.record(last.info, last.info.stop, model=model, replaces=replaces, ttl_s=ttl_s).key
                if adopted is None:
                    writer.publish(self.path / "chunks", durable=durable)
        except BaseException:
            self.abandon(writer)
            raise
        if adopted is not None:
            writer.discard()
        self.space.enforce(keep=(last.info.segment, *keep))
        self.space.reap()
        return Committed(Segment.stored(last, self.path / "chunks"), key)

    @staticmethod
    def _settle_parent(txn: Transaction, writer: SegmentWriter) -> None:
        """raises  PrefixDeleted when somebody has deleted what the writer builds on"""
        parent = writer.info.parent
        if parent is not None:
            now = txn.current(parent)
            _still_there(txn, now)
            if now != parent:
                writer.reparent(now)

    def abandon(self, writer: SegmentWriter) -> None:
        """Remove the files of a failed commit, unless it was interrupted after it had succeeded. For the engine's own modules."""
        writer.discard()
        self.remove_unlisted([writer.info])

    def remove_unlisted(self, infos: Iterable[SegmentInfo]) -> None:
        """Remove arrays of segments that did not get into the catalog. For the engine's own modules."""
        for info in infos:
            with contextlib.suppress(Damaged, StoreError), self.catalog.begin() as txn:
                if txn.segment(info.segment) is None:
                    for array in info.array_names():
                        files.remove_tree(self.path / "chunks" / array)

    @staticmethod
    def _same(txn: Transaction, info: SegmentInfo, token_ids: Tokens) -> SegmentEntry | None:
        tokens = token_ids
        if info.parent is not None:
            tokens = np.concatenate((txn.path_tokens(info.parent)[: info.start], token_ids))
        for other in txn.ending_with(info.identity, info.fidelity, tokens):
            same = all(
                getattr(other.info, field) == getattr(info, field)
                for field in ("start", "parent", "tokens", "codec", "cipher", "geometry")
            )
            if same and np.array_equal(txn.tokens(other.info.segment), token_ids):
                return other
        return None

    def put_sequence(
        self,
        last: Segment,
        tokens: int,
        *,
        name: str | None = None,
        model: str = "",
        replaces: str | None = None,
        ttl_s: float | None = None,
    ) -> str:
        """Record the sequence that ends in segment `last` with `tokens` tokens in all, and return its key.

        name      None for a sequence that may be evicted; a name moves to its newest sequence
        model     what to show people; not part of the identity
        replaces  key of an unnamed sequence that this one continues, to be forgotten; one that ends in a segment of its own
                  stays until it is evicted: a started chunk was written anew, and a cache may still live on the old one
        ttl_s     seconds after which it goes, named or not; None: never by age
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
        if ttl_s is not None and not ttl_s > 0:
            raise InvalidInput(f"sequence: ttl_s is {ttl_s!r}, expected seconds above 0")
        with self.catalog.locked():
            if name is not None:
                self.space.make_room(_NAME_BYTES, keep=last.info.segment)
            return self._record_sequence(last, tokens, name=name, model=model, replaces=replaces, ttl_s=ttl_s)

    def _record_sequence(self, last: Segment, tokens: int, **facts: Any) -> str:
        with self.write_transaction() as txn:
            info = txn.segment(txn.current(last.info.segment))
            if info is None:
                raise _deleted(last.info.segment)
            sequence = txn.record(info, tokens, **facts)
        self.space.enforce(keep=info.segment)
        return sequence.key

    def touch(self, spans: tuple[Span, ...]) -> None:
        """Note that these spans were reused. Written down with the next write of this handle, or when it is closed."""
        self._writable()
        for span in spans:
            self._used[span.segment] = self._used.pop(span.segment, 0) + 1

    def pin(self, name_or_key: str, pinned: bool = True) -> None:
        """Keep a sequence from eviction, expiry and deletion, or let it go again.

        raises  SequenceNotFound, ReadOnly
        """
        self._writable()
        with self.write_transaction() as txn:
            txn.set_pinned(txn.sequence(name_or_key), pinned)
        self.space.enforce()

    def delete(self, name_or_key: str) -> int:
        """Forget a sequence and the segments only it used; returns bytes of files that go.

        raises  SequenceNotFound, ReadOnly; InvalidInput for a pinned one
        """
        self._writable()
        with self.catalog.locked():  # until the files are aside: an import must not bring their ids back before
            with self.catalog.freeing(), self.write_transaction() as txn:
                sequence = txn.sequence(name_or_key)
                if sequence.pinned:
                    raise InvalidInput(f"sequence {name_or_key!r}: pinned, expected one that may go; unpin it first")
                before = txn.counters().segment_bytes
                txn.remove_sequence(sequence)
                dead = txn.remove_unreferenced([sequence])
                txn.forget_gone()
                freed = before - txn.counters().segment_bytes
            self.space.dispose(array for info in dead for array in info.array_names())
        self.space.enforce()
        return freed

    def evict(self, target_bytes: int = 0, *, named: bool = False) -> list[Sequence]:
        """Let unnamed KV go, in the order of retention, until KV files occupy at most `target_bytes`.

        named    named sequences may go too (never pinned ones)
        returns  the sequences that lost KV, as they were; one that lost only its end goes on with the rest
        raises   ReadOnly
        """
        self._writable()
        with self.catalog.locked():
            with self.catalog.begin() as txn:
                wanted = txn.counters().segment_bytes - target_bytes
                there = {sequence.key for sequence in txn.sequences()}
            lost = self.space.evict(max(0, wanted), named=named).sequences
            return [
                sequence for sequence in lost + self.space.enforce() if sequence.key in there
            ]  # a cut one may go on

    def set_size_cap(self, size_cap: int | str) -> None:
        """Bound what the whole store may occupy, for every handle from now on; "unlimited" takes the bound away."""
        self._writable()
        cap = None if size_cap == UNLIMITED else parse_bytes("KVDB.open: size_cap", size_cap)
        with self.write_transaction() as txn:
            if txn.limits().size_cap != cap:
                txn.set_limits(Limits(size_cap=cap))
        self.space.enforce()

    def gc(self) -> int:
        """Remove now what only waits: expired sequences, the trash. Returns bytes freed."""
        self._writable()
        with self.catalog.locked():
            before = self.space.used_bytes()
            self.space.evict(0)
            self.space.reap(now=True)
            self.space.enforce()
            return max(0, before - self.space.used_bytes())

    def compact(self, name_or_key: str | None = None) -> int:
        """Merge the small segments that appended turns leave, of one sequence or of all; returns segments saved.

        cost    what is merged is copied once; merging only segments of like size keeps that to O(log n) times per token
        raises  SequenceNotFound, StorageFull, Damaged, ReadOnly
        """
        self._writable()
        return compact.compact(self, name_or_key)

    def recode(self, name_or_key: str, codec: CodecPlan) -> int:
        """Store one sequence with another codec; returns how many segments were written anew.

        Its KV is decoded and encoded, and is from then on of the fidelity of a lossy codec; back to a lossless one it stays so. What
        others share stays as it is, for them; a live cache that goes on from it can still be read, but not be saved. If this fails or is
        interrupted, the sequence is what it was.

        raises  SequenceNotFound, StorageFull, Damaged, ReadOnly; InvalidInput for a codec that does not fit; NotFinite for KV that a
                lossy codec cannot keep
        """
        self._writable()
        return recode.recode(self, name_or_key, codec)

    def set_abstracts(self, name_or_key: str | None, abstracts: Iterable[str]) -> int:
        """Give every segment of one sequence, or of all, exactly these abstracts; returns how many segments changed.

        What is missing or damaged is made from the stored keys, what is not named goes. KV stays where it is, byte for byte.
        What another sequence shares changes for it too. Each sequence changes at once: if this fails or is interrupted, it
        has the abstracts it had.

        name_or_key  None: every sequence, one after the other
        abstracts    names, see `kvdb.abstracts`; none of them for none at all
        cost         reads the KV of segments where one is missing, once, and every abstract that stays
        raises       InvalidInput for an unknown name; SequenceNotFound, StorageFull, Damaged, ReadOnly
        """
        self._writable()
        return summarise.set_abstracts(self, name_or_key, abstracts)

    # -- one portable file

    def export_sequence(self, name_or_key: str, target: str | os.PathLike[str]) -> int:
        """Write a sequence, its KV included, to one new zip file that Zarr can open; returns its bytes.

        raises  SequenceNotFound, Damaged; FileExistsError
        """
        return portable.export_sequence(self, name_or_key, Path(target))

    def import_sequence(self, source: str | os.PathLike[str], *, name: str | None = None) -> str:
        """Take in a file that `export_sequence` wrote; returns the sequence's key. Every byte is verified before.

        name    instead of the one in the file
        raises  Damaged for a file that is not whole; IdentityMismatch for another tenant's salt; StorageFull, ReadOnly
        """
        self._writable()
        return portable.import_sequence(self, Path(source), name=name)

    # -- housekeeping

    def _writable(self) -> None:
        if self.readonly:
            raise ReadOnly(f"{self.path}: opened with mode 'r', expected a writable store; open it with 'r+' or 'a'")

    @contextlib.contextmanager
    def write_transaction(self) -> Iterator[Transaction]:
        """A write transaction of this handle; a workspace exists, so that whoever opens the store after a crash looks. What
        a durable one may build on is durable before. For the engine's own modules."""
        self.own_workspace()
        with self.catalog.locked():
            if self.durable:
                with self.catalog.begin() as txn:
                    relaxed = txn.totals("unsynced").count
                if relaxed:
                    self.sync()
            with self.catalog.begin(write=True) as txn:
                self._note_use(txn)
                yield txn

    def _note_use(self, txn: Transaction) -> None:
        """Write down what was touched since the last write."""
        used, self._used = self._used, {}
        for segment, hits in used.items():
            txn.used([segment], hits=hits)

    def own_workspace(self) -> Path:
        """This handle's folder in tmp/, made at its first write. For the engine's own modules."""
        self._writable()
        if self.catalog.closed:
            raise StoreError(f"{self.path}: the store is closed, expected an open one; open it again")
        with self._making_workspace:
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


def _make_ready(root: Path, mode: Mode) -> None:
    """Create or replace the store at `root` as the mode asks."""
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


def _fidelities(exact: bool, accepted: Collection[str]) -> tuple[str, ...] | None:
    """EXACT and what is accepted like it, each once; None: any."""
    return tuple(dict.fromkeys((EXACT, *accepted))) if exact else None


def _still_there(txn: Transaction, segment: str) -> None:
    if txn.segment(segment) is None:
        raise _deleted(segment)


def _deleted(segment: str) -> PrefixDeleted:
    return PrefixDeleted(
        f"segment {segment}: deleted or evicted since the cache was made, expected it to stay; make the cache again"
    )
