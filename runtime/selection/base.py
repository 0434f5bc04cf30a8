"""What a selector is: from abstracts alone, it estimates how much each record of a layer matters to a query.

How much to read is not its business: a stop rule (`kvdb.runtime.selection.rules`) makes a plan of its scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvdb.runtime.selection.rules import Plan

Array = np.ndarray[Any, np.dtype[Any]]
Resident = tuple[Tensor, ...]

SINK_TOKENS = 16
RECENT_TOKENS = 16
DENSE_BELOW = 1024
"""Histories shorter than this are attended to densely: selection would save less than it costs."""


SURE: Final = 1e4
"""A logit above any real one: the score of a record of which an abstract says nothing, so that it is read."""


class Forced(NamedTuple):
    """Chunks that are always attended to: the first and the last ones of the history."""

    sink: int
    recent: int

    @classmethod
    def of(cls, chunk_tokens: int) -> Forced:
        return cls(-(-SINK_TOKENS // chunk_tokens), -(-RECENT_TOKENS // chunk_tokens))


class Scores(NamedTuple):
    """What a selector says of the records of one layer.

    lse         (kv_heads, group, chunks) float32: estimated log-sum-exp of a record's logits, up to a constant per query head
    ceiling     the same shape: proven upper bounds of the true log-sum-exp; None where none were asked for
    evaluated   ranges and records that were scored to get there
    bytes_read  bytes of the stored abstracts behind them
    """

    lse: Tensor
    ceiling: Tensor | None
    evaluated: int
    bytes_read: int


class Estimate(NamedTuple):
    """What attention over unread records is believed to be; merged with what was read by log-sum-exp.

    out         (kv_heads, group, head_dim) float32: softmax over the estimated records alone; 0 where there are none
    lse         (kv_heads, group) float32: log of the sum of exp(logit) over them; -inf where there are none
    bytes_read  bytes of the stored abstracts behind it, beyond those that scores counted
    """

    out: Tensor
    lse: Tensor
    bytes_read: int


class Selector(ABC):
    """Contract. Stateless; what it keeps in memory is made by `prepare` and held by the caller.

    A member is a frozen dataclass whose fields are its settings, numbers with defaults. Other packages add members under the
    entry point group `kvdb.selectors`; the abstracts they may ask for are those of `kvdb.abstracts`.
    """

    name: ClassVar[str]
    proves: ClassVar[bool] = True
    """Whether it can prove upper bounds, which the rule `certified` needs."""
    chunk_axes: ClassVar[tuple[int, ...]]
    """Of each tensor that `prepare` returns, the axis that counts chunks."""

    @property
    @abstractmethod
    def abstracts(self) -> dict[str, int | None]:
        """The abstracts it needs, by name in `kvdb.abstracts`, and how many of their planes (None: all)."""

    @abstractmethod
    def prepare(self, stored: Mapping[str, Array], chunk_tokens: int, head_dim: int) -> Resident:
        """Resident form of some chunks' abstracts.

        stored  for each of `abstracts`, what `Reader.abstract` gives
        """

    def join(self, parts: list[Resident]) -> Resident:
        """Resident form of several runs of chunks, one after the other."""
        return tuple(
            torch.cat(tensors, axis) for tensors, axis in zip(zip(*parts, strict=True), self.chunk_axes, strict=True)
        )

    @abstractmethod
    def score(self, q: Tensor, resident: Resident, take: int, *, ceilings: bool = False) -> Scores:
        """Score every record.

        q         (kv_heads, group, head_dim) float32, already scaled
        resident  what `prepare` or `join` returned
        take      about how many records per KV head will be read: a cascade looks closely at a multiple of that
        ceilings  also prove upper bounds; raises Unsupported where a selector `proves` nothing
        """

    def estimate(self, q: Tensor, resident: Resident, scores: Scores, plan: Plan) -> Estimate | None:
        """What the records that a plan leaves unread would add to attention. Modifies nothing.

        q, resident  as in `score`, whose answer `scores` is
        returns      None for selectors that estimate nothing, and where nothing is left unread
        """
        return None
