"""check(): walk a store and yield everything that is wrong. The engine, the tool and every test's teardown share it.

Facts checked: every span's segment exists and its parents lead to position 0; spans lie on the grid, inside their
segments and end to end; the prefix tree finds every segment; files are there and of the right size; metadata says what
the catalog says; token ids equal the catalog's; every record matches its digest; no array is left that no entry names.
It reads, and repairs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from kvdb import files, format
from kvdb.abstracts import ABSTRACTS
from kvdb.catalog import Catalog, Sequence, Transaction
from kvdb.errors import Damaged, Problem
from kvdb.format import SegmentInfo
from kvdb.identity import Identity
from kvdb.segments import abstract_bytes, codec_of, layout, row_bytes


def check_store(root: Path, catalog: Catalog) -> Iterator[Problem]:
    """Yield the problems of the store at `root`. Zero case: nothing is yielded."""
    chunks = root / "chunks"
    with catalog.begin() as txn:
        infos: dict[str, SegmentInfo] = {}
        for segment in txn.segment_ids():
            try:
                info = txn.segment(segment)
            except Damaged as e:
                yield Problem(f"segment {segment}", "damaged-entry", str(e))
                continue
            if info is not None:
                infos[segment] = info
                yield from _check_catalog_of(txn, info)
        yield from _check_sequences(txn, infos)
        entries = [(info, _identity(txn, info.identity), _tokens(txn, info.segment)) for info in infos.values()]
    for info, identity, tokens in entries:
        yield from _check_files(chunks, info, identity, tokens)
    named = {array for info in infos.values() for array in info.array_names()} | {format.METADATA_KEY}
    for array in files.list_dir(chunks):
        if array not in named:
            yield Problem(f"array {array}", "orphan", "no catalog entry names it, expected none left over")


def _identity(txn: Transaction, digest: str) -> Identity | None:
    try:
        return txn.identity(digest)
    except Damaged:  # `_check_catalog_of` has said so
        return None


def _tokens(txn: Transaction, segment: str) -> bytes | None:
    try:
        return txn.tokens(segment).tobytes()
    except Damaged:
        return None


def _check_catalog_of(txn: Transaction, info: SegmentInfo) -> Iterator[Problem]:
    where = f"segment {info.segment}"
    try:
        identity = txn.identity(info.identity)
        if identity is None or identity.digest().hex() != info.identity:
            yield Problem(where, "identity", f"identity {info.identity} is missing or another, expected its fields")
        path = txn.path_tokens(info.segment)
        if len(path) != info.stop:
            yield Problem(where, "tokens", f"{len(path)} token ids up to its end, expected {info.stop}")
        found = txn.find(info.identity, path, exact=False)
        if found.tokens != len(path):
            yield Problem(where, "tree", f"the prefix tree finds {found.tokens} of its tokens, expected {len(path)}")
    except Damaged as e:
        yield Problem(where, "damaged-entry", str(e))


def _check_sequences(txn: Transaction, infos: dict[str, SegmentInfo]) -> Iterator[Problem]:
    try:
        sequences = txn.sequences()
    except Damaged as e:
        yield Problem("sequences", "damaged-entry", str(e))
        return
    for sequence in sequences:
        where = f"sequence {sequence.name or sequence.key}"
        yield from _check_spans(where, sequence, infos)
        try:
            named = txn.named(sequence.name) if sequence.name is not None else sequence
        except Damaged as e:
            yield Problem(where, "damaged-entry", str(e))
            continue
        if named is None or named.key != sequence.key:
            yield Problem(where, "name", f"name {sequence.name!r} leads elsewhere, expected this sequence")


def _check_spans(where: str, sequence: Sequence, infos: dict[str, SegmentInfo]) -> Iterator[Problem]:
    position = 0
    for span in sequence.spans:
        info = infos.get(span.segment)
        if info is None:
            yield Problem(where, "missing-segment", f"segment {span.segment} is not in the catalog, expected it")
            return
        if info.start + span.start != position or not span.start < span.stop <= info.tokens:
            yield Problem(where, "span", f"span {span} at position {position}, expected it inside {info.segment}")
            return
        if info.identity != sequence.identity:
            yield Problem(where, "identity", f"segment {span.segment} has identity {info.identity}, expected the same")
        position += span.stop - span.start
    if position != sequence.tokens:
        yield Problem(where, "span", f"spans hold {position} tokens, expected {sequence.tokens}")


def _check_files(chunks: Path, info: SegmentInfo, identity: Identity | None, tokens: bytes | None) -> Iterator[Problem]:
    for group in range(len(info.geometry.groups)):
        array = format.kv_array(info.segment, group)
        where = f"segment {info.segment}, file {chunks / array / format.SHARD_KEY}"
        try:
            data = files.read_file(chunks / array / format.METADATA_KEY)
            attributes = format.parse_kv_metadata(data, where)
        except (OSError, Damaged) as e:
            yield Problem(where, "metadata", f"{e}, expected the array's metadata")
            continue
        written = format.kv_metadata(info, identity or attributes.identity, group, codec_of(info), attributes.sections)
        if msgspec.json.decode(data) != msgspec.json.decode(written):
            yield Problem(where, "metadata", "metadata and catalog differ, expected the same description")
        yield from _check_shard(chunks / array / format.SHARD_KEY, where, info, group, attributes.sections, tokens)
        for name in info.abstracts:
            yield from _check_abstract(chunks, info, group, name)


def _check_shard(
    path: Path, where: str, info: SegmentInfo, group: int, sections: format.Sections, tokens: bytes | None
) -> Iterator[Problem]:
    place = layout(info, group)
    try:
        fd = files.open_read(path)
    except OSError as e:
        yield Problem(where, "missing-file", f"{e.strerror}, expected {place.file_bytes} bytes")
        return
    try:
        size = files.file_size(fd)
        if size != place.file_bytes:
            yield Problem(where, "size", f"{size} bytes, expected {place.file_bytes}")
            return
        g, row = info.geometry.groups[group], row_bytes(info, group)
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
            if stored != tokens or sections.get("tokens") != format.section(place.tokens_offset, stored):
                yield Problem(where, "tokens", "token ids in the file differ from the catalog's, expected the same")
        expected = np.frombuffer(digest_bytes, "<u8").reshape(len(g.layers), info.capacity * g.kv_heads)
        for layer_row, layer in enumerate(g.layers):
            first = layer_row * info.capacity * g.kv_heads
            live = info.chunks * g.kv_heads
            data = files.pread(fd, live * row, first * row)
            rows = np.frombuffer(data, np.uint8).reshape(live, row)
            actual = format.record_digests(info.segment, first, rows)
            for record in np.flatnonzero(actual != expected[layer_row, :live]).tolist():
                chunk, head = divmod(record, g.kv_heads)
                yield Problem(
                    f"{where}, layer {layer}, chunk {chunk}, head {head}, offset {(first + record) * row}",
                    "record",
                    f"xxh3 is {int(actual[record]):#018x}, expected {int(expected[layer_row, record]):#018x}",
                )
    finally:
        files.close(fd)


def _check_abstract(chunks: Path, info: SegmentInfo, group: int, name: str) -> Iterator[Problem]:
    folder = chunks / format.abstract_array(info.segment, name, group)
    where = f"segment {info.segment}, file {folder / format.SHARD_KEY}"
    size = abstract_bytes(info, group, name)
    layers = info.geometry.groups[group].layers
    try:
        metadata = files.read_file(folder / format.METADATA_KEY)
        digests = format.abstract_digests(metadata, where)
        data = files.read_file(folder / format.SHARD_KEY)
    except (OSError, Damaged) as e:
        yield Problem(where, "abstract", f"{e}, expected the {name} abstract")
        return
    written = format.abstract_metadata(info, group, name, ABSTRACTS[name].parts, digests)
    if msgspec.json.decode(metadata) != msgspec.json.decode(written):
        yield Problem(
            where, "metadata", "the abstract's metadata and the catalog differ, expected the same description"
        )
    if len(data) != size * len(layers) or len(digests) != len(layers):
        yield Problem(
            where, "size", f"{len(data)} bytes, {len(digests)} digests, expected {size} for {len(layers)} layers"
        )
        return
    for row, layer in enumerate(layers):
        if xxhash.xxh3_64_hexdigest(data[row * size : (row + 1) * size]) != digests[row]:
            yield Problem(f"{where}, layer {layer}", "abstract", "bytes do not match their digest")
