"""The upper limit of every selector: records ranked by their true log-sum-exp, which takes all keys.

Only the judge has it: a store that read every key to decide what to read would save nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from kvdb.runtime.selection import SELECTORS, SelectorTable
from kvdb.runtime.selection.base import Array, Resident, Scores, Selector

KEYS: Final = "keys"
"""Beside the abstracts of `kvdb.abstracts`: the exact keys, (chunks, kv_heads, chunk_tokens, head_dim)."""


@dataclass(frozen=True, slots=True)
class Oracle(Selector):
    name: ClassVar[str] = "oracle"
    chunk_axes: ClassVar[tuple[int, ...]] = (1,)

    @property
    def abstracts(self) -> dict[str, int | None]:
        return {KEYS: None}

    def prepare(self, stored: Mapping[str, Array], chunk_tokens: int, head_dim: int) -> Resident:
        return (torch.from_numpy(stored[KEYS]).transpose(0, 1).contiguous(),)

    def score(self, q: Tensor, resident: Resident, take: int, *, ceilings: bool = False) -> Scores:
        (keys,) = resident  # [kv_heads, chunks, chunk_tokens, head_dim]
        logits = torch.bmm(q, keys.flatten(1, 2).transpose(1, 2)).unflatten(-1, keys.shape[1:3])
        lse = torch.logsumexp(logits, -1)
        return Scores(lse, lse if ceilings else None, keys.shape[0] * keys.shape[1], keys.nbytes)


JUDGED: Final = SelectorTable((*SELECTORS.own.values(), Oracle))
"""What can be judged."""
