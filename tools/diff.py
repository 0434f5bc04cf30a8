"""`kvdb diff`: how far the KV of two sequences is apart, or what two stores have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from kvdb.entries import Sequence
from kvdb.errors import InvalidInput, Problem
from kvdb.inspection.distance import Distance, Error, distance
from kvdb.inspection.snapshot import snapshot
from kvdb.inspection.stores import Pair, Side, StoreDifference, difference
from kvdb.tools.inspect import KEY_SHOWN, open_store
from kvdb.tools.listing import Cell, Column, print_rows
from kvdb.tools.output import (
    PROBLEM,
    Interrupted,
    print_json,
    print_problems,
    problems_json,
    stderr_console,
    stdout_console,
    visible,
)
from kvdb.tools.sizes import count_text


def show_difference(
    store: Path, first: str | None, second: str | None, *, other: Path | None, worst: int, as_json: bool
) -> int:
    """Two sequences, of one store or of two, or two whole stores. 0 whatever differs; 1 if something cannot be read."""
    if other is None and second is None:
        raise InvalidInput(
            f"kvdb diff {store}: one store and {'one sequence' if first else 'no sequences'}, expected two sequences, or --other STORE"
        )
    with open_store(store, "r") as a, open_store(other or store, "r") as b:
        sides = Side(a, snapshot(a)), Side(b, snapshot(b))
        if first is None:
            return _show_stores(store, other or store, sides, difference(*sides), as_json=as_json)
        sequences = sides[0].snap.sequence(first), sides[1].snap.sequence(second or first)
        with _bar(stderr_console()) as progress:
            found = distance((a, sequences[0]), (b, sequences[1]), worst=worst, progress=progress)
    return _show_distance(store, other or store, sequences, found, _problems(*sides), as_json=as_json)


def _problems(first: Side, second: Side) -> list[Problem]:
    return first.snap.problems + (second.snap.problems if first.db.path != second.db.path else [])


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """KV compared, its rate, and the time left; where stderr is no terminal, nothing is shown."""
    columns = (
        TextColumn("comparing"),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)
    task = bar.add_task("comparing", total=None)
    try:
        with bar:
            yield lambda done, total: bar.update(task, completed=done, total=total)
    except KeyboardInterrupt:
        raise Interrupted("the comparison is not complete; nothing was changed") from None


# -- two sequences


def _show_distance(
    store: Path,
    other: Path,
    sequences: tuple[Sequence, Sequence],
    found: Distance,
    problems: list[Problem],
    *,
    as_json: bool,
) -> int:
    problems = problems + [Problem("kv", "damaged", wrong) for wrong in found.wrong]
    code = PROBLEM if problems else 0
    if as_json:
        said = {"problems": problems_json(problems)} if problems else {}
        print_json(_distance_json(store, other, sequences, found) | said)
        return code
    console = stdout_console()
    one, two = sequences
    console.print(
        Text.assemble(
            (f"{found.common:,}", "bold"),
            f" leading tokens in common, of {one.tokens:,} of {_label(one)} and {two.tokens:,} of {_label(two)}",
        ),
        soft_wrap=True,
    )
    if found.fields:
        console.print(Text(visible(f"identities differ in: {', '.join(found.fields)}")), soft_wrap=True)
    if one.fidelity != two.fidelity:
        console.print(Text(visible(f"fidelities are {one.fidelity!r} and {two.fidelity!r}")), soft_wrap=True)
    if found.shared:
        console.print(f"{count_text(found.shared, 'token')} of these lie in the same segments: nothing to compare")
    if found.layers:
        _print_layers(console, found)
    print_problems(problems)
    return code


def _print_layers(console: Console, found: Distance) -> None:
    number = [Column(title, right=True) for title in ("KEYS", "MOST", "VALUES", "MOST")]
    rows: list[list[Cell]] = [
        [(str(layer), ""), *[(text, "") for error in (keys, values) for text in _error_texts(error)]]
        for layer, keys, values in found.layers
    ]
    print_rows(console, [Column("LAYER", right=True), *number], rows)
    if any(chunk.keys or chunk.values for chunk in found.worst):
        columns = [
            Column("WORST", right=True),
            Column("TOKENS"),
            Column("KEYS", right=True),
            Column("VALUES", right=True),
        ]
        worst: list[list[Cell]] = [
            [
                (f"layer {c.layer}", ""),
                (f"{c.start:,}-{c.stop - 1:,}", ""),
                (f"{c.keys:.4g}", ""),
                (f"{c.values:.4g}", ""),
            ]
            for c in found.worst
        ]
        print_rows(console, columns, worst)
    told = "KEYS and VALUES: root mean square of the difference / of the first sequence's numbers; MOST: greatest difference"
    console.print(told, style="dim")


def _error_texts(error: Error) -> tuple[str, str]:
    return f"{error.relative:.4g}", f"{error.most:.4g}"


def _distance_json(store: Path, other: Path, sequences: tuple[Sequence, Sequence], found: Distance) -> dict[str, Any]:
    return {
        "first": {"store": str(store), **_who(sequences[0])},
        "second": {"store": str(other), **_who(sequences[1])},
        "common": found.common,
        "shared": found.shared,
        "fields": found.fields,
        "layers": [
            {"layer": layer, "keys": keys._asdict(), "values": values._asdict()} for layer, keys, values in found.layers
        ],
        "worst": [chunk._asdict() for chunk in found.worst],
    }


def _who(sequence: Sequence) -> dict[str, Any]:
    return {"key": sequence.key, "name": sequence.name, "tokens": sequence.tokens, "fidelity": sequence.fidelity}


# -- two stores


def _show_stores(store: Path, other: Path, sides: tuple[Side, Side], found: StoreDifference, *, as_json: bool) -> int:
    problems = _problems(*sides) + [Problem("sequence", "damaged", wrong) for wrong in found.wrong]
    code = PROBLEM if problems else 0
    if as_json:
        said = {"problems": problems_json(problems)} if problems else {}
        print_json({
            "first": str(store),
            "second": str(other),
            "same": [_pair_json(pair) for pair in found.same],
            "differ": [_pair_json(pair) for pair in found.differ],
            "only_first": [_who(sequence) for sequence in found.only_first],
            "only_second": [_who(sequence) for sequence in found.only_second],
        } | said)  # fmt: skip
        return code
    console = stdout_console()
    rows: list[list[Cell]] = []
    for pair in found.differ:
        what = f"differ in {', '.join(pair.differ)}; {count_text(pair.common, 'token')} in common"
        rows.append([(_label(pair.first), "yellow"), (_label(pair.second), "yellow"), (what, "")])
    rows += [[(_label(s), "red"), ("-", "dim"), (count_text(s.tokens, "token"), "")] for s in found.only_first]
    rows += [[("-", "dim"), (_label(s), "green"), (count_text(s.tokens, "token"), "")] for s in found.only_second]
    if rows:
        columns = [
            Column(visible(str(store)), folds=True),
            Column(visible(str(other)), folds=True),
            Column("", folds=True),
        ]
        print_rows(console, columns, rows)
    console.print(
        f"{len(found.same):,} in both, {len(found.differ):,} differ, {len(found.only_first):,} only in the first, "
        f"{len(found.only_second):,} only in the second"
    )
    print_problems(problems)
    return code


def _pair_json(pair: Pair) -> dict[str, Any]:
    return {
        "first": _who(pair.first),
        "second": _who(pair.second),
        "common": pair.common,
        "differ": msgspec.to_builtins(pair.differ),
    }


def _label(sequence: Sequence) -> str:
    return visible(sequence.name) if sequence.name else sequence.key[:KEY_SHOWN]
