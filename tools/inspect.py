"""`kvdb ls`, `info`, `verify`, and `abstracts` without `--set`: what is in a store, and whether it is whole. No model is needed for
any of them, and none changes anything."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from kvdb import files, format
from kvdb.abstracts import ABSTRACTS
from kvdb.entries import Sequence
from kvdb.errors import Damaged, OlderFormat, Problem, StoreNotFound
from kvdb.identity import EXACT
from kvdb.options import Mode
from kvdb.segments import codecs_of
from kvdb.store import KVDB
from kvdb.tools.output import PROBLEM, print_json, print_problems, problems_json, stdout_console, visible, working
from kvdb.tools.sizes import age_text, bytes_text, count_text, left_text, seconds_text

KEY_SHOWN = 8
"""Characters of a key in a list: commands take any unique beginning of four or more."""
_PATIENCE_S, _SLOWEST = 60.0, 20 << 20
"""Longest look at an untrusted store: seconds, and bytes a second beyond that."""


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
    """All sequences, oldest first."""
    with open_store(store, "r") as db:
        found = [(sequence, kv_bytes(db, sequence)) for sequence in db.sequences()]
        shared = db.info()["kv_bytes"]
        with db.catalog.begin() as txn:
            now = txn.now()  # store time, as in the entries
    if as_json:
        print_json({"store": str(store), "sequences": [_described(*each) for each in found]})
        return 0
    console = stdout_console()
    if not found:
        console.print(_empty(store), soft_wrap=True)
        return 0
    kept = any(sequence.pinned or sequence.expires is not None for sequence, _ in found)
    lossy = any(sequence.fidelity != EXACT for sequence, _ in found)
    table = Table(box=box.SIMPLE_HEAD, border_style="dim", header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("NAME", overflow="fold")
    table.add_column("KEY", no_wrap=True)
    table.add_column("TOKENS", justify="right", no_wrap=True)
    table.add_column("KV", justify="right", no_wrap=True)
    table.add_column("USED", no_wrap=True)
    table.add_column("HITS", justify="right", no_wrap=True)
    table.add_column("MODEL", overflow="fold")
    if lossy:
        table.add_column("FIDELITY", overflow="fold")
    if kept:
        table.add_column("EXPIRES", no_wrap=True)
    for sequence, size in found:
        table.add_row(
            Text(visible(sequence.name), style="bold") if sequence.name else Text("-", style="dim"),
            Text(sequence.key[:KEY_SHOWN], style="cyan"),
            f"{sequence.tokens:,}",
            bytes_text(size) if size is not None else Text("damaged", style="red"),
            age_text(now - sequence.last_used),
            f"{sequence.hits:,}",
            Text(visible(_model_label(sequence.model))),
            *([Text(visible(sequence.fidelity))] if lossy else []),
            *([_expiry(sequence, now)] if kept else []),
        )
    console.print(table)
    console.print(
        f"{count_text(len(found), 'sequence')}, {bytes_text(shared)} of KV on disk; what sequences share is stored once",
        style="dim",
    )
    return 0


def _expiry(sequence: Sequence, now: float) -> Text:
    """What keeps a sequence, or until when."""
    if sequence.pinned:
        return Text("pinned", style="green")
    if sequence.expires is not None:
        return Text(left_text(sequence.expires - now), style="yellow")
    return Text("-", style="dim")


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
        segments = db.segments(sequence.spans)
    except Damaged:
        return None
    found: dict[str, dict[str, int]] = {}
    for info in (segment.info for segment in segments):
        codecs_of(info)  # refuses abstracts that this version does not know
        for name in info.abstracts:
            groups = range(len(info.geometry.groups))
            places = [format.abstract_layout(info.geometry, g, info.chunks, ABSTRACTS[name]) for g in groups]
            so_far = found.setdefault(name, {"segments": 0, "bytes": 0})
            so_far["segments"] += 1
            so_far["bytes"] += sum(place.file_bytes for place in places)
    return dict(sorted(found.items()))


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
    created = datetime.fromtimestamp(info["created"]).astimezone()
    for label, value in (
        ("store", visible(info["path"])),
        ("id", info["store"]),
        ("format", str(info["format"])),
        ("created", f"{created:%Y-%m-%d %H:%M:%S} ({age_text(time.time() - info['created'])})"),
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


def _described(sequence: Sequence, size: int | None) -> dict[str, object]:
    fields: dict[str, object] = msgspec.to_builtins(sequence)
    fields["segments"] = len(sequence.spans)
    del fields["spans"]
    return fields | {"kv_bytes": size}


def _model_label(model: str) -> str:
    """A folder's own name; hub ids stay whole."""
    return Path(model).name if model.startswith(("/", ".")) else model
