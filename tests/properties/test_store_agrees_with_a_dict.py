"""Whatever is done to a store in whatever order, it holds what a dict of the same operations holds.

The dicts: segments (which tokens, identity, fidelity, parent) and sequences (which spans, tokens, name, pin, expiry). KV values
need no dict: `model_kv` gives them from the tokens. What may go is not predicted but judged: eviction, expiry and repair may
take what the rules let them take, whole leaves first, and must leave all else as it was. Crashes, damage, a full disk and a
second handle are steps like any other. The listing is compared after each step; check() runs every few steps and at the end.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
from helpers import Array, assert_healthy, assert_reads_back, extend, flip, identity, write_segment
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvdb import EXACT, KVDB, Geometry, LayerGroup, Sequence, Span
from kvdb.abstracts import ABSTRACTS, build_all
from kvdb.entries import Limits, sequence_key
from kvdb.errors import InvalidInput, KVDBError, SequenceNotFound, StorageFull
from kvdb.files import Moment
from kvdb.prefix import common_prefix
from kvdb.reader import Reader
from kvdb.repair import repair
from kvdb.space import Space
from kvdb.transaction import Transaction

IDENTITIES = [identity("w0"), identity("w1")]
DIGESTS = [each.digest().hex() for each in IDENTITIES]
NAMES = ["a", "b", "../c"]
TINY = Geometry(dtype="bfloat16", chunk_tokens=16, groups=(LayerGroup(layers=(0,), kv_heads=1, head_dim=4),))
MEMORY = Path("/dev/shm")
META_PAGES = 2 * 4096
CHECK_EVERY = 8
PLACES = st.integers(
    0, 2**32 - 1
)  # modulo the size of a file: the exact size differs from run to run, by its timestamps


class KnownSegment(NamedTuple):
    identity: int
    fidelity: str
    tokens: tuple[int, ...]  # from position 0 to its end
    parent: str | None


class KnownSequence(NamedTuple):
    identity: int
    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    name: str | None = None
    pinned: bool = False
    expires: int | None = None

    def passes(self, segments: set[str]) -> bool:
        return any(span.segment in segments for span in self.spans)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # Names in order of making: with random ones, ties between equal paths would make runs differ.
        ids = itertools.count()
        self.time, self.steps, self.full, self.cap = 1000, 0, False, None
        free = shutil.disk_usage(tempfile.gettempdir()).free
        self.patches = [
            patch("kvdb.store.new_segment_id", lambda: f"{next(ids):032x}"),
            patch("kvdb.files.moment", lambda: Moment(float(self.time), "boot", float(self.time))),
            patch("kvdb.files.free_bytes", lambda path: 0 if self.full else free),
            patch("kvdb.files.fsync", lambda fd, path: None),  # nothing here can see it
        ]
        for each in self.patches:
            each.start()
        self.folder = Path(tempfile.mkdtemp(prefix="kvdb-machine-", dir=MEMORY if MEMORY.is_dir() else None))
        self.root, self.exported = self.folder / "s", dict[Path, tuple[int, tuple[int, ...]]]()
        self.db = KVDB.open(self.root)
        self.others: list[KVDB] = []
        self.segments: dict[str, KnownSegment] = {}
        self.sequences: dict[str, KnownSequence] = {}
        self.abstracts: dict[str, set[str]] = {}  # of each segment, when it was last looked at

    def teardown(self) -> None:
        try:
            if not self.db.catalog.closed:
                assert_healthy(self.db)
        finally:
            self.close()
            for each in self.patches:
                each.stop()
            shutil.rmtree(self.folder)

    def close(self) -> None:
        for db in (self.db, *self.others):
            db.close()
        self.others = []

    # -- what a dict would do

    def longest(self, ident: int, tokens: Array, *, exact: bool) -> int:
        found = 0
        for segment in self.segments.values():
            if segment.identity == ident and (segment.fidelity == EXACT or not exact):
                pairs = zip(segment.tokens, tokens.tolist(), strict=False)
                found = max(found, sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return found

    def named(self) -> dict[str, str]:
        return {known.name: key for key, known in self.sequences.items() if known.name is not None}

    def dead(self, known: KnownSequence) -> bool:
        return known.expires is not None and known.expires < self.time and not known.pinned

    def enter(self, key: str, known: KnownSequence) -> None:
        """A name moves to its newest sequence and takes its pin along; the older one goes on without."""
        older = None if known.name is None else self.named().get(known.name)
        pinned = key in self.sequences and self.sequences[key].pinned
        if older is not None and older != key:
            before = self.sequences.pop(older)
            pinned |= before.pinned
            nameless = sequence_key(DIGESTS[before.identity], before.spans, None)
            self.sequences.setdefault(nameless, before._replace(name=None, pinned=False))
        self.sequences[key] = known._replace(pinned=pinned)

    def remove(self, key: str) -> None:
        """A sequence goes, and segments that no other passes through."""
        del self.sequences[key]
        live = {span.segment for known in self.sequences.values() for span in known.spans}
        self.segments = {s: known for s, known in self.segments.items() if s in live}

    # -- what the store says

    def look(self) -> tuple[dict[str, KnownSequence], dict[str, KnownSegment]]:
        sequences, segments = dict[str, KnownSequence](), dict[str, KnownSegment]()
        for s in self.db.sequences():
            known, ident = self.sequences.get(s.key), DIGESTS.index(s.identity)
            tokens = known.tokens if known is not None else tuple(self.db.tokens(s.spans).tolist())
            expires = None if s.expires is None else round(s.expires)
            sequences[s.key] = KnownSequence(ident, tokens, s.spans, s.name, s.pinned, expires)
            assert s.tokens == len(tokens)
            missing = [span for span in s.spans if span.segment not in self.segments and span.segment not in segments]
            segments |= {p.segment: self.segments[p.segment] for p in s.spans if p.segment in self.segments}
            for segment in self.db.segments(tuple(missing)):
                info, below = segment.info, () if segment.info.parent is None else segments[segment.info.parent].tokens
                own = self.db.tokens((Span(segment=info.segment, start=0, stop=info.tokens),))
                path = (*below[: info.start], *own.tolist())
                segments[info.segment] = KnownSegment(ident, info.fidelity, path, info.parent)
        return sequences, segments

    def agree(self, *, evicted: bool = False, named: bool = False) -> None:
        """Judge what is there against the dicts, then take it over.

        evicted  whether unprotected KV may have gone; named  named sequences too
        """
        evicted |= self.cap is not None or self.full
        sequences, segments = self.look()
        for key, known in self.sequences.items():
            protected = known.pinned or (known.name is not None and not named)
            whole = all(span.segment in segments for span in known.spans)
            if not self.dead(known) and (protected or whole or not evicted):
                assert sequences.get(key) == known
        for key, found in sequences.items():
            if key in self.sequences:
                assert found == self.sequences[key]
            else:
                assert evicted
                assert any(self.cut(found, known) for k, known in self.sequences.items() if k not in sequences)
        assert segments.items() <= self.segments.items()
        assert all(known.parent in segments for known in segments.values() if known.parent is not None)
        self.sequences, self.segments = sequences, segments

    def cut(self, found: KnownSequence, known: KnownSequence) -> bool:
        tokens = known.tokens[: len(found.tokens)]
        return not known.pinned and found == (
            known.identity,
            tokens,
            known.spans[: len(found.spans)],
            None,
            False,
            known.expires,
        )

    def learn(self, ident: int, tokens: Array, key: str, name: str | None) -> None:
        """A sequence was stored: its segments hold its tokens, and nothing else appeared."""
        spans, position = self.db.sequence(key).spans, 0
        for span, segment in zip(spans, self.db.segments(spans), strict=True):
            info = segment.info
            position += span.stop - span.start
            if info.segment not in self.segments:  # an imported one may go on where the sequence branches off
                own = self.db.tokens((Span(segment=info.segment, start=0, stop=info.tokens),)).tolist()
                path = (*tokens[: info.start].tolist(), *own)
                self.segments[info.segment] = KnownSegment(ident, info.fidelity, path, info.parent)
            assert self.segments[info.segment].tokens[:position] == tuple(tokens[:position].tolist())
        assert position == len(tokens)
        self.enter(key, KnownSequence(ident, tuple(tokens.tolist()), spans, name))

    def attempt(self, tokens: Array, ident: int, action: Callable[[], None]) -> None:
        """Do what may find no room: then it says so, and only a beginning of what was to be stored may be there."""
        try:
            action()
        except StorageFull:
            assert self.full or self.cap is not None
            wanted = tuple(tokens.tolist())
            sequences, segments = self.look()
            for key, found in sequences.items():
                fresh = any(span.segment not in self.segments for span in found.spans)
                if (
                    fresh
                    and found.identity == ident
                    and found.name is None
                    and found.tokens == wanted[: len(found.tokens)]
                ):
                    self.sequences[key] = found
                    self.segments |= {span.segment: segments[span.segment] for span in found.spans}
        self.agree()

    def draw_tokens(self, data: st.DataObject) -> Array:
        """Branches off anything known, at any token."""
        start: tuple[int, ...] = ()
        if self.segments:
            start = self.segments[data.draw(st.sampled_from(list(self.segments)))].tokens
            start = start[: data.draw(st.integers(0, len(start)))]
        tail = data.draw(st.lists(st.integers(0, 1), max_size=5))
        tail += [data.draw(st.integers(0, 2))] * data.draw(st.integers(0 if start or tail else 1, 70))
        return np.array([*start, *tail], "<u4")

    def draw_sequence(self, data: st.DataObject) -> tuple[str, KnownSequence]:
        return data.draw(st.sampled_from(list(self.sequences.items())))

    # -- steps: storing

    @initialize(data=st.data())
    def begin_with_something(self, data: st.DataObject) -> None:
        self.commit(data, 0, EXACT, 64, None)

    @rule(
        data=st.data(),
        ident=st.integers(0, 1),
        fidelity=st.sampled_from([EXACT, "sparse"]),
        segment_tokens=st.sampled_from([16, 32, 80, 1 << 20]),
        name=st.none() | st.sampled_from(NAMES),
    )
    def commit(self, data: st.DataObject, ident: int, fidelity: str, segment_tokens: int, name: str | None) -> None:
        tokens, spare = self.draw_tokens(data), data.draw(st.integers(0, 1))
        known = self.longest(ident, tokens, exact=fidelity == EXACT)

        def store() -> None:
            stored = extend(
                self.db, tokens, name=name, geometry=TINY, ident=IDENTITIES[ident], fidelity=fidelity,
                segment_tokens=segment_tokens, spare=spare,
            )  # fmt: skip
            assert stored.written == (known < len(tokens))
            self.learn(ident, tokens, stored.key, name)

        self.attempt(tokens, ident, store)

    @precondition(lambda self: self.cap is None)
    @rule(data=st.data(), ident=st.integers(0, 1), published=st.booleans())
    def crash(self, data: st.DataObject, ident: int, published: bool) -> None:
        """The process dies with a writer open, or right after a commit; another opens the store."""
        tokens = self.draw_tokens(data)
        writer = write_segment(self.db, tokens, geometry=TINY, ident=IDENTITIES[ident])
        if published:
            self.learn(ident, tokens, self.db.commit(writer, tokens).sequence, None)
        assert self.db._workspace_lock is not None
        os.close(self.db._workspace_lock)  # what death does to a lock
        self.db._workspace = self.db._workspace_lock = None
        self.close()
        writer._close()
        self.db = KVDB.open(self.root)
        assert os.listdir(self.root / "tmp") == []
        self.agree()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), ttl=st.sampled_from([25, 125]))
    def let_it_expire(self, data: st.DataObject, ttl: int) -> None:
        key, known = self.draw_sequence(data)
        last = self.db.segments(known.spans)[-1]

        def store() -> None:
            assert self.db.put_sequence(last, len(known.tokens), name=known.name, ttl_s=ttl) == key
            self.sequences[key] = known._replace(expires=self.time + ttl)

        self.attempt(np.array(known.tokens, "<u4"), known.identity, store)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        key, known = self.draw_sequence(data)
        self.db.pin(key if known.name is None else known.name, pinned)
        self.sequences[key] = known._replace(pinned=pinned)
        self.agree()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.db.touch(self.draw_sequence(data)[1].spans)

    # -- steps: letting go

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), by_name=st.booleans())
    def delete(self, data: st.DataObject, by_name: bool) -> None:
        key, known = self.draw_sequence(data)
        what = known.name if by_name and known.name is not None else key
        if known.pinned:
            with pytest.raises(InvalidInput, match="pinned"):
                self.db.delete(what)
        else:
            self.db.delete(what)
            self.remove(key)
        self.agree()

    @rule(share=st.sampled_from([0.0, 0.3, 0.7, 0.9]), named=st.booleans())
    def evict(self, share: float, named: bool) -> None:
        before, target = set(self.sequences), int(self.db.info()["disk_bytes"] * share)
        lost = {s.key for s in self.db.evict(target, named=named)}
        self.agree(evicted=True, named=named)
        assert before - set(self.sequences) == lost
        assert not any(self.dead(known) for known in self.sequences.values())
        if self.db.info()["disk_bytes"] > target:
            assert self.all_protected(named=named)

    @rule(seconds=st.sampled_from([0, 50, 200]))
    def gc(self, seconds: int) -> None:
        self.time += seconds
        self.db.gc()
        self.agree()
        assert not any(self.dead(known) for known in self.sequences.values())
        assert os.listdir(self.root / "trash") == []

    @rule(seconds=st.sampled_from([10, 100]))
    def time_passes(self, seconds: int) -> None:
        self.time += seconds

    # -- steps: other shapes of the same

    @precondition(lambda self: self.cap is None)
    @rule(data=st.data(), everything=st.booleans(), after_turns=st.booleans())
    def compact(self, data: st.DataObject, everything: bool, after_turns: bool) -> None:
        """Sequences stay what they are, in fewer segments, which hold all the tokens of the ones they replace."""
        if after_turns:
            self.commit(data, 0, EXACT, 16, None)
        before, old = Counter(known._replace(spans=()) for known in self.sequences.values()), self.segments
        named = None if everything or not self.sequences else self.draw_sequence(data)[0]
        saved = self.db.compact(named)
        sequences, segments = self.look()
        assert Counter(known._replace(spans=()) for known in sequences.values()) == before
        assert len(segments) == len(old) - saved
        for known in old.values():
            assert any(
                (each.identity, each.fidelity, each.tokens[: len(known.tokens)])
                == (known.identity, known.fidelity, known.tokens)
                for each in segments.values()
            )
        self.sequences, self.segments = sequences, segments
        if saved:
            self.read_all()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), wanted=st.sets(st.sampled_from(sorted(ABSTRACTS))), everything=st.booleans())
    def set_abstracts(self, data: st.DataObject, wanted: set[str], everything: bool) -> None:
        """The segments of a sequence, or all, have these abstracts, or what they had where there is no room; KV stays put."""
        key, known = self.draw_sequence(data)
        chosen = set(self.segments) if everything else {span.segment for span in known.spans}
        before, files = self.look_at_abstracts(), self.kv_files()
        try:
            changed = self.db.set_abstracts(None if everything else key, wanted)
            self.abstracts |= dict.fromkeys(chosen, wanted)
            others = {segment for segment in chosen if before[segment] != wanted}
            # Room for one sequence may be made of another one, before it is its turn.
            left = others & self.look_at_abstracts().keys() if self.cap is not None else others
            assert len(left) <= changed <= len(others)
        except StorageFull:
            assert self.cap is not None
            if everything:  # those that were done before stay so
                self.abstracts = self.look_at_abstracts()
        self.agree()
        now = self.kv_files()
        assert all(files[path] == inode for path, inode in now.items())
        if key in self.sequences:
            assert_reads_back(self.db, np.array(known.tokens, "<u4"), known.spans)

    def kv_files(self) -> dict[Path, int]:
        """Every shard of KV and its inode."""
        return {path: path.stat().st_ino for path in (self.root / "chunks").glob("*.kv*/c.*")}

    def look_at_abstracts(self) -> dict[str, set[str]]:
        with self.db.catalog.begin() as txn:
            return {segment: set(entry.info.abstracts) for segment, entry in txn.segments().items()}

    @rule(
        mode=st.sampled_from(["a", "r+"]),
        read_mode=st.sampled_from(["mmap", "pread"]),
        durability=st.sampled_from(["commit", "relaxed"]),
        grace_s=st.sampled_from([0.0, 10.0]),
    )
    def reopen(self, mode: str, read_mode: str, durability: str, grace_s: float) -> None:
        self.close()
        self.db = KVDB.open(self.root, mode, read_mode=read_mode, durability=durability, grace_s=grace_s)  # type: ignore[arg-type]
        self.agree()
        assert not any(self.dead(known) for known in self.sequences.values())

    @rule()
    def take_another_handle(self) -> None:
        if not self.others:
            self.others.append(KVDB.open(self.root))
        self.others.append(self.db)
        self.db = self.others.pop(0)
        self.agree()

    @precondition(lambda self: self.sequences and len(self.exported) < 3)
    @rule(data=st.data())
    def export(self, data: st.DataObject) -> None:
        key, known = self.draw_sequence(data)
        if not self.dead(known):
            target = self.folder / f"{len(self.exported)}.zip"
            self.db.export_sequence(key, target)
            self.exported[target] = known.identity, known.tokens

    @precondition(lambda self: self.exported)
    @rule(data=st.data(), elsewhere=st.booleans(), name=st.sampled_from(NAMES))
    def import_(self, data: st.DataObject, elsewhere: bool, name: str) -> None:
        source, (ident, known) = data.draw(st.sampled_from(list(self.exported.items())))
        tokens = np.array(known, "<u4")
        if elsewhere:
            with KVDB.open(self.folder / "other") as other:
                assert_reads_back(other, tokens, other.sequence(other.import_sequence(source, name=name)).spans)
                assert_healthy(other)
            return

        def store() -> None:
            holder = self.named().get(name)
            if holder is not None and self.sequences[holder].pinned:
                with pytest.raises(InvalidInput, match="pinned"):
                    self.db.import_sequence(source, name=name)
            else:
                self.learn(ident, tokens, self.db.import_sequence(source, name=name), name)

        self.attempt(tokens, ident, store)

    # -- steps: trouble

    @rule(data=st.data())
    def disk_is_full(self, data: st.DataObject) -> None:
        """Whatever is not protected may go to make room, and a write that needs more says so."""
        self.full = True
        try:
            self.commit(data, 0, EXACT, 80, None)
        finally:
            self.full = False

    @rule(share=st.sampled_from([0.5, 0.9, 1.5, None]))
    def set_size_cap(self, share: float | None) -> None:
        self.cap = None if share is None else int(self.db.info()["used_bytes"] * share)
        self.db.set_size_cap("unlimited" if self.cap is None else self.cap)
        self.agree()

    @rule(data=st.data(), bit=st.integers(0, 7))
    def damage_a_segment(self, data: st.DataObject, bit: int) -> None:
        """A flipped bit costs its segment and what continues it, or nothing when it is one that nobody reads."""
        self.close()
        paths = sorted(path for path in (self.root / "chunks").rglob("*") if path.is_file())
        path = data.draw(st.sampled_from(paths))
        flip(path, data.draw(PLACES) % path.stat().st_size, bit)
        report = repair(self.root, apply=True)
        assert report.remaining == []
        gone = {path.parent.name.partition(".")[0]} & set(self.segments) if report.problems else set[str]()
        while more := {segment for segment, known in self.segments.items() if known.parent in gone} - gone:
            gone |= more
        assert gone == {a.split()[2].rstrip(":") for a in report.actions if a.startswith("quarantine segment")}
        assert gone == {name.partition(".")[0] for name in os.listdir(self.root / "quarantine")} - {"zarr"}
        shutil.rmtree(self.root / "quarantine")
        for key, known in list(self.sequences.items()):
            if known.passes(gone):
                del self.sequences[key]
                left = tuple(span for span in known.spans if span.segment not in gone)
                if left:
                    tokens = known.tokens[: sum(span.stop for span in left)]
                    cut = KnownSequence(known.identity, tokens, left)
                    self.sequences.setdefault(sequence_key(DIGESTS[known.identity], left, None), cut)
        self.segments = {s: known for s, known in self.segments.items() if s not in gone}
        self.db = KVDB.open(self.root)
        self.agree()
        if not gone:
            self.read_all()

    @precondition(lambda self: any(known.name for known in self.sequences.values()))
    @rule(data=st.data(), bit=st.integers(0, 7))
    def damage_a_manifest(self, data: st.DataObject, bit: int) -> None:
        self.close()
        path = data.draw(st.sampled_from(sorted((self.root / "names").iterdir())))
        before = manifest(path)
        flip(path, data.draw(PLACES) % path.stat().st_size, bit)
        assert repair(self.root, apply=True).remaining == []
        assert manifest(path) == before
        shutil.rmtree(self.root / "quarantine")
        self.db = KVDB.open(self.root)
        self.agree()

    @precondition(lambda self: self.cap is None)
    @rule(data=st.data(), bit=st.integers(0, 7), lost=st.booleans())
    def damage_the_catalog(self, data: st.DataObject, bit: int, lost: bool) -> None:
        """Rebuilt, it has every segment and every name; unnamed sequences may end elsewhere, and forget their expiry."""
        self.close()
        path = self.root / "catalog" / "data.mdb"
        if lost:
            path.unlink()
        else:
            pages = len(path.read_bytes().rstrip(b"\0")) - META_PAGES
            flip(path, META_PAGES + data.draw(PLACES) % pages, bit)
        report = repair(self.root, apply=True, rebuild=True)
        assert report.remaining == []
        shutil.rmtree(self.root / "quarantine")
        self.db = KVDB.open(self.root)
        before, named = self.segments, self.named()
        sequences, segments = self.look()
        dead = {key for key, known in self.sequences.items() if self.dead(known)}
        assert segments.items() <= before.items()
        if not dead:
            assert segments == before
        for key, known in self.sequences.items():
            if known.name is not None and key not in dead:
                found = sequences.get(key)
                assert found is not None
                assert found._replace(pinned=known.pinned, expires=known.expires) == known
        assert {known.name for known in sequences.values() if known.name} <= set(named)
        for found in sequences.values():
            assert found.tokens == segments[found.spans[-1].segment].tokens[: len(found.tokens)]
        self.sequences, self.segments = sequences, segments

    # -- steps: reading

    @rule(data=st.data(), ident=st.integers(0, 1), exact=st.booleans())
    def match(self, data: st.DataObject, ident: int, exact: bool) -> None:
        tokens = self.draw_tokens(data)
        found = self.db.match(IDENTITIES[ident], tokens, exact=exact)
        assert found.tokens == self.longest(ident, tokens, exact=exact)
        assert_reads_back(self.db, tokens, found.spans)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def read_back(self, data: st.DataObject) -> None:
        key, known = self.draw_sequence(data)
        if self.dead(known):
            with pytest.raises(SequenceNotFound, match="expired"):
                self.db.sequence(key)
        else:
            assert self.db.sequence(key).identity == DIGESTS[known.identity]
            assert_reads_back(self.db, np.array(known.tokens, "<u4"), self.db.sequence(key).spans)

    def read_all(self) -> None:
        for known in self.sequences.values():
            assert_reads_back(self.db, np.array(known.tokens, "<u4"), known.spans)

    # -- always

    @invariant()
    def it_lists_what_the_dict_lists(self) -> None:
        listed = {s.key: (s.name, s.pinned, s.tokens) for s in self.db.sequences()}
        assert listed == {key: (k.name, k.pinned, len(k.tokens)) for key, k in self.sequences.items()}
        named = self.named()
        for name in NAMES:
            if name in named and not self.dead(self.sequences[named[name]]):
                assert self.db.sequence(name).key == named[name]
            else:
                with pytest.raises(SequenceNotFound):
                    self.db.sequence(name)

    @invariant()
    def it_has_the_abstracts_it_was_given(self) -> None:
        now = self.look_at_abstracts()
        assert all(self.abstracts.get(segment, names) == names for segment, names in now.items())
        self.abstracts = now

    @invariant()
    def it_is_healthy(self) -> None:
        self.steps += 1
        if self.steps % CHECK_EVERY == 0:
            assert_healthy(self.db)

    @invariant()
    def it_keeps_its_cap_or_only_what_is_protected(self) -> None:
        if self.cap is not None and self.occupied() > self.cap:
            assert self.all_protected()

    def all_protected(self, *, named: bool = False) -> bool:
        """Whether nothing is left that eviction may take."""
        stays = [known for known in self.sequences.values() if known.pinned or (known.name is not None and not named)]
        return {span.segment for known in stays for span in known.spans} == set(self.segments)

    def occupied(self) -> int:
        found = (os.path.join(folder, name) for folder, _, names in os.walk(self.root) for name in (".", *names))
        return sum(os.lstat(path).st_blocks * 512 for path in found)


def manifest(path: Path) -> Sequence:
    """What a manifest says that a commit which fails cannot have changed, and other abstracts do not."""
    found = msgspec.json.decode(path.read_bytes(), type=Sequence)
    return msgspec.structs.replace(found, pinned=False, expires=None, model="", root="", last_used=0.0, hits=0)


SIZES = {"dev": (25, 30), "ci": (200, 75), "nightly": (1000, 500)}  # profile -> examples, steps of each


def machine_settings(examples: int, steps: int) -> settings:
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=examples, stateful_step_count=steps, suppress_health_check=quiet)


@pytest.mark.slow
def test_the_store_agrees_with_a_dict() -> None:
    size = SIZES[settings.get_current_profile_name()]
    run_state_machine_as_test(StoreMachine, settings=machine_settings(*size))


# -- planted bugs


def delete_leaves_segments(m: pytest.MonkeyPatch) -> None:
    m.setattr(Transaction, "remove_unreferenced", lambda self, gone: [])


def a_match_runs_one_token_too_far(m: pytest.MonkeyPatch) -> None:
    m.setattr("kvdb.prefix.common_prefix", lambda a, b: min(common_prefix(a, b) + 1, len(a), len(b)))


def sweeping_is_skipped(m: pytest.MonkeyPatch) -> None:
    m.setattr("kvdb.folder.sweep", lambda root, catalog: None)


def eviction_ignores_pins(m: pytest.MonkeyPatch) -> None:
    real = Space._take_leaves

    def careless(self: Space, txn: Transaction, *args: Any, **options: Any) -> Any:
        unpinned = [msgspec.structs.replace(s, pinned=False) for s in txn.sequences()]
        with patch.object(txn, "sequences", lambda: unpinned):
            return real(self, txn, *args, **options)

    m.setattr(Space, "_take_leaves", careless)


def eviction_takes_parents_first(m: pytest.MonkeyPatch) -> None:
    m.setattr("kvdb.space.Counter", lambda parents: Counter())


def expiry_never_comes(m: pytest.MonkeyPatch) -> None:
    m.setattr("kvdb.space.expire", lambda txn: ([], []))


def the_cap_is_not_enforced(m: pytest.MonkeyPatch) -> None:
    m.setattr(Space, "enforce", lambda self, keep=None: [])


def compaction_loses_the_last_chunk(m: pytest.MonkeyPatch) -> None:
    real = Reader.rows

    def forgetful(self: Reader, *args: Any) -> Array:
        rows = real(self, *args).copy()
        rows[-1] = 0
        return rows

    m.setattr(Reader, "rows", forgetful)


def compaction_merges_other_branches(m: pytest.MonkeyPatch) -> None:
    m.setattr("kvdb.compact.np.array_equal", lambda a, b: True)


def abstracts_are_made_of_other_keys(m: pytest.MonkeyPatch) -> None:
    m.setattr("kvdb.summarise.build_all", lambda names, keys, values, *rest: build_all(names, keys + 1, values, *rest))


def abstracts_that_go_stay_in_the_catalog(m: pytest.MonkeyPatch) -> None:
    m.setattr(Transaction, "change_abstracts", lambda self, changed: None)


def repair_keeps_a_damaged_segment(m: pytest.MonkeyPatch) -> None:
    m.setattr("kvdb.repair.drop_segments", lambda *args, **options: [])


def a_rebuild_forgets_names(m: pytest.MonkeyPatch) -> None:
    m.setattr("kvdb.repair._salvage", lambda path: ([], Limits()))


PLANTED = [
    delete_leaves_segments,
    a_match_runs_one_token_too_far,
    sweeping_is_skipped,
    eviction_ignores_pins,
    eviction_takes_parents_first,
    expiry_never_comes,
    the_cap_is_not_enforced,
    compaction_loses_the_last_chunk,
    compaction_merges_other_branches,
    abstracts_are_made_of_other_keys,
    abstracts_that_go_stay_in_the_catalog,
    repair_keeps_a_damaged_segment,
    a_rebuild_forgets_names,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__.replace("_", " "))
def test_the_machine_sees_planted_bugs(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    once = {"derandomize": True, "database": None, "phases": [Phase.generate], "report_multiple_bugs": False}
    quick = settings(machine_settings(1000, 40), **once)
    with pytest.raises((AssertionError, KVDBError, ExceptionGroup)):
        run_state_machine_as_test(StoreMachine, settings=quick)
