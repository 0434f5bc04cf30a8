"""Why a prompt is, or is not, found: what matches, where it breaks, and what agrees further and does not count.

The rules are the engine's: `KVDB.match` says what is reused. All else here looks past them, into other identities and fidelities, into
text that is stored at another place, and into what was deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from kvdb import files, format, prefix
from kvdb.entries import Found, Sequence
from kvdb.errors import Damaged, InvalidInput, KVDBError
from kvdb.format import SegmentInfo
from kvdb.identity import EXACT, Identity
from kvdb.inspection.snapshot import Snapshot
from kvdb.prefix import Tokens
from kvdb.repair import stored_tokens
from kvdb.segments import payload_bytes
from kvdb.space import has_expired
from kvdb.transaction import Transaction, fidelity_of

if TYPE_CHECKING:
    from kvdb.store import KVDB

SHOWN: Final = 5
"""Sequences named for each finding."""
BESIDE: Final = 32
"""Stored tokens shown after the break."""
_PROBE: Final = 16
_PROBES_AT: Final = (0, 16, 64, 256)
"""Tokens after the break at which so many in a row are looked for at other places: an edit leaves what follows it as it was."""
_ASIDE: Final = ("trash", "quarantine")
NOT_SHOWN: Final = "(not shown)"
NONE: Final = "(none)"


class Beside(NamedTuple):
    """A sequence that shares the prefix, and its token where the prompt has another one; None: it ends there."""

    sequence: Sequence
    token: int | None
    expired: bool


class Other(NamedTuple):
    """A stored prefix that agrees further than what is reused, and does not count.

    fidelity  of the stored KV, where that is why
    fields    of the identity that differ: name -> (stored, asked for); salts are not shown
    """

    tokens: int
    sequences: list[Sequence]
    fidelity: str | None
    fields: dict[str, tuple[str, str]]


class Elsewhere(NamedTuple):
    """The same tokens at another place, or after others: KV depends on all that comes before."""

    sequences: list[Sequence]
    tokens: int
    at: int
    stored_at: int


class Gone(NamedTuple):
    """A prefix that agreed further until it was deleted. where: "trash" or "quarantine"."""

    tokens: int
    where: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """tokens      of the prompt
    matched      the first of them, which are reused
    compared     False: only token ids were compared, with KV of every identity and fidelity
    reason       why no more are matched, in words
    started      matched tokens in a record that is not whole: they are read, and stored anew with what follows
    beside       who shares the prefix, those used last first; `beside_count` in all
    stored_next  token ids that the first of `beside` has from the break on
    kv_bytes     that need not be computed, as the model makes them; `read_bytes` as they are stored
    """

    tokens: int
    matched: int
    compared: bool
    reason: str
    asked_token: int | None
    started: int
    beside: list[Beside]
    beside_count: int
    stored_next: list[int]
    others: list[Other]
    elsewhere: Elsewhere | None
    gone: Gone | None
    kv_bytes: int
    read_bytes: int


def explain(
    db: KVDB, snap: Snapshot, tokens: Tokens, identity: Identity | None, *, accepted: Collection[str] = ()
) -> Explanation:
    """What of a prompt's KV is stored, and why not more.

    identity  of the model that asks; None: compare token ids alone, with everything that is stored
    accepted  fidelities that will do as well as "exact"
    raises    InvalidInput for no tokens; Damaged where the path that matches cannot be read
    """
    if not len(tokens):
        raise InvalidInput("prompt: no tokens, expected at least one")
    fine = None if identity is None else (EXACT, *accepted)
    match = None if identity is None else db.match(identity, tokens, accepted=accepted)
    with db.catalog.begin() as txn:
        if identity is None or match is None:
            mine, found = _longest(txn, snap, tokens)
            reason = "all tokens are stored" if found.tokens == len(tokens) else "no stored sequence goes on like this"
        else:
            mine, found, reason = identity.digest().hex(), Found(match.tokens, match.spans), match.reason
        n, beside = found.tokens, _beside(txn, snap, mine, tokens, found)
        return Explanation(
            tokens=len(tokens),
            matched=n,
            compared=identity is not None,
            reason=reason,
            asked_token=int(tokens[n]) if n < len(tokens) else None,
            beside=beside[:SHOWN],
            beside_count=len(beside),
            stored_next=_next(txn, beside, n),
            others=[] if identity is None else list(_others(txn, snap, tokens, identity, n, fine)),
            elsewhere=_elsewhere(txn, snap, tokens, n, None if identity is None else mine),
            gone=_gone(db.path, txn, tokens, n, None if identity is None else mine),
            **_saved(txn, found),
        )


def _longest(txn: Transaction, snap: Snapshot, tokens: Tokens) -> tuple[str, Found]:
    """Under any identity and fidelity."""
    best, whose = Found(0, ()), ""
    for digest in snap.identities:
        if (found := txn.find(digest, tokens, accepted=None)).tokens > best.tokens:
            best, whose = found, digest
    return whose, best


def _saved(txn: Transaction, found: Found) -> dict[str, int]:
    infos = [entry.info for entry in txn.span_entries(found.spans)]
    kv = read = 0
    for span, info in zip(found.spans, infos, strict=True):
        kv += (span.stop - span.start) * info.geometry.token_bytes
        read += payload_bytes(info) * info.geometry.chunks(span.stop - span.start) // info.chunks
    started = found.tokens % infos[-1].geometry.chunk_tokens if infos else 0
    return {"started": started, "kv_bytes": kv, "read_bytes": read}


def _beside(txn: Transaction, snap: Snapshot, identity: str, tokens: Tokens, found: Found) -> list[Beside]:
    """Sequences that begin with all that matches, those used last first; where nothing matches, all of the identity.

    Only where the match has its last segment may they part from it: a branch copies the beginning of a started record.
    """
    anchor = found.spans[-2].segment if len(found.spans) > 1 else None
    start = found.tokens - (found.spans[-1].stop if found.spans else 0)
    rest = tokens[start : found.tokens].tolist()
    near = [
        s
        for s in snap.sequences
        if s.tokens >= found.tokens
        and (s.identity == identity if anchor is None else any(span.segment == anchor for span in s.spans))
        and _following(txn, s, start, len(rest)) == rest
    ]
    near.sort(key=lambda s: (-s.last_used, s.key))
    return [Beside(s, _token_at(txn, s, found.tokens), has_expired(s, snap.now)) for s in near]


def _token_at(txn: Transaction, sequence: Sequence, position: int) -> int | None:
    following = _following(txn, sequence, position, 1)
    return following[0] if following else None


def _following(txn: Transaction, sequence: Sequence, position: int, count: int) -> list[int]:
    """Up to `count` token ids of a sequence, from a position on."""
    found: list[int] = []
    start = 0
    for span in sequence.spans:
        stop = start + span.stop - span.start
        if position < stop and len(found) < count:
            with contextlib.suppress(Damaged):
                first = span.start + max(0, position - start)
                found += txn.tokens(span.segment)[first : min(span.stop, first + count - len(found))].tolist()
        start = stop
    return found


def _next(txn: Transaction, beside: list[Beside], position: int) -> list[int]:
    return _following(txn, beside[0].sequence, position, BESIDE) if beside else []


def _others(
    txn: Transaction, snap: Snapshot, tokens: Tokens, identity: Identity, matched: int, fine: tuple[str, ...] | None
) -> Iterator[Other]:
    """Of each identity, this one included, the longest prefix of any fidelity, where it is longer than the match; longest first."""
    mine, longer = identity.digest().hex(), []
    for digest, stored in snap.identities.items():
        with contextlib.suppress(Damaged):
            found = txn.find(digest, tokens, accepted=None)
            if found.tokens > matched:
                approximate = fidelity_of(entry.info for entry in txn.span_entries(found.spans))
                told = None if fine is None or approximate in fine else approximate
                fields = {} if digest == mine else _fields(identity, stored)
                longer.append(Other(found.tokens, _through(snap, found.spans[-1].segment), told, fields))
    yield from sorted(longer, key=lambda other: (-other.tokens, len(other.fields)))


def _fields(asked: Identity, stored: Identity) -> dict[str, tuple[str, str]]:
    theirs, mine = stored.fields(), asked.fields()
    return {
        name: (NOT_SHOWN, NOT_SHOWN) if name == "salt" else (theirs.get(name, NONE), mine.get(name, NONE))
        for name in asked.difference(stored)
    }


def _through(snap: Snapshot, segment: str) -> list[Sequence]:
    """Sequences that pass through a segment: named ones first, then those used last."""
    through = [s for s in snap.sequences if any(span.segment == segment for span in s.spans)]
    return sorted(through, key=lambda s: (s.name is None, -s.last_used, s.key))[:SHOWN]


def _elsewhere(
    txn: Transaction, snap: Snapshot, tokens: Tokens, matched: int, identity: str | None
) -> Elsewhere | None:
    """The longest run of the prompt's tokens after the match, among some, that a segment has. None: there is none of _PROBE tokens.

    cost  one pass over all token ids
    """
    probes = [
        (at, np.ascontiguousarray(tokens[at : at + _PROBE], "<u4").tobytes())
        for at in (matched + beyond for beyond in _PROBES_AT)
        if at + _PROBE <= len(tokens)
    ]
    best: tuple[int, int, int, str] = (0, 0, 0, "")
    for segment, entry in snap.segments.items() if probes else ():
        if identity is not None and entry.info.identity != identity:
            continue
        with contextlib.suppress(Damaged):
            best = max(best, _run(txn.tokens(segment), tokens, matched, probes, entry.info))
    length, at, stored_at, segment = best
    if not length:
        return None
    sequences = _through(snap, segment)
    return _stretched(txn, Elsewhere(sequences, length, at, stored_at), tokens, matched) if sequences else None


def _stretched(txn: Transaction, found: Elsewhere, tokens: Tokens, matched: int) -> Elsewhere:
    """The same run in the segments before and after, as the first of its sequences has them."""
    sequence = found.sequences[0]
    stored = np.array(_following(txn, sequence, 0, sequence.tokens), "<u4")
    at, there = found.at, found.stored_at
    most = min(there, at - matched)
    before = prefix.common_prefix(stored[there - most : there][::-1], tokens[at - most : at][::-1])
    after = prefix.common_prefix(stored[there:], tokens[at:])
    return found._replace(tokens=before + after, at=at - before, stored_at=there - before)


def _run(
    stored: Tokens, tokens: Tokens, matched: int, probes: list[tuple[int, bytes]], info: SegmentInfo
) -> tuple[int, int, int, str]:
    """The longest run of equal tokens around the first place of each probe: tokens, where in the prompt, where in the sequence, segment."""
    best: tuple[int, int, int, str] = (0, 0, 0, "")
    data = stored.tobytes()
    for at, probe in probes:
        place = data.find(probe)
        while place > 0 and place % 4:
            place = data.find(probe, place + 1)
        if place < 0:
            continue
        here, before = place // 4, 0
        most = min(here, at - matched)
        if most:
            before = prefix.common_prefix(stored[here - most : here][::-1], tokens[at - most : at][::-1])
        length = before + prefix.common_prefix(stored[here:], tokens[at:])
        best = max(best, (length, at - before, info.start + here - before, info.segment))
    return best


def _gone(root: Path, txn: Transaction, tokens: Tokens, matched: int, identity: str | None) -> Gone | None:
    """The longest prefix that a deleted segment would have given, if its files are still in the store's folder."""
    best: Gone | None = None
    for where in _ASIDE:
        for info in _described(root / where):
            if identity is not None and info.identity != identity:
                continue
            with contextlib.suppress(KVDBError, OSError):
                path = _path_of(root, txn, info)
                agree = prefix.common_prefix(path, tokens)
                if agree > (best.tokens if best else matched):
                    best = Gone(agree, where)
    return best


def _described(folder: Path) -> Iterator[SegmentInfo]:
    """Every segment whose first array lies in a folder and says what it is."""
    for name in files.list_dir(folder) if folder.is_dir() else ():
        if name.endswith(format.kv_array("", 0)):
            with contextlib.suppress(KVDBError, OSError):
                yield format.parse_kv_metadata(files.read_file(folder / name / format.METADATA_KEY), name).info


def _path_of(root: Path, txn: Transaction, info: SegmentInfo) -> Tokens:
    """Token ids from position 0 to the end of a segment that is not in the catalog; what it continued is, or is aside as well."""
    parts: list[Tokens] = []
    stop = info.stop
    while True:
        folder = next(root / where for where in _ASIDE if (root / where / format.kv_array(info.segment, 0)).is_dir())
        parts.append(stored_tokens(folder, info)[: stop - info.start])
        if info.parent is None:
            return np.concatenate(parts[::-1])
        stop, parent = info.start, txn.current(info.parent)
        if txn.segment(parent) is not None:
            return np.concatenate([txn.path_tokens(parent)[:stop], *parts[::-1]])
        above = {found.segment: found for where in _ASIDE for found in _described(root / where)}
        if parent not in above or above[parent].start >= stop:
            raise Damaged(f"segment {parent}: not in the store any more, expected what {info.segment} continues")
        info = above[parent]
