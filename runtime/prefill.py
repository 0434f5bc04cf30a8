"""Block-wise prefill: peak memory does not grow with the prompt.

Each block of tokens runs through the whole model; every layer attends to earlier blocks through the store and hands its new
KV to disk while the next layer computes. Logits are asked for the last position only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvdb.runtime.cache import KVDBCache
from kvdb.runtime.history import FLUSH_TOKENS

BLOCK_TOKENS = FLUSH_TOKENS
"""One block fills one tail, so each block goes to disk at once. 512 to 2048 cost the same per token."""


class PrefillProgress(NamedTuple):
    """Reported after each block."""

    done_tokens: int
    total_tokens: int
    kv_bytes_written: int


def prefill(
    model: nn.Module, cache: KVDBCache, input_ids: Tensor, *, progress: Callable[[PrefillProgress], None] | None
) -> None:
    """Compute KV of every token of `input_ids` (batch, tokens) that the cache does not hold yet, densely.

    raises  StorageFull and others of the store: nothing of the block in flight is committed
    """
    total = input_ids.shape[1]
    todo = total - cache.length
    if todo <= 0:
        return
    extra: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = 1  # full logits of a long block cost more memory than the block's KV
    token_bytes = cache.geometry.token_bytes * len(cache.rows)
    written = 0
    cache.prefilling, cache.expected_tokens = True, todo
    try:
        with torch.no_grad():
            while cache.length < total:
                start = cache.length
                block = input_ids[:, start : start + BLOCK_TOKENS]
                model(input_ids=block, past_key_values=cache, use_cache=True, **extra)
                cache.expected_tokens = total - cache.length
                written += block.shape[1] * token_bytes if cache.writes else 0
                if progress is not None:
                    progress(PrefillProgress(start + block.shape[1], total, written))
    finally:
        cache.prefilling, cache.expected_tokens = False, 0
        cache.metrics.prefill_tokens += cache.length - (total - todo)
