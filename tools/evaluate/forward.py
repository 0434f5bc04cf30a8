"""One forward pass over many positions, each attending to what its own query selected.

Decoding computes one position after the other; here all of them go through a layer together, and for each the real selector
and the real rule choose from its query. The result is the same: a position depends on others only through keys and values
of earlier ones, which come from the same approximated layers below. What a store would hold is chosen from in whole chunks;
the newest tokens, which a store's tail would hold, are always attended to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvdb.errors import Unsupported
from kvdb.runtime.attention import CHANGES_ATTENTION
from kvdb.runtime.cache import MASS_EVERY
from kvdb.runtime.selection import Forced, Resident, Selector, StopRule, covered_mass
from kvdb.runtime.tiles import Partial
from kvdb.tools.evaluate.past import Past

IMPLEMENTATION: Final = "kvdb-eval"
BLOCK_POSITIONS: Final = 32
"""So many positions' logits over the whole past are in memory at once."""


class Selecting(NamedTuple):
    """How every position selects: by which scores, until when. resident: per layer, what `Past.resident` gives."""

    selector: Selector
    resident: dict[int, Resident]
    rule: StopRule


@dataclass(slots=True)
class Cost:
    """What one layer cost, summed over the positions of a pass.

    mass            true share of attention mass that was read, mean over query heads
    estimate        the same as the runtime estimates it, over `estimates` of the positions
    records         stored records read, all KV heads together
    kv_bytes        stored bytes of these
    evaluated       ranges and records that were scored
    abstract_bytes  bytes of abstracts read to score them, and to estimate what was not read
    """

    mass: float = 0.0
    estimate: float = 0.0
    estimates: int = 0
    records: int = 0
    kv_bytes: int = 0
    evaluated: int = 0
    abstract_bytes: int = 0


class Outcome(NamedTuple):
    """logits (positions, vocabulary) float32; the costs of each layer that selects."""

    logits: Tensor
    costs: dict[int, Cost]


class _Pass(NamedTuple):
    past: Past
    selecting: Selecting | None
    costs: dict[int, Cost]


_running: ContextVar[_Pass] = ContextVar("kvdb_eval_pass")


def forward(
    model: nn.Module, past: Past, ids: list[int], selecting: Selecting | None, cache: Cache | None = None
) -> Outcome:
    """Feed the tokens that follow `past`, or what a `cache` begun from it has come to.

    selecting  None attends to everything
    """
    running = _Pass(past, selecting, {layer: Cost() for layer in past.layers})
    begun = past.begun() if cache is None else cache
    with _judged(model, running), torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), past_key_values=begun, use_cache=True)
    return Outcome(out.logits[0].float(), running.costs)


@contextmanager
def _judged(model: Any, running: _Pass) -> Iterator[None]:
    """Inside the block the model's attention is the judge's. At the end its own is put back."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)  # full layers do without it
    previous, token = model.config._attn_implementation, _running.set(running)
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
        _running.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, positions, head_dim) -> (1, positions, heads, head_dim)"""
    running, layer = _running.get(), int(module.layer_idx)  # type: ignore[arg-type]
    if layer not in running.past.layers:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    if changed := [name for name in CHANGES_ATTENTION if kwargs.get(name) is not None]:
        raise Unsupported(
            f"eval: layer {layer} has attention with {', '.join(changed)}, expected plain causal softmax attention; "
            "this model is not supported yet"
        )
    k, v = key[0].float(), value[0].float()  # [kv_heads, tokens, head_dim]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q = (query[0] * scale).float().unflatten(0, (k.shape[0], -1))  # [kv_heads, group, positions, head_dim]
    before = k.shape[1] - q.shape[2]
    attended = [
        _attend(running, layer, q[:, :, start : start + BLOCK_POSITIONS], before + start, k, v)
        for start in range(0, q.shape[2], BLOCK_POSITIONS)
    ]
    return torch.cat(attended, 2).flatten(0, 1).transpose(0, 1)[None].to(query.dtype), None


def _attend(running: _Pass, layer: int, q: Tensor, first: int, k: Tensor, v: Tensor) -> Tensor:
    """Attention of positions first, first + 1, ...: q, out (kv_heads, group, positions, head_dim)."""
    past, selecting = running.past, running.selecting
    _, group, positions, _ = q.shape
    stored, stop = past.chunks * past.chunk_tokens, first + positions
    rows = q.flatten(1, 2)
    logits = torch.bmm(rows, k[:, :stored].transpose(1, 2)).unflatten(-1, (past.chunks, past.chunk_tokens))
    top = logits.amax(-1)
    weights = logits.sub_(top[..., None]).exp_()  # within each record, whose place is its own log-sum-exp
    lse = (top + weights.sum(-1).log()).unflatten(1, (group, positions))  # [kv_heads, group, positions, chunks]
    tail = torch.bmm(rows, k[:, stored:stop].transpose(1, 2)).unflatten(1, (group, positions))
    later = torch.ones(positions, stop - stored, dtype=torch.bool).triu(stop - stored - positions + 1)
    tail = tail.masked_fill(later, -math.inf)
    tail_lse = torch.logsumexp(tail, -1)
    everything = torch.logaddexp(torch.logsumexp(lse, -1), tail_lse)
    read, beside = lse, _nothing(q)
    if selecting is not None:
        chosen, beside = _choose(running, layer, q, lse, tail_lse)  # [kv_heads, positions, chunks]
        running.costs[layer].kv_bytes += int(chosen.sum((0, 1)) @ past.record_bytes(layer))
        read = lse.masked_fill(~chosen[:, None], -math.inf)
    total = torch.logaddexp(torch.logsumexp(read, -1), tail_lse)
    running.costs[layer].mass += float(torch.exp(total - everything).mean((0, 1)).sum())
    total = torch.logaddexp(total, beside.lse)
    # exp(logit - total) = exp(logit - top) * exp(top - total)
    places = top.unflatten(1, (group, positions)).masked_fill(read.isneginf(), -math.inf) - total[..., None]
    weights *= places.exp().flatten(1, 2)[..., None]
    shares = torch.exp(tail - total[..., None]).flatten(1, 2)
    out = torch.baddbmm(torch.bmm(weights.flatten(2), v[:, :stored]), shares, v[:, stored:stop])
    return out.unflatten(1, (group, positions)) + torch.exp(beside.lse - total)[..., None] * beside.out


def _nothing(q: Tensor) -> Partial:
    """Attention over no keys."""
    return Partial(torch.zeros_like(q), torch.full_like(q[..., 0], -math.inf))


def _choose(running: _Pass, layer: int, q: Tensor, lse: Tensor, tail_lse: Tensor) -> tuple[Tensor, Partial]:
    """What each position reads, chosen from its own query alone: (kv_heads, positions, chunks) of bool; and attention over the
    rest as the selector estimates it."""
    past, selecting, cost = running.past, running.selecting, running.costs[layer]
    assert selecting is not None
    heads, group, positions, _ = q.shape
    chosen = torch.zeros(heads, positions, past.chunks, dtype=torch.bool)
    beside = _nothing(q)
    take = selecting.rule.look_at(past.chunks, past.chunk_tokens)
    if take >= past.chunks:
        chosen.fill_(True)
        cost.records += chosen.numel()
        cost.estimate += positions
        cost.estimates += positions
        return chosen, beside
    forced, resident = Forced.of(past.chunk_tokens), selecting.resident[layer]
    for at in range(positions):

        def read(chunks: Tensor, true: Tensor = lse[:, :, at]) -> Tensor:
            return true.gather(2, chunks[:, None].expand(-1, group, -1))

        query = q[:, :, at].contiguous()
        scores = selecting.rule.score(selecting.selector, query, resident, take)
        plan = selecting.rule.plan(scores, take, forced, tail_lse[:, :, at], read)
        chosen[:, at] = plan.read(past.chunks)
        if at % MASS_EVERY == 0:
            cost.estimate += float(covered_mass(scores, plan, read(plan.chunks), tail_lse[:, :, at]))
            cost.estimates += 1
        cost.records += plan.records
        cost.evaluated += scores.evaluated
        cost.abstract_bytes += scores.bytes_read
        if (estimate := selecting.selector.estimate(query, resident, scores, plan)) is not None:
            beside.out[:, :, at], beside.lse[:, :, at] = estimate.out, estimate.lse
            cost.abstract_bytes += estimate.bytes_read
    return chosen, beside
