"""Decode step over a store against a dense DynamicCache in memory: paired, step by step, same context, same tokens.

    python -m kvdb.tools.bench.decode --tokens 7000 --threads 1

Beside it the same step with selected records copied together first, as it is done where loops cannot be compiled.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from kvdb.runtime import KVDBCache, attach
from kvdb.tools.bench.setup import dense_cache, document_ids, median, real_model, temporary_store, write_result
from kvdb.tools.models import LoadedModel

LIMITS: list[dict[str, Any]] = [
    *({"budget": share} for share in (0.05, 0.1, 0.2, 0.3)),
    *({"threshold": share} for share in (0.01, 0.004)),
    {"mass": 0.95},
    {"exact": True},
]


def run(
    tokens: Annotated[int, typer.Option(help="context length")] = 7000,
    steps: Annotated[int, typer.Option(help="measured steps of each kind")] = 40,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
) -> None:
    """Median milliseconds per token under each limit, beside DynamicCache in the same loop."""
    torch.set_num_threads(threads)
    loaded = real_model()
    ids = document_ids(loaded, tokens)
    rows: list[dict[str, Any]] = []
    with temporary_store() as db:
        for limit in LIMITS:
            with attach(loaded.model, db, **limit) as kv:
                cache = kv.cache(ids)
                row = _paired(loaded, cache, ids, steps)
                rows.append({**limit, **row, "kv_share": cache.stats()["kv_bytes_read_share"]})
    table = Table(
        "limit",
        "of KV",
        "KVDB ms",
        "DynamicCache ms",
        "no attention ms",
        "DynamicCache / KVDB",
        "copied / KVDB",
        title=f"decode at {tokens} tokens",
    )
    for row in rows:
        name = next(f"{key}={row[key]}" for key in ("budget", "threshold", "mass", "exact") if key in row)
        table.add_row(
            name,
            f"{row['kv_share']:.1%}",
            f"{row['kvdb_ms']:.1f}",
            f"{row['dense_ms']:.1f}",
            f"{row['floor_ms']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['copied_ratio']:.2f}x",
        )
    Console().print(table)
    write_result("decode", {"tokens": tokens, "steps": steps, "rows": rows})


def _paired(loaded: LoadedModel, cache: KVDBCache, ids: torch.Tensor, steps: int) -> dict[str, float]:
    """One step of each kind in turn, so that a change of the machine's speed hits all alike."""
    model: Any = loaded.model
    dense, empty = dense_cache(cache, model.config), DynamicCache(config=model.config)
    token = ids[:, -1:]
    times: dict[str, list[float]] = {"kvdb": [], "copied": [], "dense": [], "floor": []}
    with torch.no_grad():
        for step in range(steps + 3):
            for name, past in (("kvdb", cache), ("copied", cache), ("dense", dense), ("floor", empty)):
                with patch("kvdb.runtime.layers.can_compile", _never) if name == "copied" else nullcontext():
                    started = time.perf_counter()
                    model(input_ids=token, past_key_values=past, use_cache=True)
                if step >= 3:
                    times[name].append(1e3 * (time.perf_counter() - started))
    speedup, copied = (
        median([a / k for a, k in zip(times[other], times["kvdb"], strict=True)]) for other in ("dense", "copied")
    )
    return {f"{name}_ms": median(values) for name, values in times.items()} | {
        "speedup": speedup,
        "copied_ratio": copied,
    }


def _never(q: torch.Tensor) -> bool:
    return False


if __name__ == "__main__":
    typer.run(run)
