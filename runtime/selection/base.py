"""Which records of a layer to attend to at one step: the contract of selectors, and what they all share.

A selector estimates, from abstracts alone, how much each record matters to a query. From its scores `plan` picks a
budget's worth per KV head: the sink and the recent window always, then the best by estimated attention mass (softmax per
query head, summed over the group that shares the KV head).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvdb.errors import InvalidInput

SINK_TOKENS = 16
RECENT_TOKENS = 64
DENSE_BELOW = 1024
"""Histories shorter than this are attended to densely: selection would save less than it costs."""
DEFAULT_SHARE, DEFAULT_TOKENS = 0.1, 2048


class Selector(ABC):
    """Contract. Stateless; its tensors are made by `prepare` and kept by the caller."""

    name: ClassVar[str]
    abstract: ClassVar[str]
    """The abstract it scores, by name in `kvdb.abstracts`."""

    @abstractmethod
    def prepare(self, abstract: Tensor) -> Tensor:
        """abstract (chunks, kv_heads, parts, head_dim) float32 -> resident form (kv_heads, width, chunks) float32."""

    @abstractmethod
    def score(self, q: Tensor, resident: Tensor) -> Tensor:
        """Estimated logit of the best token of each record.

        q         (kv_heads, group, head_dim) float32, already scaled
        resident  what `prepare` returned
        returns   (kv_heads, group, chunks) float32
        """


@dataclass(frozen=True, slots=True)
class Budget:
    """How many tokens of a layer's history each KV head may attend to, sink and recent window included.

    share   of the history, 0 < share <= 1
    tokens  upper limit, or None
    """

    share: float
    tokens: int | None

    @classmethod
    def of(cls, budget: float | int | None) -> Budget:
        """A float is a share of tokens, an int is tokens, None the default: min(10 %, 2 048 tokens)."""
        if budget is None:
            return cls(DEFAULT_SHARE, DEFAULT_TOKENS)
        if isinstance(budget, bool) or not isinstance(budget, int | float):
            raise InvalidInput(f"budget: {budget!r}, expected a share such as 0.1 or a number of tokens such as 2048")
        if isinstance(budget, int):
            if budget < 1:
                raise InvalidInput(f"budget: {budget} tokens, expected at least 1 (a share is written 0.1, not 0)")
            return cls(1.0, budget)
        if not 0.0 < budget <= 1.0:
            raise InvalidInput(f"budget: {budget}, expected a share 0 < budget <= 1, or an int number of tokens")
        return cls(budget, None)

    def chunks(self, history_chunks: int, chunk_tokens: int) -> int:
        """Records per KV head for a history of that many chunks."""
        allowed = int(self.share * history_chunks)
        return allowed if self.tokens is None else min(allowed, self.tokens // chunk_tokens)

    @property
    def fidelity(self) -> str:
        """Name of the fidelity of KV computed under this budget."""
        limit = "" if self.tokens is None else f",tokens={self.tokens}"
        return f"budget={self.share:g}{limit}"


class Plan(NamedTuple):
    """Records chosen for one layer at one step.

    chunks  (kv_heads, n) int64: chunk ids of the sequence; sink first, then by choice, then the recent window
    free    slice of the columns that the scores chose
    """

    chunks: Tensor
    free: slice


class Forced(NamedTuple):
    """Chunks that are always attended to."""

    sink: int
    recent: int

    @classmethod
    def of(cls, chunk_tokens: int) -> Forced:
        return cls(-(-SINK_TOKENS // chunk_tokens), -(-RECENT_TOKENS // chunk_tokens))


def plan(scores: Tensor, take: int, forced: Forced) -> Plan:
    """Choose `take` records per KV head (never fewer than the forced ones).

    scores  (kv_heads, group, chunks); chunks > sink + recent
    """
    heads, _, chunks = scores.shape
    sink, recent = forced
    free = max(0, min(take, chunks) - sink - recent)
    chosen = _edges(heads, chunks, free, forced, scores.device).clone()
    if free:
        middle = torch.softmax(scores[..., sink : chunks - recent], -1).sum(1)  # [kv_heads, middle chunks]
        torch.add(torch.topk(middle, free, sorted=False).indices, sink, out=chosen[:, sink : sink + free])
    return Plan(chosen, slice(sink, sink + free))


@lru_cache(maxsize=8)
def _edges(heads: int, chunks: int, free: int, forced: Forced, device: torch.device) -> Tensor:
    """A plan with sink and recent window filled in: the same for every layer of a step."""
    edge = torch.arange(chunks, device=device)
    parts = [edge[: forced.sink], edge.new_zeros(free), edge[chunks - forced.recent :]]
    return torch.cat(parts).repeat(heads, 1)


def covered_mass(scores: Tensor, chosen: Plan, record_lse: Tensor, tail_lse: Tensor) -> Tensor:
    """Estimated share of attention mass that the attended tokens hold.

    The mass of unread records is estimated from their scores, shifted by how far scores of the *lowest* read records lie
    from those records' true log-sum-exp: they resemble the unread ones most. An estimate, not a bound.

    scores      (kv_heads, group, chunks)
    record_lse  (kv_heads, group, n) true log-sum-exp of each record in `chosen.chunks`
    tail_lse    (kv_heads, group) log-sum-exp over the unstored newest tokens
    returns     scalar, mean over heads
    """
    index = chosen.chunks[:, None].expand(-1, scores.shape[1], -1)
    read = scores.gather(2, index)  # [kv_heads, group, n]
    free_read, free_true = read[..., chosen.free], record_lse[..., chosen.free]
    if free_read.shape[-1] == 0:
        shift = torch.zeros_like(tail_lse)
    else:
        weakest = torch.topk(free_read, max(1, free_read.shape[-1] // 2), largest=False).indices
        shift = (free_true.gather(2, weakest) - free_read.gather(2, weakest)).mean(-1)
    total_lse = torch.logaddexp(torch.logsumexp(record_lse, -1), tail_lse)
    unread = scores.scatter(2, index, float("-inf"))
    unread_lse = torch.logsumexp(unread, -1) + shift
    return torch.sigmoid(total_lse - unread_lse).mean()
