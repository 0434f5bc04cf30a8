"""`kvdb trace`: where the time of a generation went, from the time line that `kvdb ask --trace` wrote. No model, and no store, is needed."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvdb.errors import InvalidInput
from kvdb.inspection import traces
from kvdb.inspection.maps import COLUMNS
from kvdb.inspection.traces import Cost, Hidden, Summary
from kvdb.tools.output import print_json, stdout_console, visible, working
from kvdb.tools.sizes import bytes_text, count_text, seconds_text, share_text


def show_trace(file: Path, *, stage: str | None, as_json: bool) -> int:
    """stage  show layers of this one alone; None: of all together"""
    with working(f"reading {file}", interrupted="nothing was changed"):
        summary = traces.summarise(traces.load(file), COLUMNS)
    if stage is not None and stage not in {cost.stage for cost in summary.stages}:
        known = ", ".join(sorted(cost.stage for cost in summary.stages if cost.stage))
        raise InvalidInput(f"--stage {stage}: not in {file}, expected one of {known}")
    if as_json:
        print_json({"file": str(file), **msgspec.to_builtins(summary)})
        return 0
    console = stdout_console()
    _print_whole(console, summary)
    console.print(_table("STAGE", summary.stages, wall=summary.wall_seconds))
    layers = summary.layers if stage is None else [cost for cost in summary.cells if cost.stage == stage]
    if layers:
        console.print(Text(f"layers{'' if stage is None else f', {visible(stage)} alone'}", style="dim"))
        console.print(_table("LAYER", layers, wall=summary.wall_seconds))
    return 0


def _print_whole(console: Console, summary: Summary) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    left_out = f", and {summary.spans_left_out:,} that had no room" if summary.spans_left_out else ""
    threads = ", ".join(f"{thread.thread}: {share_text(min(1.0, thread.share))}" for thread in summary.threads)
    for label, said in (
        ("length", f"{seconds_text(summary.wall_seconds)}, {count_text(summary.steps, 'step')}"),
        ("spans", f"{summary.spans:,}{left_out}"),
        ("threads busy", f"{threads}; two or more at once for {seconds_text(summary.overlap_seconds)}"),
        ("reading hidden", _hidden(summary.reading)),
        ("writing hidden", _hidden(summary.writing)),
    ):
        grid.add_row(label, Text(said))
    console.print(grid)


def _hidden(hidden: Hidden) -> str:
    if not hidden.seconds:
        return "there was none"
    return (
        f"{seconds_text(hidden.hidden_seconds)} of {seconds_text(hidden.seconds)} ({share_text(hidden.share)}) "
        "while another thread computed"
    )


def _table(first: str, costs: list[Cost] | tuple[Cost, ...], *, wall: float) -> Table:
    """OWN leaves out what is nested; SHARE is of OWN in the whole length, so shares of several threads can be more than 100 %."""
    table = Table(box=box.SIMPLE_HEAD, border_style="dim", header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, no_wrap=True, justify="left" if first == "STAGE" else "right")
    for column in ("OWN", "SHARE", "SPANS", "SECONDS", "MEDIAN", "99 %", "BYTES"):
        table.add_column(column, justify="right", no_wrap=True)
    for cost in costs:
        table.add_row(
            Text(visible(cost.stage or "") if first == "STAGE" else str(cost.layer), style="bold"),
            seconds_text(cost.own_seconds),
            f"{cost.share * 100:.1f} %",
            f"{cost.spans:,}",
            f"{cost.seconds:,.3f}",
            _brief(cost.median_s),
            _brief(cost.p99_s),
            bytes_text(cost.bytes) if cost.bytes else "-",
        )
    return table


def _brief(seconds: float) -> str:
    """Microseconds count here."""
    return f"{seconds * 1e3:,.3f} ms"
