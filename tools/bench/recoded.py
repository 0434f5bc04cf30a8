"""Decode step over one context stored with several codecs, warm and cold: paired, step by step, same tokens, raw as the baseline.

    python -m kvdb.tools.bench.recoded --tokens 7000 --threads 1

The context is prefilled once; each store is a copy of it, stored anew with its codec. Cold: maps are closed and the files forced out of the
page cache before each step, and abstracts stay in memory, as they do while decoding. Where control groups allow it, cold steps run under a memory
limit as well, of so much of the raw KV's bytes.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB, format
from kvdb.codecs import CodecPlan
from kvdb.errors import Unsupported
from kvdb.runtime import KVDBCache, attach
from kvdb.tools.bench.capped import force_out, memory_cap
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result

CODECS = ("raw", "int8", "int4", "int2", "planes:bits=6+int8", "planes")


def run(
    tokens: Annotated[int, typer.Option(help="context length")] = 7000,
    budget: Annotated[float, typer.Option(help="share of stored tokens to attend to")] = 0.2,
    turns: Annotated[int, typer.Option(help="how often codecs take turns")] = 5,
    steps: Annotated[int, typer.Option(help="measured steps of each codec in a turn, warm and cold")] = 5,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    share: Annotated[float, typer.Option(help="of the raw KV's bytes: memory for cold steps")] = 0.3,
    folder: Annotated[
        Path | None, typer.Option(help="where the stores lie; the system's temporary folder by default")
    ] = None,
) -> None:
    """Median milliseconds per token, and each codec's time divided by that of raw in the same turn."""
    torch.set_num_threads(threads)
    loaded = real_model()
    ids = document_ids(loaded, tokens)
    with tempfile.TemporaryDirectory(prefix="kvdb-bench-", dir=folder) as place:
        paths = _stores(Path(place), loaded.model, ids)
        warm: dict[str, list[float]] = {codec: [] for codec in CODECS}
        cold: dict[str, list[float]] = {codec: [] for codec in CODECS}
        limit = int(share * _bytes(paths["raw"]))
        capped = _may_cap(limit)
        for _ in range(turns):
            for codec, path in paths.items():
                with KVDB.open(path, "r") as db, attach(loaded.model, db, budget=budget, codec=codec) as kv:
                    cache = kv.cache(ids)
                    _step(loaded.model, cache, ids)  # loads abstracts
                    warm[codec] += [_step(loaded.model, cache, ids) for _ in range(steps)]
                    with memory_cap(limit) if capped else contextlib.nullcontext():
                        cold[codec] += [_cold_step(loaded.model, cache, ids, path) for _ in range(steps)]
                        cache._reader.close()
        sizes = {codec: _bytes(path) for codec, path in paths.items()}
    rows: list[dict[str, Any]] = [
        {
            "codec": codec, "bytes_per_token": sizes[codec] / tokens, "warm_ms": median(warm[codec]), "cold_ms": median(cold[codec]),
            "warm_ratio": median([a / b for a, b in zip(warm[codec], warm["raw"], strict=True)]),
            "cold_ratio": median([a / b for a, b in zip(cold[codec], cold["raw"], strict=True)]),
        }
        for codec in CODECS
    ]  # fmt: skip
    table = Table(
        "codec",
        "KV bytes a token",
        "warm ms",
        "/ raw",
        "cold ms",
        "/ raw",
        title=f"decode at {tokens} tokens, budget {budget}",
    )
    for r in rows:
        table.add_row(
            r["codec"], f"{r['bytes_per_token']:,.0f}", f"{r['warm_ms']:.1f}", f"{r['warm_ratio']:.2f}", f"{r['cold_ms']:.1f}",
            f"{r['cold_ratio']:.2f}",
        )  # fmt: skip
    Console().print(table)
    told = {
        "tokens": tokens,
        "budget": budget,
        "turns": turns,
        "steps": steps,
        "limit_bytes": limit if capped else None,
    }
    write_result("recoded", {**told, "rows": rows})


def _may_cap(limit: int) -> bool:
    try:
        with memory_cap(limit):
            return True
    except Unsupported as e:
        Console().print(f"recoded: cold steps without a limit; {e}")
        return False


def _stores(place: Path, model: Any, ids: torch.Tensor) -> dict[str, Path]:
    """A store for each codec, with the same KV."""
    paths = {codec: place / f"{number}.kvdb" for number, codec in enumerate(CODECS)}
    with KVDB.open(paths["raw"]) as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids), name="n")
    for codec in CODECS[1:]:
        shutil.copytree(paths["raw"], paths[codec])
        with KVDB.open(paths[codec], grace_s=0) as db:
            db.recode("n", CodecPlan.parse(codec))
    return paths


def _step(model: Any, cache: KVDBCache, ids: torch.Tensor) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
    return 1e3 * (time.perf_counter() - started)


def _cold_step(model: Any, cache: KVDBCache, ids: torch.Tensor, path: Path) -> float:
    cache._reader.close()  # opens its files again when it needs them
    force_out(_shards(path))
    return _step(model, cache, ids)


def _shards(path: Path) -> list[Path]:
    return sorted((path / "chunks").glob(f"*.kv*/{format.SHARD_KEY}"))


def _bytes(path: Path) -> int:
    """Of all files of KV, digests, ids and index included."""
    return sum(shard.stat().st_size for shard in _shards(path))


if __name__ == "__main__":
    typer.run(run)
