"""Which records a tier should let go: hit rates of replacement policies, and what the next layer's predicted queries foretell, as the real model decodes.

    python -m kvdb.tools.bench.policies --tokens 7400

Each policy of `kvdb.replacement` runs the host tier of `read_mode="direct"` with less and more room than a step selects. Rates count once the first
third of the steps has filled the tier.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB
from kvdb.replacement import REPLACEMENT
from kvdb.runtime import attach
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result
from kvdb.tools.bench.synthetic import file_system, scratch
from kvdb.tools.models import LoadedModel

ROOM: Final = (0.1, 0.12, 0.15, 0.2, 0.3)


def run(
    tokens: Annotated[int, typer.Option(help="context length")] = 7400,
    budget: Annotated[float, typer.Option(help="share of stored tokens to attend to")] = 0.1,
    steps: Annotated[int, typer.Option(help="decoding steps with each policy and size")] = 48,
    folder: Annotated[
        Path | None, typer.Option(help="where the store lies; the system's temporary folder by default")
    ] = None,
) -> None:
    """Share of the records that were asked for that the tier had."""
    loaded = real_model()
    ids, rows = document_ids(loaded, tokens), list[dict[str, Any]]()
    with scratch(folder) as place:
        if file_system(place) == "tmpfs":
            Console().print(f"policies: SKIPPED, {place} is in memory; expected a disk, see --folder")
            return
        path = place / "s.kvdb"
        with KVDB.open(path) as db, attach(loaded.model, db, exact=True) as kv:
            kv.save(kv.cache(ids), name="n")
            kv_bytes = int(db.info()["kv_bytes"])
        for room in ROOM:
            for policy in REPLACEMENT:
                rate, _ = _decode(loaded, path, ids, budget, steps, int(room * kv_bytes), policy)
                rows.append({"room": room, "policy": policy, "hit_rate": rate})
        _, layers = _decode(loaded, path, ids, budget, steps, kv_bytes, "lru", prefetch=True)
    table = Table("room, of all KV", *REPLACEMENT, title=f"hit rates at {tokens} tokens, {budget:.0%} selected")
    for room in ROOM:
        found = {row["policy"]: row["hit_rate"] for row in rows if row["room"] == room}
        table.add_row(f"{room:.0%}", *(f"{found[policy]:.1%}" for policy in REPLACEMENT))
    Console().print(table)
    rates = [counts["hit_rate"] for counts in layers.values()]
    Console().print(
        f"expected a layer before, of what is chosen: median {median(rates):.1%}; by layer {', '.join(f'{rate:.0%}' for rate in rates)}"
    )
    told = {"tokens": tokens, "budget": budget, "steps": steps, "kv_bytes": kv_bytes}
    write_result("policies", {**told, "rows": rows, "predicted": layers})


def _decode(
    loaded: LoadedModel,
    path: Path,
    ids: torch.Tensor,
    budget: float,
    steps: int,
    room: int,
    policy: str,
    *,
    prefetch: bool = False,
) -> tuple[float, dict[str, Any]]:
    """The tier's hit rate, and what was predicted of each layer."""
    with (
        KVDB.open(path, "r", read_mode="direct", host_budget=room, host_policy=policy) as db,
        attach(loaded.model, db, budget=budget, prefetch=prefetch) as kv,
        torch.no_grad(),
    ):
        cache, token, before = kv.cache(ids), ids[:, -1:], dict[str, Any]()
        for step in range(steps):
            if step == steps // 3:
                before = cache.stats()["host_tier"]
            logits = loaded.model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        stats = cache.stats()
        hits, misses = (stats["host_tier"][name] - before[name] for name in ("hits", "misses"))
        return hits / (hits + misses), stats["prefetch"]["layers"]


if __name__ == "__main__":
    typer.run(run)
