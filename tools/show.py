"""`kvdb show`: one sequence, its segments, its text, and one chunk of one layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.table import Table
from rich.text import Text

from kvdb.entries import Sequence
from kvdb.errors import InvalidInput, Problem
from kvdb.inspection.describe import Facts, SegmentFacts, facts_of, ranges, segments_of
from kvdb.inspection.record import ChunkFacts, RecordFacts, Spread, chunk_of
from kvdb.inspection.snapshot import Snapshot, snapshot
from kvdb.store import KVDB
from kvdb.tools.inspect import described, expiry, model_label, open_store, size_cell
from kvdb.tools.listing import Cell, Column, print_rows
from kvdb.tools.output import (
    PROBLEM,
    print_json,
    print_problems,
    problems_json,
    stderr_console,
    stdout_console,
    visible,
    working,
)
from kvdb.tools.sizes import age_text, bytes_text, count_text, share_text, time_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[[list[int]], str]


def show(
    store: Path,
    name_or_key: str,
    *,
    text: bool,
    tokenizer: str | None,
    layer: int | None,
    chunk: int | None,
    as_json: bool,
) -> int:
    """A sequence, or one chunk of it; 1 if something of it cannot be read."""
    if (layer is None) != (chunk is None):
        given, missing = ("--layer", "--chunk") if chunk is None else ("--chunk", "--layer")
        raise InvalidInput(f"{given}: no {missing}, expected both; a chunk is some tokens of one layer")
    if text and tokenizer is None:
        raise InvalidInput(
            "--text: no --tokenizer, expected one; stored are token ids, and only a tokenizer tells their text"
        )
    with open_store(store, "r") as db:
        snap = snapshot(db)
        sequence = snap.sequence(name_or_key)
        decode = None if tokenizer is None else decoder(tokenizer)
        if layer is not None and chunk is not None:
            return _show_chunk(store, db, sequence, chunk_of(db, sequence, layer, chunk), decode, as_json=as_json)
        return _show_sequence(store, db, snap, sequence, decode if text else None, as_json=as_json)


def decoder(tokenizer: str) -> Decode:
    """What turns token ids into text; a tokenizer's control tokens stay visible."""
    loaded = load_tokenizer(tokenizer)
    return lambda ids: str(loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """By the name of a model, a folder or a tokenizer.json; says on the terminal what takes long."""
    console = stderr_console()
    with working(f"loading the tokenizer {name}", interrupted="nothing was changed"):
        from kvdb.tools import models

        return models.load_tokenizer(name, progress=lambda line: console.print(line, style="dim", soft_wrap=True))


# -- a sequence


def _show_sequence(
    store: Path, db: KVDB, snap: Snapshot, sequence: Sequence, decode: Decode | None, *, as_json: bool
) -> int:
    facts, segments = facts_of(snap, sequence), list(segments_of(db, snap, sequence))
    problems = snap.problems + _problems(snap, sequence, segments)
    text = None if decode is None else decode(db.tokens(sequence.spans).tolist())
    if as_json:
        said: dict[str, Any] = {"store": str(store), **described(facts, snap.now)}
        said |= {"codec_tokens": _codec_tokens(segments), "segments": msgspec.to_builtins(segments)}
        said |= {} if text is None else {"text": text}
        print_json(said | ({"problems": problems_json(problems)} if problems else {}))
        return PROBLEM if problems else 0
    console = stdout_console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in _lines(snap, facts, segments):
        grid.add_row(label, Text(visible(value)))
    console.print(grid)
    print_rows(console, _SEGMENT_COLUMNS, [_segment_row(segment) for segment in segments])
    if text is not None:
        console.print(Text(visible(text)), soft_wrap=True)
    print_problems(problems)
    return PROBLEM if problems else 0


_SEGMENT_COLUMNS = [
    Column("SEGMENT"), Column("POSITIONS"), Column("KV", right=True), Column("STORED", right=True), Column("DISK", right=True),
    Column("CODEC BY LAYER", folds=True), Column("ABSTRACTS", folds=True), Column("SHARED", right=True),
]  # fmt: skip


def _lines(snap: Snapshot, facts: Facts, segments: list[SegmentFacts]) -> list[tuple[str, str]]:
    sequence = facts.sequence
    identity = snap.identities.get(sequence.identity)
    codecs = ", ".join(f"{codec} ({count_text(tokens, 'token')})" for codec, tokens in _codec_tokens(segments).items())
    layers = sorted({layer for segment in segments for layer in _layers(snap, segment)})
    return [
        ("name", sequence.name or "-"),
        ("key", sequence.key),
        (
            "model",
            f"{model_label(sequence.model)}, KV in {identity.dtype if identity else 'an identity that cannot be read'}",
        ),
        ("identity", sequence.identity),
        ("tokens", f"{sequence.tokens:,} in {count_text(len(segments), 'segment')}"),
        ("layers", f"{len(layers)}: {ranges(layers)}" if layers else "unknown"),
        ("KV", _kv_text(facts)),
        ("codec", codecs or "unknown"),
        ("fidelity", sequence.fidelity),
        ("created", _when(snap, sequence.created)),
        ("last used", f"{_when(snap, sequence.last_used)}, {count_text(sequence.hits, 'hit')}"),
        ("kept", _kept(sequence, snap.now)),
    ]


def _layers(snap: Snapshot, segment: SegmentFacts) -> tuple[int, ...]:
    entry = snap.segments.get(segment.segment)
    return () if entry is None else entry.info.geometry.layers


def _kv_text(facts: Facts) -> str:
    if facts.kv_bytes is None or facts.disk_bytes is None or facts.shared_bytes is None:
        return "damaged"
    shared = f"{bytes_text(facts.shared_bytes)} of it shared" if facts.shared_bytes else "none of it shared"
    return (
        f"{bytes_text(facts.kv_bytes)} as the model makes it; {bytes_text(facts.disk_bytes)} on disk with abstracts "
        f"({share_text(facts.disk_bytes / facts.kv_bytes)}), {shared}"
    )


def _when(snap: Snapshot, at: float) -> str:
    return f"{time_text(at)} ({age_text(snap.now - at)})"


def _kept(sequence: Sequence, now: float) -> str:
    said = ["pinned: neither eviction, expiry nor rm takes it"] if sequence.pinned else []
    if sequence.expires is not None:
        said.append(f"expires {expiry(msgspec.structs.replace(sequence, pinned=False), now)[0]}")
    if not said:
        said.append("by its name, from eviction" if sequence.name else "until room is needed")
    return "; ".join(said)


def _codec_tokens(segments: list[SegmentFacts]) -> dict[str, int]:
    """Codec -> tokens of the sequence. Where layers differ, a codec says which are its own."""
    found: Counter[str] = Counter()
    for segment in segments:
        runs = [codec if len(segment.codecs) == 1 else f"{layers} {codec}" for layers, codec in segment.codecs]
        found["; ".join(runs) or "unknown"] += segment.stop - segment.start
    return dict(found.most_common())


def _segment_row(segment: SegmentFacts) -> list[Cell]:
    abstracts = ", ".join(f"{name} {bytes_text(size)}" for name, size in segment.abstracts.items())
    codecs = ", ".join(f"{layers} {codec}" for layers, codec in segment.codecs)
    part = "" if segment.holds in (None, segment.stop - segment.start) else f" of {segment.holds:,}"
    return [
        (segment.segment[:8], "red" if segment.wrong else "cyan"),
        (f"{segment.start:,}-{segment.stop - 1:,}{part}", ""),
        size_cell(segment.kv_bytes),
        size_cell(segment.payload_bytes),
        size_cell(segment.disk_bytes),
        (visible(codecs) or "-", ""),
        (visible(abstracts) or "-", ""),
        (f"{segment.shared_by:,}" if segment.shared_by > 0 else "-", "" if segment.shared_by > 0 else "dim"),
    ]


def _problems(snap: Snapshot, sequence: Sequence, segments: list[SegmentFacts]) -> list[Problem]:
    wrong = snap.wrong_with(sequence)
    found = [] if wrong is None else [Problem(f"sequence {sequence.name or sequence.key}", "missing-segment", wrong)]
    damaged = [(s.segment, s.wrong) for s in segments if s.wrong is not None]
    return found + [Problem(f"segment {segment}", "damaged", told) for segment, told in damaged]


# -- a chunk


def _show_chunk(
    store: Path, db: KVDB, sequence: Sequence, chunk: ChunkFacts, decode: Decode | None, *, as_json: bool
) -> int:
    ids = db.tokens(sequence.spans)[chunk.start : chunk.stop].tolist()
    text = None if decode is None else decode(ids)
    code = PROBLEM if any(record.wrong for record in chunk.records) else 0
    if as_json:
        said = {"store": str(store), "key": sequence.key, "name": sequence.name, **msgspec.to_builtins(chunk)}
        said["records"] = [_record_json(record) for record in chunk.records]
        print_json(said | {"token_ids": ids} | ({} if text is None else {"text": text}))
        return code
    console = stdout_console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in (
        (
            "tokens",
            f"{chunk.start:,}-{chunk.stop - 1:,} of {sequence.tokens:,}, layer {chunk.layer}, chunk {chunk.chunk}",
        ),
        ("ids", " ".join(map(str, ids))),
        *([("text", repr(text))] if text is not None else []),
        ("segment", chunk.segment),
        ("codec", f"{chunk.codec}, of {chunk.dtype}; fidelity {chunk.fidelity}"),
        ("file", next((record.file for record in chunk.records if record.file), None) or "-"),
    ):
        grid.add_row(label, Text(visible(value)))
    console.print(grid)
    print_rows(console, _RECORD_COLUMNS, [_record_row(record) for record in chunk.records])
    console.print(
        "norms are least / mean / most of the tokens; a box is as wide as its keys reach, mean over channels",
        style="dim",
    )
    for record in chunk.records:
        if record.wrong:
            print_problems([Problem(f"layer {chunk.layer}, head {record.head}", "record", record.wrong)])
    return code


_RECORD_COLUMNS = [
    Column("HEAD", right=True), Column("OFFSET", right=True), Column("BYTES", right=True), Column("DIGEST"),
    Column("KEY NORMS", right=True), Column("VALUE NORMS", right=True), Column("BOX", right=True), Column("WIDEST", right=True),
    Column("LARGEST KEY", right=True),
]  # fmt: skip


def _record_json(record: RecordFacts) -> dict[str, Any]:
    """Named tuples by their names."""
    fields: dict[str, Any] = msgspec.structs.asdict(record)
    return {k: v._asdict() if hasattr(v, "_asdict") else v for k, v in fields.items()}


def _record_row(record: RecordFacts) -> list[Cell]:
    place: list[Cell] = [
        (str(record.head), ""),
        (f"{record.offset:,}", ""),
        (f"{record.nbytes:,}", ""),
        (record.digest or "-", "cyan"),
    ]
    if record.box is None:
        return [*place, *[("damaged", "red")] * 5]
    return [
        *place,
        (_spread(record.key_norms), ""),
        (_spread(record.value_norms), ""),
        (f"{record.box.width:.3g}", ""),
        (f"channel {record.box.widest}", ""),
        (f"{record.box.reach:+.3g} in channel {record.box.channel}", ""),
    ]


def _spread(norms: Spread | None) -> str:
    return "-" if norms is None else " / ".join(f"{number:.3g}" for number in norms)
