"""Attention of one query per head over records where they lie: in a map of the store, in the staging buffer, in a tail.

Nothing is gathered first: each record's keys and values are read once, and parts in any number and order are joined by their
log-sum-exps as they come. On CPU, where numba is installed; elsewhere `kvdb.runtime.tiles` computes the same from gathered copies.
source: online softmax, FlashAttention, arXiv 2205.14135; attention over selected pages where they lie, FlashInfer, arXiv 2501.01005.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvdb.runtime.heads import over_heads
from kvdb.runtime.staging import Array, storage_view


class Lent(NamedTuple):
    """Records that may be read where they are, until whoever lent them is asked for others.

    keys, values      1-D, storage dtype: what holds them, and maybe much else
    key_at, value_at  (n,) int64: element at which each record's vectors begin, (tokens, head_dim) without gaps; all records of a KV head
                      one after the other
    starts            (kv_heads + 1,) int64: the records of KV head h are starts[h] to starts[h + 1]
    tokens            of each record
    """

    keys: Array
    values: Array
    key_at: Array
    value_at: Array
    starts: Array
    tokens: int

    @classmethod
    def of_tail(cls, k: Tensor, v: Tensor) -> Lent:
        """The newest tokens, one record per KV head: k and v (kv_heads, tokens, head_dim), in memory as they like."""
        heads, tokens, _ = k.shape
        (keys, key_at), (values, value_at) = _flat(k), _flat(v)
        return cls(keys, values, key_at, value_at, np.arange(heads + 1), tokens)


def _flat(vectors: Tensor) -> tuple[Array, Array]:
    """What holds the vectors of each head, and where they begin in it."""
    if vectors.stride()[1:] != (vectors.shape[2], 1):
        vectors = vectors.contiguous()
    size = vectors.untyped_storage().nbytes() // vectors.itemsize
    whole = storage_view(torch.as_strided(vectors, (size,), (1,), 0))
    return whole, int(vectors.storage_offset()) + np.arange(len(vectors)) * int(vectors.stride(0))


class Gather:
    """Attention of `q` over what is added, one part after the other.

    q      (kv_heads, group, head_dim) float32, already scaled; `group` query heads share a KV head
    dtype  of keys and values: "float32", "float16" or "bfloat16"
    """

    def __init__(self, q: Tensor, dtype: str) -> None:
        from kvdb.runtime import gather_kernel

        self._attend, self._join = gather_kernel.attend(dtype), gather_kernel.join()
        self._q = q.contiguous().numpy()
        heads, group, dim = self._q.shape
        self._tops = np.full((heads, group), -np.inf, np.float32)
        self._sums = np.zeros((heads, group), np.float32)
        self._out = np.zeros((heads, group, dim), np.float32)

    @property
    def lse(self) -> Tensor:
        """(kv_heads, group) float32: log of the sum of exp(logit) over all that was added; -inf before."""
        return torch.from_numpy(self._tops) + torch.from_numpy(self._sums).log()

    def add(self, part: Lent) -> None:
        self._run(part, np.empty((0, self._q.shape[1]), np.float32))

    def add_measured(self, part: Lent) -> Array:
        """`add`, and the log-sum-exp of each record: (n, group) float32. Logits that lie 87 or more below the largest so far count as if they
        lay that far."""
        lse = np.empty((len(part.key_at), self._q.shape[1]), np.float32)
        self._run(part, lse)
        return lse

    def _run(self, part: Lent, lse: Array) -> None:
        keys, values = part.keys, part.values
        if keys.itemsize == 2:
            keys, values = keys.view(np.uint16), values.view(np.uint16)
        heads, _, dim = self._q.shape

        def attend(h: slice) -> None:
            starts = part.starts[h.start : h.stop + 1]
            ours = (each[h] for each in (self._q, self._tops, self._sums, self._out))
            self._attend(keys, values, part.key_at, part.value_at, starts, part.tokens, *ours, lse)

        over_heads(heads, 2 * len(part.key_at) * part.tokens * dim * keys.itemsize, attend)

    def finish(self, out: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
        """The attention over all that was added, and beside it over keys that are known by their output (kv_heads, group, head_dim) and
        log-sum-exp (kv_heads, group) alone, both float32: (kv_heads, group, head_dim) float32. Ends it."""
        _, group, dim = self._q.shape
        if out is None or lse is None:
            self._join(
                self._tops,
                self._sums,
                self._out,
                np.empty((0, group), np.float32),
                np.empty((0, group, dim), np.float32),
            )
        else:
            self._join(self._tops, self._sums, self._out, lse.contiguous().numpy(), out.contiguous().numpy())
        return torch.from_numpy(self._out)
