"""`kvdb du`: where a store's bytes are, and what would free some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.text import Text

from kvdb.entries import Sequence
from kvdb.inspection import room
from kvdb.inspection.describe import ranges
from kvdb.inspection.room import Owner, Room, Saving
from kvdb.inspection.snapshot import snapshot
from kvdb.retention import RETENTION
from kvdb.sizes import parse_bytes
from kvdb.tools.inspect import KEY_SHOWN, model_label, open_store
from kvdb.tools.listing import Cell, Column, print_rows
from kvdb.tools.output import PROBLEM, print_json, print_problems, problems_json, stdout_console, visible, working
from kvdb.tools.sizes import bytes_text, count_text, share_text

_WHAT: Final = {
    "kv": "KV, with token ids and digests",
    "abstracts": "abstracts",
    "metadata": "metadata of arrays, folders",
    "catalog": "catalog",
    "names": "manifests of names",
    "trash": "trash",
    "quarantine": "quarantine",
    "tmp": "in flight, or left by writers",
    "other": "the store's own, and what nothing names",
}
_LOST: Final = 10
"""Sequences named as what a cap would take."""


def show_room(store: Path, *, cap: str | None, top: int, as_json: bool) -> int:
    """Bytes by kind, model, layer, codec and sequence, and what gc, compact and a cap would free; nothing is written."""
    wanted = None if cap is None else parse_bytes("--cap", cap)
    told = working(f"looking at the files of {store}", interrupted="nothing was changed")
    with open_store(store, "r") as db, told:
        snap = snapshot(db)
        found, used = room.measure(db, snap), db.space.used_bytes()
        savings = {"gc": room.gc(snap, found), "compact": room.merging(snap)}
        if wanted is not None:
            savings["cap"] = room.capped(snap, used, found, wanted, RETENTION[db.options.retention])
        owners = room.owners(snap)
    code = PROBLEM if snap.problems else 0
    if as_json:
        said = {"problems": problems_json(snap.problems)} if snap.problems else {}
        print_json({"store": str(store), **_as_json(found, owners, savings), "used_bytes": used, **said})
        return code
    console = stdout_console()
    _print_parts(console, found)
    _print_owners(console, owners, top)
    _print_savings(console, savings, cap)
    print_problems(snap.problems)
    return code


def _as_json(found: Room, owners: list[Owner], savings: dict[str, Saving]) -> dict[str, Any]:
    return {
        "total_bytes": found.total,
        "parts": found.parts,
        "abstracts": found.abstracts,
        "models": [{**kind._asdict(), "bytes": size} for kind, size in found.kinds.items()],
        "layers": {str(layer): size for layer, size in found.layers.items()},
        "codecs": found.codecs,
        "sequences": [
            {"key": o.sequence.key, "name": o.sequence.name, "own_bytes": o.own_bytes, "shared_bytes": o.shared_bytes}
            for o in owners
        ],
        "would_free": {
            what: msgspec.structs.asdict(s) | {"sequences": [{"key": q.key, "name": q.name} for q in s.sequences]}
            for what, s in savings.items()
        },
    }


def _print_parts(console: Console, found: Room) -> None:
    rows = [(_WHAT[part], size) for part, size in sorted(found.parts.items(), key=lambda item: -item[1]) if size]
    _print_shares(console, "WHAT", rows, found.total)
    for title, sizes in (
        ("MODEL", {_kind(kind): size for kind, size in found.kinds.items()}),
        ("ABSTRACTS", found.abstracts),
        ("KV BY CODEC", found.codecs),
        ("KV BY LAYER", _runs(found.layers)),
    ):
        if sizes:
            _print_shares(console, title, list(sizes.items()), found.total)
    console.print(f"{bytes_text(found.total)} in all", style="bold")


def _print_shares(console: Console, title: str, rows: list[tuple[str, int]], total: int) -> None:
    columns = [Column(title, folds=True), Column("DISK", right=True), Column("SHARE", right=True)]
    cells: list[list[Cell]] = [
        [(visible(what), ""), (bytes_text(size), ""), (share_text(size / total), "dim")] for what, size in rows
    ]
    print_rows(console, columns, cells)


def _kind(kind: room.Kind) -> str:
    return f"{model_label(kind.model) or '-'} {kind.dtype}, identity {kind.identity[:KEY_SHOWN]}"


def _runs(layers: dict[int, int]) -> dict[str, int]:
    """Layers that take as much as the one before them together; what is left of a division by layers is no difference."""
    runs: list[list[int]] = []
    for layer, size in layers.items():
        if runs and abs(layers[runs[-1][-1]] - size) <= 1 and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return {
        f"{ranges(run)}{f', {bytes_text(layers[run[0]])} each' if len(run) > 1 else ''}": sum(layers[n] for n in run)
        for run in runs
    }


def _print_owners(console: Console, owners: list[Owner], top: int) -> None:
    columns = [Column("SEQUENCE", folds=True), Column("KEY"), Column("OWN", right=True), Column("SHARED", right=True)]
    rows: list[list[Cell]] = [
        [
            (visible(o.sequence.name or "-"), "bold" if o.sequence.name else "dim"),
            (o.sequence.key[:KEY_SHOWN], "cyan"),
            (bytes_text(o.own_bytes), ""),
            (bytes_text(o.shared_bytes), ""),
        ]
        for o in owners[:top]
    ]
    if rows:
        print_rows(console, columns, rows)
    if len(owners) > top:
        rest = sum(o.own_bytes for o in owners[top:])
        more = (
            f"... {count_text(len(owners) - top, 'sequence')} more, {bytes_text(rest)} of their own; --top shows more"
        )
        console.print(more, style="dim")


def _print_savings(console: Console, savings: dict[str, Saving], cap: str | None) -> None:
    gc, merging = savings["gc"], savings["compact"]
    expired = f", {count_text(len(gc.sequences), 'sequence')} expired" if gc.sequences else ""
    console.print(f"kvdb gc would free {bytes_text(gc.bytes)}{expired}")
    console.print(
        f"kvdb compact would save {count_text(merging.segments, 'segment')}, about {bytes_text(merging.bytes)}"
    )
    if cap is None:
        return
    lost = savings["cap"]
    missed = "" if lost.enough else "; that is not enough: what is left is named, pinned or the store's own"
    console.print(
        Text(
            f"a cap of {cap} would free {bytes_text(lost.bytes)}: {count_text(len(lost.sequences), 'sequence')} would lose KV, "
            f"{count_text(lost.segments, 'segment')} would go{missed}"
        ),
        soft_wrap=True,
    )
    for sequence in lost.sequences[:_LOST]:
        console.print(Text(f"  {_label(sequence)}", style="yellow"), soft_wrap=True)
    if len(lost.sequences) > _LOST:
        console.print(f"  ... and {len(lost.sequences) - _LOST:,} more", style="dim")


def _label(sequence: Sequence) -> str:
    return f"{visible(sequence.name or '-')} {sequence.key[:KEY_SHOWN]}, {count_text(sequence.tokens, 'token')}"
