"""Progress bars: of a prefill (tokens per second, bytes written, time left), of a run of named steps, and of things that are counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from kvdb.tools.output import visible
from kvdb.tools.sizes import bytes_text, seconds_text

if TYPE_CHECKING:
    from kvdb.runtime.prefill import PrefillProgress

MIN_TOKENS: Final = 256
"""Fewer tokens than this are done before a bar could be read."""


@contextmanager
def prefill_bar(console: Console, *, total: int, reused: int) -> Iterator[Callable[[PrefillProgress], None]]:
    """Shows a prefill from token `reused` to token `total`; where stderr is no terminal, one line when it is done."""
    if total - reused < MIN_TOKENS:
        yield lambda _: None
        return
    started = time.monotonic()
    bar = Progress(
        TextColumn("prefill"),
        BarColumn(bar_width=24),
        _Counts(),
        console=console,
        disable=not console.is_terminal,
        refresh_per_second=4,
    )
    task = bar.add_task("prefill", total=total, completed=reused, reused=reused, written=0, at=0.0)
    written = 0

    def update(progress: PrefillProgress) -> None:
        nonlocal written
        written = progress.kv_bytes_written
        bar.update(task, completed=progress.done_tokens, written=written, at=time.monotonic() - started)

    with bar:
        yield update
    if not console.is_terminal:
        seconds = time.monotonic() - started
        console.print(
            f"prefill: {total - reused:,} tokens in {seconds_text(seconds)} "
            f"({(total - reused) / seconds:,.0f} tokens/s), {bytes_text(written)} written"
        )


@contextmanager
def steps_bar(console: Console, *, total: int) -> Iterator[Callable[[str], None]]:
    """Shows which of `total` steps goes on: call it as each begins. Where stderr is no terminal, nothing is shown."""
    bar = Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = bar.add_task("", total=total)
    begun = 0

    def update(step: str) -> None:
        nonlocal begun
        bar.update(task, description=visible(step), completed=begun)
        begun += 1

    with bar:
        yield update


@contextmanager
def counting_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows (what, how many are done, of how many), with rate and time left. Where stderr is no terminal, nothing is shown."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}

    def update(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(visible(what), total=total)
        bar.update(tasks[what], completed=done)

    with bar:
        yield update


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "", style="cyan")


class _Counts(ProgressColumn):
    """Blocks come every few seconds; in between, the time left counts down from the last block's rate."""

    def render(self, task: Task) -> Text:
        done, total, at = int(task.completed), int(task.total or 0), task.fields["at"]
        text = Text(f"{done:,} / {total:,} tokens")
        fresh = done - task.fields["reused"]
        if fresh <= 0 or at <= 0:
            return text
        rate = fresh / at
        text.append(f"  {rate:,.0f} tokens/s", style="cyan")
        text.append(f"  {bytes_text(task.fields['written'])} written", style="magenta")
        if done < total:
            left = (total - done) / rate - ((task.elapsed or at) - at)
            text.append(f"  {seconds_text(max(1.0, left))} left", style="yellow")
        else:
            text.append(f"  {seconds_text(at)}", style="yellow")
        return text
