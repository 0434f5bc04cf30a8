"""Exact KV of a text, in memory: computed once with dense attention, shared by every configuration that is judged."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvdb.abstracts import ABSTRACTS
from kvdb.errors import Unsupported
from kvdb.runtime.identity import dtype_name
from kvdb.runtime.selection.base import Array, Resident, Selector
from kvdb.tools.evaluate.oracle import KEYS

BLOCK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Past:
    """KV of the first `tokens` tokens of a text. Never changed: `begun` hands out caches that go on from here."""

    cache: DynamicCache
    tokens: int
    chunk_tokens: int

    @classmethod
    def of(cls, model: nn.Module, ids: list[int], chunk_tokens: int) -> Past:
        """Prefill `ids` densely, block by block, with whichever attention the model has.

        raises  Unsupported for layers that are neither full nor sliding-window attention
        """
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(cache.layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise Unsupported(
                    f"eval: layer {index} keeps a {type(layer).__name__}, expected full or sliding-window attention; "
                    "this model is not supported yet"
                )
        with torch.no_grad():
            for start in range(0, len(ids), BLOCK_TOKENS):
                block = torch.tensor([ids[start : start + BLOCK_TOKENS]])
                model(input_ids=block, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cls(cache, len(ids), chunk_tokens)

    @property
    def chunks(self) -> int:
        """Whole chunks, which a store would hold. The tokens after them are in a tail."""
        return self.tokens // self.chunk_tokens

    @property
    def layers(self) -> list[int]:
        """Full-attention layers: those that select."""
        return [index for index, layer in enumerate(self.cache.layers) if type(layer) is DynamicLayer]

    def begun(self) -> Cache:
        """A cache that holds this past. Its layers put new tokens into memory of their own."""
        return Cache(layers=[copy.copy(layer) for layer in self.cache.layers])

    def resident(self, selector: Selector) -> dict[int, Resident]:
        """Every selecting layer's abstracts as a store would make them, in the selector's form."""
        return {layer: self._resident(selector, layer) for layer in self.layers}

    def _resident(self, selector: Selector, layer: int) -> Resident:
        tokens = self.chunks * self.chunk_tokens
        cached: Any = self.cache.layers[layer]
        keys, values = (
            each[0, :, :tokens].float().unflatten(1, (self.chunks, self.chunk_tokens)).numpy()
            for each in (cached.keys, cached.values)
        )
        dtype, head_dim = dtype_name(cached.keys.dtype), keys.shape[-1]
        loaded: dict[str, Array] = {}
        for name, planes in selector.abstracts.items():
            if name == KEYS:
                loaded[name] = keys.swapaxes(0, 1)
            else:
                stored = ABSTRACTS[name].build(keys, tokens, dtype, values)
                loaded[name] = ABSTRACTS[name].load(stored[:planes], head_dim, dtype)
        return selector.prepare(loaded, self.chunk_tokens, head_dim)

    @property
    def record_bytes(self) -> dict[int, int]:
        """Of each selecting layer, bytes of K and V of one KV head's part of a chunk."""
        shapes: dict[int, Any] = {layer: self.cache.layers[layer].keys for layer in self.layers}
        return {layer: 2 * self.chunk_tokens * k.shape[3] * k.element_size() for layer, k in shapes.items()}

    @property
    def records(self) -> dict[int, int]:
        """Of each selecting layer, how many records a store would hold."""
        return {layer: int(self.cache.layers[layer].keys.shape[1]) * self.chunks for layer in self.layers}
