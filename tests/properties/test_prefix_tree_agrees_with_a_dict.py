"""For any tree of sequences, a match is the longest common prefix with any stored sequence that may be reused.

The oracle is a list of everything stored and a loop over it. Sequences branch anywhere: inside chunks, inside blocks of 64,
inside segments; identities never mix; with `exact`, inexact KV does not count, but for that of accepted fidelities, whether or not listings
tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from helpers import assert_healthy, assert_reads_back, extend, identity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Array

from kvdb import EXACT, KVDB, Identity
from kvdb.prefix import first_bytes
from kvdb.transaction import Transaction

IDENTITIES = [identity("w0"), identity("w1"), identity("w0", salt="tenant")]
FIDELITIES = [EXACT, "sparse", "int4", "sparse int4"]
ACCEPTED = [(), ("int4",), ("sparse", "sparse int4"), ("unheard of",)]
LISTED = {
    "as written": first_bytes,
    "by earlier writers": lambda fidelity: first_bytes(fidelity)[::-1],
    "alike": lambda fidelity: (1,) if fidelity == EXACT else (2, 0),
}
"""Which first bytes listings get."""


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[Array, int, int, int]]:
    """(tokens, identity, fidelity, tokens per segment), each branching off an earlier one. Shrinks to one short list."""
    found: list[tuple[Array, int, int, int]] = []
    for _ in range(draw(st.integers(1, 6))):
        tokens = np.empty(0, "<u4")
        if found and draw(st.booleans()):
            earlier = draw(st.sampled_from(found))[0]
            tokens = earlier[: draw(st.integers(0, len(earlier)))]
        word = draw(st.integers(0, 2))
        tail = np.full(draw(st.integers(1, 100)), word, "<u4")
        tail[0] = draw(st.integers(0, 2))
        cut = draw(st.sampled_from([16, 48, 64, 128, 1 << 20]))
        identity_, fidelity = draw(st.integers(0, 2)), draw(st.integers(0, 1))
        found.append((np.concatenate((tokens, tail)), identity_, fidelity, cut))
    return found


def agreement(one: Array, other: Array) -> int:
    n = 0
    for a, b in zip(one.tolist(), other.tolist(), strict=False):
        if a != b:
            break
        n += 1
    return n


def longest(stored: list[tuple[Array, int, int, int]], ident: int, query: Array, *, exact: bool) -> int:
    best = 0
    for tokens, other, fidelity, _ in stored:
        if other == ident and not (exact and fidelity):
            best = max(best, agreement(tokens, query))
    return best


def queries(stored: list[tuple[Array, int, int, int]]) -> Iterator[Array]:
    yield np.empty(0, "<u4")
    for tokens, *_ in stored:
        yield tokens
        yield np.concatenate((tokens, [7])).astype("<u4")
        for at in (1, 15, 16, 63, 64, 65, len(tokens) - 1):
            if at < len(tokens):
                yield tokens[:at]
                changed = tokens.copy()
                changed[at] += 9
                yield changed


def paths(db: KVDB) -> list[tuple[str, set[str], Array]]:
    """(identity, fidelities, tokens) from position 0 to the end of each segment."""
    with db.catalog.begin() as txn:
        chains = [txn.path(segment) for segment in txn.segment_ids()]
        return [(c[-1].identity, {i.fidelity for i in c}, txn.path_tokens(c[-1].segment)) for c in chains]


def judge(db: KVDB, stored: list[tuple[Array, int, int, int]], identities: list[Identity]) -> None:
    offered = paths(db)
    for ident, mine in enumerate(identities):
        for query in queries(stored):
            for accepted in ACCEPTED:
                match = db.match(mine, query, accepted=accepted)
                assert match.tokens == max(
                    agreement(tokens, query) if fidelities <= {EXACT, *accepted} and key == mine.digest().hex() else 0
                    for key, fidelities, tokens in offered
                )
            for exact in (True, False):
                match = db.match(mine, query, exact=exact)
                assert match.tokens == longest(stored, ident, query, exact=exact)
                assert match.tokens == sum(span.stop - span.start for span in match.spans)


def store(db: KVDB, tree: list[tuple[Array, int, int, int]]) -> None:
    for tokens, ident, fidelity, cut in tree:
        extend(db, tokens, ident=IDENTITIES[ident], fidelity=FIDELITIES[fidelity], segment_tokens=cut)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(trees(), st.sampled_from(sorted(LISTED, reverse=True)), st.sampled_from(sorted(LISTED, reverse=True)))
def test_a_match_is_the_longest_reusable_prefix(
    tmp_path_factory: pytest.TempPathFactory, tree: list[tuple[Array, int, int, int]], first: str, later: str
) -> None:
    """Also where half of it was listed otherwise, by an earlier writer."""
    if "alike" in (first, later):
        first = later = "alike"
    with KVDB.open(tmp_path_factory.mktemp("tree") / "s") as db, pytest.MonkeyPatch.context() as patch:
        for listed, part in ((first, tree[::2]), (later, tree[1::2])):
            patch.setattr("kvdb.prefix.first_bytes", LISTED[listed])
            store(db, part)
        if first != "alike":
            patch.setattr("kvdb.prefix.first_bytes", LISTED["as written"])
        judge(db, tree, IDENTITIES)
        for tokens, ident, fidelity, _ in tree:
            match = db.match(IDENTITIES[ident], tokens, exact=FIDELITIES[fidelity] == EXACT)
            assert match.tokens == len(tokens)
            assert_reads_back(db, tokens, match.spans)
        assert_healthy(db)
        for sequence in db.sequences():
            db.delete(sequence.key)
        assert not list(listings(db))
        assert_healthy(db)


def listings(db: KVDB) -> Iterator[tuple[bytes, str]]:
    with db.catalog.begin() as txn:
        yield from txn.listed_segments()


BRANCHES = [
    (np.arange(100, dtype="<u4"), 0, 0, 48),
    (np.r_[np.arange(70), np.arange(500, 530)].astype("<u4"), 0, 0, 48),
    (np.r_[np.arange(20), np.arange(900, 1000)].astype("<u4"), 0, 1, 64),
    (np.arange(90, dtype="<u4"), 2, 0, 64),
    (np.r_[np.arange(80), np.arange(700, 740)].astype("<u4"), 0, 1, 64),
    (np.r_[np.arange(60), np.arange(700, 740)].astype("<u4"), 0, 2, 64),
]


@pytest.mark.parametrize(
    "bug", ["none", "tokens are not compared", "keys leave out the salt", "exact is ignored", "a byte is one fidelity"]
)
def test_the_oracle_sees_planted_bugs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    if bug == "tokens are not compared":
        monkeypatch.setattr("kvdb.prefix.common_prefix", lambda a, b: min(len(a), len(b)))
    elif bug == "keys leave out the salt":
        real = Identity.fields
        monkeypatch.setattr(Identity, "fields", lambda self: real(self) | {"salt": ""})
    elif bug == "exact is ignored":
        real_match = KVDB.match
        monkeypatch.setattr(KVDB, "match", lambda *a, exact=True, accepted=(): real_match(*a, exact=False))
    elif bug == "a byte is one fidelity":
        monkeypatch.setattr("kvdb.prefix.first_bytes", LISTED["alike"])
        real_first = Transaction._first_accepted
        monkeypatch.setattr(Transaction, "_first_accepted", lambda *a: real_first(*a[:-1], None))
    with KVDB.open(tmp_path_factory.mktemp("bug") / "s") as db:
        try:
            store(db, BRANCHES)
            judge(db, BRANCHES, IDENTITIES)
        except AssertionError:
            assert bug != "none"
        else:
            assert bug == "none"
