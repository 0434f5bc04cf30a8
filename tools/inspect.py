"""`kvdb ls`, `info`, `verify`, and `abstracts` without `--set`: what is in a store, and whether it is whole. No model is needed for
any of them, and none changes anything."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from kvdb import files
from kvdb.codecs import RAW
from kvdb.entries import Sequence
from kvdb.errors import Damaged, OlderFormat, Problem, StoreNotFound
from kvdb.identity import EXACT
from kvdb.inspection.describe import Facts, listed
from kvdb.inspection.snapshot import Snapshot, snapshot
from kvdb.options import Mode
from kvdb.store import KVDB
from kvdb.summarise import held_abstracts
from kvdb.tools.listing import Cell, Column, print_rows
from kvdb.tools.output import PROBLEM, print_json, print_problems, problems_json, stdout_console, visible, working
from kvdb.tools.sizes import age_text, bytes_text, count_text, left_text, seconds_text, time_text

KEY_SHOWN = 8
"""Characters of a key in a list: commands take any unique beginning of four or more."""
_PATIENCE_S, _SLOWEST = 60.0, 20 << 20
"""Longest look at an untrusted store: seconds, and bytes a second beyond that."""
_ROOMY: Final = 110
"""Columns of a terminal from which on a list also says how old each sequence is."""
_COLUMNS: Final = [
    Column("NAME", folds=True), Column("KEY"), Column("TOKENS", right=True), Column("KV", right=True), Column("DISK", right=True),
    Column("SHARED", right=True), Column("USED"), Column("HITS", right=True), Column("CODEC", folds=True), Column("AGE"),
    Column("MODEL", folds=True), Column("FIDELITY", folds=True), Column("EXPIRES"),
]  # fmt: skip


def open_store(store: Path, mode: Mode, **options: Any) -> KVDB:
    """A store that must be there."""
    with advised(store):
        return KVDB.open(store, mode, **options)


@contextmanager
def advised(store: Path) -> Iterator[None]:
    """Errors about a store as a whole say which command helps."""
    try:
        yield
    except StoreNotFound:
        raise _nowhere(store) from None
    except OlderFormat as e:
        raise OlderFormat(f"{str(e).rpartition(';')[0]}; 'kvdb gc {store}' upgrades it") from None


def _nowhere(store: Path) -> StoreNotFound:
    return StoreNotFound(f"{store}: no store there, expected one; 'kvdb ask' creates it")


def list_sequences(store: Path, *, as_json: bool) -> int:
    """All sequences, oldest first; 1 if some cannot be read."""
    with open_store(store, "r") as db:
        snap = snapshot(db)
    found = listed(snap)
    problems = snap.problems + [damage for facts in found if (damage := _damage(snap, facts.sequence)) is not None]
    code = PROBLEM if problems else 0
    if as_json:
        said = {"problems": problems_json(problems)} if problems else {}
        print_json({"store": str(store), "sequences": [described(facts, snap.now) for facts in found], **said})
        return code
    console = stdout_console()
    if not found and not problems:
        console.print(_empty(store), soft_wrap=True)
        return code
    print_rows(console, *_table(found, snap.now, roomy=console.width >= _ROOMY))
    on_disk = bytes_text(snap.disk_bytes(snap.segments))
    told = (
        f"{count_text(len(found), 'sequence')}, {on_disk} on disk with abstracts; what sequences share is stored once"
    )
    console.print(told, style="dim")
    print_problems(problems)
    return code


def described(facts: Facts, now: float) -> dict[str, Any]:
    """A sequence as JSON: the entry without its spans, and what they amount to; None where its segments cannot be read."""
    fields: dict[str, Any] = msgspec.to_builtins(facts.sequence)
    fields["segments"] = len(fields.pop("spans"))
    fields["age_seconds"] = max(0.0, now - facts.sequence.created)
    return fields | {k: v for k, v in facts._asdict().items() if k != "sequence"}


def _damage(snap: Snapshot, sequence: Sequence) -> Problem | None:
    wrong = snap.wrong_with(sequence)
    return None if wrong is None else Problem(f"sequence {sequence.name or sequence.key}", "missing-segment", wrong)


def _table(found: list[Facts], now: float, *, roomy: bool) -> tuple[list[Column], Iterator[list[Cell]]]:
    """Columns that would say the same of every sequence are left out: sharing, codecs, fidelity, expiry."""
    plain = (None, (str(RAW),))
    shown = {
        "SHARED": any(facts.shared_bytes for facts in found),
        "CODEC": any(facts.codecs not in plain for facts in found),
        "AGE": roomy,
        "FIDELITY": any(facts.sequence.fidelity != EXACT for facts in found),
        "EXPIRES": any(facts.sequence.pinned or facts.sequence.expires is not None for facts in found),
    }
    columns = [column for column in _COLUMNS if shown.get(column.title, True)]
    wanted = [column.title for column in columns]
    return columns, ([row[title] for title in wanted] for row in (_row(facts, now) for facts in found))


def _row(facts: Facts, now: float) -> dict[str, Cell]:
    sequence = facts.sequence
    return {
        "NAME": (visible(sequence.name), "bold") if sequence.name else ("-", "dim"),
        "KEY": (sequence.key[:KEY_SHOWN], "cyan"),
        "TOKENS": (f"{sequence.tokens:,}", ""),
        "KV": size_cell(facts.kv_bytes),
        "DISK": size_cell(facts.disk_bytes),
        "SHARED": size_cell(facts.shared_bytes),
        "USED": (age_text(now - sequence.last_used), ""),
        "HITS": (f"{sequence.hits:,}", ""),
        "CODEC": (visible(", ".join(facts.codecs or ("-",))), ""),
        "AGE": (age_text(now - sequence.created), ""),
        "MODEL": (visible(model_label(sequence.model)), ""),
        "FIDELITY": (visible(sequence.fidelity), ""),
        "EXPIRES": expiry(sequence, now),
    }


def size_cell(count: int | None) -> Cell:
    """Bytes; None: what they are of cannot be read."""
    if count is None:
        return "damaged", "red"
    return (bytes_text(count), "") if count else ("-", "dim")


def expiry(sequence: Sequence, now: float) -> Cell:
    """What keeps a sequence, or until when."""
    if sequence.pinned:
        return "pinned", "green"
    if sequence.expires is not None:
        return left_text(sequence.expires - now), "yellow"
    return "-", "dim"


def list_abstracts(store: Path, name_or_key: str | None, *, as_json: bool) -> int:
    """The abstracts that the segments of each sequence have, or of one."""
    with open_store(store, "r") as db:
        sequences = db.sequences() if name_or_key is None else [db.sequence(name_or_key)]
        found = [(sequence, _abstracts(db, sequence)) for sequence in sequences]
    if as_json:
        print_json({
            "store": str(store),
            "sequences": [
                {"key": s.key, "name": s.name, "tokens": s.tokens, "segments": len(s.spans), "abstracts": abstracts}
                for s, abstracts in found
            ],
        })  # fmt: skip
        return 0
    console = stdout_console()
    if not found:
        console.print(_empty(store), soft_wrap=True)
        return 0
    table = Table(box=box.SIMPLE_HEAD, border_style="dim", header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("NAME", overflow="fold")
    table.add_column("KEY", no_wrap=True)
    table.add_column("SEGMENTS", justify="right", no_wrap=True)
    table.add_column("ABSTRACTS", overflow="fold")
    for sequence, abstracts in found:
        table.add_row(
            Text(visible(sequence.name), style="bold") if sequence.name else Text("-", style="dim"),
            Text(sequence.key[:KEY_SHOWN], style="cyan"),
            f"{len(sequence.spans):,}",
            Text("damaged", style="red") if abstracts is None else _abstracts_text(abstracts, len(sequence.spans)),
        )
    console.print(table)
    return 0


def _abstracts(db: KVDB, sequence: Sequence) -> dict[str, dict[str, int]] | None:
    """Of each abstract, how many of a sequence's segments have it, and its bytes there; None where segments are gone."""
    try:
        return {name: held._asdict() for name, held in held_abstracts(db, sequence.spans).items()}
    except Damaged:
        return None


def _abstracts_text(abstracts: dict[str, dict[str, int]], segments: int) -> Text:
    said = []
    for name, has in abstracts.items():
        some = "" if has["segments"] == segments else f" in {has['segments']:,} of them"
        said.append(f"{name} {bytes_text(has['bytes'])}{some}")
    return Text(", ".join(said)) if said else Text("-", style="dim")


def show_info(store: Path, *, as_json: bool) -> int:
    with open_store(store, "r") as db:
        info = db.info() | {"pinned": sum(sequence.pinned for sequence in db.sequences())}
    if as_json:
        print_json(info)
        return 0
    console = stdout_console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in (
        ("store", visible(info["path"])),
        ("id", info["store"]),
        ("format", str(info["format"])),
        ("created", f"{time_text(info['created'])} ({age_text(time.time() - info['created'])})"),
        ("sequences", f"{info['sequences']:,}, of which {info['named']:,} named and {info['pinned']:,} pinned"),
        ("segments", f"{info['segments']:,}"),
        ("tokens", f"{info['tokens']:,}"),
        ("identities", f"{info['identities']:,}  (models, dtypes and salts whose KV is kept apart)"),
        ("KV", bytes_text(info["kv_bytes"])),
        ("on disk", f"{bytes_text(info['disk_bytes'])}, and {bytes_text(info['catalog_bytes'])} of catalog"),
        ("used, all files", used_text(info["used_bytes"], info["size_cap"])),
        ("read with", f"{info['read_mode']}: {info['why_read_mode']}"),
        ("written so far", f"{bytes_text(info['bytes_written'])}, of which {bytes_text(info['bytes_compacted'])} by compaction"),
        ("evicted so far", count_text(info["segments_evicted"], "segment")),
    ):  # fmt: skip
        grid.add_row(label, Text(value))
    console.print(grid)
    if not info["sequences"]:
        console.print(_empty(store), soft_wrap=True)
    return 0


def verify(store: Path, *, as_json: bool) -> int:
    """Read and check every byte; 1 if anything is wrong."""
    try:
        with open_store(store, "r") as db:
            info = db.info()
            read = (
                f"{count_text(info['sequences'], 'sequence')}, {count_text(info['segments'], 'segment')}, "
                f"{bytes_text(info['disk_bytes'])}"
            )
            started = time.perf_counter()
            with working(f"checking {store}: {read}", interrupted="the check is not complete; nothing was changed"):
                problems = db.check()
            seconds = time.perf_counter() - started
    except Damaged as e:  # the catalog itself: there is no more to look at
        return _verdict(store, [Problem("catalog", "catalog", str(e))], {}, "the catalog", as_json=as_json)
    counts = {name: info[name] for name in ("sequences", "segments", "disk_bytes")}
    rate = f" ({bytes_text(info['disk_bytes'] / seconds)}/s)" if info["disk_bytes"] and seconds else ""
    return _verdict(store, problems, counts, read, rate=rate, as_json=as_json)


def verify_unknown(store: Path, *, as_json: bool) -> int:
    """As `verify`, for a store from somebody else: in a process that can do no harm."""
    from kvdb.untrusted import verify_untrusted

    if not os.path.lexists(store):
        raise _nowhere(store)
    size = files.tree_bytes(store)
    timeout_s = _PATIENCE_S + size / _SLOWEST
    what = f"checking {store} in a process of its own: {bytes_text(size)}, at most {seconds_text(timeout_s)}"
    with working(what, interrupted="the check is not complete; nothing was changed"):
        problems = verify_untrusted(store, timeout_s=timeout_s)
    return _verdict(store, problems, {}, str(store), as_json=as_json)


def _verdict(
    store: Path, problems: list[Problem], counts: dict[str, int], read: str, *, rate: str = "", as_json: bool
) -> int:
    """Tell what was found; returns the exit code."""
    if as_json:
        print_json({"store": str(store), **counts, "problems": problems_json(problems)})
        return PROBLEM if problems else 0
    print_problems(problems)
    console = stdout_console()
    if problems:
        found = f"{count_text(len(problems), 'problem')} in {visible(read)}; 'kvdb repair' says what can be done"
        console.print(Text(found, style="red"), soft_wrap=True)
        return PROBLEM
    console.print(Text.assemble(("ok: ", "bold green"), f"no problems in {visible(read)}{rate}"), soft_wrap=True)
    return 0


def used_text(used_bytes: int, size_cap: int | None) -> str:
    return (
        f"{bytes_text(used_bytes)}, no cap"
        if size_cap is None
        else f"{bytes_text(used_bytes)} of {bytes_text(size_cap)}"
    )


def _empty(store: Path) -> Text:
    return Text(f'{visible(str(store))} is empty; fill it with: kvdb ask {store} "a question" --document FILE')


def kv_bytes(db: KVDB, sequence: Sequence) -> int | None:
    """KV of a sequence, shared parts included; None where its segments are gone."""
    try:
        segments = db.segments(sequence.spans)
    except Damaged:
        return None
    return sum(
        (span.stop - span.start) * segment.info.geometry.token_bytes
        for span, segment in zip(sequence.spans, segments, strict=True)
    )


def model_label(model: str) -> str:
    """A folder's own name; hub ids stay whole."""
    return Path(model).name if model.startswith(("/", ".")) else model
