"""Other abstracts for stored segments: made, dropped or made anew beside their KV, which nobody touches.

Abstracts follow from the keys, so none is ever lost for good: one that is missing or damaged is made from the stored keys,
each record compared with its digest on the way. New arrays are filled in tmp/, without the write lock, and forced to disk;
one transaction moves them into the store, changes the entries of all segments concerned and the roots of the sequences
through them; what is dropped goes to the trash after that. Who finds that somebody was faster begins again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from kvdb import files, format
from kvdb.abstracts import ABSTRACTS, build_all
from kvdb.arrays import AbstractWriter, abstract_bytes
from kvdb.check import check_abstract
from kvdb.entries import SegmentEntry, Span
from kvdb.errors import Damaged, InvalidInput, StoreError
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.segments import Segment, codecs_of

if TYPE_CHECKING:
    from kvdb.store import KVDB

_BLOCK_BYTES: Final = 8 << 20
"""KV that is read at a time."""


class _Plan(NamedTuple):
    """What is to be done to a segment.

    before   its entry
    missing  abstracts to be made, sorted; those that are damaged, too
    after    all it will have, sorted
    """

    before: SegmentEntry
    missing: tuple[str, ...]
    after: tuple[str, ...]

    def fresh(self) -> list[str]:
        """Arrays to be made."""
        info = self.before.info
        groups = range(len(info.geometry.groups))
        return [format.abstract_array(info.segment, name, group) for name in self.missing for group in groups]

    def room(self) -> int:
        info = self.before.info
        return sum(abstract_bytes(info.geometry, name, info.capacity) for name in self.missing)


class Held(NamedTuple):
    """segments: how many have it. bytes: what it takes there, chunks that are not used yet not counted."""

    segments: int
    bytes: int


def held_abstracts(db: KVDB, spans: tuple[Span, ...]) -> dict[str, Held]:
    """The abstracts of some segments, by name.

    raises  Damaged where segments are gone; Unsupported for abstracts that this version does not know
    """
    found: dict[str, Held] = {}
    for segment in db.segments(spans):
        info = segment.info
        codecs_of(info)  # refuses abstracts that this version does not know
        for name in info.abstracts:
            groups = range(len(info.geometry.groups))
            places = [format.abstract_layout(info.geometry, g, info.chunks, ABSTRACTS[name]) for g in groups]
            count, total = found.get(name, Held(0, 0))
            found[name] = Held(count + 1, total + sum(place.file_bytes for place in places))
    return dict(sorted(found.items()))


def set_abstracts(db: KVDB, name_or_key: str | None, abstracts: Iterable[str]) -> int:
    """See `KVDB.set_abstracts`."""
    wanted = tuple(sorted(set(abstracts)))
    if unknown := [name for name in wanted if name not in ABSTRACTS]:
        raise InvalidInput(f"abstracts: {unknown}, expected some of {sorted(ABSTRACTS)}")
    with db.catalog.begin() as txn:
        sequences = txn.sequences() if name_or_key is None else [txn.sequence(name_or_key)]
    settled, changed, damage = set[str](), 0, list[Damaged]()
    for sequence in sequences:
        segments = [span.segment for span in sequence.spans]
        try:
            changed += _settle(db, [segment for segment in segments if segment not in settled], wanted)
        except Damaged as e:  # the others are changed all the same
            damage.append(e)
        settled.update(segments)
    if damage:
        raise damage[0]
    return changed


def _settle(db: KVDB, segments: list[str], wanted: tuple[str, ...]) -> int:
    """Give segments of one path the abstracts that are wanted; returns how many of them changed."""
    while True:  # until nobody else changes them meanwhile
        with db.catalog.begin() as txn:
            now = dict.fromkeys(txn.current(segment) for segment in segments)
            found = [entry for segment in now if (entry := txn.entry(segment)) is not None]
        plans = [plan for entry in found if (plan := _plan(db, entry, wanted)) is not None]
        if not plans:
            return 0
        try:
            if _carry_out(db, plans, keep=found[-1].info.segment):
                return len(plans)
        except Damaged:
            if db.agrees(Segment.stored(entry, db.path / "chunks") for entry in found):
                raise


def _plan(db: KVDB, entry: SegmentEntry, wanted: tuple[str, ...]) -> _Plan | None:
    """None where there is nothing to be done."""
    codecs_of(entry.info)  # refuses abstracts that this version does not know
    whole = [
        name
        for name in entry.info.abstracts
        if name in wanted and not any(check_abstract(db.path / "chunks", entry, name))
    ]
    missing = tuple(name for name in wanted if name not in whole)
    if not missing and len(wanted) == len(entry.info.abstracts):
        return None
    return _Plan(entry, missing, wanted)


def _carry_out(db: KVDB, plans: list[_Plan], *, keep: str) -> bool:
    """Whether it was done: False when somebody else has changed one of the segments meanwhile.

    keep  segment that making room must leave alone, with its ancestors
    """
    if not any(plan.missing for plan in plans):  # on a full disk, too
        return _swap(db, db.path, plans, [_make(db, db.path, plan, 0, keep) for plan in plans], keep)
    workspace = db.own_workspace() / f"abstracts-{os.urandom(8).hex()}"
    files.mkdir(workspace)
    try:
        rooms = [plan.room() for plan in plans]
        made = [_make(db, workspace, plan, sum(rooms[i:]), keep) for i, plan in enumerate(plans)]
        return _swap(db, workspace, plans, made, keep)
    finally:
        files.remove_tree(workspace)


def _make(db: KVDB, workspace: Path, plan: _Plan, room: int, keep: str) -> SegmentEntry:
    """Make what is missing of one segment; returns its entry as it will be.

    room  most that this and what is still to be made can occupy: what cannot fit in the end is not begun
    """
    info, chunks = plan.before.info, db.path / "chunks"
    writers: list[AbstractWriter] = []
    seals = dict[str, str]()
    try:
        if plan.missing:
            with (
                db.catalog.locked()
            ):  # until the files stand there, full size, no other writer counts this room as free
                db.space.make_room(room, keep=keep)
                for name in plan.missing:
                    writers.append(AbstractWriter(workspace, info, name))
            with contextlib.closing(READERS[db.read_mode]("always")) as reader:
                _fill(reader, Segment.stored(plan.before, chunks), writers)
        for writer in writers:
            seals |= writer.seal(info)
        files.fsync_trees([workspace / array for array in plan.fresh()])
    finally:
        for writer in writers:
            writer.close()
    info = msgspec.structs.replace(info, abstracts=plan.after)
    seals = {array: seal for array, seal in (plan.before.seals | seals).items() if array in info.array_names()}
    disk_bytes = sum(
        files.tree_bytes((workspace if array in plan.fresh() else chunks) / array) for array in info.array_names()
    )
    return SegmentEntry(info=info, seals=seals, disk_bytes=disk_bytes, changes=plan.before.changes + 1)


def _fill(reader: Reader, segment: Segment, writers: list[AbstractWriter]) -> None:
    """Make abstracts of all layers of a segment, block by block."""
    info, geometry, ct = segment.info, segment.info.geometry, segment.info.geometry.chunk_tokens
    for layer in geometry.layers:
        group = geometry.locate(layer)[0]
        g, step = geometry.groups[group], max(1, _BLOCK_BYTES // geometry.slot_bytes(group))
        for start in range(0, info.chunks, step):
            stop = min(start + step, info.chunks)
            records = np.arange(start * g.kv_heads, stop * g.kv_heads)
            out = np.empty((2, len(records), ct, g.head_dim), geometry.storage_dtype)
            reader.read(segment, layer, records, out)
            keys, values = out.reshape(2, stop - start, g.kv_heads, ct, g.head_dim).swapaxes(1, 2)
            tokens = min(info.tokens, stop * ct) - start * ct
            built = build_all((writer.abstract.name for writer in writers), keys, values, tokens, geometry.dtype)
            for writer in writers:
                writer.write(layer, start, built[writer.abstract.name])


def _swap(db: KVDB, workspace: Path, plans: list[_Plan], made: list[SegmentEntry], keep: str) -> bool:
    """Make the change visible, if the segments still are what they were."""
    chunks, fresh = db.path / "chunks", [array for plan in plans for array in plan.fresh()]
    with db.catalog.locked():  # until the files are aside: nobody must bring one of these names back before
        try:
            with db.catalog.freeing(), db.write_transaction() as txn:
                if any(txn.entry(plan.before.info.segment) != plan.before for plan in plans):
                    return False
                txn.change_abstracts(made)
                txn.count(bytes_written=sum(files.tree_bytes(workspace / array) for array in fresh))
                db.space.dispose(array for array in fresh if (chunks / array).exists())  # damaged, or left over
                for array in fresh:
                    files.rename(workspace / array, chunks / array)
                files.fsync_dir(chunks)
        except BaseException:
            _take_back(db, plans, fresh)
            raise
        dropped = [plan.before.seals.keys() - entry.seals.keys() for plan, entry in zip(plans, made, strict=True)]
        db.space.dispose(array for arrays in dropped for array in sorted(arrays))
    db.space.enforce(keep=keep)
    return True


def _take_back(db: KVDB, plans: list[_Plan], fresh: list[str]) -> None:
    """Remove what was moved into the store and has no entry. The caller holds the write lock."""
    with contextlib.suppress(Damaged, StoreError), db.catalog.begin() as txn:
        entries = [txn.entry(plan.before.info.segment) for plan in plans]
        named = {array for entry in entries if entry is not None for array in entry.seals}
        for array in set(fresh) - named:
            files.remove_tree(db.path / "chunks" / array)
