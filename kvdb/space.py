"""Room: how much a store takes, and what goes when it must shrink.

Everything in the folder counts: segments, files in flight (as if they were full already), what was deleted and waits,
quarantine, manifests, catalog. Retention takes the leaves of the prefix tree, so a shared parent goes only after its
children; named and pinned sequences keep all their segments. Deletion is: entries first, then the arrays move to trash/,
where a reader that was on its way still finds them, and vanish after a grace period, or at once when room is needed.
"""

from __future__ import annotations

import heapq
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from kvdb import files, manifests
from kvdb.catalog import Catalog
from kvdb.entries import SegmentEntry, Sequence, Totals, Use
from kvdb.errors import StorageFull, StoreLocked
from kvdb.format import METADATA_KEY, SegmentInfo
from kvdb.reader import TRASH
from kvdb.retention import Leaf, Retention
from kvdb.transaction import Transaction

_MARGIN: Final = 256 << 10
"""What a transaction may add to the catalog's file."""
_SLACK: Final = 0.05
"""Share of the cap that is freed beyond need, so that not every commit has to look for something to evict."""


_LOG: Final = logging.getLogger(__name__)


Keep = str | Collection[str] | None
"""Segments that must stay with all before them."""


class Evicted(NamedTuple):
    """segments: gone; sequences: as they were before they lost KV."""

    segments: list[SegmentInfo]
    sequences: list[Sequence]


class Space:
    """Room of one handle.

    floor    bytes of the file system to leave free
    grace_s  how long deleted arrays stay readable
    settle   writes down what the handle has used, before anything goes for not being used
    """

    def __init__(
        self,
        root: Path,
        catalog: Catalog,
        *,
        floor: int,
        grace_s: float,
        retention: Retention,
        settle: Callable[[Transaction], None],
    ) -> None:
        self.root, self.catalog, self.floor, self.grace_s, self.retention = root, catalog, floor, grace_s, retention
        self._settle = settle
        self._names: tuple[Totals | None, int] = None, 0  # totals of the names, and the bytes of their manifests then

    # -- measuring

    def used_bytes(self) -> int:
        """Everything the store occupies, as of now."""
        with self.catalog.begin() as txn:
            segments, named = txn.counters().segment_bytes, txn.totals("names")
        if named != self._names[0]:  # there may be thousands: they are only looked at again when they have changed
            self._names = named, files.tree_bytes(self.root / manifests.NAMES)
        parts = (TRASH, "quarantine")
        in_flight = files.tree_bytes(self.root / "tmp", reserved=True)
        fixed = (".", "kvdb.json", "chunks", f"chunks/{METADATA_KEY}")
        return (
            segments
            + in_flight
            + self._names[1]
            + self.catalog.file_bytes()
            + sum(files.tree_bytes(self.root / part) for part in parts)
            + sum(files.disk_bytes(self.root / part) for part in fixed)
        )

    def _short_of(self, need: int) -> int:
        """Bytes that must go before `need` more fit; at most 0 when they fit."""
        with self.catalog.begin() as txn:
            cap = txn.limits().size_cap
        short = [0]
        if cap is not None:
            short.append(self.used_bytes() + need - cap)
        if self.floor or need:
            tmp = self.root / "tmp"
            promised = files.tree_bytes(tmp, reserved=True) - files.tree_bytes(tmp)
            short.append(self.floor + promised + need - files.free_bytes(self.root))
        return max(short)

    # -- making room

    def make_room(self, need: int, *, keep: Keep = None) -> None:
        """Evict until `need` more bytes fit under the cap and above the floor. The caller holds the write lock.

        keep    segment, or segments, whose paths must stay
        raises  StorageFull when what may go is not enough
        """
        need += _MARGIN
        if self._short_of(need) <= 0:
            return
        self.reap(now=True)
        for _ in range(3):  # what a deletion frees is measured, not assumed
            short = self._short_of(need)
            if short <= 0:
                return
            with self.catalog.begin() as txn:
                cap = txn.limits().size_cap or 0
            evicted = self.evict(short + int(_SLACK * cap), keep=keep)
            self.reap(now=True)
            if not evicted.segments:
                break
        if (short := self._short_of(need)) > 0:
            with self.catalog.begin() as txn:
                cap_text = f"size_cap {txn.limits().size_cap}"
            raise StorageFull(
                f"{self.root}: {self.used_bytes()} bytes used, {files.free_bytes(self.root)} free on the disk, {need} wanted, "
                f"expected room under {cap_text} and above {self.floor} free bytes; {short} bytes short, and only named, "
                "pinned or used KV is left: delete sequences or raise the cap"
            )

    def enforce(self, *, keep: Keep = None) -> list[Sequence]:
        """Evict what is over the cap, as far as it may go; after every write, since a deletion too adds to the catalog's
        file. What has just been committed is, so a failure is only logged. Returns the sequences that lost KV, as they were.
        """
        lost: list[Sequence] = []
        try:
            if self._short_of(0) > 0:
                self.reap(now=True)
                while (short := self._short_of(0)) > 0:
                    evicted = self.evict(short, keep=keep)
                    lost += evicted.sequences
                    if not evicted.segments:
                        break
                    self.reap(now=True)
        except (StorageFull, StoreLocked) as e:
            _LOG.warning("%s; the cap is kept at the next write", e)
        return lost

    def evict(self, wanted: int, *, named: bool = False, keep: Keep = None) -> Evicted:
        """Take leaves until `wanted` bytes are free, expired sequences first. A sequence that loses its end is cut.

        named  take named sequences too, whole (never pinned ones)
        """
        with self.catalog.locked():  # until the files are aside: an import must not bring their ids back before
            with self.catalog.freeing(), self.catalog.begin(write=True) as txn:
                self._settle(txn)
                gone, sequences = expire(txn)
                freed = sum(entry.disk_bytes for entry in gone)
                if freed < wanted:
                    more, cut = self._take_leaves(txn, wanted - freed, named=named, keep=keep)
                    gone, sequences = gone + more, sequences + cut
                txn.count(segments_evicted=len(gone))
                txn.forget_gone()
            self.dispose(array for entry in gone for array in entry.info.array_names())
        return Evicted([entry.info for entry in gone], sequences)

    def _take_leaves(
        self, txn: Transaction, wanted: int, *, named: bool, keep: Keep
    ) -> tuple[list[SegmentEntry], list[Sequence]]:
        sequences, segments = txn.sequences(), txn.segments()
        protected = protected_segments(sequences, named=named)
        ends = (keep,) if isinstance(keep, str) else keep or ()
        kept = protected | {info.segment for end in ends if end in segments for info in txn.path(end)}
        gone: dict[str, SegmentEntry] = {}
        freed = 0
        for entry in in_order(self.retention, segments, kept, lambda entry: txn.use(entry.info.segment)):
            if freed >= wanted:
                break
            gone[entry.info.segment] = entry
            freed += entry.disk_bytes
            txn.remove_segment(entry.info)
        cut = [s for s in sequences if any(span.segment in gone for span in s.spans)]
        for sequence in cut:
            left = tuple(span for span in sequence.spans if span.segment not in gone)
            if sequence.name is not None or not left or left[-1].segment in protected:
                txn.remove_sequence(sequence)
            else:
                txn.rewrite_spans(sequence, left)
        rest = [info.segment for info in txn.remove_unreferenced(cut)] if named else []
        return [*gone.values(), *(segments[segment] for segment in rest)], cut

    # -- getting rid of files

    def dispose(self, arrays: Iterable[str]) -> None:
        """After no entry names them any more: put arrays in the trash. The deletion has happened, so what fails here is only
        logged; the next opener for writing finds it."""
        for array in arrays:
            target = self.root / TRASH / array
            try:
                if target.exists():  # an imported segment, or an abstract, may come and go twice
                    files.remove_tree(target)
                files.rename(self.root / "chunks" / array, target)
                files.mark_now(target)
            except FileNotFoundError:  # it never had files, or another process was faster
                pass
            except OSError as e:
                _LOG.warning("%s: %s, expected it in the trash; it is removed at a later open", e.filename, e.strerror)
        self.reap()

    def reap(self, *, now: bool = False) -> None:
        """Remove what has been in the trash for the grace period, or all of it. A clock that went back ends the wait."""
        for array in files.list_dir(self.root / TRASH):
            path = self.root / TRASH / array
            try:
                if now or not 0 <= files.now() - files.modified(path) < self.grace_s:
                    files.remove_tree(path)
            except FileNotFoundError:  # another process removed it first
                pass
            except OSError as e:
                _LOG.warning("%s: %s, expected to remove it; it is tried again", e.filename, e.strerror)


def expire(txn: Transaction) -> tuple[list[SegmentEntry], list[Sequence]]:
    """Remove sequences whose time has come, and the segments only they used."""
    now = txn.now()
    if (due := txn.next_expiry()) is None or due > now:
        return [], []
    mortal = [s for s in txn.sequences() if s.expires is not None]
    expired = [s for s in mortal if has_expired(s, now)]
    for sequence in expired:
        txn.remove_sequence(sequence)
    txn.expect_expiry([s.expires for s in mortal if s.expires is not None and s not in expired and not s.pinned])
    if not expired:
        return [], []
    segments = txn.segments()
    return [segments[info.segment] for info in txn.remove_unreferenced(expired)], expired


def protected_segments(sequences: Iterable[Sequence], *, named: bool) -> set[str]:
    """What retention must leave alone: segments of pinned sequences, and of named ones unless those may go too."""
    return {span.segment for s in sequences if s.pinned or (s.name is not None and not named) for span in s.spans}


def in_order(
    retention: Retention, segments: dict[str, SegmentEntry], kept: Collection[str], use: Callable[[SegmentEntry], Use]
) -> Iterator[SegmentEntry]:
    """Segments as they may go, one after the other: leaves of the prefix tree by rank, a parent after its last child."""
    children = Counter(entry.info.parent for entry in segments.values())
    leaves = [
        (_rank(retention, entry, use), segment)
        for segment, entry in segments.items()
        if not children[segment] and segment not in kept
    ]
    heapq.heapify(leaves)
    while leaves:
        entry = segments[heapq.heappop(leaves)[1]]
        yield entry
        parent = entry.info.parent
        if parent in segments:
            children[parent] -= 1
            if not children[parent] and parent not in kept:
                heapq.heappush(leaves, (_rank(retention, segments[parent], use), parent))


def _rank(retention: Retention, entry: SegmentEntry, use: Callable[[SegmentEntry], Use]) -> tuple[float, ...]:
    info, used = entry.info, use(entry)
    return retention.rank(Leaf(info.segment, used.last_used, used.hits, info.start, info.tokens, entry.disk_bytes))


def has_expired(sequence: Sequence, now: float) -> bool:
    """Whether it goes with the next write. now: store time."""
    return sequence.expires is not None and sequence.expires <= now and not sequence.pinned
