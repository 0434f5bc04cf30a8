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
from kvdb.check import readable_segments
from kvdb.entries import SegmentEntry, Sequence, Span, Use
from kvdb.errors import Damaged, Problem, Unsupported
from kvdb.reader import Reader
from kvdb.segments import Segment, abstract_layout, block_file, codecs_of, row_bytes
from kvdb.store import KVDB
from kvdb.transaction import Transaction


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

    last       the segment it ends in
    kv_bytes   uncoded KV, what it shares included; None where segments are gone
    own_bytes  files of segments that no other sequence passes through
    damaged    whether anything it passes through is
    """

    key: str
    name: str | None
    model: str
    fidelity: str
    tokens: int
    last: str
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
        problems = [Problem(f"catalog table {table}", "damaged-entry", said) for table, said in txn.table_problems()]
        entries, now = readable_segments(txn), txn.now()
        uses = {segment: _use(txn, segment) for segment in entries}
        sequences = txn.readable_sequences()
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
    through = Counter(span.segment for sequence in sequences for span in sequence.spans)
    return Survey(
        now=now,
        sequences=tuple(
            sorted((_sequence(s, entries, uses, through, wrong) for s in sequences), key=lambda s: (s.created, s.key))
        ),
        segments=tuple(
            _segment(entry, uses[segment], through[segment], wrong.get(segment)) for segment, entry in entries.items()
        ),
        layers=tuple(
            LayerBytes(layer=layer, kv=dict(sorted(kv.items())), abstracts=dict(sorted(abstracts.items())))
            for layer, (kv, abstracts) in sorted(layers.items())
        ),
        problems=tuple(problems),
    )


def _use(txn: Transaction, segment: str) -> Use | None:
    try:
        return txn.use(segment)
    except Damaged:  # the table's problems name it
        return None


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


def _segment(entry: SegmentEntry, use: Use | None, sequences: int, problem: str | None) -> SurveyedSegment:
    info = entry.info
    return SurveyedSegment(
        segment=info.segment,
        parent=info.parent,
        start=info.start,
        tokens=info.tokens,
        fidelity=info.fidelity,
        codecs=_codecs(entry),
        abstracts=info.abstracts,
        disk_bytes=entry.disk_bytes,
        sequences=sequences,
        hits=None if use is None else use.hits,
        last_used=None if use is None else use.last_used,
        problem=problem,
    )


def _sequence(
    sequence: Sequence,
    entries: dict[str, SegmentEntry],
    uses: dict[str, Use | None],
    through: Counter[str],
    wrong: dict[str, str],
) -> SurveyedSequence:
    here = [span.segment for span in sequence.spans]
    gone = any(segment not in entries for segment in here)
    use = uses.get(here[-1]) or Use(last_used=0.0, hits=0)
    return SurveyedSequence(
        key=sequence.key,
        name=sequence.name,
        model=sequence.model,
        fidelity=sequence.fidelity,
        tokens=sequence.tokens,
        last=here[-1],
        segments=len(here),
        kv_bytes=None
        if gone
        else sum((s.stop - s.start) * entries[s.segment].info.geometry.token_bytes for s in sequence.spans),
        own_bytes=sum(entries[s].disk_bytes for s in here if s in entries and through[s] == 1),
        created=sequence.created,
        last_used=max(use.last_used, sequence.created),
        hits=use.hits,
        expires=sequence.expires,
        pinned=sequence.pinned,
        damaged=gone or any(segment in wrong for segment in here),
    )
