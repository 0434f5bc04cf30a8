"""A sequence as one portable file: a zip, uncompressed, of a Zarr hierarchy that holds its segments, and of what they make.

    kvdb-sequence.json   the sequence, its identity and segments
    zarr.json            a group, so that Zarr opens the file as it is
    <array>/...          the arrays, as in a store's chunks/

Importing trusts nothing in the file: names of members are computed and never taken from it, sizes follow from the geometry
and are compared before anything is read, and every record is compared with its digest before the transaction that makes
the sequence visible. (Digests are no signatures: whoever made the file decides what the KV says.)
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from kvdb import files, format
from kvdb.check import check_files
from kvdb.entries import SegmentEntry, Sequence, check_name
from kvdb.errors import Damaged, IdentityMismatch, InvalidInput, SequenceNotFound
from kvdb.format import SegmentInfo
from kvdb.identity import Identity
from kvdb.repair import stored_tokens
from kvdb.segments import abstract_layout, codecs_of, layout, reserved_bytes

if TYPE_CHECKING:
    from kvdb.store import KVDB

EXPORT_VERSION: Final = 1
_DESCRIPTION: Final = "kvdb-sequence.json"
_DESCRIPTION_BYTES: Final = 64 << 20
_BLOCK: Final = 1 << 20


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """kvdb-sequence.json. segments: the sequence's path, oldest first."""

    export: int
    sequence: Sequence
    identity: Identity
    segments: tuple[SegmentEntry, ...]


def export_sequence(db: KVDB, name_or_key: str, target: Path) -> int:
    sequence = db.sequence(name_or_key)
    with db.catalog.begin() as txn:
        entries = txn.span_entries(sequence.spans)
    identity = db.identity(sequence.identity)
    try:
        for entry in entries:
            for problem in check_files(db.path / "chunks", entry, identity, None):
                raise Damaged(f"sequence {name_or_key!r}: {problem}; run 'kvdb repair', nothing was exported")
        return _write(db, sequence, identity, entries, target)
    except (Damaged, FileNotFoundError) as e:
        if not db.holds(sequence.spans):
            raise SequenceNotFound(
                f"sequence {name_or_key!r}: deleted or merged while it was exported, expected it to stay; export it again"
            ) from e
        with db.catalog.begin() as txn:
            if txn.span_entries(sequence.spans) == entries:
                raise
        return export_sequence(db, name_or_key, target)  # it has other abstracts now


def _write(db: KVDB, sequence: Sequence, identity: Identity, entries: list[SegmentEntry], target: Path) -> int:
    description = Description(export=EXPORT_VERSION, sequence=sequence, identity=identity, segments=tuple(entries))
    draft = target.with_name(f".{target.name[:200]}.{os.urandom(4).hex()}.part")
    try:
        with files.translated(target), files.create_stream(draft) as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
                archive.writestr(_DESCRIPTION, msgspec.json.format(msgspec.json.encode(description), indent=1))
                archive.writestr(format.METADATA_KEY, format.group_metadata())
                for array, size in (item for entry in entries for item in _arrays(entry)):
                    _put(archive, db.path / "chunks", array, size)
            stream.flush()
            files.fsync(stream.fileno(), draft)
        files.link(draft, target)  # never over an existing file
        files.fsync_dir(target.absolute().parent)
    finally:
        files.unlink(draft)
    return target.stat().st_size


def _put(archive: zipfile.ZipFile, chunks: Path, array: str, size: int) -> None:
    archive.writestr(f"{array}/{format.METADATA_KEY}", files.read_file(chunks / array / format.METADATA_KEY))
    path = chunks / array / format.SHARD_KEY
    fd = files.open_read(path)
    try:
        if files.file_size(fd) != size:
            raise Damaged(f"{path}: {files.file_size(fd)} bytes, expected {size}; run 'kvdb verify'")
        with archive.open(zipfile.ZipInfo(f"{array}/{format.SHARD_KEY}"), "w", force_zip64=True) as out:
            for offset in range(0, size, _BLOCK):
                out.write(files.pread(fd, min(_BLOCK, size - offset), offset))
    finally:
        files.close(fd)


def _arrays(entry: SegmentEntry) -> list[tuple[str, int]]:
    """Names of a segment's arrays and the size of each one's file."""
    info, found = entry.info, []
    for group in range(len(info.geometry.groups)):
        found.append((format.kv_array(info.segment, group), layout(info, group).file_bytes))
        for name in info.abstracts:
            size = abstract_layout(info, group, name).file_bytes
            found.append((format.abstract_array(info.segment, name, group), size))
    return found


def _kv(entry: SegmentEntry) -> tuple[SegmentInfo, list[str | None]]:
    """What tells a segment's KV from any other: its abstracts may have changed since it was exported."""
    info = msgspec.structs.replace(entry.info, abstracts=())
    return info, [entry.seals.get(array) for array in info.array_names()]


def _room(entry: SegmentEntry) -> int:
    """Most that a segment's files can occupy."""
    info = entry.info
    return reserved_bytes(info.geometry, codecs_of(info), info.abstracts, info.capacity)


def import_sequence(db: KVDB, source: Path, *, name: str | None) -> str:
    try:
        with files.open_stream(source) as stream, zipfile.ZipFile(stream) as archive:
            return _take_in(db, source, archive, name)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as e:
        raise Damaged(f"{source}: {e}, expected a file that 'kvdb export' wrote") from e


def _take_in(db: KVDB, source: Path, archive: zipfile.ZipFile, name: str | None) -> str:
    described = _description(source, archive)
    sequence, identity = described.sequence, described.identity
    if identity.salt != db.salt:
        raise IdentityMismatch(
            f"{source}: made under another tenant's salt, expected this handle's; open the store with it"
        )
    name = sequence.name if name is None else name
    if name is not None:
        check_name(name)
    workspace = db.own_workspace()
    fresh: list[SegmentEntry] = []
    known: str | None = None  # the deepest segment of the path that the store has
    try:
        with db.catalog.locked():
            with db.catalog.begin() as txn:
                older = None if name is None else txn.named(name)
            if older is not None and older.pinned:
                raise InvalidInput(f"sequence {name!r}: pinned, expected a name that may move; give another one")
            for entry in described.segments:
                with db.catalog.begin() as txn:
                    there = txn.entry(entry.info.segment)
                if there is None:
                    fresh.append(entry)
                elif _kv(there) != _kv(entry):
                    raise Damaged(
                        f"{source}: segment {entry.info.segment} is not the one of that id in the store, expected it"
                    )
                else:
                    known = entry.info.segment
            db.space.make_room(sum(map(_room, fresh)), keep=known)
            for entry in fresh:
                for array, size in _arrays(entry):
                    _extract(source, archive, workspace, array, size)
                problems = list(check_files(workspace, entry, identity, None))
                if problems:
                    raise Damaged(f"{source}: {problems[0]}; the file is damaged, nothing was imported")
            files.fsync_trees([workspace / array for entry in fresh for array, _ in _arrays(entry)])
            with db.write_transaction() as txn:
                for entry in fresh:
                    measured = sum(files.tree_bytes(workspace / array) for array, _ in _arrays(entry))
                    entry = msgspec.structs.replace(entry, disk_bytes=measured, changes=0)
                    txn.add_segment(entry, identity, stored_tokens(workspace, entry.info))
                    txn.count(bytes_written=measured, segments_written=1, tokens_written=entry.info.tokens)
                last = described.segments[-1].info
                recorded = txn.record(last, sequence.tokens, name=name, model=sequence.model)
                for array, _ in (item for entry in fresh for item in _arrays(entry)):
                    files.rename(workspace / array, db.path / "chunks" / array)
                files.fsync_dir(db.path / "chunks")
            db.space.enforce(keep=last.segment)
            return recorded.key
    except BaseException:
        db.remove_unlisted(entry.info for entry in fresh)
        raise
    finally:
        for array, _ in (item for entry in fresh for item in _arrays(entry)):
            files.remove_tree(workspace / array)


def _description(source: Path, archive: zipfile.ZipFile) -> Description:
    """raises  Damaged when the file does not describe one path of segments of one identity"""
    try:
        data = _read_member(source, archive, _DESCRIPTION, limit=_DESCRIPTION_BYTES)
        version = msgspec.json.decode(data)["export"]
        if isinstance(version, int) and version > EXPORT_VERSION:
            raise InvalidInput(
                f"{source}: export of version {version}, expected at most {EXPORT_VERSION}; upgrade kvdb"
            )
        described = msgspec.json.decode(data, type=Description)
    except InvalidInput:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise Damaged(f"{source}: {e}, expected a file that 'kvdb export' wrote") from e
    sequence, before = described.sequence, None
    for entry in described.segments:
        info = entry.info
        if info.parent != before or info.identity != described.identity.digest().hex():
            raise Damaged(
                f"{source}: segment {info.segment} has parent {info.parent}, expected {before} and one identity"
            )
        before = info.segment
    positions = [entry.info.start for entry in described.segments]
    last = described.segments[-1].info if positions else None
    if last is None or positions != sorted(set(positions)) or not last.start < sequence.tokens <= last.stop:
        raise Damaged(f"{source}: segments begin at {positions}, expected a path that holds {sequence.tokens} tokens")
    return described


def _read_member(source: Path, archive: zipfile.ZipFile, member: str, *, limit: int) -> bytes:
    found = _member(source, archive, member)
    if found.file_size > limit:
        raise Damaged(f"{source}: {member} has {found.file_size} bytes, expected at most {limit}")
    return archive.read(found)


def _member(source: Path, archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    """A member that is stored as it is: what is not compressed cannot be a bomb."""
    try:
        found = archive.getinfo(member)
    except KeyError:
        raise Damaged(f"{source}: no member {member}, expected it; the file is not whole") from None
    if found.compress_type != zipfile.ZIP_STORED or found.compress_size != found.file_size or found.flag_bits & 1:
        raise Damaged(f"{source}: member {member} is compressed or encrypted, expected it stored")
    return found


def _extract(source: Path, archive: zipfile.ZipFile, workspace: Path, array: str, size: int) -> None:
    """One array into the workspace; holes stay holes."""
    metadata = _read_member(source, archive, f"{array}/{format.METADATA_KEY}", limit=16 << 20)
    found = _member(source, archive, f"{array}/{format.SHARD_KEY}")
    if found.file_size != size:
        raise Damaged(f"{source}: {found.filename} has {found.file_size} bytes, expected {size}")
    files.mkdir(workspace / array)
    files.write_new(workspace / array / format.METADATA_KEY, metadata)
    path = workspace / array / format.SHARD_KEY
    fd = files.open_excl(path)
    try:
        files.truncate(fd, size, path)
        with archive.open(found) as stream:
            for offset in range(0, size, _BLOCK):
                block = stream.read(min(_BLOCK, size - offset))
                if np.frombuffer(block, np.uint8).any():
                    files.write_all(fd, block, offset, path)
    finally:
        files.close(fd)
