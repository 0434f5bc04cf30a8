"""check(): walk a store and yield everything that is wrong. The engine, the tool, `repair` and every test's teardown share it.

Facts checked: every entry of the catalog verifies, and each table has as many as its totals say; every span's segment exists
and its parents lead to position 0; spans lie on the grid, inside their segments and end to end; sequences have the root and
the fidelity of their segments; the prefix tree finds every segment and lists no other; names, manifests, uses and counters agree with what
is there; files are there and of the right size; metadata says what the catalog says; seals, token ids, abstracts and every
record match their digests; no array or manifest is left that no entry names. It reads, and repairs nothing. (What a dead
writer left in tmp/ is no problem: the next opener for writing removes it.)

The catalog is seen as of one moment. Files are looked at after that: what was deleted meanwhile, or has other abstracts since,
is no problem, so findings about files are looked at again before they are told, and leftovers while no writer is at work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import xxhash

from kvdb import files, format, manifests
from kvdb.abstracts import ABSTRACTS
from kvdb.catalog import Catalog
from kvdb.entries import SegmentEntry, Sequence, spans_root
from kvdb.errors import Damaged, KVDBError, Problem, Unsupported
from kvdb.format import SegmentInfo
from kvdb.identity import Identity
from kvdb.segments import abstract_layout, block_file, codec_of, layout, row_bytes
from kvdb.transaction import Transaction, fidelity_of

UNSUPPORTED: Final = "unsupported"
"""Kind of problem: no damage, but a codec, cipher or abstract of a later version."""


def check_store(root: Path, catalog: Catalog) -> Iterator[Problem]:
    """Yield the problems of the store at `root`. Zero case: nothing is yielded."""
    try:
        catalog.check_structure()
        with catalog.begin() as txn:
            found = list(_check_catalog(txn))
            segments = _readable_segments(txn)
            views = [(e, _identity(txn, e.info.identity), _tokens(txn, e.info.segment)) for e in segments.values()]
    except Damaged as e:
        yield Problem("catalog", "catalog", str(e))
        return
    yield from found
    damaged = any(p.kind == "damaged-entry" for p in found)
    for entry, identity, tokens in views:
        while problems := list(check_files(root / "chunks", entry, identity, tokens)):
            with catalog.begin() as txn:
                now = entry if damaged else txn.entry(entry.info.segment)
            if now is None:  # deleted
                break
            if now == entry:
                yield from problems
                break
            entry = now
    with catalog.quiet(), catalog.begin() as txn:
        yield from _check_leftovers(root, txn)


def _readable_segments(txn: Transaction) -> dict[str, SegmentEntry]:
    """The segments whose entries verify, by id."""
    found = {}
    for segment in txn.segment_ids():
        try:
            entry = txn.entry(segment)
        except Damaged:
            continue
        if entry is not None and entry.info.segment == segment:
            found[segment] = entry
    return found


def _check_leftovers(root: Path, txn: Transaction) -> Iterator[Problem]:
    try:
        segments, sequences = txn.segments(), txn.sequences()
    except Damaged:  # told already; what a damaged catalog does not name is not left over
        return
    named = {array for entry in segments.values() for array in entry.info.array_names()} | {format.METADATA_KEY}
    for array in files.list_dir(root / "chunks"):
        if array not in named:
            yield Problem(f"array {array}", "orphan", "no catalog entry names it, expected none left over")
    wanted = {f"{s.key}.json": s for s in sequences if s.name is not None}
    there = {f"{s.key}.json": s for s in manifests.read(root / manifests.NAMES)}
    for name in sorted(wanted.keys() | set(files.list_dir(root / manifests.NAMES))):
        if name not in wanted:
            yield Problem(f"manifest {name}", "orphan", "no named sequence has this key, expected none left over")
        elif name not in there or not manifests.agree(there[name], wanted[name]):
            yield Problem(
                f"sequence {wanted[name].name}", "manifest", "its manifest is missing or differs, expected it"
            )


def _identity(txn: Transaction, digest: str) -> Identity | None:
    try:
        return txn.identity(digest)
    except Damaged:  # `_check_segment` has said so
        return None


def _tokens(txn: Transaction, segment: str) -> bytes | None:
    try:
        return txn.tokens(segment).tobytes()
    except Damaged:
        return None


def _check_catalog(txn: Transaction) -> Iterator[Problem]:
    for table, message in txn.table_problems():
        yield Problem(f"catalog table {table}", "damaged-entry", message)
    segments = _readable_segments(txn)
    for segment in sorted(set(txn.segment_ids()) - set(segments)):
        yield Problem(f"segment {segment}", "damaged-entry", "its entry does not verify, expected it to", segment)
    for entry in segments.values():
        yield from _check_segment(txn, entry.info)
    for node, segment in txn.listed_segments():
        if segment not in segments:
            yield Problem(
                f"prefix tree, key {node.hex()}", "tree", f"lists segment {segment}, expected one that exists"
            )
    for table in ("tokens", "uses", "unsynced"):
        for segment in sorted(set(txn.keys_of(table)) - set(segments)):
            yield Problem(f"catalog table {table}", "stale", f"entry for segment {segment}, expected one that exists")
    sequences = txn.readable_sequences()
    for sequence in sequences:
        yield from _check_sequence(txn, sequence, segments)
    used = {span.segment for sequence in sequences for span in sequence.spans}
    for segment in sorted(set(segments) - used):
        yield Problem(f"segment {segment}", "unreferenced", "no sequence passes through it, expected one", segment)
    with contextlib.suppress(Damaged):  # of totals and counters: told already
        yield from _check_names(txn, sequences)
        yield from _check_counters(txn, segments)


def _check_counters(txn: Transaction, segments: dict[str, SegmentEntry]) -> Iterator[Problem]:
    counters, entries = txn.counters(), segments.values()
    expected = (sum(e.disk_bytes for e in entries), sum(len(e.info.array_names()) for e in entries))
    if (counters.segment_bytes, counters.arrays) != expected:
        yield Problem(
            "catalog counters",
            "counters",
            f"{counters.segment_bytes} bytes, {counters.arrays} arrays, expected {expected}",
        )


def _check_segment(txn: Transaction, info: SegmentInfo) -> Iterator[Problem]:
    where = f"segment {info.segment}"
    try:
        identity = txn.identity(info.identity)
        if identity is None or identity.digest().hex() != info.identity:
            yield Problem(
                where, "identity", f"identity {info.identity} is missing or another, expected its fields", info.segment
            )
        path = txn.path_tokens(info.segment)
        if len(path) != info.stop:
            yield Problem(where, "tokens", f"{len(path)} token ids up to its end, expected {info.stop}", info.segment)
        found = txn.find(info.identity, path, accepted=None)
        if found.tokens != len(path):
            yield Problem(
                where, "tree", f"the prefix tree finds {found.tokens} of its tokens, expected {len(path)}", info.segment
            )
    except KVDBError as e:
        yield Problem(where, "damaged-entry", str(e), info.segment)


def _check_sequence(txn: Transaction, sequence: Sequence, segments: dict[str, SegmentEntry]) -> Iterator[Problem]:
    where = f"sequence {sequence.name or sequence.key}"
    position = 0
    for span in sequence.spans:
        if span.segment not in segments:
            yield Problem(where, "missing-segment", f"segment {span.segment} is not in the catalog, expected it")
            return
        info = segments[span.segment].info
        if info.start + span.start != position or not span.start < span.stop <= info.tokens:
            yield Problem(where, "span", f"span {span} at position {position}, expected it inside {info.segment}")
            return
        if info.identity != sequence.identity:
            yield Problem(where, "identity", f"segment {span.segment} has identity {info.identity}, expected the same")
        position += span.stop - span.start
    if position != sequence.tokens:
        yield Problem(where, "span", f"spans hold {position} tokens, expected {sequence.tokens}")
    fidelity = fidelity_of(segments[span.segment].info for span in sequence.spans)
    if sequence.fidelity != fidelity:
        yield Problem(where, "fidelity", f"fidelity {sequence.fidelity!r}, expected {fidelity!r}, as its segments say")
    root = spans_root(sequence.spans, [segments[span.segment] for span in sequence.spans])
    if root != sequence.root:
        yield Problem(where, "root", f"root of its segments is {root}, expected {sequence.root}")


def _check_names(txn: Transaction, sequences: list[Sequence]) -> Iterator[Problem]:
    for sequence in sequences:
        if sequence.name is not None:
            try:
                named = txn.named(sequence.name)
            except Damaged:  # told already
                continue
            if named is None or named.key != sequence.key:
                where = f"sequence {sequence.name}"
                yield Problem(where, "name", f"name {sequence.name!r} leads elsewhere, expected this sequence")
    count = sum(sequence.name is not None for sequence in sequences)
    if txn.totals("names").count != count:
        yield Problem("catalog table names", "name", f"{txn.totals('names').count} names, expected {count}")


def check_files(
    chunks: Path, entry: SegmentEntry, identity: Identity | None, tokens: bytes | None
) -> Iterator[Problem]:
    """Problems of one segment's files. What stores it may be of a later version: then that is all there is to say.

    identity, tokens  as the catalog has them; None where it does not verify, or when only the files are asked
    """
    try:
        for problem in _check_arrays(chunks, entry, identity, tokens):
            yield Problem(problem.loc, problem.kind, problem.message, entry.info.segment)
    except Unsupported as e:
        yield Problem(f"segment {entry.info.segment}", UNSUPPORTED, str(e), entry.info.segment)


def _check_arrays(
    chunks: Path, entry: SegmentEntry, identity: Identity | None, tokens: bytes | None
) -> Iterator[Problem]:
    info = entry.info
    for group in range(len(info.geometry.groups)):
        array = format.kv_array(info.segment, group)
        where = f"segment {info.segment}, file {chunks / array / format.SHARD_KEY}"
        try:
            data = files.read_file(chunks / array / format.METADATA_KEY)
            attributes = format.parse_kv_metadata(data, where)
        except (OSError, KVDBError) as e:
            yield Problem(where, "metadata", f"{e}, expected the array's metadata")
            continue
        kv = msgspec.structs.replace(info, abstracts=attributes.info.abstracts)  # there they mean nothing
        written = format.kv_metadata(
            kv, identity or attributes.identity, group, codec_of(info, group), attributes.sections
        )
        if msgspec.json.decode(data) != msgspec.json.decode(written):
            yield Problem(where, "metadata", "metadata and catalog differ, expected the same description")
        if attributes.sections.get("digests", (0, 0, ""))[2] != entry.seals.get(array):
            yield Problem(
                where, "seal", f"the catalog's seal is {entry.seals.get(array)}, expected that of its digests"
            )
        yield from _check_shard(chunks / array / format.SHARD_KEY, where, info, group, attributes.sections, tokens)
    for name in info.abstracts:
        yield from check_abstract(chunks, entry, name)


def _check_shard(
    path: Path, where: str, info: SegmentInfo, group: int, sections: format.Sections, tokens: bytes | None
) -> Iterator[Problem]:
    place = layout(info, group)
    try:
        fd = files.open_read(path)
    except (OSError, Damaged) as e:
        yield Problem(where, "missing-file", f"{e}, expected {place.file_bytes} bytes")
        return
    try:
        size = files.file_size(fd)
        if size != place.file_bytes:
            yield Problem(where, "size", f"{size} bytes, expected {place.file_bytes}")
            return
        g, row = info.geometry.groups[group], row_bytes(info, group)
        blocks = None
        if codec_of(info, group).blocks is not None:
            try:
                blocks = block_file(info, group, fd, path)
            except Damaged as e:
                yield Problem(where, "index", str(e))
                return
        else:
            index = format.shard_index(info.geometry, group, info.capacity, info.chunks, row)
            if files.pread(fd, len(index), place.index_offset) != index:
                yield Problem(where, "index", "shard index differs, expected the one its geometry gives")
        count = len(g.layers) * info.capacity * g.kv_heads
        digest_bytes = files.pread(fd, 8 * count, place.digests_offset)
        if sections.get("digests") != format.section(place.digests_offset, digest_bytes):
            yield Problem(where, "digests", "the digests themselves do not match their digest")
            return
        if group == 0:
            stored = files.pread(fd, 4 * info.tokens, place.tokens_offset)
            if tokens not in (None, stored) or sections.get("tokens") != format.section(place.tokens_offset, stored):
                yield Problem(where, "token-ids", "token ids in the file differ from the catalog's, expected the same")
        expected = np.frombuffer(digest_bytes, "<u8").reshape(len(g.layers), info.capacity * g.kv_heads)
        for layer_row, layer in enumerate(g.layers):
            first = layer_row * info.capacity * g.kv_heads
            live = info.chunks * g.kv_heads
            at_once = live if blocks is None else blocks.form.records
            for begin in range(0, live, at_once):
                count = min(at_once, live - begin)
                try:
                    if blocks is None:
                        data = files.pread(fd, count * row, (first + begin) * row)
                        rows = np.frombuffer(data, np.uint8).reshape(count, row)
                    else:
                        rows = blocks.rows(layer_row, begin // at_once)[:count]
                except Damaged as e:
                    yield Problem(f"{where}, layer {layer}, block {begin // at_once}", "record", str(e))
                    continue
                actual = format.record_digests(info.segment, first + begin, rows)
                for i in np.flatnonzero(actual != expected[layer_row, begin : begin + count]).tolist():
                    chunk, head = divmod(begin + i, g.kv_heads)
                    offset = "" if blocks is not None else f", offset {(first + begin + i) * row}"
                    yield Problem(
                        f"{where}, layer {layer}, chunk {chunk}, head {head}{offset}",
                        "record",
                        f"xxh3 is {int(actual[i]):#018x}, expected {int(expected[layer_row, begin + i]):#018x}",
                    )
    finally:
        files.close(fd)


def check_abstract(chunks: Path, entry: SegmentEntry, name: str) -> Iterator[Problem]:
    """Problems of one abstract of a segment, in every layer group."""
    for group in range(len(entry.info.geometry.groups)):
        yield from _check_planes(chunks, entry, group, name)


def _check_planes(chunks: Path, entry: SegmentEntry, group: int, name: str) -> Iterator[Problem]:
    info, array = entry.info, format.abstract_array(entry.info.segment, name, group)
    where = f"segment {info.segment}, file {chunks / array / format.SHARD_KEY}"
    layers, planes = info.geometry.groups[group].layers, ABSTRACTS[name].planes
    place = abstract_layout(info, group, name)
    try:
        metadata = files.read_file(chunks / array / format.METADATA_KEY)
        digests = format.abstract_digests(metadata, where)
        data = files.read_file(chunks / array / format.SHARD_KEY, limit=place.file_bytes)
    except (OSError, Damaged) as e:
        yield Problem(where, "abstract", f"{e}, expected the {name} abstract")
        return
    written = format.abstract_metadata(info, group, ABSTRACTS[name], digests)
    if msgspec.json.decode(metadata) != msgspec.json.decode(written):
        yield Problem(
            where, "metadata", "the abstract's metadata and the catalog differ, expected the same description"
        )
    if format.abstract_seal(digests) != entry.seals.get(array):
        yield Problem(where, "seal", f"the catalog's seal is {entry.seals.get(array)}, expected that of its digests")
    if len(data) != place.file_bytes or len(digests) != len(layers) * planes:
        yield Problem(
            where,
            "size",
            f"{len(data)} bytes, {len(digests)} digests, expected {place.file_bytes} and {len(layers) * planes}",
        )
        return
    for number, expected in enumerate(digests):
        offset = number * place.plane_bytes
        if (actual := xxhash.xxh3_64_hexdigest(data[offset : offset + place.plane_bytes])) != expected:
            row, plane = divmod(number, planes)
            yield Problem(
                f"{where}, layer {layers[row]}, plane {plane}, offset {offset}",
                "abstract",
                f"xxh3 is {actual}, expected {expected}",
            )
