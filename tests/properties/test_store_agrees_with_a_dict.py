"""Whatever is done to a store in whatever order, it holds what a dict of the same operations holds.

The dicts: segments (which tokens, identity, fidelity), sequences (which segments, tokens) and names. KV values need no dict:
`model_kv` gives them from the tokens. Crashing and reopening are steps like any other; check() holds after each.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from helpers import Array, assert_healthy, assert_reads_back, extend, identity, write_segment
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvdb import EXACT, KVDB, Sequence
from kvdb.entries import sequence_key
from kvdb.errors import SequenceNotFound
from kvdb.prefix import common_prefix

IDENTITIES = [identity("w0"), identity("w1")]
NAMES = ["a", "b", "../c"]


class KnownSegment(NamedTuple):
    identity: int
    fidelity: str
    tokens: list[int]  # from position 0 to its end


class KnownSequence(NamedTuple):
    identity: int
    tokens: list[int]
    segments: frozenset[str]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # Names in order of making: with random ones, ties between equal paths would make runs differ.
        ids = itertools.count()
        self.naming = patch("kvdb.store.new_segment_id", lambda: f"{next(ids):032x}")
        self.naming.start()
        self.root = Path(tempfile.mkdtemp(prefix="kvdb-machine-"))
        self.db = KVDB.open(self.root / "s")
        self.segments: dict[str, KnownSegment] = {}
        self.sequences: dict[str, KnownSequence] = {}
        self.names: dict[str, str] = {}

    def teardown(self) -> None:
        self.naming.stop()
        self.db.close()
        shutil.rmtree(self.root)

    # -- what a dict would do

    def longest(self, ident: int, tokens: Array, *, exact: bool) -> int:
        best = 0
        for segment in self.segments.values():
            if segment.identity == ident and (segment.fidelity == EXACT or not exact):
                n = 0
                for a, b in zip(segment.tokens, tokens.tolist(), strict=False):
                    if a != b:
                        break
                    n += 1
                best = max(best, n)
        return best

    def forget(self, key: str) -> None:
        del self.sequences[key]
        self.names = {name: k for name, k in self.names.items() if k != key}
        live = {segment for known in self.sequences.values() for segment in known.segments}
        self.segments = {s: known for s, known in self.segments.items() if s in live}

    def learn_segments(self, ident: int, tokens: Array, key: str) -> None:
        spans = self.db.sequence(key).spans
        for segment in self.db.segments(spans):
            known = KnownSegment(ident, segment.info.fidelity, tokens[: segment.info.stop].tolist())
            if segment.info.segment not in self.segments:
                self.segments[segment.info.segment] = known
        self.sequences[key] = KnownSequence(ident, tokens.tolist(), frozenset(s.segment for s in spans))

    def draw_tokens(self, data: st.DataObject) -> Array:
        """Branches off anything known, at any token."""
        start: list[int] = []
        if self.segments:
            known = data.draw(st.sampled_from(list(self.segments)))
            start = self.segments[known].tokens
            start = start[: data.draw(st.integers(0, len(start)))]
        tail = data.draw(st.lists(st.integers(0, 1), max_size=5))
        tail += [data.draw(st.integers(0, 2))] * data.draw(st.integers(0 if start or tail else 1, 70))
        return np.array(start + tail, "<u4")

    def same(self, entry: Sequence, known: KnownSequence) -> bool:
        return (
            entry.identity == IDENTITIES[known.identity].digest().hex()
            and frozenset(span.segment for span in entry.spans) == known.segments
            and entry.tokens == len(known.tokens)
        )

    # -- steps

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
        tokens = self.draw_tokens(data)
        stored = extend(
            self.db,
            tokens,
            name=name,
            ident=IDENTITIES[ident],
            fidelity=fidelity,
            segment_tokens=segment_tokens,
            spare=data.draw(st.integers(0, 1)),
        )
        assert stored.written == (self.longest(ident, tokens, exact=fidelity == EXACT) < len(tokens))
        if name is not None:
            older = self.names.get(name, stored.key)
            if older != stored.key:  # it goes on without its name
                known = self.sequences.pop(older)
                spans = next(s.spans for s in self.db.sequences() if s.name is None and self.same(s, known))
                self.sequences[sequence_key(IDENTITIES[known.identity].digest().hex(), spans, None)] = known
            self.names[name] = stored.key
        self.learn_segments(ident, tokens, stored.key)

    @rule(data=st.data(), ident=st.integers(0, 1), published=st.booleans())
    def crash(self, data: st.DataObject, ident: int, published: bool) -> None:
        """The process dies with a writer open, or right after a commit; another opens the store."""
        tokens = self.draw_tokens(data)
        writer = write_segment(self.db, tokens, ident=IDENTITIES[ident])
        if published:
            self.learn_segments(ident, tokens, self.db.commit(writer, tokens).sequence)
        assert self.db._workspace_lock is not None
        os.close(self.db._workspace_lock)  # what death does to a lock
        self.db._workspace = self.db._workspace_lock = None
        self.db.close()
        writer._close()
        self.db = KVDB.open(self.root / "s")
        assert os.listdir(self.root / "s" / "tmp") == []

    @rule(mode=st.sampled_from(["a", "r+"]), read_mode=st.sampled_from(["mmap", "pread"]))
    def reopen(self, mode: str, read_mode: str) -> None:
        self.db.close()
        self.db = KVDB.open(self.root / "s", mode, read_mode=read_mode)  # type: ignore[arg-type]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.sequences)))
        name = next((n for n, k in self.names.items() if k == key), None)
        self.db.delete(name if name is not None and data.draw(st.booleans()) else key)
        self.forget(key)

    @rule()
    def evict(self) -> None:
        evicted = [s.key for s in self.db.evict(0)]
        assert set(evicted) == set(self.sequences) - set(self.names.values())
        for key in evicted:
            self.forget(key)

    @rule(data=st.data(), ident=st.integers(0, 1), exact=st.booleans())
    def match(self, data: st.DataObject, ident: int, exact: bool) -> None:
        tokens = self.draw_tokens(data)
        found = self.db.match(IDENTITIES[ident], tokens, exact=exact)
        assert found.tokens == self.longest(ident, tokens, exact=exact)
        assert_reads_back(self.db, tokens, found.spans)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def read_back(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.sequences)))
        known, sequence = self.sequences[key], self.db.sequence(key)
        assert sequence.tokens == len(known.tokens)
        assert sequence.identity == IDENTITIES[known.identity].digest().hex()
        assert_reads_back(self.db, np.array(known.tokens, "<u4"), sequence.spans)

    # -- always

    @invariant()
    def it_lists_what_the_dict_lists(self) -> None:
        named = {key: name for name, key in self.names.items()}
        assert {s.key: s.name for s in self.db.sequences()} == {k: named.get(k) for k in self.sequences}
        assert self.db.info()["segments"] == len(self.segments)
        for name in NAMES:
            if name in self.names:
                assert self.db.sequence(name).key == self.names[name]
            else:
                with pytest.raises(SequenceNotFound):
                    self.db.sequence(name)

    @invariant()
    def it_is_healthy(self) -> None:
        assert_healthy(self.db)


def machine_settings() -> settings:
    return settings(
        max_examples=max(settings().max_examples // 2, 10),
        stateful_step_count=20,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def test_the_store_agrees_with_a_dict() -> None:
    run_state_machine_as_test(StoreMachine, settings=machine_settings())


@pytest.mark.parametrize("bug", ["delete leaves segments", "a match runs one token too far", "sweeping is skipped"])
def test_the_machine_sees_planted_bugs(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    if bug == "delete leaves segments":
        monkeypatch.setattr("kvdb.catalog.Transaction.remove_unreferenced", lambda self: [])
    elif bug == "a match runs one token too far":
        monkeypatch.setattr("kvdb.prefix.common_prefix", lambda a, b: min(common_prefix(a, b) + 1, len(a), len(b)))
    else:
        monkeypatch.setattr("kvdb.folder.sweep", lambda root, catalog: None)
    quick = settings(machine_settings(), max_examples=60, derandomize=True, database=None, phases=_ONLY_GENERATE)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(StoreMachine, settings=quick)


_ONLY_GENERATE = [p for p in settings().phases if p.name == "generate"]
