"""`kvdb bench`: runs benchmarks, or lists them, and compares results. Each runs elsewhere; torch is not imported here."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from kvdb.errors import InvalidInput
from kvdb.tools.bench.compare import Compared, Summary, benchmark_of, compare, moved_baselines, read_result, summaries
from kvdb.tools.bench.series import Outcome, chosen, expected_s, finished, machine_of, measure
from kvdb.tools.bench.table import BENCHES, NEEDS, missing, name_of, result_file
from kvdb.tools.output import PROBLEM, Interrupted, print_json, stderr_console, stdout_console, visible
from kvdb.tools.sizes import count_text, seconds_text

_WAYS = {"higher": "higher is better", "lower": "lower is better", None: ""}


def list_benches(names: list[str], *, results: Path, as_json: bool) -> int:
    """What there is, what each needs, and what is finished."""
    some = chosen(names)
    done = finished(some, results)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "what": BENCHES[name].what,
            "about_s": expected_s(name, results),
            "needs": [NEEDS[need].what for need in BENCHES[name].needs],
            "missing": missing(BENCHES[name]),
            "finished": name in done,
            "commit": (machine_of(name, results) or {}).get("commit"),
        }
        for name in some
    ]
    if as_json:
        print_json({"results": str(results), "benchmarks": rows})
        return 0
    table = Table(box=box.SIMPLE_HEAD, border_style="dim", header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for header in ("NAME", "MEASURES", "ABOUT", "NEEDS", "RESULT"):
        table.add_column(header, overflow="fold", no_wrap=header == "NAME")
    for row in rows:
        result = (
            Text("finished", "green")
            if row["finished"]
            else Text(f"of {visible(str(row['commit']))}" if row["commit"] else "-", "dim")
        )
        lacks = f"missing: {', '.join(row['missing'])}"
        needs = Text(lacks, "red") if row["missing"] else Text(", ".join(row["needs"]))
        table.add_row(
            Text(row["name"], "bold"), row["what"], seconds_text(row["about_s"]).removesuffix(" 00 s"), needs, result
        )
    stdout_console().print(table)
    return 0


def bench(
    names: list[str],
    *,
    results: Path,
    again: bool = False,
    run: bool = True,
    compare_with: Path | None = None,
    each: bool = False,
    as_json: bool = False,
) -> int:
    """Run some, or all without names; 1 if one fails.

    again         also what is finished
    run           False: only compare what is there
    compare_with  an older result, or a folder of them, read before anything is run
    each          show every figure of a comparison, not only what all rows come to
    """
    older = {} if compare_with is None else _older(compare_with, chosen(names))
    if compare_with is not None and not compare_with.is_dir() and not names:
        names = [name for name in BENCHES if any(_is_of(result, [name]) for result in older.values())]
    if not run and compare_with is None:
        raise InvalidInput("--no-run: no --compare, expected one; without it there is nothing to do")
    outcomes = _run_all(chosen(names), results, again=again, as_json=as_json) if run else []
    measured = {result_file(outcome.name, results).resolve() for outcome in outcomes if outcome.state == "measured"}
    compared = [
        pair for file, result in older.items() if (pair := _compared(file, result, results, measured)) is not None
    ]
    if older and not compared and all(outcome.state in ("measured", "kept") for outcome in outcomes):
        raise InvalidInput(
            f"--compare {compare_with}: none of its results has one of its benchmark in {results}, expected some"
        )
    if as_json:
        told = [{**outcome._asdict(), "file": str(result_file(outcome.name, results))} for outcome in outcomes]
        print_json({"results": str(results), "benchmarks": told, "compared": msgspec.to_builtins(compared)})
    else:
        show_compared(compared, each=each)
        _say_done(outcomes, results)
    return PROBLEM if any(outcome.state == "failed" for outcome in outcomes) else 0


def _run_all(names: list[str], results: Path, *, again: bool, as_json: bool) -> list[Outcome]:
    console, outcomes = stderr_console(), list[Outcome]()
    kept = set[str]() if again else finished(names, results)
    waiting = [name for name in names if name not in kept]
    ahead_s = {name: 0.0 if missing(BENCHES[name]) else expected_s(name, results) for name in waiting}
    for at, name in enumerate(names, 1):
        if name in kept:
            outcomes.append(Outcome(name, "kept", "finished before, by this code on this machine", 0.0))
        else:
            about_s, rest_s = ahead_s.pop(name), sum(ahead_s.values())
            with console.status("") as status:

                def watch(
                    seconds: float, at: int = at, name: str = name, about_s: float = about_s, rest_s: float = rest_s
                ) -> None:
                    left_s = max(about_s - seconds, 0) + rest_s
                    status.update(
                        Text(
                            f"{at} of {len(names)}, {name}: {seconds_text(seconds)} of about {seconds_text(about_s)}; {seconds_text(left_s)} left in all"
                        )
                    )

                try:
                    outcomes.append(measure(name, results, watch))
                except KeyboardInterrupt:
                    raise Interrupted(
                        f"{at - 1} of {len(names)} benchmarks are done, their results in {results}; the same command goes on from there"
                    ) from None
        _say(outcomes[-1], as_json=as_json)
    return outcomes


def _say(outcome: Outcome, *, as_json: bool) -> None:
    """What it printed goes to stdout, unless JSON does; how it went to stderr."""
    if outcome.state == "measured" and not as_json:
        print(visible(outcome.told), end="", flush=True)
    took = f" in {seconds_text(outcome.seconds)}" if outcome.state == "measured" else f": {visible(outcome.told)}"
    stderr_console().print(
        Text(f"{outcome.name}: {outcome.state}{took}", style="red" if outcome.state == "failed" else ""), soft_wrap=True
    )


def _say_done(outcomes: list[Outcome], results: Path) -> None:
    if outcomes:
        counts = {
            state: sum(outcome.state == state for outcome in outcomes)
            for state in ("measured", "kept", "skipped", "failed")
        }
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        stderr_console().print(
            Text(f"{count_text(len(outcomes), 'benchmark')}: {told}; results in {results}"), soft_wrap=True
        )


# -- comparing


def _older(path: Path, names: list[str]) -> dict[Path, dict[str, Any]]:
    """Results by file: of a folder all that are of some benchmarks."""
    if not path.is_dir():
        result = read_result(path)
        if not _is_of(result, names):
            raise InvalidInput(
                f"--compare {path}: of benchmark {benchmark_of(result)!r}, expected one of {', '.join(names)}"
            )
        return {path: result}
    found = {}
    for file in sorted(path.glob("*.json")):
        try:
            result = read_result(file)
        except InvalidInput:  # other files may lie there too
            continue
        if _is_of(result, names):
            found[file] = result
    if not found:
        raise InvalidInput(f"{path}: a folder without results of {', '.join(names)}, expected some")
    return found


def _is_of(result: dict[str, Any], names: Collection[str]) -> bool:
    name = name_of(benchmark_of(result))
    return name is not None and name in names


def _compared(file: Path, old: dict[str, Any], results: Path, measured: set[Path]) -> Compared | None:
    """With the new one of its file name, else of its settings, else of its benchmark; None where there is none."""
    names = (file.name, f"{benchmark_of(old)}.json", result_file(str(name_of(benchmark_of(old))), results).name)
    found = [results / name for name in names if (results / name).is_file()]
    others = [new for new in found if new.resolve() != file.resolve() or new.resolve() in measured]
    if found and not others:
        raise InvalidInput(
            f"--compare {file}: it would be compared with itself, expected an older one; give -o FOLDER, or --again"
        )
    return compare(old, read_result(others[0])) if others else None


def show_compared(all_compared: list[Compared], *, each: bool) -> None:
    console = stdout_console()
    for compared in all_compared:
        if compared.figures:
            console.print(_figures_table(compared) if each else _summary_table(compared))
        else:
            console.print(Text(f"{compared.benchmark}: no row of both results is the same"), soft_wrap=True)
        for note in _notes(compared):
            console.print(Text(visible(note), style="yellow"), soft_wrap=True)


def _notes(compared: Compared) -> list[str]:
    notes = []
    if compared.machines:
        notes.append(
            f"measured on different machines ({'; '.join(compared.machines)}): ratios beside a baseline may be compared, times may not"
        )
    if moved := moved_baselines(compared):
        notes.append(
            f"baselines moved too ({', '.join(moved)}): the machine was another or not as busy; trust figures that are ratios"
        )
    if compared.settings:
        notes.append(f"measured with different settings: {'; '.join(compared.settings)}")
    if any(compared.missing):
        notes.append(
            f"rows that only the old result has: {compared.missing[0]}, only the new one: {compared.missing[1]}"
        )
    return notes


def _table(compared: Compared, *headers: str) -> Table:
    title = f"{compared.benchmark}: {compared.new_commit} / {compared.old_commit}"
    table = Table(box=box.HORIZONTALS, border_style="dim", padding=(0, 1), title=visible(title), title_justify="left")
    for header in headers:
        table.add_column(header, overflow="fold", justify="left" if header in ("row", "figure", "") else "right")
    return table


def _summary_table(compared: Compared) -> Table:
    table = _table(compared, "figure", "rows", "new / old", "least", "most", "")
    for row in summaries(compared):
        table.add_row(
            visible(row.name), f"{row.rows}", _ratio(row.median), _ratio(row.least), _ratio(row.most), _judged(row)
        )
    return table


def _figures_table(compared: Compared) -> Table:
    table = _table(compared, "row", "figure", "old", "new", "new / old", "")
    for figure in compared.figures:
        ratio = "-" if figure.ratio is None else _ratio(figure.ratio)
        judged = Text("") if figure.ratio is None else _judgement(figure.ratio, figure.better, baseline=figure.baseline)
        row = visible(", ".join(figure.row))
        table.add_row(row, visible(figure.name), f"{figure.old:,.4g}", f"{figure.new:,.4g}", ratio, judged)
    return table


def _judged(row: Summary) -> Text:
    return _judgement(row.median, row.better, baseline=row.baseline)


def _judgement(ratio: float, better: str | None, *, baseline: bool) -> Text:
    if baseline:
        return Text("a baseline", style="dim")
    if better is None or _ratio(ratio) == _ratio(1.0):
        return Text(_WAYS[better], style="dim")
    improved = (ratio > 1) == (better == "higher")
    return Text("better" if improved else "worse", style="green" if improved else "red")


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if math.isfinite(ratio) and ratio < 1000 else f"{ratio:.3g}x"
