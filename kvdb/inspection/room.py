"""Where a store's bytes are, measured on disk, and what would free some: a dry run of `gc`, `compact` and a size cap.

What would go is asked of the same functions that let it go (`space.in_order`, `compact.plan`); nothing is written.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from kvdb import compact, files, format
from kvdb.entries import SegmentEntry, Sequence
from kvdb.errors import Damaged, Unsupported
from kvdb.format import SegmentInfo
from kvdb.geometry import div_ceil
from kvdb.inspection.snapshot import Snapshot
from kvdb.retention import Retention
from kvdb.segments import abstract_layout, codecs_of, layout
from kvdb.space import has_expired, in_order, protected_segments

if TYPE_CHECKING:
    from kvdb.store import KVDB

_BLOCK: Final = 4096
"""What file systems give room in."""
_PARTS: Final = ("catalog", "names", "quarantine", "tmp", "trash")


class Kind(NamedTuple):
    """A model's KV: identity (digest in hex), what people call the model, KV dtype."""

    identity: str
    model: str
    dtype: str


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on disk.

    total       of the whole folder; `parts` add up to it
    parts       kv, abstracts, metadata, catalog, names, quarantine, tmp, trash, other (header, folders, arrays that no entry names)
    abstracts   by name
    kinds       KV and abstracts by model
    layers      KV by layer, of all models together; compressed rows count for the layers of their file in equal parts
    codecs      KV by codec
    """

    total: int
    parts: dict[str, int]
    abstracts: dict[str, int]
    kinds: dict[Kind, int]
    layers: dict[int, int]
    codecs: dict[str, int]


class Owner(NamedTuple):
    """Bytes of a sequence's files: its own go with it, others stay for those that share them."""

    sequence: Sequence
    own_bytes: int
    shared_bytes: int


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """What a command would do.

    sequences  that would go, or lose their ends
    segments   that would go
    bytes      that would be free
    enough     whether that is all that is asked for
    """

    sequences: list[Sequence]
    segments: int
    bytes: int
    enough: bool = True


def measure(db: KVDB, snap: Snapshot) -> Room:
    """Look at every file. Zero case: an empty store has no KV, and still a catalog."""
    root, parts, abstracts = db.path, Counter({"kv": 0, "abstracts": 0, "metadata": 0}), Counter[str]()
    kinds, layers, codecs = Counter[Kind](), Counter[int](), Counter[str]()
    known = _kinds(snap)
    for entry in snap.segments.values():
        for group in range(len(entry.info.geometry.groups)):
            taken = _array(root / "chunks" / format.kv_array(entry.info.segment, group), parts)
            parts["kv"] += taken
            kinds[known[entry.info.identity]] += taken
            codecs[_codec(entry, group)] += taken
            _spread(layers, entry.info.geometry.groups[group].layers, taken)
            for name in entry.info.abstracts:
                taken = _array(root / "chunks" / format.abstract_array(entry.info.segment, name, group), parts)
                parts["abstracts"] += taken
                abstracts[name] += taken
                kinds[known[entry.info.identity]] += taken
    for part in _PARTS:
        parts[part] = _inside(root / part)
    total = files.tree_bytes(root)
    parts["other"] = total - sum(parts.values())
    return Room(
        total=total,
        parts=dict(parts),
        abstracts=dict(abstracts.most_common()),
        kinds=dict(kinds.most_common()),
        layers=dict(sorted(layers.items())),
        codecs=dict(codecs.most_common()),
    )


def owners(snap: Snapshot) -> list[Owner]:
    """Of every readable sequence, the one with the most bytes of its own first."""
    found = []
    for sequence in snap.sequences:
        segments = {span.segment for span in sequence.spans}
        own = {segment for segment in segments if snap.passing[segment] == 1}
        found.append(Owner(sequence, snap.disk_bytes(own), snap.disk_bytes(segments - own)))
    return sorted(found, key=lambda o: (-o.own_bytes, -o.shared_bytes, o.sequence.key))


def gc(snap: Snapshot, room: Room) -> Saving:
    """What `KVDB.gc` would free: expired sequences, and what waits in the trash."""
    gone = _expired(snap)
    segments = snap.only_theirs(gone)
    freed = snap.disk_bytes(segments) + room.parts["trash"]
    return Saving(sequences=gone, segments=len(segments), bytes=freed)


def merging(snap: Snapshot) -> Saving:
    """What `KVDB.compact` would save: segments, and about as many bytes (what it leaves in the trash included)."""
    children = compact.continued(snap.segments)
    whole = [s.spans for s in snap.sequences if snap.entries(s.spans)]
    runs = dict.fromkeys(tuple(compact.plan(snap.segments, children, spans)) for spans in whole)
    saved = freed = 0
    for run in (run for run in runs if len(run) > 1):
        entries = [snap.segments[segment] for segment in run]
        with contextlib.suppress(Damaged, Unsupported):  # what cannot be read is not merged either
            freed += max(0, sum(entry.disk_bytes for entry in entries) - _merged_bytes(entries))
            saved += len(run) - 1
    return Saving(sequences=[], segments=saved, bytes=freed)


def capped(snap: Snapshot, used_bytes: int, room: Room, cap: int, retention: Retention) -> Saving:
    """What a size cap would let go, in the order of a retention policy: the trash, expired sequences, then leaves of the prefix tree that
    nothing protects. Sequences are as they are now; one that loses only its end goes on with the rest.

    used_bytes  as `Space.used_bytes` counts them
    """
    short = used_bytes - cap - room.parts["trash"]
    if short <= 0:
        return Saving(sequences=[], segments=0, bytes=max(0, min(used_bytes - cap, room.parts["trash"])))
    expired = _expired(snap)
    gone = snap.only_theirs(expired)
    left = [s for s in snap.sequences if s not in expired]
    segments = {segment: entry for segment, entry in snap.segments.items() if segment not in gone}
    freed = snap.disk_bytes(gone)
    for entry in in_order(
        retention, segments, protected_segments(left, named=False), lambda e: snap.use(e.info.segment)
    ):
        if freed >= short:
            break
        gone.add(entry.info.segment)
        freed += entry.disk_bytes
    lost = [s for s in left if any(span.segment in gone for span in s.spans)]
    return Saving(
        sequences=expired + lost, segments=len(gone), bytes=freed + room.parts["trash"], enough=freed >= short
    )


def _array(folder: Path, parts: Counter[str]) -> int:
    """Bytes of an array's values; what describes them is added to `parts`. An array that is not there takes none."""
    try:
        values = files.disk_bytes(folder / format.SHARD_KEY)
    except (FileNotFoundError, NotADirectoryError):
        values = 0
    parts["metadata"] += files.tree_bytes(folder) - values
    return values


def _kinds(snap: Snapshot) -> dict[str, Kind]:
    """By identity: the name that its newest sequence gives the model."""
    names = {s.identity: s.model for s in snap.sequences}
    found = {}
    for entry in snap.segments.values():
        digest = entry.info.identity
        found[digest] = Kind(digest, names.get(digest, ""), entry.info.geometry.dtype)
    return found


def _codec(entry: SegmentEntry, group: int) -> str:
    try:
        return str(codecs_of(entry.info)[group])
    except (Damaged, Unsupported):
        return "unreadable"


def _spread(layers: Counter[int], of: tuple[int, ...], taken: int) -> None:
    share, rest = divmod(taken, len(of))
    for place, layer in enumerate(of):
        layers[layer] += share + (place < rest)


def _expired(snap: Snapshot) -> list[Sequence]:
    return [s for s in snap.sequences if has_expired(s, snap.now)]


def _inside(folder: Path) -> int:
    """Of what is in a folder, without the folder itself; 0 where there is none."""
    return files.tree_bytes(folder) - files.disk_bytes(folder) if folder.is_dir() else 0


def _merged_bytes(entries: list[SegmentEntry]) -> int:
    """What one segment instead of these would take on disk: its files in whole blocks, and as much metadata as the first of them has."""
    first, last = entries[0].info, entries[-1].info
    tokens = last.stop - first.start
    packed = tuple(map(sum, zip(*(entry.info.packed for entry in entries), strict=True)))
    merged = msgspec.structs.replace(first, tokens=tokens, capacity=first.geometry.chunks(tokens), packed=packed)
    return _values_bytes(merged) + entries[0].disk_bytes - _values_bytes(first)


def _values_bytes(info: SegmentInfo) -> int:
    groups = range(len(info.geometry.groups))
    sizes = [layout(info, g).file_bytes for g in groups]
    sizes += [abstract_layout(info, g, name).file_bytes for name in info.abstracts for g in groups]
    return sum(div_ceil(size, _BLOCK) * _BLOCK for size in sizes)
