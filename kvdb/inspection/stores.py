"""Where a store is, and which sequences two stores have in common. Compared is what the catalogs say: token ids, identity, fidelity and codecs; no KV is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import xxhash

from kvdb.entries import Sequence
from kvdb.errors import Damaged
from kvdb.folder import HEADER
from kvdb.inspection.describe import listed
from kvdb.inspection.snapshot import Snapshot
from kvdb.prefix import common_prefix

if TYPE_CHECKING:
    from kvdb.store import KVDB


def store_around(path: Path) -> Path | None:
    """The folder of the store that a path without symbolic links, which need not be there, lies in; None: in no store."""
    return next((folder for folder in path.parents if (folder / HEADER).exists()), None)


class Side(NamedTuple):
    """One of two stores."""

    db: KVDB
    snap: Snapshot


class Pair(NamedTuple):
    """Two sequences and how many leading tokens they share. differ: what is not equal, of "tokens", "identity", "fidelity", "codec"."""

    first: Sequence
    second: Sequence
    common: int
    differ: tuple[str, ...]


class StoreDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Each sequence is in one of the four lists, or, where its tokens cannot be read, in `wrong`. Segments' ids play no part: they are
    never the same in two stores, unless one is a copy of the other.

    same    of both stores
    differ  with the same tokens or the same name, and something else
    """

    same: list[Pair]
    differ: list[Pair]
    only_first: list[Sequence]
    only_second: list[Sequence]
    wrong: list[str]


class _Content(NamedTuple):
    """What a sequence holds. key: its own; digest: of its token ids."""

    sequence: Sequence
    digest: str
    identity: str
    fidelity: str
    codecs: tuple[str, ...] | None

    @property
    def kind(self) -> Hashable:
        return self.digest, self.identity, self.fidelity, self.codecs


def difference(first: Side, second: Side) -> StoreDifference:
    """Pair equal sequences first, then those with the same tokens, then those with the same name."""
    wrong: list[str] = []
    a, b = _contents(first, wrong), _contents(second, wrong)
    same: list[Pair] = []
    differ: list[Pair] = []
    rules: list[Callable[[_Content], Hashable]] = [lambda c: c.kind, lambda c: c.digest, lambda c: c.sequence.name]
    for rule in rules:
        for one, two in list(_pairs(a, b, rule)):
            del a[one.sequence.key], b[two.sequence.key]
            common = one.sequence.tokens if one.digest == two.digest else _common(first, one, second, two)
            pair = Pair(one.sequence, two.sequence, common, _differences(one, two))
            (differ if pair.differ else same).append(pair)
    return StoreDifference(
        same=same,
        differ=differ,
        only_first=[content.sequence for content in a.values()],
        only_second=[content.sequence for content in b.values()],
        wrong=wrong,
    )


def _contents(side: Side, wrong: list[str]) -> dict[str, _Content]:
    """By key, oldest first."""
    found = {}
    for facts in listed(side.snap):
        sequence = facts.sequence
        try:
            digest = xxhash.xxh3_128_hexdigest(side.db.tokens(sequence.spans).tobytes())
        except Damaged as e:
            wrong.append(f"{side.db.path}, sequence {sequence.name or sequence.key}: {e}")
            continue
        found[sequence.key] = _Content(sequence, digest, sequence.identity, sequence.fidelity, facts.codecs)
    return found


def _pairs(
    a: dict[str, _Content], b: dict[str, _Content], rule: Callable[[_Content], Hashable]
) -> Iterator[tuple[_Content, _Content]]:
    """Sequences of which a rule says the same; None is like nothing. Of several alike those of the same name, then the oldest."""
    theirs: dict[Hashable, list[_Content]] = defaultdict(list)
    for content in b.values():
        theirs[rule(content)].append(content)
    for content in a.values():
        said = rule(content)
        if said is not None and (alike := theirs[said]):
            names = [other.sequence.name for other in alike]
            yield content, alike.pop(names.index(content.sequence.name) if content.sequence.name in names else 0)


def _differences(a: _Content, b: _Content) -> tuple[str, ...]:
    compared = {
        "tokens": (a.digest, b.digest),
        "identity": (a.identity, b.identity),
        "fidelity": (a.fidelity, b.fidelity),
        "codec": (a.codecs, b.codecs),
    }
    return tuple(name for name, (mine, theirs) in compared.items() if mine != theirs)


def _common(first: Side, a: _Content, second: Side, b: _Content) -> int:
    return common_prefix(first.db.tokens(a.sequence.spans), second.db.tokens(b.sequence.spans))
