"""What a report is made of: looked up once, then drawn, or printed as JSON. No layout here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from kvdb import __version__
from kvdb.entries import Sequence
from kvdb.errors import Damaged
from kvdb.inspection.maps import KeyMaps, key_maps
from kvdb.inspection.snapshot import snapshot
from kvdb.inspection.survey import Survey, survey
from kvdb.inspection.traces import Summary
from kvdb.store import KVDB

MAPPED: Final = 4
"""Sequences whose keys are mapped where nobody names any."""
_MAPPED_TOKENS: Final = 160_000
"""No further sequence is mapped once these are: a page is to be ready in half a minute."""


class Mapped(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence and its maps."""

    key: str
    name: str | None
    maps: KeyMaps


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """info: what `KVDB.info` says, or as much of it as is readable. made: when, seconds since 1970. trace: None where none was given."""

    store: str
    version: str
    made: float
    info: dict[str, Any]
    survey: Survey
    mapped: tuple[Mapped, ...]
    trace: Summary | None


def gather(
    db: KVDB,
    *,
    wanted: list[str] | None = None,
    trace: Summary | None = None,
    most_mapped: int = MAPPED,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Content:
    """Everything there is to show of a store.

    wanted  sequences to map, by name or key; None: the longest, each only if it is no part of one before it
    told    what goes on: how many are done, of how many
    raises  SequenceNotFound for one that is wanted; Damaged when the catalog cannot be read at all
    """
    surveyed = survey(db, lambda done, total: told("segments", done, total))
    if wanted is None:
        sequences = longest(db, most_mapped)
    else:
        sequences = [db.sequence(name) for name in wanted]
    mapped = []
    for done, sequence in enumerate(sequences):
        told("key maps", done, len(sequences))
        try:
            mapped.append(Mapped(key=sequence.key, name=sequence.name, maps=key_maps(db, sequence)))
        except Damaged:  # a segment is not in the catalog: the survey says so
            if wanted is not None:
                raise
    return Content(
        store=str(db.path),
        version=__version__,
        made=time.time(),
        info=_info(db),
        survey=surveyed,
        mapped=tuple(mapped),
        trace=trace,
    )


def longest(db: KVDB, most: int) -> list[Sequence]:
    """The longest sequences, without those that end inside one before them."""
    chosen: list[Sequence] = []
    passed: set[str] = set()
    for sequence in sorted(snapshot(db).sequences, key=lambda s: (-s.tokens, s.key)):
        full = sum(s.tokens for s in chosen) + sequence.tokens > _MAPPED_TOKENS
        if len(chosen) == most or (chosen and full):
            break
        if sequence.spans and sequence.spans[-1].segment not in passed:
            chosen.append(sequence)
            passed |= {span.segment for span in sequence.spans}
    return chosen


def _info(db: KVDB) -> dict[str, Any]:
    try:
        return db.info()
    except Damaged:  # the survey tells which entry; what the header says is still good
        return {"format": db.header.format, "store": db.header.store, "created": db.header.created}
