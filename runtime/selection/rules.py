"""How much to read: stop rules make a plan of a selector's scores.

All of them take the sink and the recent window, then records by estimated share of attention mass (softmax over all records and the
newest tokens for each query head, mean over the group that shares the KV head), best first. They differ in where they stop:

    budget     at a fixed number of records per KV head
    threshold  at records that have less than a given share
    mass       when the estimated share of attention mass reaches p (top-p)
    certified  when proven bounds leave at most epsilon of the softmax mass unread, for every query head

Under threshold and mass each KV head of each layer stops at its own count, at every step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvdb.errors import InvalidInput, Unsupported
from kvdb.runtime.selection.base import Forced, Scores, Selector
from kvdb.runtime.selection.largest import largest
from kvdb.runtime.selection.shares import UNKNOWN_SHARE, shares

DEFAULT_SHARE, DEFAULT_TOKENS = 0.1, 2048
ROUNDING, RELATIVE_ROUNDING = 1e-3, 2.0**-20
"""What float32 may shift a log-sum-exp that is used in a proof: nats, and a share of it. Several times what was ever seen."""


class Plan(NamedTuple):
    """Records chosen for one layer at one step.

    chunks       (kv_heads, n) int64: chunk ids of the sequence; sink first, then the recent window, then best first
    counts       (kv_heads,) int64: how many of them each head reads; None: all n
    forced       the first columns, which no score chose
    unread_mass  (kv_heads, group) float32: proven bound of the softmax mass that is not read; None: nothing was proven
    """

    chunks: Tensor
    counts: Tensor | None
    forced: int
    unread_mass: Tensor | None = None

    @property
    def records(self) -> int:
        """Records read, all KV heads together."""
        return self.chunks.numel() if self.counts is None else int(self.counts.sum())

    def read(self, chunks: int) -> Tensor:
        """(kv_heads, chunks) of bool: which records of a history of `chunks` are read."""
        heads, n = self.chunks.shape
        taken = self.chunks.new_ones(heads, n, dtype=torch.bool)
        if self.counts is not None:
            taken = torch.arange(n, device=self.chunks.device) < self.counts[:, None]
        return taken.new_zeros(heads, chunks).scatter_(1, self.chunks, taken)


Read = Callable[[Tensor], Tensor]
"""True log-sum-exp of records: chunks (kv_heads, n) -> (kv_heads, group, n); reads them."""


class StopRule(ABC):
    """Contract. Immutable; equal rules choose alike."""

    @property
    @abstractmethod
    def fidelity(self) -> str:
        """Name of the fidelity of KV computed under this rule."""

    @abstractmethod
    def look_at(self, chunks: int, chunk_tokens: int) -> int:
        """About how many records per KV head will be read of a history of `chunks`; `chunks` when all will."""

    def check(self, selector: Selector) -> None:
        """raises  Unsupported for a selector that cannot tell what the rule needs to know"""
        return

    def score(self, selector: Selector, q: Tensor, resident: tuple[Tensor, ...], take: int) -> Scores:
        """The selector's scores, with what the rule needs to know."""
        return selector.score(q, resident, take)

    @abstractmethod
    def plan(self, scores: Scores, take: int, forced: Forced, tail_lse: Tensor, read: Read) -> Plan:
        """Choose.

        take      what `look_at` said
        tail_lse  (kv_heads, group): log-sum-exp over the newest tokens, which are always attended to; -inf: there are none
        read      for rules that must know what they read
        """


@dataclass(frozen=True, slots=True)
class Budget(StopRule):
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

    @property
    def fidelity(self) -> str:
        limit = "" if self.tokens is None else f",tokens={self.tokens}"
        return f"budget={self.share:g}{limit}"

    def look_at(self, chunks: int, chunk_tokens: int) -> int:
        allowed = int(self.share * chunks)
        return allowed if self.tokens is None else min(allowed, self.tokens // chunk_tokens)

    def plan(self, scores: Scores, take: int, forced: Forced, tail_lse: Tensor, read: Read) -> Plan:
        """Never fewer than the forced ones."""
        heads, _, chunks = scores.lse.shape
        edges = min(chunks, forced.sink + forced.recent)
        free = max(0, min(take, chunks) - edges)
        chosen = _edges(heads, chunks, free, forced, scores.lse.device).clone()
        if free:
            middle = shares(scores.lse, tail_lse)[:, forced.sink : chunks - forced.recent]
            torch.add(largest(middle, free), forced.sink, out=chosen[:, edges:])
        return Plan(chosen, None, edges)


@dataclass(frozen=True, slots=True)
class Threshold(StopRule):
    """Read every record whose estimated share of attention mass, mean over the query heads of a KV head, is at least `share`.

    At most 1 / share records of a KV head are read beside sink and window. What is read follows attention over layers, heads and
    steps, as with `mass`; but a head that attends to much a little is not read to the end.
    """

    share: float

    @classmethod
    def of(cls, threshold: float) -> Threshold:
        return cls(_open_unit("threshold", threshold, 0.004))

    @property
    def fidelity(self) -> str:
        return f"threshold={self.share:g}"

    def look_at(self, chunks: int, chunk_tokens: int) -> int:
        if self.share * (chunks - 1) <= 0.25:
            return max(1, chunks - 1)
        return math.ceil(0.25 / self.share)  # heads differ; few come near the most there can be

    def plan(self, scores: Scores, take: int, forced: Forced, tail_lse: Tensor, read: Read) -> Plan:
        each = shares(scores.lse, tail_lse)[:, :-1]
        order, edges = _best_first(each, forced)
        counts = (each.gather(1, order[:, edges:]) >= self.share).sum(-1) + edges
        return Plan(order[:, : int(counts.max())], counts, edges)


@dataclass(frozen=True, slots=True)
class Mass(StopRule):
    """Top-p: read until the estimated share of attention mass, averaged over the query heads of a KV head, reaches `share`."""

    share: float

    @classmethod
    def of(cls, mass: float) -> Mass:
        return cls(_open_unit("mass", mass, 0.95))

    @property
    def fidelity(self) -> str:
        return f"mass={self.share:g}"

    def look_at(self, chunks: int, chunk_tokens: int) -> int:
        return max(
            1, chunks // 4
        )  # more is needed where attention is flat; then what is not looked at closely is near its mean

    def plan(self, scores: Scores, take: int, forced: Forced, tail_lse: Tensor, read: Read) -> Plan:
        each = shares(scores.lse, tail_lse)
        order, edges = _best_first(each[:, :-1], forced)
        gained = each.gather(1, order)
        reached = each[:, -1:] + gained.masked_fill(gained >= UNKNOWN_SHARE, 0).cumsum(-1)
        counts = ((reached < self.share).sum(-1) + 1).clamp(edges, order.shape[1])
        return Plan(order[:, : int(counts.max())], counts, edges)


@dataclass(frozen=True, slots=True)
class Certified(StopRule):
    """Read until bounds prove that at most `epsilon` of every query head's softmax mass is unread.

    With R the sum of exp(logit) over what is read (exact) and U the sum of upper bounds over what is not, the unread share is
    at most U / (R + U). Deterministic: it holds for every input, up to `ROUNDING`.
    """

    epsilon: float

    @classmethod
    def of(cls, epsilon: float) -> Certified:
        return cls(_open_unit("certified", epsilon, 0.05))

    @property
    def fidelity(self) -> str:
        return f"certified={self.epsilon:g}"

    def look_at(self, chunks: int, chunk_tokens: int) -> int:
        return chunks - 1 if chunks > 1 else 1  # every record needs its bound

    def check(self, selector: Selector) -> None:
        if not selector.proves:
            raise Unsupported(
                f"certified={self.epsilon:g}: selector {selector.name!r} proves no bounds, expected one that does, such as 'box' or "
                "'sketch'; choose another, or another rule"
            )

    def score(self, selector: Selector, q: Tensor, resident: tuple[Tensor, ...], take: int) -> Scores:
        return selector.score(q, resident, take, ceilings=True)

    def plan(self, scores: Scores, take: int, forced: Forced, tail_lse: Tensor, read: Read) -> Plan:
        assert scores.ceiling is not None
        heads, group, chunks = scores.lse.shape
        order, edges = _best_first(shares(scores.lse, tail_lse)[:, :-1], forced)
        spread = order[:, None].expand(-1, group, -1)
        ceiling = _moved(scores.ceiling, 1).gather(2, spread)
        beyond = _suffix_lse(ceiling)  # [kv_heads, group, chunks + 1]: bound of all from a place on
        lse = scores.lse.new_empty(heads, group, 0)
        count = edges
        while True:
            lse = torch.cat((lse, read(order[:, lse.shape[2] : count])), -1)
            have = _moved(torch.logaddexp(torch.logsumexp(lse, -1), tail_lse), -1)
            unread = torch.sigmoid(
                beyond - have[..., None]
            )  # were the rest from a place on unread, given what is read now
            if count == chunks or bool((unread[..., count] <= self.epsilon).all()):
                return Plan(order[:, :count], None, edges, unread[..., count])
            needed = int((unread > self.epsilon).any(1).sum(-1).max())  # an upper limit: reading on only adds to R
            count = min(chunks, max(count + 1, count + (needed - count + 1) // 2))


def _open_unit(where: str, value: float, example: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise InvalidInput(f"{where}: {value!r}, expected a share between 0 and 1 such as {example}")
    return float(value)


def _moved(lse: Tensor, sign: int) -> Tensor:
    """Up or down, by more than rounding."""
    return lse + sign * (ROUNDING + RELATIVE_ROUNDING * lse.abs())


def _best_first(each: Tensor, forced: Forced) -> tuple[Tensor, int]:
    """All chunks per KV head: the forced ones, then by `each` one's share (kv_heads, chunks); and how many are forced."""
    chunks = each.shape[1]
    edges = min(chunks, forced.sink + forced.recent)
    ranked = each.nan_to_num(nan=0.0)
    ranked[:, : forced.sink] = math.inf
    ranked[:, max(0, chunks - forced.recent) :] = math.inf
    return torch.sort(ranked, dim=-1, descending=True, stable=True).indices, edges


def _suffix_lse(values: Tensor) -> Tensor:
    """log-sum-exp of all values from each place to the end; one place more than values, the last of them -inf."""
    sums = torch.logcumsumexp(values.flip(-1), -1).flip(-1)
    return torch.cat((sums, sums.new_full((*sums.shape[:-1], 1), -math.inf)), -1)


@lru_cache(maxsize=8)
def _edges(heads: int, chunks: int, free: int, forced: Forced, device: torch.device) -> Tensor:
    """A plan with sink and recent window filled in: the same for every layer of a step."""
    edge = torch.arange(chunks, device=device)
    recent = edge[max(forced.sink, chunks - forced.recent) :]
    parts = [edge[: forced.sink], recent, edge.new_zeros(free)]
    return torch.cat(parts).repeat(heads, 1)
