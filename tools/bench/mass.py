"""Is the estimated attention mass honest? Estimated beside true covered mass, on real text.

    python -m kvdb.tools.bench.mass --tokens 7000

The truth needs every key, so it is only ever computed here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvdb.runtime import KVDBCache
from kvdb.runtime.attach import Attachment
from kvdb.runtime.selection import BoxSelector, Budget, covered_mass, plan
from kvdb.tools.bench.setup import document_ids, real_model, temporary_store, write_result

BUDGETS = (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class _Recording(BoxSelector):
    """Keeps the queries of a step, layer by layer."""

    queries: list[Tensor] = field(default_factory=list)

    def score(self, q: Tensor, resident: Tensor) -> Tensor:
        self.queries.append(q)
        return super().score(q, resident)


def run(
    tokens: Annotated[int, typer.Option(help="context length")] = 7000,
    positions: Annotated[int, typer.Option(help="decoding steps")] = 32,
) -> None:
    """Mean over positions, layers and heads."""
    torch.set_num_threads(2)
    loaded = real_model()
    model: Any = loaded.model
    ids = document_ids(loaded, tokens + positions)
    rows: list[dict[str, float]] = []
    with temporary_store() as db, torch.no_grad():
        for budget in BUDGETS:
            selector = _Recording()
            with Attachment(model, db, budget=Budget.of(budget), fidelity="exact", selector=selector) as kv:
                cache = kv.cache(ids[:, : tokens + 1])
                pairs = []
                for position in range(tokens, tokens + positions):
                    selector.queries.clear()
                    model(input_ids=ids[:, position : position + 1], past_key_values=cache)
                    pairs += [_masses(cache, layer, q) for layer, q in enumerate(selector.queries)]
            estimated, true = torch.tensor(pairs).T
            rows.append({
                "budget": budget, "estimated": float(estimated.mean()), "true": float(true.mean()),
                "mean_error": float((estimated - true).abs().mean()),
            })  # fmt: skip
    table = Table(
        "budget", "estimated", "true", "mean error of a layer", title=f"covered attention mass at {tokens} tokens"
    )
    for r in rows:
        table.add_row(f"{r['budget']:.0%}", f"{r['estimated']:.1%}", f"{r['true']:.1%}", f"{r['mean_error']:.1%}")
    Console().print(table)
    write_result("mass", {"tokens": tokens, "positions": positions, "rows": rows})


def _masses(cache: KVDBCache, layer: int, q: Tensor) -> tuple[float, float]:
    """(estimated, true) share of attention mass that the step's plan covered in one layer."""
    row, ct = cache.rows[0], cache.geometry.chunk_tokens
    assert cache.take is not None
    scores = BoxSelector().score(q, row.resident(layer, cache.selector))
    chosen = plan(scores, cache.take, cache.forced)
    k, _ = row.read(layer, 0, row.chunks(layer))
    lse = torch.logsumexp(torch.bmm(q, k.transpose(1, 2)).unflatten(-1, (-1, ct)), -1)  # [kv_heads, group, chunks]
    tail_lse = torch.logsumexp(torch.bmm(q, cache.layers[layer].stored.tail.k[0].transpose(1, 2)), -1)
    read = lse.gather(2, chosen.chunks[:, None].expand(-1, lse.shape[1], -1))
    covered = torch.logaddexp(torch.logsumexp(read, -1), tail_lse)
    total = torch.logaddexp(torch.logsumexp(lse, -1), tail_lse)
    return float(covered_mass(scores, chosen, read, tail_lse)), float(torch.exp(covered - total).mean())


if __name__ == "__main__":
    typer.run(run)
