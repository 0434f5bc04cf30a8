"""`kvdb ls`, `info`, `verify`, `rm`: what is in a store, and whether it is whole. No model is needed for any of them."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from kvdb.entries import Sequence
from kvdb.errors import Damaged, StoreNotFound
from kvdb.store import KVDB, Mode
from kvdb.tools.output import PROBLEM, print_json, stderr_console, stdout_console, visible
from kvdb.tools.sizes import age_text, bytes_text

KEY_SHOWN = 8
"""Characters of a key in a list: `kvdb rm` takes any unique beginning of four or more."""


def list_sequences(store: Path, *, as_json: bool) -> int:
    """All sequences, oldest first."""
    with _open(store, "r") as db:
        found = [(sequence, _kv_bytes(db, sequence)) for sequence in db.sequences()]
        shared = db.info()["kv_bytes"]
    if as_json:
        print_json({"store": str(store), "sequences": [_described(*each) for each in found]})
        return 0
    console = stdout_console()
    if not found:
        console.print(_empty(store), soft_wrap=True)
        return 0
    table = Table(box=box.SIMPLE_HEAD, border_style="dim", header_style="dim", pad_edge=False)
    table.add_column("NAME", overflow="fold")
    table.add_column("KEY", no_wrap=True)
    table.add_column("TOKENS", justify="right", no_wrap=True)
    table.add_column("KV", justify="right", no_wrap=True)
    table.add_column("FIDELITY", overflow="fold")
    table.add_column("MODEL", overflow="fold")
    table.add_column("USED", no_wrap=True)
    now = time.time()
    for sequence, kv_bytes in found:
        table.add_row(
            Text(visible(sequence.name), style="bold") if sequence.name else Text("-", style="dim"),
            Text(sequence.key[:KEY_SHOWN], style="cyan"),
            f"{sequence.tokens:,}",
            bytes_text(kv_bytes) if kv_bytes is not None else Text("damaged", style="red"),
            Text(visible(sequence.fidelity)),
            Text(visible(_model_label(sequence.model))),
            age_text(now - sequence.last_used),
        )
    console.print(table)
    console.print(
        f"{_count(len(found), 'sequence')}, {bytes_text(shared)} of KV on disk; what sequences share is stored once",
        style="dim",
    )
    return 0


def show_info(store: Path, *, as_json: bool) -> int:
    with _open(store, "r") as db:
        info = db.info()
    if as_json:
        print_json(info)
        return 0
    console = stdout_console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    created = datetime.fromtimestamp(info["created"]).astimezone()
    for label, value in (
        ("store", visible(info["path"])),
        ("id", info["store"]),
        ("format", str(info["format"])),
        ("created", f"{created:%Y-%m-%d %H:%M:%S} ({age_text(time.time() - info['created'])})"),
        ("sequences", f"{info['sequences']:,}"),
        ("segments", f"{info['segments']:,}"),
        ("tokens", f"{info['tokens']:,}"),
        ("identities", f"{info['identities']:,}  (models, dtypes and salts whose KV is kept apart)"),
        ("KV", bytes_text(info["kv_bytes"])),
        ("on disk", f"{bytes_text(info['disk_bytes'])}, and {bytes_text(info['catalog_bytes'])} of catalog"),
    ):
        grid.add_row(label, Text(value))
    console.print(grid)
    if not info["sequences"]:
        console.print(_empty(store), soft_wrap=True)
    return 0


def verify(store: Path, *, as_json: bool) -> int:
    """Read and check every byte; 1 if anything is wrong."""
    with _open(store, "r") as db, stderr_console().status(f"checking {visible(str(store))}"):
        started = time.perf_counter()
        info, problems = db.info(), db.check()
        seconds = time.perf_counter() - started
    if as_json:
        print_json({
            "store": str(store),
            "sequences": info["sequences"],
            "segments": info["segments"],
            "disk_bytes": info["disk_bytes"],
            "problems": [{"loc": p.loc, "kind": p.kind, "message": p.message} for p in problems],
        })  # fmt: skip
        return PROBLEM if problems else 0
    console = stdout_console()
    for problem in problems:
        console.print(Text.assemble((f"{problem.kind}: ", "bold red"), visible(str(problem))), soft_wrap=True)
    read = f"{_count(info['sequences'], 'sequence')}, {_count(info['segments'], 'segment')}, {bytes_text(info['disk_bytes'])}"
    if problems:
        console.print(Text(f"{_count(len(problems), 'problem')} in {read}", style="red"), soft_wrap=True)
        return PROBLEM
    rate = bytes_text(info["disk_bytes"] / seconds) if seconds else ""
    console.print(Text.assemble(("ok: ", "bold green"), f"no problems in {read} ({rate}/s)"), soft_wrap=True)
    return 0


def remove(store: Path, name_or_key: str, *, as_json: bool) -> int:
    """Forget one sequence; KV that others share stays."""
    with _open(store, "r+") as db:
        sequence = db.sequence(name_or_key)
        freed = db.delete(sequence.key)
    if as_json:
        print_json({"store": str(store), "removed": sequence.key, "name": sequence.name, "freed_bytes": freed})
    else:
        shown = visible(sequence.name or sequence.key[:KEY_SHOWN])
        rest = "" if freed else "; other sequences share all of its KV"
        stdout_console().print(
            Text(f"removed {shown} ({sequence.tokens:,} tokens), {bytes_text(freed)} freed{rest}"), soft_wrap=True
        )
    return 0


def _open(store: Path, mode: Mode) -> KVDB:
    try:
        return KVDB.open(store, mode)
    except StoreNotFound:
        raise StoreNotFound(f"{store}: no store there, expected one; 'kvdb ask' creates it") from None


def _empty(store: Path) -> Text:
    return Text(f'{visible(str(store))} is empty; fill it with: kvdb ask {store} "a question" --document FILE')


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _kv_bytes(db: KVDB, sequence: Sequence) -> int | None:
    """KV of a sequence, shared parts included; None where its segments are gone."""
    try:
        segments = db.segments(sequence.spans)
    except Damaged:
        return None
    return sum(
        (span.stop - span.start) * segment.info.geometry.token_bytes
        for span, segment in zip(sequence.spans, segments, strict=True)
    )


def _described(sequence: Sequence, kv_bytes: int | None) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(sequence)
    fields["segments"] = len(sequence.spans)
    del fields["spans"]
    return fields | {"kv_bytes": kv_bytes}


def _model_label(model: str) -> str:
    """A folder's own name; hub ids stay whole."""
    return Path(model).name if model.startswith(("/", ".")) else model
