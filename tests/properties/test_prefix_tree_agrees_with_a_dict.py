"""For any tree of sequences, a match is the longest common prefix with any stored sequence that may be reused.

The oracle is a list of everything stored and a loop over it. Sequences branch anywhere: inside chunks, inside blocks of 64,
inside segments; identities never mix; with `exact`, inexact KV does not count.
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

IDENTITIES = [identity("w0"), identity("w1"), identity("w0", salt="tenant")]
FIDELITIES = [EXACT, "sparse"]


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


def longest(stored: list[tuple[Array, int, int, int]], ident: int, query: Array, *, exact: bool) -> int:
    best = 0
    for tokens, other, fidelity, _ in stored:
        if other == ident and not (exact and fidelity):
            n = 0
            for a, b in zip(tokens.tolist(), query.tolist(), strict=False):
                if a != b:
                    break
                n += 1
            best = max(best, n)
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


def judge(db: KVDB, stored: list[tuple[Array, int, int, int]], identities: list[Identity]) -> None:
    for ident, mine in enumerate(identities):
        for query in queries(stored):
            for exact in (True, False):
                match = db.match(mine, query, exact=exact)
                assert match.tokens == longest(stored, ident, query, exact=exact)
                assert match.tokens == sum(span.stop - span.start for span in match.spans)


def store(db: KVDB, tree: list[tuple[Array, int, int, int]]) -> None:
    for tokens, ident, fidelity, cut in tree:
        extend(db, tokens, ident=IDENTITIES[ident], fidelity=FIDELITIES[fidelity], segment_tokens=cut)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(trees())
def test_a_match_is_the_longest_reusable_prefix(
    tmp_path_factory: pytest.TempPathFactory, tree: list[tuple[Array, int, int, int]]
) -> None:
    with KVDB.open(tmp_path_factory.mktemp("tree") / "s") as db:
        store(db, tree)
        judge(db, tree, IDENTITIES)
        for tokens, ident, fidelity, _ in tree:
            match = db.match(IDENTITIES[ident], tokens, exact=FIDELITIES[fidelity] == EXACT)
            assert match.tokens == len(tokens)
            assert_reads_back(db, tokens, match.spans)
        assert_healthy(db)


BRANCHES = [
    (np.arange(100, dtype="<u4"), 0, 0, 48),
    (np.r_[np.arange(70), np.arange(500, 530)].astype("<u4"), 0, 0, 48),
    (np.r_[np.arange(20), np.arange(900, 1000)].astype("<u4"), 0, 1, 64),
    (np.arange(90, dtype="<u4"), 2, 0, 64),
]


@pytest.mark.parametrize("bug", ["none", "tokens are not compared", "keys leave out the salt", "exact is ignored"])
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
        monkeypatch.setattr(KVDB, "match", lambda *a, exact=True: real_match(*a, exact=False))
    with KVDB.open(tmp_path_factory.mktemp("bug") / "s") as db:
        try:
            store(db, BRANCHES)
            judge(db, BRANCHES, IDENTITIES)
        except AssertionError:
            assert bug != "none"
        else:
            assert bug == "none"
