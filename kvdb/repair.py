"""repair(): bring a store back to where `check` finds nothing, without deleting anything.

Damaged segments, and what continues them, leave the catalog and their arrays move to quarantine/; a named sequence that ran
through one loses its name (its undamaged beginning stays, unnamed, and is found by prompt). A catalog that is damaged
itself is rebuilt from the segments, which describe themselves, the manifests of named sequences, and whatever of it can
still be read. A dry run unless told otherwise; repairing twice changes nothing more.

`upgrade` is a rebuild of a store of an earlier format.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from kvdb import files, folder, format, manifests
from kvdb.abstracts import ABSTRACTS
from kvdb.catalog import Catalog
from kvdb.check import UNSUPPORTED, check_abstract, check_files, check_store
from kvdb.entries import Limits, SegmentEntry, Sequence, sequence_key
from kvdb.environment import DATA
from kvdb.errors import Damaged, KVDBError, NotAStore, OlderFormat, OutOfMemory, Problem, StorageFull, Unsupported
from kvdb.format import FORMAT_VERSION, KVAttributes, SegmentInfo
from kvdb.identity import EXACT, Identity
from kvdb.prefix import Tokens
from kvdb.segments import layout

FILE_KINDS: Final = ("metadata", "missing-file", "size", "index", "digests", "token-ids", "record", "abstract", "seal")
"""Problems of a segment's files: the catalog is fine."""
_UPGRADE_TIMEOUT_S: Final = 60.0
_LITTER: Final = ("orphan", "manifest")
_OF_THE_MACHINE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Repair(msgspec.Struct, kw_only=True):
    """What was found, and what was done or would be.

    actions    sentences, in order
    remaining  what `check` still finds afterwards; None after a dry run
    """

    applied: bool
    problems: list[Problem]
    actions: list[str]
    remaining: list[Problem] | None = None


def repair(path: Path, *, apply: bool = False, rebuild: bool = False) -> Repair:
    """Check a store, and mend what can be mended.

    apply    do it; otherwise only say what would be done
    rebuild  make the catalog anew from the segments whatever state it is in
    raises   NotAStore, NewerFormat; Unsupported where the catalog names what only a later version knows; StoreLocked when a rebuild is needed and the store is open elsewhere; OutOfMemory and
             StorageFull, which are no reason to rebuild
    """
    path = at(path)
    report = Repair(applied=apply, problems=[], actions=[])
    held = folder.hold(path, exclusive=False)
    try:
        if not _has_header(path, report):
            if not apply:  # nothing else can be asked of a store without a header
                return report
            files.make_exclusive(held, path)
            _write_header(path)
        if apply:
            folder.make_parts(path)
        report.problems += _problems(path, writing=apply)
        if later := [p for p in report.problems if p.kind == UNSUPPORTED]:
            raise Unsupported(
                f"{later[0].message}; nothing was repaired, so that nothing of a later version is taken for damage"
            )
        if rebuild or any(p.kind not in FILE_KINDS + _LITTER for p in report.problems):
            if apply:
                files.make_exclusive(held, path)  # nobody may be left with the old catalog
            _rebuild(path, report)
            if apply:
                _mend(path, set(), report)
        elif report.problems:
            bad = {p.segment for p in report.problems if p.kind in FILE_KINDS and p.segment is not None}
            _mend(path, bad, report)
        if apply:
            report.remaining = _problems(path, writing=True)
        return report
    finally:
        files.close(held)


def at(path: str | os.PathLike[str]) -> Path:
    """A store's folder, whatever the working directory will be later and whichever links lead there."""
    root = Path(os.path.abspath(path))
    return root.resolve() if root.is_dir() else root


def _has_header(path: Path, report: Repair) -> bool:
    """Whether kvdb.json is there and readable.

    raises  NotAStore, OlderFormat, NewerFormat
    """
    try:
        header = folder.read_header(path)
    except (NotAStore, Damaged) as e:
        if not (path / "chunks").is_dir():
            raise
        report.problems.append(Problem("kvdb.json", "header", str(e)))
        report.actions.append("write kvdb.json anew, then look at the rest")
        return False
    if header.format < FORMAT_VERSION:
        raise OlderFormat(
            f"{path}: store of format {header.format}, expected {FORMAT_VERSION}; open it once, which upgrades it"
        )
    return True


def _write_header(path: Path) -> None:
    """A new kvdb.json; what the old one said are defaults."""
    folder.make_parts(path)
    quarantine(path, path / folder.HEADER)
    folder.replace_header(path, folder.new_header())


def _catalog(path: Path, *, readonly: bool) -> Catalog:
    return Catalog(path / "catalog", readonly=readonly, names=path / manifests.NAMES)


def _problems(path: Path, *, writing: bool) -> list[Problem]:
    try:
        with contextlib.closing(_catalog(path, readonly=not writing)) as catalog:
            return list(check_store(path, catalog))
    except (OutOfMemory, StorageFull):  # the machine's state, not the catalog's: nothing is rebuilt for it
        raise
    except KVDBError as e:
        return [Problem("catalog", "catalog", str(e))]


# -- damaged segments under a catalog that is fine


def _mend(path: Path, bad: set[str], report: Repair) -> None:
    with contextlib.closing(_catalog(path, readonly=not report.applied)) as catalog, contextlib.ExitStack() as locked:
        if report.applied:
            locked.enter_context(catalog.locked())
            bad = _damaged(path, catalog, bad)  # what somebody has mended meanwhile stays
        if bad:
            report.actions += drop_segments(path, catalog, bad, apply=report.applied)
        for problem in report.problems:
            if problem.kind in _LITTER:
                report.actions.append(f"tidy {problem.loc}")
        if report.applied:
            _tidy(path, catalog)


def _damaged(path: Path, catalog: Catalog, segments: Iterable[str]) -> set[str]:
    """Those of them whose files are not what their entries say."""
    with catalog.begin() as txn:
        views = [(entry, txn.identity(entry.info.identity)) for s in segments if (entry := txn.entry(s)) is not None]
    return {e.info.segment for e, identity in views if any(check_files(path / "chunks", e, identity, None))}


def _tidy(path: Path, catalog: Catalog) -> None:
    """Quarantine arrays without an entry, write manifests anew, sweep."""
    with catalog.begin() as txn:
        entries, named = txn.segments().values(), [s for s in txn.sequences() if s.name is not None]
    _quarantine_unnamed(path, entries)
    _write_manifests(path, named)
    folder.sweep(path, catalog)


def _quarantine_unnamed(path: Path, entries: Iterable[SegmentEntry]) -> None:
    """Move arrays aside that none of these entries names."""
    named = {array for entry in entries for array in entry.info.array_names()} | {format.METADATA_KEY}
    for array in set(files.list_dir(path / "chunks")) - named:
        quarantine(path, path / "chunks" / array)


def _write_manifests(path: Path, named: list[Sequence]) -> None:
    names = path / manifests.NAMES
    there = {s.key: s for s in manifests.read(names)}
    for name in set(files.list_dir(names)) - {f"{s.key}.json" for s in named}:
        quarantine(path, names / name)
    for sequence in named:
        if sequence.key not in there or not manifests.agree(there[sequence.key], sequence):
            quarantine(path, names / f"{sequence.key}.json")
            manifests.write(names, sequence)


def drop_segments(path: Path, catalog: Catalog, bad: set[str], *, apply: bool) -> list[str]:
    """Take segments and all that continues them out of the catalog, and their arrays to quarantine. Says what it does."""
    with contextlib.ExitStack() as locked:
        if apply:  # until the arrays are aside: nobody may bring them back meanwhile
            locked.enter_context(catalog.locked())
        actions, gone = _forget(catalog, bad, apply=apply)
        for info in gone if apply else ():
            for array in info.array_names():
                quarantine(path, path / "chunks" / array)
    return actions


def _forget(catalog: Catalog, bad: set[str], *, apply: bool) -> tuple[list[str], list[SegmentInfo]]:
    """Take segments and what continues them out of the catalog; returns what is done and the segments."""
    actions = []
    with catalog.begin(write=apply) as txn:
        segments, sequences = txn.segments(), txn.sequences()
        gone = _with_descendants(segments, bad)
        touched = [s for s in sequences if any(span.segment in gone for span in s.spans)]
        for sequence in touched:
            left = tuple(span for span in sequence.spans if span.segment not in gone)
            kept = sum(span.stop - span.start for span in left)
            actions.append(
                f"forget {'name ' + repr(sequence.name) if sequence.name is not None else 'sequence ' + sequence.key}: "
                f"{kept} of its {sequence.tokens} tokens stay, to be found by prompt"
            )
            if apply:
                txn.remove_sequence(sequence)
                if left:
                    unnamed = msgspec.structs.replace(sequence, name=None, pinned=False, expires=None)
                    txn.rewrite_spans(unnamed, left)
        for info in gone.values():
            actions.append(f"quarantine segment {info.segment}: positions {info.start}..{info.stop}")
            if apply:
                txn.remove_segment(info)
        if apply:
            txn.forget_gone()
    return actions, list(gone.values())


def _with_descendants(segments: dict[str, SegmentEntry], bad: Iterable[str]) -> dict[str, SegmentInfo]:
    """Segments of `bad` and what continues them, children before parents."""
    gone = {segment for segment in bad if segment in segments}
    for entry in sorted(segments.values(), key=lambda e: e.info.start):
        if entry.info.parent in gone:
            gone.add(entry.info.segment)
    infos = sorted((segments[segment].info for segment in gone), key=lambda info: -info.start)
    return {info.segment: info for info in infos}


def quarantine(path: Path, what: Path) -> None:
    """Move a file or folder aside; what is not there needs no moving."""
    with contextlib.suppress(FileNotFoundError):
        files.rename(what, _aside(path, what.name))


def taken_out(path: Path) -> Path:
    """Where a repair of the store at `path` leaves what it takes out."""
    return path / "quarantine"


def _aside(path: Path, name: str) -> Path:
    """A free name in quarantine/."""
    target = taken_out(path) / name
    return target.with_name(f"{name}.{os.urandom(4).hex()}") if target.exists() else target


def drop_lost(path: Path, catalog: Catalog) -> None:
    """After a power failure: of what was committed relaxed before this boot, keep what reached the disk."""
    boot = files.moment().boot
    with catalog.locked():
        with catalog.begin() as txn:
            earlier = [segment for segment, written in txn.unsynced().items() if written != boot]
        lost = _damaged(path, catalog, earlier)
        if lost:
            drop_segments(path, catalog, lost, apply=True)
        with catalog.begin(write=True) as txn:
            for segment in set(earlier) - lost:
                txn.mark_synced(segment)


# -- a catalog made anew


class _Found(msgspec.Struct, frozen=True):
    """A whole segment, as its files describe it."""

    entry: SegmentEntry
    identity: Identity


def _rebuild(path: Path, report: Repair) -> None:
    """The caller holds the store, exclusively if anything is to be changed."""
    found, broken = _scan(path / "chunks")
    sequences, limits = _salvage(path)
    whole = _connected(found)
    lost = set(broken) | (set(found) - set(whole))
    for segment in sorted(lost):
        report.actions.append(f"quarantine segment {segment}: {broken.get(segment, 'its parent is gone')}")
    report.actions.append(
        f"rebuild the catalog from {len(whole)} segments and {len(sequences)} known sequences; statistics are lost, and "
        "what only the catalog knew: pins and expiry of unnamed sequences"
    )
    if report.applied:
        _replace_catalog(path, whole, sequences, limits)


def _replace_catalog(path: Path, whole: dict[str, _Found], sequences: list[Sequence], limits: Limits) -> None:
    chunks, workspace = path / "chunks", path / "tmp" / f"rebuild-{os.urandom(8).hex()}"
    files.mkdir(workspace)
    try:
        named = _fill(workspace / "catalog", chunks, whole, sequences, limits)
        _quarantine_unnamed(path, [each.entry for each in whole.values()])
        _swap_catalog(path, workspace / "catalog")
        _write_manifests(path, named)
        if not (chunks / format.METADATA_KEY).exists():
            files.write_new(chunks / format.METADATA_KEY, format.group_metadata())
    finally:
        files.remove_tree(workspace)


def _swap_catalog(path: Path, new: Path) -> None:
    """Put a new catalog in the old one's place in one step, and keep the old one. Nobody has either open."""
    files.mkdir(path / "catalog", exist_ok=True)
    data = path / "catalog" / DATA
    if data.exists():
        aside = _aside(path, "catalog")
        files.mkdir(aside)
        files.copy_file(data, aside / DATA)
    files.rename(new / DATA, data)
    files.unlink(path / "catalog" / "lock.mdb")  # it tells of the old one's readers
    files.fsync_dir(path / "catalog")


def _scan(chunks: Path) -> tuple[dict[str, _Found], dict[str, str]]:
    """Segments in chunks/ that are whole, and ids of those that are not, with the reason.

    raises  OutOfMemory, and OSError for what says nothing of a segment
    """
    found, broken = dict[str, _Found](), dict[str, str]()
    for segment in sorted(
        {array.partition(".")[0] for array in files.list_dir(chunks) if array != format.METADATA_KEY}
    ):
        try:
            found[segment] = _describe(chunks, segment)
        except OutOfMemory:
            raise
        except Unsupported as e:
            broken[segment] = f"of a later version, kept for it ({e})"
        except (KVDBError, OSError) as e:
            if isinstance(e, OSError) and e.errno in _OF_THE_MACHINE:
                raise
            broken[segment] = "damaged"
    return found, broken


def _describe(chunks: Path, segment: str) -> _Found:
    """A segment from its own files, with those abstracts that are whole.

    raises  Damaged when anything about its KV is wrong; Unsupported for what only a later version knows
    """
    first = _attributes(chunks, segment, 0)
    info, seals = msgspec.structs.replace(first.info, abstracts=()), dict[str, str]()
    for group in range(len(info.geometry.groups)):
        seals[format.kv_array(segment, group)] = _attributes(chunks, segment, group).sections["digests"][2]
    entry = SegmentEntry(info=info, seals=seals, disk_bytes=0)
    problems = list(check_files(chunks, entry, first.identity, None))
    if later := [p for p in problems if p.kind == UNSUPPORTED]:
        raise Unsupported(later[0].message)
    if problems or info.segment != segment or first.identity.digest().hex() != info.identity:
        raise Damaged(
            f"segment {segment}: {problems[0] if problems else 'its metadata names another'}, expected it whole"
        )
    for name in ABSTRACTS:
        with contextlib.suppress(KVDBError, OSError):  # not there, not whole: it can be made anew
            entry = _with_abstract(chunks, entry, name)
    disk_bytes = sum(files.tree_bytes(chunks / array) for array in entry.info.array_names())
    return _Found(msgspec.structs.replace(entry, disk_bytes=disk_bytes), first.identity)


def _with_abstract(chunks: Path, entry: SegmentEntry, name: str) -> SegmentEntry:
    """raises  Damaged, OSError when its arrays are not all there and whole"""
    info, seals = entry.info, dict[str, str]()
    for group in range(len(info.geometry.groups)):
        array = format.abstract_array(info.segment, name, group)
        digests = format.abstract_digests(files.read_file(chunks / array / format.METADATA_KEY), array)
        seals[array] = format.abstract_seal(digests)
    info = msgspec.structs.replace(info, abstracts=(*info.abstracts, name))
    found = msgspec.structs.replace(entry, info=info, seals=entry.seals | seals)
    for problem in check_abstract(chunks, found, name):
        raise Damaged(str(problem))
    return found


def _attributes(chunks: Path, segment: str, group: int) -> KVAttributes:
    array = format.kv_array(segment, group)
    return format.parse_kv_metadata(files.read_file(chunks / array / format.METADATA_KEY), f"array {array}")


def _connected(found: dict[str, _Found]) -> dict[str, _Found]:
    """The segments whose ancestors are all there and of their kind, parents before children."""
    whole: dict[str, _Found] = {}
    for segment, each in sorted(found.items(), key=lambda item: item[1].entry.info.start):
        info = each.entry.info
        parent = whole[info.parent].entry.info if info.parent in whole else None
        fits = parent is not None and parent.identity == info.identity and parent.start < info.start <= parent.stop
        if info.parent is None or (
            fits and parent is not None and (parent.fidelity == EXACT or info.fidelity != EXACT)
        ):
            whole[segment] = each
    return whole


def _salvage(path: Path) -> tuple[list[Sequence], Limits]:
    """Sequences that the old catalog and the manifests know, and the old limits, as far as they can be read."""
    known = manifests.read(path / manifests.NAMES)
    limits = Limits()
    with (
        contextlib.suppress(KVDBError),
        contextlib.closing(Catalog(path / "catalog", readonly=False)) as catalog,
        catalog.begin() as txn,
    ):
        readable = txn.readable_sequences()
        keys, names = {r.key for r in readable}, {r.name for r in readable}
        known = readable + [
            s for s in known if s.key not in keys and s.name not in names
        ]  # a manifest may be an older one
        limits = txn.limits()
    return known, limits


def _fill(
    target: Path, chunks: Path, whole: dict[str, _Found], sequences: list[Sequence], limits: Limits
) -> list[Sequence]:
    """Make a catalog; returns its named sequences."""
    files.mkdir(target)
    with contextlib.closing(Catalog(target, readonly=False, create=True)) as catalog:
        for each in whole.values():
            with catalog.begin(write=True) as txn:
                txn.add_segment(each.entry, each.identity, stored_tokens(chunks, each.entry.info))
        with catalog.begin(write=True) as txn:
            txn.set_limits(limits)
            for sequence in sequences:
                if _fits(sequence, whole):
                    txn.put_sequence(sequence)
            ends = {s.spans[-1].segment for s in txn.sequences() if s.spans}
            children = Counter(each.entry.info.parent for each in whole.values())
            for segment, each in whole.items():
                if not children[segment] and segment not in ends:
                    txn.record(each.entry.info, each.entry.info.stop)
            named = [s for s in txn.sequences() if s.name is not None]
        catalog.ballast()
    return named


def _fits(sequence: Sequence, whole: dict[str, _Found]) -> bool:
    """Whether a sequence's spans lie end to end in segments that are there."""
    position = 0
    for span in sequence.spans:
        info = whole[span.segment].entry.info if span.segment in whole else None
        if info is None or info.identity != sequence.identity or info.start + span.start != position:
            return False
        if not 0 == span.start < span.stop <= info.tokens:
            return False
        position += span.stop
    key = sequence_key(sequence.identity, sequence.spans, sequence.name)
    return position == sequence.tokens > 0 and key == sequence.key


def stored_tokens(chunks: Path, info: SegmentInfo) -> Tokens:
    """Token ids from a segment's own file."""
    path = chunks / format.kv_array(info.segment, 0) / format.SHARD_KEY
    fd = files.open_read(path)
    try:
        return np.frombuffer(files.pread(fd, 4 * info.tokens, layout(info, 0).tokens_offset), "<u4")
    finally:
        files.close(fd)


def upgrade(path: Path) -> None:
    """Bring a store of an earlier format to the current one: segments stay as they are, the catalog is made anew.

    raises  StoreLocked when it is open elsewhere for too long
    """
    held = folder.hold(path, exclusive=True, timeout_s=_UPGRADE_TIMEOUT_S)
    try:
        header = folder.read_header(path)
        if header.format < FORMAT_VERSION:  # otherwise another process was faster
            folder.make_parts(path)
            _rebuild(path, Repair(applied=True, problems=[], actions=[]))
            folder.replace_header(path, msgspec.structs.replace(header, format=FORMAT_VERSION))
    finally:
        files.close(held)
