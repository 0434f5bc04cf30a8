"""Time to first token: reusing a stored prefix against prefilling the same prompt.

python -m kvdb.tools.bench.reuse --tokens 7000
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB
from kvdb.runtime import attach
from kvdb.runtime.identity import weights_digest
from kvdb.tools.bench.setup import document_ids, median, real_model, temporary_store, write_result
from kvdb.tools.models import LoadedModel


def run(
    tokens: Annotated[list[int], typer.Option(help="prompt lengths")] = [2000, 4000, 7000],  # noqa: B006  typer copies it
    repeats: Annotated[int, typer.Option(help="measured reuses")] = 5,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
) -> None:
    """Prefill and first token, stock transformers and KVDB, beside reuse and first token; medians of the reuses."""
    torch.set_num_threads(threads)
    loaded = real_model()
    rows: list[dict[str, Any]] = []
    for length in tokens:
        ids = document_ids(loaded, length)
        with temporary_store() as db:
            started = time.perf_counter()
            weights_digest(loaded.model)
            hashing = time.perf_counter() - started
            prefill = _first_token(loaded, db, ids)
            reuse = median([_first_token(loaded, db, ids) for _ in range(repeats)])
        started = time.perf_counter()
        loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        stock = time.perf_counter() - started
        rows.append({
            "tokens": length, "stock_s": stock, "prefill_s": prefill, "reuse_s": reuse, "weights_digest_s": hashing,
            "ratio": prefill / reuse, "ratio_with_digest": prefill / (reuse + hashing),
        })  # fmt: skip
    table = Table(
        "tokens", "stock prefill s", "KVDB prefill s", "reuse s", "prefill / reuse", "weights digest s", "... with digest",
        title="time to first token",
    )  # fmt: skip
    for r in rows:
        table.add_row(
            f"{r['tokens']}", f"{r['stock_s']:.2f}", f"{r['prefill_s']:.2f}", f"{r['reuse_s']:.3f}",
            f"{r['ratio']:.0f}x", f"{r['weights_digest_s']:.2f}", f"{r['ratio_with_digest']:.0f}x",
        )  # fmt: skip
    Console().print(table)
    write_result("reuse", {"rows": rows})


def _first_token(loaded: LoadedModel, db: KVDB, ids: torch.Tensor) -> float:
    with attach(loaded.model, db, exact=True) as kv:
        started = time.perf_counter()
        cache = kv.cache(ids)
        loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1, do_sample=False
        )
        return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(run)
