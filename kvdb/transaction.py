"""Reads and writes of the catalog inside one LMDB transaction: typed entries, the prefix tree, sequences.

Rules: values are copied out, never handed out as views; a read verifies the frame of every entry it touches; a write
keeps the totals of its table; a listing that does not agree with the totals is Damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

import lmdb
import msgspec
import numpy as np

from kvdb import clock, entries, files, prefix
from kvdb.entries import Counters, Found, Limits, SegmentEntry, Sequence, Span, Totals, Use
from kvdb.environment import TABLES, Environment
from kvdb.errors import Damaged, InvalidInput, SequenceNotFound
from kvdb.format import SegmentInfo
from kvdb.geometry import SEGMENT_TOKENS
from kvdb.identity import EXACT, Identity
from kvdb.prefix import Tokens

_T = TypeVar("_T")
_LOOKED_AT: Final = 64
"""Listings that a search passes over, in each direction, because others than the accepted fidelities begin with the same byte."""


class Transaction:
    def __init__(self, env: Environment, txn: lmdb.Transaction, *, writing: bool = False) -> None:
        self._env, self._txn, self._writing = env, txn, writing
        self._totals: dict[str, Totals] = {}
        self._counters: Counters | None = None
        self._entries: dict[str, SegmentEntry | None] = {}  # read so far: a path is walked more than once
        self._removed = False
        self.manifests: dict[
            str, Sequence | None
        ] = {}  # key -> named sequence as this transaction leaves it, None: gone

    @property
    def takes_away(self) -> bool:
        """Whether files go after the commit: of segments, or manifests."""
        return self._removed or None in self.manifests.values()

    # -- entries

    def _get(self, table: str, key: bytes, kind: type[_T]) -> _T | None:
        entry = self._txn.get(key, db=self._env.db[table])
        return None if entry is None else entries.decode(table, key, entries.unframed(table, key, entry), kind)

    def _put(self, table: str, key: bytes, value: object) -> None:
        try:
            data = msgspec.msgpack.encode(value)
        except OverflowError as e:  # it was read from other entries, or added up from them
            raise Damaged(f"catalog table {table}, entry {key.hex()}: {e}, expected numbers of 64 bits") from e
        except TypeError as e:
            raise InvalidInput(f"catalog table {table}: {e}, expected plain values") from e
        try:  # what cannot be read back must not get in: one such entry would spoil the table
            msgspec.msgpack.decode(data, type=type(value))
        except msgspec.ValidationError as e:
            raise InvalidInput(
                f"catalog table {table}: {value!r:.200}: {e}; pass values of the documented types"
            ) from e
        self._replace(table, key, entries.framed(key, data))

    def _delete(self, table: str, key: bytes) -> None:
        self._replace(table, key, None)

    def _replace(self, table: str, key: bytes, entry: bytes | None) -> None:
        db = self._env.db[table]
        old = self._txn.get(key, db=db)
        if table == "segments":
            self._entries.pop(key.hex(), None)
        if table != "meta":
            totals = self.totals(table)
            if old is not None:
                totals = totals.removing(bytes(old[:8]))
            self._totals[table] = totals if entry is None else totals.adding(entry)
        if entry is not None:
            self._txn.put(key, entry, db=db)
        elif old is not None:
            self._txn.delete(key, db=db)

    def _list(self, table: str, kind: type[_T]) -> Iterator[tuple[bytes, _T]]:
        """Every entry of a table, and then the table's totals compared.

        raises  Damaged
        """
        seen = Totals()
        for key, data in self._frames(table):
            seen = seen.adding(_frame(table, data))
            yield key, entries.decode(table, key, entries.unframed(table, key, data), kind)
        self._compare(table, seen)

    def readable(self, table: str, kind: type[_T], wrong: list[str]) -> Iterator[tuple[bytes, _T]]:
        """The entries of a table that verify. What is wrong with others, or with the table's totals, is added to `wrong`."""
        seen = Totals()
        try:
            for key, data in self._frames(table):
                seen = seen.adding(_frame(table, data))
                try:
                    value = entries.decode(table, key, entries.unframed(table, key, data), kind)
                except Damaged as e:
                    wrong.append(str(e))
                    continue
                yield key, value
            self._compare(table, seen)
        except Damaged as e:
            wrong.append(str(e))

    def _frames(self, table: str) -> Iterator[tuple[bytes, bytes]]:
        """Entries as they are. More than there should be is Damaged: pages may form a circle."""
        db = self._env.db[table]
        expected = self._txn.stat(db)["entries"]
        with self._txn.cursor(db=db) as cursor:
            for number, (key, data) in enumerate(cursor.iternext(keys=True, values=True)):
                if number > expected:
                    raise Damaged(
                        f"catalog table {table}: more than {expected} entries, expected {expected}; run 'kvdb repair'"
                    )
                yield bytes(key), bytes(data[: entries.ENTRY_BYTES])

    def _compare(self, table: str, seen: Totals) -> None:
        expected = self.totals(table)
        if seen != expected:
            raise Damaged(
                f"catalog table {table}: {seen.count} entries, root {seen.root:#018x}, expected {expected.count}, "
                f"{expected.root:#018x}; run 'kvdb repair'"
            )

    def table_problems(self) -> Iterator[tuple[str, str]]:
        """(table, what is wrong) for every entry that does not verify and every table that misses its totals."""
        for table in TABLES:
            seen = Totals()
            try:
                for key, data in self._frames(table):
                    seen = seen.adding(_frame(table, data))
                    try:
                        if table == "tree":
                            self._check_listing(key, data)
                        else:
                            entries.unframed(table, key, data)
                    except Damaged as e:
                        yield table, str(e)
                if table != "meta":
                    self._compare(table, seen)
            except Damaged as e:
                yield table, str(e)

    # -- the store as a whole

    def totals(self, table: str) -> Totals:
        if table not in self._totals:
            self._totals[table] = self._get("meta", b"totals:" + table.encode(), Totals) or Totals()
        return self._totals[table]

    def counters(self) -> Counters:
        if self._counters is None:
            self._counters = self._get("meta", b"counters", Counters) or Counters()
        return self._counters

    def count(self, **more: int) -> None:
        """Add to counters."""
        old = self.counters()
        self._counters = msgspec.structs.replace(old, **{name: getattr(old, name) + n for name, n in more.items()})

    def limits(self) -> Limits:
        return self._get("meta", b"limits", Limits) or Limits()

    def set_limits(self, limits: Limits) -> None:
        self._put("meta", b"limits", limits)

    def now(self) -> float:
        """Store time; in a write transaction each call is later than the one before and is remembered."""
        reading = clock.read(self._get("meta", b"clock", clock.Reading), files.moment())
        if self._writing:
            self._put("meta", b"clock", reading)
        return reading.time

    def finish_writing(self) -> None:
        """Before the commit: what was counted becomes entries."""
        for table, totals in self._totals.items():
            self._put("meta", b"totals:" + table.encode(), totals)
        if self._counters is not None:
            self._put("meta", b"counters", self._counters)

    def keys_of(self, table: str) -> list[str]:
        return [key.hex() for key, _ in self._frames(table)]

    # -- identities

    def identity(self, digest: str) -> Identity | None:
        return self._get("identities", _id(digest), Identity)

    def identities(self) -> dict[str, Identity]:
        """Every readable identity by its digest; damaged ones are left to `check`."""
        found: dict[str, Identity] = {}
        for key, _ in self._frames("identities"):
            with contextlib.suppress(Damaged):
                if (identity := self.identity(key.hex())) is not None:
                    found[key.hex()] = identity
        return found

    def _forget_identities(self) -> None:
        """Drop the identities of which nothing is stored any more: they hold tenants' salts."""
        with self._txn.cursor(db=self._env.db["tree"]) as cursor:
            for digest in self.keys_of("identities"):
                if not cursor.set_key(prefix.block_keys(bytes.fromhex(digest), np.empty(0, "<u4"))[0]):
                    self._delete("identities", bytes.fromhex(digest))

    def add_identity(self, identity: Identity) -> None:
        if self.identity(identity.digest().hex()) is None:
            self._put("identities", identity.digest(), identity)

    # -- segments

    def entry(self, segment: str) -> SegmentEntry | None:
        if segment not in self._entries:
            self._entries[segment] = self._get("segments", _id(segment), SegmentEntry)
        return self._entries[segment]

    def segment(self, segment: str) -> SegmentInfo | None:
        entry = self.entry(segment)
        return None if entry is None else entry.info

    def segment_ids(self) -> list[str]:
        return [key.hex() for key, _ in self._frames("segments")]

    def segments(self) -> dict[str, SegmentEntry]:
        """Every segment by its id. Raises Damaged when one does not verify or is missing."""
        return {key.hex(): entry for key, entry in self._list("segments", SegmentEntry)}

    def tokens(self, segment: str) -> Tokens:
        """Token ids of a segment, (tokens,) uint32."""
        data = self._get("tokens", _id(segment), bytes)
        if data is None:
            raise Damaged(f"segment {segment}: no token ids in the catalog, expected them; run 'kvdb repair'")
        if len(data) % 4 or len(data) > 4 * SEGMENT_TOKENS:
            raise Damaged(
                f"segment {segment}: {len(data)} bytes of token ids, expected 4 for each of at most {SEGMENT_TOKENS}; run "
                "'kvdb repair'"
            )
        return np.frombuffer(data, "<u4")

    def add_segment(self, entry: SegmentEntry, identity: Identity, token_ids: Tokens) -> None:
        """Make a published segment visible, and reachable by prefix. Its parent must be in the catalog.

        raises  InvalidInput for an exact segment after one that is not: what follows an approximation is one
        """
        info = entry.info
        key = _id(info.segment)
        if info.parent is not None and info.fidelity == EXACT and self.path(info.parent)[-1].fidelity != EXACT:
            raise InvalidInput(f"segment {info.segment}: fidelity {EXACT!r} after another one, expected that one's")
        self.add_identity(identity)
        self._put("segments", key, entry)
        self._delete("moved", key)  # it may have been merged away, exported before that and imported now
        self._put("tokens", key, np.ascontiguousarray(token_ids, "<u4").tobytes())
        self._put("uses", key, Use(last_used=self.now(), hits=0))
        self.list_in_tree(info)
        self.count(**_sizes(entry))

    def change_abstracts(self, changed: list[SegmentEntry]) -> None:
        """Put anew the entries of segments that have other abstracts now, and the roots of the sequences through them.
        Their manifests stay: nothing asks for the root in one.

        raises  Damaged when a segment is not there, or a sequence through one was so before
        """
        segments = {entry.info.segment for entry in changed}
        through = [s for s in self.sequences() if any(span.segment in segments for span in s.spans)]
        for sequence in through:
            self.check_root(sequence)
        for entry in changed:
            before = self.span_entries([Span(segment=entry.info.segment, start=0, stop=0)])[0]
            self._removed |= not before.seals.keys() <= entry.seals.keys()
            self._put("segments", _id(entry.info.segment), entry)
            now, then = _sizes(entry), _sizes(before)
            self.count(**{name: now[name] - then[name] for name in now})
        for sequence in through:
            self._put("sequences", _id(sequence.key), self._rooted(sequence))

    def remove_segment(self, info: SegmentInfo) -> None:
        """Children must be gone already.

        raises  Damaged when it is not there
        """
        entry = self.span_entries([Span(segment=info.segment, start=0, stop=0)])[0]
        self._removed = True
        self.unlist(info)
        key = _id(info.segment)
        for table in ("segments", "tokens", "uses", "unsynced"):
            self._delete(table, key)
        self.count(**{name: -size for name, size in _sizes(entry).items()})

    # -- the prefix tree

    def list_in_tree(self, info: SegmentInfo) -> None:
        for node, value in self._listings(info, prefix.first_bytes(info.fidelity)[0]):
            if self._txn.put(node, value, dupdata=False, db=self._env.db["tree"]):
                self._totals["tree"] = self.totals("tree").adding(value[-8:])

    def unlist(self, info: SegmentInfo) -> None:
        for first in prefix.first_bytes(info.fidelity):
            for node, value in self._listings(info, first):
                if self._txn.delete(node, value, db=self._env.db["tree"]):
                    self._totals["tree"] = self.totals("tree").removing(value[-8:])

    def _listings(self, info: SegmentInfo, first: int) -> Iterator[tuple[bytes, bytes]]:
        """Where in the tree a segment stands and how: the digest comes last, so that listings sort by tokens."""
        path = self.path_tokens(info.segment)
        keys = prefix.block_keys(_id(info.identity), path[: info.stop - 1])
        for block in range(info.start // prefix.BLOCK_TOKENS, len(keys)):
            start = block * prefix.BLOCK_TOKENS
            tokens = path[start : min(start + prefix.BLOCK_TOKENS, info.stop)]
            value = prefix.listing(first, tokens) + _id(info.segment)
            yield keys[block], value + entries.framed(keys[block], value)[:8]

    def find(self, identity: str, tokens: Tokens, *, accepted: Collection[str] | None) -> Found:
        """Longest stored prefix of `tokens` through segments of accepted fidelities only; None accepts any. Of equally long ones an exact one.

        Zero case: Found(0, ()). Token ids are compared, whatever the tree says.
        cost  O(log blocks) seeks for each accepted fidelity, or for each that is there, then the token ids of one path. It may be a shorter
              prefix where more than _LOOKED_AT segments hold the same tokens under fidelities of the same first byte
        """
        keys, nearest = prefix.block_keys(_id(identity), tokens), None
        with self._txn.cursor(db=self._env.db["tree"]) as cursor:
            low, high = -1, len(keys) - 1  # the last listed key lies in (low, high]; ancestors list all keys before it
            while low < high:
                middle = (low + high + 1) // 2
                block = tokens[middle * prefix.BLOCK_TOKENS : (middle + 1) * prefix.BLOCK_TOKENS]
                found = self._nearest(cursor, keys[middle], block, accepted)
                low, high, nearest = (low, middle - 1, nearest) if found is None else (middle, high, found)
        if nearest is None:
            return Found(0, ())
        n = prefix.common_prefix(self.path_tokens(nearest), tokens)
        return Found(n, entries.spans_of(self.path(nearest), n))

    def _nearest(self, cursor: lmdb.Cursor, node: bytes, block: Tokens, accepted: Collection[str] | None) -> str | None:
        """The accepted segment listed under a key that agrees longest with `block`."""
        best, nearest = -1, None
        for first in self._present(cursor, node) if accepted is None else _first_bytes(accepted):
            for value in self._neighbours(cursor, node, prefix.listing(first, block), accepted):
                n = prefix.common_prefix(prefix.listed_tokens(value), block)
                if n > best:
                    best, nearest = n, _listed_segment(value)
                if n == len(block):
                    return nearest
        return nearest

    def _present(self, cursor: lmdb.Cursor, node: bytes) -> list[int]:
        """What listings under a key begin with, an exact one's before all others."""
        found = []
        there = cursor.set_key(node)
        while there:
            found.append(cursor.value()[0])
            there = found[-1] < 255 and cursor.set_range_dup(node, bytes([found[-1] + 1]))
        return _exact_first(found)

    def _neighbours(
        self, cursor: lmdb.Cursor, node: bytes, wanted: bytes, accepted: Collection[str] | None
    ) -> Iterator[bytes]:
        """The listings of accepted segments next to `wanted`, after it and before it, that begin with the same byte."""
        if cursor.set_range_dup(node, wanted):
            yield from self._first_accepted(node, cursor.iternext_dup(), wanted[0], accepted)
        above = cursor.set_range_dup(node, wanted)
        if cursor.prev_dup() if above else cursor.set_key(node) and cursor.last_dup():
            yield from self._first_accepted(node, cursor.iterprev_dup(), wanted[0], accepted)

    def _first_accepted(
        self, node: bytes, listed: Iterable[bytes | memoryview], first: int, accepted: Collection[str] | None
    ) -> list[bytes]:
        """The first of these listings that begins with a byte and is of an accepted path; an exact one's whole path is exact."""
        for value in map(bytes, islice(listed, _LOOKED_AT)):
            self._check_listing(node, value)
            if value[0] != first:
                break
            if (
                first == prefix.EXACT_FIRST
                or accepted is None
                or all(info.fidelity in accepted for info in self.path(_listed_segment(value)))
            ):
                return [value]
        return []

    def ending_with(self, identity: str, fidelity: str, tokens: Tokens) -> Iterator[SegmentEntry]:
        """The segments of one fidelity whose path is listed like `tokens` and ends where they do: the digest of all blocks before the last,
        and the tokens of the last, are equal.

        tokens  at least one
        """
        keys = prefix.block_keys(_id(identity), tokens[:-1])
        block = tokens[(len(keys) - 1) * prefix.BLOCK_TOKENS :]
        with self._txn.cursor(db=self._env.db["tree"]) as cursor:
            for first in prefix.first_bytes(fidelity):
                wanted = prefix.listing(first, block)
                there = cursor.set_range_dup(keys[-1], wanted)
                while there and (value := bytes(cursor.value())).startswith(wanted):
                    self._check_listing(keys[-1], value)
                    entry = self.entry(_listed_segment(value))
                    if entry is not None and (entry.info.fidelity, entry.info.stop) == (fidelity, len(tokens)):
                        yield entry
                    there = cursor.next_dup()

    def _check_listing(self, node: bytes, value: bytes) -> None:
        if len(value) != prefix.LISTING_BYTES + 24:
            raise Damaged(
                f"catalog table tree, entry {node.hex()}: {len(value)} bytes, expected {prefix.LISTING_BYTES + 24}"
            )
        entries.unframed("tree", node, value[-8:] + value[:-8])

    def listed_segments(self) -> Iterator[tuple[bytes, str]]:
        """(key, segment) of every listing in the tree that verifies."""
        for node, value in self._frames("tree"):
            with contextlib.suppress(Damaged):
                self._check_listing(node, value)
                yield node, _listed_segment(value)

    # -- paths

    def path(self, segment: str) -> list[SegmentInfo]:
        """The segment and its ancestors, oldest first."""
        chain: list[SegmentInfo] = []
        wanted: str | None = segment
        while wanted is not None:
            info = self.segment(wanted)
            if info is None or (chain and info.start >= chain[-1].start):
                raise Damaged(f"segment {segment}: ancestor {wanted} is missing or misplaced; run 'kvdb repair'")
            chain.append(info)
            wanted = info.parent
        return chain[::-1]

    def path_tokens(self, segment: str) -> Tokens:
        """Token ids from position 0 to the end of the segment."""
        chain = self.path(segment)
        stops = [info.start for info in chain[1:]] + [chain[-1].stop]
        parts = [self.tokens(info.segment)[: stop - info.start] for info, stop in zip(chain, stops, strict=True)]
        return np.concatenate(parts)

    def current(self, segment: str) -> str:
        """The segment that holds these tokens now: another one after a compaction."""
        seen = {segment}
        while self.entry(segment) is None and (moved := self._get("moved", _id(segment), str)) is not None:
            if moved in seen:
                raise Damaged(f"segment {moved}: moved in a circle, expected an end; run 'kvdb repair'")
            seen.add(moved)
            segment = moved
        return segment

    def move(self, segment: str, to: str) -> None:
        self._put("moved", _id(segment), to)

    def forget_gone(self) -> None:
        """After segments have gone: drop forwarding addresses that lead nowhere, and identities of which nothing is stored."""
        self._forget_identities()
        for key, to in list(self._list("moved", str)):
            if self.entry(self.current(to)) is None:
                self._delete("moved", key)

    # -- use

    def use(self, segment: str) -> Use:
        return self._get("uses", _id(segment), Use) or entries.UNUSED

    def set_use(self, segment: str, use: Use) -> None:
        self._put("uses", _id(segment), use)

    def used(self, segments: Iterable[str], *, hits: int = 1) -> None:
        """Note that segments were used now. Those that are gone are left out."""
        now = self.now()
        for segment in segments:
            if self.entry(segment) is not None:
                self._put("uses", _id(segment), Use(last_used=now, hits=self.use(segment).hits + hits))

    # -- what was committed without being forced to disk

    def mark_unsynced(self, segment: str, boot: str) -> None:
        self._put("unsynced", _id(segment), boot)

    def unsynced(self) -> dict[str, str]:
        """Segment -> the boot in which it was written."""
        return {key.hex(): boot for key, boot in self._list("unsynced", str)}

    def mark_synced(self, segment: str) -> None:
        self._delete("unsynced", _id(segment))

    # -- sequences

    def record(
        self,
        last: SegmentInfo,
        tokens: int,
        *,
        name: str | None = None,
        model: str = "",
        replaces: str | None = None,
        ttl_s: float | None = None,
    ) -> Sequence:
        """Enter the sequence of the first `tokens` tokens on the path to `last`; see `KVDB.put_sequence`."""
        path = self.path(last.segment)
        spans = entries.spans_of(path, tokens)
        used = {span.segment for span in spans}
        now = self.now()
        sequence = Sequence(
            key=entries.sequence_key(last.identity, spans, name),
            name=name,
            identity=last.identity,
            tokens=tokens,
            fidelity=fidelity_of(info for info in path if info.segment in used),
            spans=spans,
            created=now,
            model=model,
            expires=None if ttl_s is None else now + ttl_s,
        )
        older = None if replaces in (None, sequence.key) else self.find_sequence(replaces or "")
        if older is not None and not older.protected and used.issuperset(span.segment for span in older.spans):
            self.remove_sequence(older)
        return self.put_sequence(sequence)

    def put_sequence(self, sequence: Sequence) -> Sequence:
        """Insert or update; a name moves to its newest sequence, the older one stays as an unnamed one. Returns the entry."""
        if (name := sequence.name) is not None:
            older = self.named(name)
            if older is not None and older.key != sequence.key:
                pinned = sequence.pinned or older.pinned  # a pin is the name's
                sequence = msgspec.structs.replace(sequence, pinned=pinned)
                self.remove_sequence(older)
                self._put_unnamed(older)
            self._put("names", entries.name_key(name), sequence.key)
        previous = self.find_sequence(sequence.key)
        if previous is not None:
            sequence = msgspec.structs.replace(
                sequence, created=previous.created, pinned=sequence.pinned or previous.pinned
            )
        return self._put_entry(sequence)

    def _put_unnamed(self, sequence: Sequence) -> None:
        key = entries.sequence_key(sequence.identity, sequence.spans, None)
        if self.find_sequence(key) is None:
            self._put_entry(msgspec.structs.replace(sequence, key=key, name=None, pinned=False))

    def _put_entry(self, sequence: Sequence) -> Sequence:
        sequence = self._rooted(sequence)
        self._put("sequences", _id(sequence.key), sequence)
        if sequence.name is not None:
            self.manifests[sequence.key] = sequence
        if sequence.expires is not None:
            self.expect_expiry([sequence.expires, *([] if (due := self.next_expiry()) is None else [due])])
        return sequence

    def check_root(self, sequence: Sequence) -> None:
        """raises  Damaged when the KV behind a sequence is not the one it was made for"""
        root = entries.spans_root(sequence.spans, self.span_entries(sequence.spans))
        if root != sequence.root:
            name = repr(sequence.name) if sequence.name is not None else sequence.key
            raise Damaged(
                f"sequence {name}: root of its segments is {root}, expected {sequence.root}; run 'kvdb repair'"
            )

    def _rooted(self, sequence: Sequence) -> Sequence:
        """As it is entered: bound to the KV behind its spans, and of the fidelity of that KV whatever it said before."""
        behind = self.span_entries(sequence.spans)
        root, fidelity = entries.spans_root(sequence.spans, behind), fidelity_of(entry.info for entry in behind)
        return msgspec.structs.replace(sequence, root=root, fidelity=fidelity, last_used=0.0, hits=0)

    def next_expiry(self) -> float | None:
        """Store time before which no sequence expires; None: none ever does."""
        return self._get("meta", b"next expiry", float)

    def expect_expiry(self, times: list[float]) -> None:
        if times:
            self._put("meta", b"next expiry", min(times))
        else:
            self._delete("meta", b"next expiry")

    def set_pinned(self, sequence: Sequence, pinned: bool) -> None:
        self._put_entry(msgspec.structs.replace(sequence, pinned=pinned))

    def rewrite_spans(self, sequence: Sequence, spans: tuple[Span, ...]) -> None:
        """The same sequence in other segments, or cut to fewer; nothing is left of it without any."""
        self.remove_sequence(sequence)
        if spans:
            tokens = sum(span.stop - span.start for span in spans)
            key = entries.sequence_key(sequence.identity, spans, sequence.name)
            if sequence.name is not None or self.find_sequence(key) is None:
                self.put_sequence(msgspec.structs.replace(sequence, key=key, spans=spans, tokens=tokens))

    def span_entries(self, spans: Iterable[Span]) -> list[SegmentEntry]:
        """Catalog entries behind spans.

        raises  Damaged when one is missing
        """
        found = []
        for span in spans:
            entry = self.entry(span.segment)
            if entry is None:
                raise Damaged(f"segment {span.segment}: not in the catalog, expected it; run 'kvdb verify'")
            found.append(entry)
        return found

    def sequences(self) -> list[Sequence]:
        """All sequences, oldest first.

        raises  Damaged when an entry does not verify or is missing
        """
        found = [self._with_use(sequence) for _, sequence in self._list("sequences", Sequence)]
        return sorted(found, key=lambda s: (s.created, s.key))

    def readable_sequences(self) -> list[Sequence]:
        """The sequences whose entries verify."""
        return [sequence for _, sequence in self.readable("sequences", Sequence, [])]

    def _with_use(self, sequence: Sequence) -> Sequence:
        """As it is where it has no segments: such an entry may verify, and is for `check` to tell."""
        return entries.with_use(sequence, self.use(sequence.spans[-1].segment)) if sequence.spans else sequence

    def named(self, name: str) -> Sequence | None:
        key = self._get("names", entries.name_key(name), str)
        found = None if key is None else self.find_sequence(key)
        return found if found is not None and found.name == name else None

    def find_sequence(self, key: str) -> Sequence | None:
        return self._get("sequences", _id(key), Sequence)

    def sequence(self, name_or_key: str) -> Sequence:
        """By name, else by key or a unique beginning of one.

        raises  SequenceNotFound
        """
        found = self.named(name_or_key)
        if found is None and len(name_or_key) == 32 and set(name_or_key) <= set("0123456789abcdef"):
            found = self.find_sequence(name_or_key)
        if found is None and len(name_or_key) >= 4:
            matches = [s for s in self.sequences() if s.key.startswith(name_or_key)]
            found = matches[0] if len(matches) == 1 else None
        if found is None:
            names = sorted(s.name for s in self.sequences() if s.name)[:8]
            raise SequenceNotFound(
                f"sequence {name_or_key!r}: not in the store, expected a name or key such as {names}; run 'kvdb ls'"
            )
        return self._with_use(found)

    def remove_sequence(self, sequence: Sequence) -> None:
        self._delete("sequences", _id(sequence.key))
        if sequence.name is not None:
            self._delete("names", entries.name_key(sequence.name))
            self.manifests[sequence.key] = None

    def remove_unreferenced(self, gone: Iterable[Sequence]) -> list[SegmentInfo]:
        """After sequences have gone: remove and return those of their segments that no other passes through, children before
        parents."""
        live = {span.segment for _, s in self._list("sequences", Sequence) for span in s.spans}
        candidates = {span.segment for sequence in gone for span in sequence.spans} - live
        dead = [entry.info for segment in sorted(candidates) if (entry := self.entry(segment)) is not None]
        dead.sort(key=lambda info: -info.start)
        for info in dead:
            self.remove_segment(info)
        return dead


def _sizes(entry: SegmentEntry) -> dict[str, int]:
    """A segment's part in the counters."""
    info = entry.info
    return {
        "segment_bytes": entry.disk_bytes,
        "arrays": len(info.array_names()),
        "tokens": info.tokens,
        "kv_bytes": info.tokens * info.geometry.token_bytes,
    }


def _frame(table: str, data: bytes) -> bytes:
    """The digest of an entry; a listing in the tree carries it at its end."""
    return (data[-8:] if table == "tree" else data[:8]).ljust(8, b"\0")


def _first_bytes(fidelities: Iterable[str]) -> list[int]:
    return _exact_first({first for fidelity in fidelities for first in prefix.first_bytes(fidelity)})


def _exact_first(first_bytes: Iterable[int]) -> list[int]:
    return sorted(first_bytes, key=lambda first: (first != prefix.EXACT_FIRST, first))


def _listed_segment(value: bytes) -> str:
    return value[prefix.LISTING_BYTES : -8].hex()


def _id(text: str) -> bytes:
    """An id or key as bytes; what entries say may be any text.

    raises  Damaged
    """
    try:
        return bytes.fromhex(text)
    except ValueError as e:
        raise Damaged(f"catalog: {text[:80]!r} as an id, expected hex digits; run 'kvdb repair'") from e


def fidelity_of(infos: Iterable[SegmentInfo]) -> str:
    """Fidelity of tokens in these segments, oldest first: approximate from the first that is."""
    approximate = [info.fidelity for info in infos if info.fidelity != EXACT]
    return approximate[-1] if approximate else EXACT
