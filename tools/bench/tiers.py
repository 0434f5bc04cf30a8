"""Decoding a context whose KV is larger than the memory that is left for it, against what it could be and what it would be otherwise.

    python -m kvdb.tools.bench.tiers --tokens 7500 --share 0.45

The real model writes the same text in four ways, each in a process of its own and in turn with the others:

    capped    as it is: selected records, through the page cache, which may hold `share` of the KV
    memory    the same with no limit, all KV in the page cache
    apart     the same records under the limit, but each step's read from the disk: nothing is kept from one to the next
    all       dense attention under the limit: every step reads all KV

A limit counts what the process allocates and reads after its model and abstracts are loaded (`kvdb.tools.bench.capped`). Steps are decoded
one after the other, so that what is selected changes as it does in use.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB, format
from kvdb.errors import Unsupported
from kvdb.runtime import KVDBCache, attach
from kvdb.tools.bench.capped import force_out, memory_cap
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result
from kvdb.tools.bench.synthetic import file_system, scratch

WAYS: Final = ("capped", "memory", "apart", "all")
FEWER: Final = 8
"""Of the slow way, one step in so many."""


def run(
    tokens: Annotated[int, typer.Option(help="context length")] = 7500,
    share: Annotated[float, typer.Option(help="of the KV's bytes: memory under the limit")] = 0.45,
    budget: Annotated[float, typer.Option(help="share of stored tokens to attend to")] = 0.1,
    steps: Annotated[int, typer.Option(help="measured steps of each way in a turn")] = 64,
    turns: Annotated[int, typer.Option(help="how often ways take turns")] = 3,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    folder: Annotated[
        Path | None, typer.Option(help="where the store lies; the system's temporary folder by default")
    ] = None,
) -> None:
    """Milliseconds a token, median and 99th percentile, and ratios of medians within a turn."""
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with scratch(folder) as place:
        if file_system(place) == "tmpfs":
            Console().print(f"tiers: SKIPPED, {place} is in memory; expected a disk, see --folder")
            return
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            kv_bytes = pool.apply(_prefill, (place / "s.kvdb", tokens, threads))
            limit = int(share * kv_bytes)
            try:
                for _ in range(turns):
                    for way in WAYS:
                        found = pool.apply(_decode, (place / "s.kvdb", tokens, way, budget, limit, steps, threads))
                        times[way].append(found)
            except Unsupported as e:
                Console().print(f"tiers: SKIPPED, {e}")
                return
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        every = [ms for turn in times[way] for ms in turn]
        ratios = [median(own) / median(base) for own, base in zip(times[way], times["memory"], strict=True)]
        rows.append(
            {"way": way, "ms": median(every), "p99_ms": float(np.percentile(every, 99)), "ratio": median(ratios)}
        )
    table = Table(
        "way",
        "ms",
        "p99 ms",
        "/ memory",
        title=f"decode at {tokens} tokens, {limit >> 20} MiB for {kv_bytes >> 20} MiB of KV",
    )
    for r in rows:
        table.add_row(r["way"], f"{r['ms']:.1f}", f"{r['p99_ms']:.1f}", f"{r['ratio']:.2f}")
    Console().print(table)
    told = {
        "tokens": tokens,
        "budget": budget,
        "kv_bytes": kv_bytes,
        "limit_bytes": limit,
        "steps": steps,
        "turns": turns,
    }
    write_result("tiers", {**told, "rows": rows})


def _prefill(path: Path, tokens: int, threads: int) -> int:
    """Bytes of KV that are now stored under the name `n`."""
    torch.set_num_threads(threads)
    loaded = real_model()
    with KVDB.open(path) as db, attach(loaded.model, db, exact=True) as kv:
        kv.save(kv.cache(document_ids(loaded, tokens)), name="n")
        return sum(file.stat().st_size for file in _shards(path))


def _decode(path: Path, tokens: int, way: str, budget: float, limit: int, steps: int, threads: int) -> list[float]:
    """Milliseconds of each step."""
    torch.set_num_threads(threads)
    loaded = real_model()
    ids = document_ids(loaded, tokens)
    rule: dict[str, Any] = {"exact": True} if way == "all" else {"budget": budget}
    count, taken = (max(4, steps // FEWER) if way == "all" else steps), list[float]()
    with KVDB.open(path, "r") as db, attach(loaded.model, db, **rule) as kv, torch.no_grad():
        cache = kv.cache(ids)
        token = _step(loaded.model, cache, ids[:, -1:])  # loads abstracts and loops
        shards = _shards(path)
        if way != "memory":
            cache._reader.close()  # opens its files again when it needs them
            force_out(shards)
        with contextlib.nullcontext() if way == "memory" else memory_cap(limit):
            for step in range(count + count // 4):
                if way == "apart":
                    cache._reader.close()
                    force_out(shards)
                started = time.perf_counter()
                token = _step(loaded.model, cache, token)
                if step >= count // 4:  # before that, memory fills
                    taken.append(1e3 * (time.perf_counter() - started))
            cache._reader.close()
    return taken


def _step(model: Any, cache: KVDBCache, token: torch.Tensor) -> torch.Tensor:
    """The token that follows, (1, 1)."""
    logits: torch.Tensor = model(input_ids=token, past_key_values=cache, use_cache=True).logits
    return logits[:, -1:].argmax(-1)


def _shards(path: Path) -> list[Path]:
    return sorted((path / "chunks").glob(f"*.kv*/{format.SHARD_KEY}"))


if __name__ == "__main__":
    typer.run(run)
