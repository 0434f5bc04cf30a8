"""`kvdb eval`: checks what was asked before a model is loaded, judges, and shows the result.

torch and transformers are imported inside: `kvdb ls` must not wait for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvdb.codecs import CodecPlan
from kvdb.errors import InvalidInput
from kvdb.geometry import CHUNK_TOKENS
from kvdb.tools.ask import load, parse_budget, read_document
from kvdb.tools.output import print_json, stderr_console, stdout_console
from kvdb.tools.progress import steps_bar

if TYPE_CHECKING:
    from kvdb.runtime.selection import StopRule

DEFAULT_TOKENS: Final = 4000
DEFAULT_CODEC: Final = "raw"
DEFAULT_BUDGETS: Final = ("0.05", "0.1", "0.2")


def evaluate(
    *,
    model: str = "smollm2",
    tokens: list[int] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    codecs: list[str] | None = None,
    selectors: list[str] | None = None,
    budgets: list[str] | None = None,
    thresholds: list[float] | None = None,
    masses: list[float] | None = None,
    certified: list[float] | None = None,
    positions: int = 256,
    texts: list[str] | None = None,
    needles: int = 1,
    seed: int = 0,
    layers: bool = False,
    threads: int | None = None,
    stats: Path | None = None,
    plot: Path | None = None,
    compare_with: Path | None = None,
    keep: Path | None = None,
    as_json: bool = False,
) -> None:
    """See `kvdb eval --help`. None or nothing in a list: its default; budgets: only where no other rule is given."""
    older = None if compare_with is None else _older(compare_with)
    budgets = budgets or ([] if thresholds or masses or certified else [*DEFAULT_BUDGETS])
    limits = [parse_budget(budget) for budget in budgets]
    parsed = [CodecPlan.parse(codec) for codec in codecs or [DEFAULT_CODEC]]
    for plan in parsed:
        if not plan.by_record:
            raise InvalidInput(
                f"--codec {plan}: loses nothing, expected one whose loss can be measured; 'kvdb.tools.bench.codecs' has its size"
            )
    for option, file in (("--stats", stats), ("--plot", plot), ("--keep", keep)):
        if file is not None and not file.parent.is_dir():
            raise InvalidInput(f"{option} {file}: no folder {file.parent}, expected an existing one")
    console = stderr_console()
    with console.status("loading torch and transformers"):
        import msgspec

        from kvdb.runtime.selection import Budget, Certified, Mass, Threshold
        from kvdb.tools.bench.command import show_compared
        from kvdb.tools.bench.compare import compare
        from kvdb.tools.bench.machine import code_digest
        from kvdb.tools.bench.setup import machine, write_whole
        from kvdb.tools.evaluate.journal import Journal
        from kvdb.tools.evaluate.judge import Trial, judge
        from kvdb.tools.evaluate.oracle import JUDGED
        from kvdb.tools.evaluate.plot import svg
        from kvdb.tools.evaluate.report import layers_table, table
        from kvdb.tools.evaluate.texts import TEXTS
        from kvdb.tools.selectors import parse_selector

    rules: list[StopRule] = [
        *(Budget.of(limit) for limit in limits),
        *(Threshold.of(threshold) for threshold in thresholds or ()),
        *(Mass.of(mass) for mass in masses or ()),
        *(Certified.of(epsilon) for epsilon in certified or ()),
    ]
    able = [name for name, kind in JUDGED.own.items() if kind.proves or not certified]
    for text in texts or ():
        if text not in TEXTS:
            read_document(text)
    trial = Trial(
        tokens=tokens or [DEFAULT_TOKENS],
        positions=positions,
        selectors={name: parse_selector(name, JUDGED) for name in selectors or able},
        rules=rules,
        texts=texts or list(TEXTS),
        needles=needles,
        seed=seed,
        chunk_tokens=chunk_tokens,
        codecs={str(codec): codec for codec in parsed},
    )
    loaded = load(model, console, threads)
    trial.check(loaded.model)
    journal = None if keep is None else Journal(keep, {**trial.described(loaded.name), "code": code_digest()})
    with steps_bar(console, total=trial.steps) as progress:
        report = judge(loaded, trial, progress, journal)
    result: dict[str, Any] = {"machine": machine(), **msgspec.to_builtins(report)}
    if plot is not None:
        plot.write_text(svg(report))
    if stats is not None:  # last: with it an evaluation is finished
        write_whole(stats, json.dumps(result, indent=1) + "\n")
    compared = [] if older is None else [compare(older, result)]
    if as_json:
        print_json(result if older is None else {**result, "compared": msgspec.to_builtins(compared)})
        return
    shown = stdout_console()
    shown.print(table(report))
    for row in report.rows if layers else ():
        shown.print(f"{row.codec} {row.selector} {row.rule} at {row.tokens:,} tokens", style="italic")
        shown.print(layers_table(row))
    show_compared(compared, each=False)


def _older(file: Path) -> dict[str, Any]:
    """raises  InvalidInput for what is no result of an evaluation"""
    from kvdb.tools.bench.compare import EVAL, benchmark_of, read_result

    result = read_result(file)
    if benchmark_of(result) != EVAL:
        raise InvalidInput(
            f"--compare {file}: of benchmark {benchmark_of(result)!r}, expected what 'kvdb eval --stats' wrote"
        )
    return result
