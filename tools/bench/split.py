"""Time to first token of a stored prefix on a disk as slow as the model: read it, compute it again, or compute its first tokens while the rest is read.

    python -m kvdb.tools.bench.split --tokens 2000

The disk is slowed (`kvdb.tools.bench.throttled`) to what computing the prefix once takes, so that the two pure ways take about as long and a split could
take half of that. Nothing of the prefix is in memory when a turn begins; other tokens follow it each time. The split is KVDB's own choice, from
what the pure ways of that turn took.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB
from kvdb.errors import Unsupported
from kvdb.runtime import attach
from kvdb.runtime.costs import Costs
from kvdb.tools.bench.capped import force_out
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result
from kvdb.tools.bench.synthetic import file_system, scratch
from kvdb.tools.bench.throttled import read_limit
from kvdb.tools.models import LoadedModel

WAYS: Final = {"load": False, "compute": True, "split": None}
"""What `attach(recompute=)` is given."""
MODES: Final = ("mmap", "direct")


class First(NamedTuple):
    """seconds: until the first token was there. computed: of the prefix's tokens. costs: as they were known in the end."""

    seconds: float
    computed: int
    costs: Costs


def run(
    tokens: Annotated[int, typer.Option(help="of the stored prefix")] = 2000,
    more: Annotated[int, typer.Option(help="tokens that follow it")] = 64,
    turns: Annotated[int, typer.Option(help="how often ways take turns")] = 3,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
    folder: Annotated[
        Path | None, typer.Option(help="where the store lies; the system's temporary folder by default")
    ] = None,
) -> None:
    """Seconds, and their ratio to the faster pure way of the same turn; medians of the turns."""
    torch.set_num_threads(threads)
    with scratch(folder) as place:
        if file_system(place) == "tmpfs":
            Console().print(f"split: SKIPPED, {place} is in memory; expected a disk, see --folder")
            return
        loaded = real_model()
        path, text = place / "s.kvdb", document_ids(loaded, tokens + (1 + len(MODES) * turns * len(WAYS)) * more)
        kv_bytes, seconds = _store(loaded, path, text[:, :tokens])
        try:
            with read_limit(place, round(kv_bytes / seconds)):
                rows = [row for mode in MODES for row in _measure(loaded, path, text, mode, tokens, more, turns)]
        except Unsupported as e:
            Console().print(f"split: SKIPPED, {e}")
            return
    table = Table(
        "reader", "way", "s", "computed", "/ faster of load, compute",
        title=f"first token after a prefix of {tokens} tokens, {kv_bytes >> 20} MiB at {kv_bytes / seconds / 1e6:.1f} MB/s",
    )  # fmt: skip
    for r in rows:
        table.add_row(r["reader"], r["way"], f"{r['seconds']:.2f}", f"{r['computed']}", f"{r['ratio']:.2f}")
    Console().print(table)
    told = {"tokens": tokens, "more": more, "turns": turns, "kv_bytes": kv_bytes}
    write_result("split", {**told, "bytes_per_second": kv_bytes / seconds, "rows": rows})


def _store(loaded: LoadedModel, path: Path, ids: torch.Tensor) -> tuple[int, float]:
    """Bytes of KV of a prefix that is now stored, and seconds it took to compute."""
    with KVDB.open(path) as db, attach(loaded.model, db, exact=True) as kv:
        kv.cache(ids.flip(1)[:, :65])  # what is compiled once is compiled now
        cache = kv.cache(torch.cat((ids, ids[:, -1:]), 1))
        return int(cache.stats()["kv_bytes_stored"]), cache.metrics.prefill_seconds


def _measure(
    loaded: LoadedModel, path: Path, text: torch.Tensor, mode: str, tokens: int, more: int, turns: int
) -> list[dict[str, Any]]:
    taken: dict[str, list[First]] = {way: [] for way in WAYS}
    follows = tokens + (1 + MODES.index(mode) * turns * len(WAYS)) * more
    for _ in range(turns):
        for way in WAYS:
            ids = torch.cat((text[:, :tokens], text[:, follows : follows + more]), 1)
            follows += more
            known = [taken["load"][-1].costs, taken["compute"][-1].costs] if way == "split" else []
            taken[way].append(_first_token(loaded, path, ids, tokens, mode, way, known))
    pure = [min(a.seconds, b.seconds) for a, b in zip(taken["load"], taken["compute"], strict=True)]
    return [
        {
            "reader": mode,
            "way": way,
            "seconds": median([each.seconds for each in found]),
            "computed": median([each.computed for each in found]),
            "ratio": median([each.seconds / least for each, least in zip(found, pure, strict=True)]),
        }
        for way, found in taken.items()
    ]


def _first_token(
    loaded: LoadedModel, path: Path, ids: torch.Tensor, tokens: int, mode: str, way: str, known: list[Costs]
) -> First:
    """tokens: of the prefix. known: what told of reading, and of computing."""
    force_out([file for file in path.rglob("*") if file.is_file()])
    with (
        KVDB.open(path, read_mode=mode) as db,
        attach(loaded.model, db, exact=True, recompute=WAYS[way]) as kv,
    ):
        if known:
            kv._costs.reading, kv._costs.computing = known[0].reading, known[1].computing
        started = time.perf_counter()
        cache = kv.cache(ids)
        loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1, do_sample=False
        )
        seconds = time.perf_counter() - started
        computed = cache.metrics.recomputed_tokens or tokens - cache.metrics.reused_tokens
        return First(seconds, computed, kv._costs)


if __name__ == "__main__":
    typer.run(run)
