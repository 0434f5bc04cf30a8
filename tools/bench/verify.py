"""What verification costs a decode step: a budget of the context read at each step, with records compared always, once, or never.

    python -m kvdb.tools.bench.verify --tokens 7000 --threads 1

The three take turns of a few steps, each with a handle of its own on one store: the first step of a turn is the first to
touch what it reads, the others mostly read it again. `kvdb.tools.bench.gather` shows the same by record size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB
from kvdb.reader import VERIFY
from kvdb.runtime import KVDBCache, attach
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result
from kvdb.tools.bench.synthetic import ratio, scratch, seconds


def run(
    tokens: Annotated[int, typer.Option(help="context length")] = 7000,
    turns: Annotated[int, typer.Option(help="measured turns of each kind")] = 7,
    steps: Annotated[int, typer.Option(help="steps of a turn")] = 8,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
) -> None:
    """Median milliseconds of a step for each way to verify, at a budget of 20 % and exact."""
    torch.set_num_threads(threads)
    loaded = real_model()
    ids = document_ids(loaded, tokens)
    rows: list[dict[str, Any]] = []
    with scratch(None) as place:
        with KVDB.open(place / "bench.kvdb") as db, attach(loaded.model, db, exact=True) as kv:
            kv.cache(ids)  # writes the context
        for budget in (0.2, None):
            rows.append({"budget": budget, **_measure(loaded.model, place / "bench.kvdb", ids, budget, turns, steps)})
    table = Table(
        "budget",
        "step",
        *(f"{v}, ms" for v in VERIFY),
        "first / never",
        "always / never",
        title=f"decode at {tokens} tokens",
    )
    for r in rows:
        name = "exact" if r["budget"] is None else f"{r['budget']:.0%}"
        for step in ("opening", "later"):
            found = r[step]
            ratios = (f"{found[v]['to_never']:.2f}x" for v in ("first", "always"))
            table.add_row(name, step, *(f"{found[v]['ms']:.1f}" for v in VERIFY), *ratios)
    Console().print(table)
    write_result("verify", {"tokens": tokens, "turns": turns, "steps": steps, "rows": rows})


def _measure(
    model: Any, path: Path, ids: torch.Tensor, budget: float | None, turns: int, steps: int
) -> dict[str, dict[str, dict[str, float]]]:
    options: dict[str, Any] = {"exact": True} if budget is None else {"budget": budget}
    taken: dict[str, list[list[float]]] = {verify: [] for verify in VERIFY}
    for _ in range(turns):
        for verify in VERIFY:
            with KVDB.open(path, "r", verify=verify) as db, attach(model, db, **options) as kv, torch.no_grad():
                cache = kv.cache(ids)
                taken[verify].append([1e3 * seconds(lambda: _step(model, cache, ids)) for _ in range(steps)])  # noqa: B023
    parts = {"opening": slice(0, 1), "later": slice(1, None)}
    times = {part: {v: [t for turn in taken[v] for t in turn[which]] for v in VERIFY} for part, which in parts.items()}
    return {
        part: {v: {"ms": median(t[v]), "to_never": 1 / ratio(t[v], t["never"])} for v in VERIFY}
        for part, t in times.items()
    }


def _step(model: Any, cache: KVDBCache, ids: torch.Tensor) -> None:
    model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)


if __name__ == "__main__":
    typer.run(run)
