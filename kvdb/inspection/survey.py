"""What a store holds, laid open: segments as the tree they form, sequences, bytes by layer, and what of it is damaged.

Nothing is written, and no KV is read: files are opened, their sizes and digests' seals compared. Damage to one entry or file is told
and leaves the rest; records are `check`'s to compare. What another process deletes meanwhile is not damage.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable

import msgspec

from kvdb import files, format
from kvdb.entries import SegmentEntry, Sequence, Span
from kvdb.errors import Damaged, Problem, Unsupported
from kvdb.inspection.snapshot import DAMAGED, Snapshot, snapshot_in
from kvdb.reader import Reader
from kvdb.segments import Segment, abstract_layout, block_file, codecs_of, row_bytes
from kvdb.store import KVDB


class SurveyedSegment(msgspec.Struct, frozen=True, kw_only=True):
    """A segment as a node of the prefix tree: it continues `parent` at position `start`.

    codecs              of its layer groups, each once; none where this version does not know them
    disk_bytes          what its files take
    sequences           how many pass through it
    hits, last_used     None where the entry of its uses is damaged; times are store time
    problem             what is wrong with it; None: nothing was seen
    """

    segment: str
    parent: str | None
    start: int
    tokens: int
    fidelity: str
    codecs: tuple[str, ...]
    abstracts: tuple[str, ...]
    disk_bytes: int
    sequences: int
    hits: int | None
    last_used: float | None
    problem: str | None


class SurveyedSequence(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence, and what it holds on to.

    last       the segment it ends in; None where it has none, which is damage
    kv_bytes   uncoded KV, what it shares included; None where segments are gone
    own_bytes  files of segments that no other sequence passes through
    damaged    whether anything it passes through is
    """

    key: str
    name: str | None
    model: str
    fidelity: str
    tokens: int
    last: str | None
    segments: int
    kv_bytes: int | None
    own_bytes: int
    created: float
    last_used: float
    hits: int
    expires: float | None
    pinned: bool
    damaged: bool


class LayerBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one model layer: of KV by codec, of abstracts by name. Digests, indices and metadata are no layer's."""

    layer: int
    kv: dict[str, int]
    abstracts: dict[str, int]


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """now: store time. problems: of the catalog and of segments."""

    now: float
    sequences: tuple[SurveyedSequence, ...]
    segments: tuple[SurveyedSegment, ...]
    layers: tuple[LayerBytes, ...]
    problems: tuple[Problem, ...]


def survey(db: KVDB, told: Callable[[int, int], None] = lambda done, total: None) -> Survey:
    """Look at everything that the catalog names, as of one moment.

    told    called with the number of segments looked at, and of all
    raises  Damaged when the catalog cannot be read at all
    cost    opens every file of the store once
    """
    with db.catalog.begin() as txn:
        snap = snapshot_in(txn, db.path)
        problems = [Problem(f"catalog table {table}", DAMAGED, said) for table, said in txn.table_problems()]
    entries = snap.segments
    wrong: dict[str, str] = {}
    layers: dict[int, tuple[Counter[str], Counter[str]]] = {}
    with contextlib.closing(db.reader()) as reader:
        for done, (segment, entry) in enumerate(entries.items()):
            told(done, len(entries))
            try:
                _look_at(reader, Segment.stored(entry, db.path / "chunks"), entry, layers)
            except (Damaged, Unsupported, OSError) as e:
                if db.holds((Span(segment=segment, start=0, stop=entry.info.tokens),)):
                    wrong[segment] = str(e)
                    problems.append(Problem(f"segment {segment}", "segment", str(e), segment))
    return Survey(
        now=snap.now,
        sequences=tuple(_sequence(snap, sequence, wrong) for sequence in snap.sequences),
        segments=tuple(_segment(snap, entry, wrong.get(segment)) for segment, entry in entries.items()),
        layers=tuple(
            LayerBytes(layer=layer, kv=dict(sorted(kv.items())), abstracts=dict(sorted(abstracts.items())))
            for layer, (kv, abstracts) in sorted(layers.items())
        ),
        problems=tuple(problems),
    )


def _look_at(
    reader: Reader, segment: Segment, entry: SegmentEntry, layers: dict[int, tuple[Counter[str], Counter[str]]]
) -> None:
    """Open all files of a segment, which compares them with the catalog's seals, and add what each layer takes.

    raises  Damaged, Unsupported, OSError; nothing is added then
    """
    info = entry.info
    found = []
    try:
        reader.open(segment)
        for group, (g, codec) in enumerate(zip(info.geometry.groups, codecs_of(info), strict=True)):
            rows = info.chunks * g.kv_heads * row_bytes(info, group)
            kv = [rows] * len(g.layers) if codec.blocks is None else _packed_bytes(segment, group)
            abstracts = {name: abstract_layout(info, group, name).layer_bytes for name in info.abstracts}
            found += [(layer, str(codec), size, abstracts) for layer, size in zip(g.layers, kv, strict=True)]
    finally:
        reader.forget(info.segment)
    for layer, name, size, abstracts in found:
        by_codec, by_abstract = layers.setdefault(layer, (Counter(), Counter()))
        by_codec[name] += size
        by_abstract.update(abstracts)


def _packed_bytes(segment: Segment, group: int) -> list[int]:
    """Bytes of each layer's compressed blocks."""
    path = segment.folder / format.kv_array(segment.info.segment, group) / format.SHARD_KEY
    fd = files.open_read(path)
    try:
        blocks = block_file(segment.info, group, fd, path)
        return [blocks.layer_bytes(row) for row in range(blocks.layers)]
    finally:
        files.close(fd)


def _codecs(entry: SegmentEntry) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(map(str, codecs_of(entry.info))))
    except (Damaged, Unsupported):  # told as the segment's problem
        return ()


def _segment(snap: Snapshot, entry: SegmentEntry, problem: str | None) -> SurveyedSegment:
    info = entry.info
    use = snap.use(info.segment) if snap.knows_use(info.segment) else None
    return SurveyedSegment(
        segment=info.segment,
        parent=info.parent,
        start=info.start,
        tokens=info.tokens,
        fidelity=info.fidelity,
        codecs=_codecs(entry),
        abstracts=info.abstracts,
        disk_bytes=entry.disk_bytes,
        sequences=snap.passing[info.segment],
        hits=None if use is None else use.hits,
        last_used=None if use is None else use.last_used,
        problem=problem,
    )


def _sequence(snap: Snapshot, sequence: Sequence, wrong: dict[str, str]) -> SurveyedSequence:
    here = [span.segment for span in sequence.spans]
    entries = snap.entries(sequence.spans)
    return SurveyedSequence(
        key=sequence.key,
        name=sequence.name,
        model=sequence.model,
        fidelity=sequence.fidelity,
        tokens=sequence.tokens,
        last=here[-1] if here else None,
        segments=len(here),
        kv_bytes=None
        if not entries
        else sum(
            (s.stop - s.start) * e.info.geometry.token_bytes for s, e in zip(sequence.spans, entries, strict=True)
        ),
        own_bytes=snap.disk_bytes(segment for segment in here if snap.passing[segment] == 1),
        created=sequence.created,
        last_used=sequence.last_used,
        hits=sequence.hits,
        expires=sequence.expires,
        pinned=sequence.pinned,
        damaged=not entries or any(segment in wrong for segment in here),
    )
