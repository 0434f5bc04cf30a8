"""What choosing costs: scoring, planning and estimating what is not read, for one decoding step of the whole model, by length and selector.

    python -m kvdb.tools.bench.selection --tokens 8192 --tokens 32768
    python -m kvdb.tools.bench.selection --tokens 131072 --budget 2048 --shape 32x8x4x128 --selector sketch

Keys are real ones, repeated to the length asked for; queries are real as well. Another model's shape is put together from the same
heads, side by side. All selectors take turns, step by step. A sketch
looks at the codes of 1 024 records of a KV head, or of six times as many as are read, chosen by all boxes; it is shown with the latter
alone, with 40 % of the ranges opened, and looking at all codes, too.
"""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvdb.abstracts import ABSTRACTS
from kvdb.geometry import CHUNK_TOKENS, div_ceil
from kvdb.runtime.selection import BoxSelector, Budget, CentroidSelector, Forced, Resident, Selector, SketchSelector
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result

REAL_TOKENS = 4096
SELECTORS: dict[str, Selector] = {
    "box": BoxSelector(),
    "sketch": SketchSelector(),
    "centroid": CentroidSelector(),
    "sketch, 6 times": SketchSelector(least=1),
    "sketch, ranges": SketchSelector(least=1, opened=0.4),
    "sketch, all codes": SketchSelector(margin=math.inf),
}


def run(
    tokens: Annotated[list[int] | None, typer.Option(help="lengths; 8192, 32768 and 131072 if not given")] = None,
    budget: Annotated[int, typer.Option(help="tokens per KV head")] = 512,
    steps: Annotated[int, typer.Option(help="measured steps of each kind")] = 15,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    shape: Annotated[
        str, typer.Option(help="LAYERSxKV_HEADSxGROUPxHEAD_DIM of another model; 32x8x4x128 is Llama-3.1-8B")
    ] = "",
    selector: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SELECTORS)}; all if not given")] = None,
) -> None:
    """Median milliseconds per step, all layers together, and bytes that stay in memory. The first selector is the baseline."""
    torch.set_num_threads(threads)
    keys, values, queries = _real()
    if shape:
        sizes = [int(size) for size in shape.split("x")]
        values, _ = _reshaped(values, queries, *sizes)
        keys, queries = _reshaped(keys, queries, *sizes)
    chosen = {name: SELECTORS[name] for name in selector or SELECTORS}
    lengths = tokens or (8192, 32768, 131072)
    rows = [row for length in lengths for row in _measure(keys, values, queries, chosen, length, budget, steps)]
    table = Table(
        "tokens",
        "selector",
        "ms a step",
        "ratio",
        "resident MiB",
        "ranges",
        title=f"selection, budget {budget} tokens",
    )
    for r in rows:
        table.add_row(
            f"{r['tokens']:,}", r["selector"], f"{r['ms']:.1f}", f"{r['ratio']:.2f}", f"{r['resident_mib']:.1f}", f"{r['ranges']:,}"
        )  # fmt: skip
    Console().print(table)
    write_result(
        f"selection-{shape}" if shape else "selection", {"budget": budget, "steps": steps, "shape": shape, "rows": rows}
    )


def _real() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Per layer: keys and values (kv_heads, tokens, head_dim), and scaled queries (kv_heads, group, head_dim) of the next token."""
    loaded = real_model()
    model: Any = loaded.model
    ids = document_ids(loaded, REAL_TOKENS + 1)
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: found.append(out[0, -1].float()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        past = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        found.clear()
        model(input_ids=ids[:, -1:], past_key_values=past)
    for hook in hooks:
        hook.remove()
    keys = [layer.keys[0, :, :REAL_TOKENS].float() for layer in past.layers]
    values = [layer.values[0, :, :REAL_TOKENS].float() for layer in past.layers]
    heads, dim = keys[0].shape[0], keys[0].shape[2]
    return keys, values, [(q * dim**-0.5).view(heads, -1, dim) for q in found]


def _reshaped(
    keys: list[Tensor], queries: list[Tensor], layers: int, heads: int, group: int, dim: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Layers of another shape: each of their heads is real heads side by side, those of a layer taken in turn."""
    own_heads, own_group, own_dim = queries[0].shape
    pieces = div_ceil(dim, own_dim)
    many_keys, many_queries = [], []
    for layer in range(layers):
        at = [(layer * heads * pieces + i) % (len(keys) * own_heads) for i in range(heads * pieces)]
        k = torch.stack([keys[i // own_heads][i % own_heads] for i in at]).unflatten(0, (heads, pieces))
        q = torch.stack([queries[i // own_heads][i % own_heads] for i in at]).unflatten(0, (heads, pieces))
        q = q[:, :, torch.arange(group) % own_group]
        many_keys.append(k.transpose(1, 2).flatten(2)[..., :dim].contiguous())
        many_queries.append((q.transpose(1, 2).flatten(2)[..., :dim] * (own_dim / dim) ** 0.5).contiguous())
    return many_keys, many_queries


def _measure(
    keys: list[Tensor],
    values: list[Tensor],
    queries: list[Tensor],
    selectors: dict[str, Selector],
    tokens: int,
    budget: int,
    steps: int,
) -> list[dict[str, Any]]:
    first = next(iter(selectors))
    chunks = tokens // CHUNK_TOKENS
    rule, forced = Budget.of(budget), Forced.of(CHUNK_TOKENS)
    take = rule.look_at(chunks, CHUNK_TOKENS)
    resident = {
        name: [_tiled(selector, *kv, chunks) for kv in zip(keys, values, strict=True)]
        for name, selector in selectors.items()
    }
    times: dict[str, list[float]] = {name: [] for name in selectors}
    ranges = dict.fromkeys(selectors, 0)
    for step in range(steps + 1):
        for name, selector in selectors.items():
            started = time.perf_counter()
            evaluated = 0
            for q, kept in zip(queries, resident[name], strict=True):
                scores = selector.score(q, kept, take)
                plan = rule.plan(scores, take, forced, q.new_zeros(q.shape[:2]), _unread)
                selector.estimate(q, kept, scores, plan)
                evaluated += scores.evaluated
            if step:  # the first one compiles and warms up
                times[name].append(time.perf_counter() - started)
            ranges[name] = evaluated
    return [
        {
            "tokens": tokens, "selector": name, "ms": 1e3 * median(times[name]),
            "ratio": median([a / b for a, b in zip(times[name], times[first], strict=True)]), "ranges": ranges[name],
            "resident_mib": sum(t.nbytes for kept in resident[name] for t in kept) / 2**20,
        }
        for name in selectors
    ]  # fmt: skip


def _tiled(selector: Selector, keys: Tensor, values: Tensor, chunks: int) -> Resident:
    heads, tokens, dim = keys.shape
    times, stored = div_ceil(chunks, tokens // CHUNK_TOKENS), {}
    for name, planes in selector.abstracts.items():
        kind = ABSTRACTS[name]
        k, v = (vectors.reshape(heads, tokens // CHUNK_TOKENS, CHUNK_TOKENS, dim).numpy() for vectors in (keys, values))
        once = kind.build(k, tokens, "float32", v)[:planes]
        stored[name] = kind.load(np.tile(once, (1, times, 1, 1))[:, :chunks].copy(), dim, "float32")
    return selector.prepare(stored, CHUNK_TOKENS, dim)


def _unread(chunks: Tensor) -> Tensor:
    raise AssertionError("a budget reads nothing to make its plan")


if __name__ == "__main__":
    typer.run(run)
