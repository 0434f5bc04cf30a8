"""What selection costs in quality: KL to dense attention and top-1 agreement on real text, teacher-forced.

    python -m kvdb.tools.bench.quality --tokens 7000 --positions 64

The dense logits come from the same store in exact mode, so the only difference is what attention read.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvdb import KVDB
from kvdb.runtime.attach import Attachment
from kvdb.runtime.selection import BoxSelector, Budget
from kvdb.tools.bench.setup import document_ids, real_model, temporary_store, write_result
from kvdb.tools.models import LoadedModel

BUDGETS = (0.05, 0.1, 0.2, 0.3)
BETAS = (1.0, 0.5, 0.25)


def run(
    tokens: Annotated[int, typer.Option(help="context length")] = 7000,
    positions: Annotated[int, typer.Option(help="teacher-forced positions per text")] = 64,
    texts: Annotated[int, typer.Option(help="different documents")] = 2,
) -> None:
    """Mean KL (nats) and top-1 agreement per budget; beta = 1 ranks by the bound itself, less by a shrunken score."""
    torch.set_num_threads(2)
    loaded = real_model()
    rows: list[dict[str, Any]] = []
    with temporary_store() as db:
        for text in range(texts):
            ids = document_ids(loaded, tokens + positions, offset=text * (tokens + positions))
            dense, _ = _logits(loaded, db, ids, tokens, None, BoxSelector())
            for beta in BETAS:
                for budget in BUDGETS:
                    some, stats = _logits(loaded, db, ids, tokens, budget, BoxSelector(beta=beta))
                    kl = torch.nn.functional.kl_div(some, dense, log_target=True, reduction="none").sum(-1)
                    agree = (some.argmax(-1) == dense.argmax(-1)).float()
                    rows.append({
                        "text": text, "beta": beta, "budget": budget, "kl": float(kl.mean()), "top1": float(agree.mean()),
                        "kv_bytes_read_share": stats["kv_bytes_read_share"],
                        "mass_covered_estimate": stats["mass_covered_estimate"],
                    })  # fmt: skip
    table = Table(
        "beta", "budget", "KL", "top-1", "KV bytes read", "mass (estimated)", title=f"quality at {tokens} tokens"
    )
    for beta in BETAS:
        for budget in BUDGETS:
            same = [r for r in rows if (r["beta"], r["budget"]) == (beta, budget)]
            mean = {key: sum(r[key] for r in same) / len(same) for key in same[0] if key != "text"}
            table.add_row(
                f"{beta:g}", f"{budget:.0%}", f"{mean['kl']:.4f}", f"{mean['top1']:.1%}",
                f"{mean['kv_bytes_read_share']:.1%}", f"{mean['mass_covered_estimate']:.1%}",
            )  # fmt: skip
    Console().print(table)
    write_result("quality", {"tokens": tokens, "positions": positions, "texts": texts, "rows": rows})


def _logits(
    loaded: LoadedModel, db: KVDB, ids: Tensor, context: int, budget: float | None, selector: BoxSelector
) -> tuple[Tensor, dict[str, Any]]:
    """Log-probabilities of every position after `context`, one decoding step each: (positions, vocabulary)."""
    limit = None if budget is None else Budget.of(budget)
    model: Any = loaded.model
    with Attachment(loaded.model, db, budget=limit, fidelity="exact", selector=selector) as kv, torch.no_grad():
        cache = kv.cache(ids[:, : context + 1])
        found = []
        for position in range(context, ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            found.append(torch.log_softmax(out.logits[0, -1].float(), -1))
        return torch.stack(found), cache.stats()


if __name__ == "__main__":
    typer.run(run)
