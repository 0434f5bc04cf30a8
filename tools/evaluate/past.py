"""KV of a text, in memory: computed once with dense attention, shared by every configuration that is judged.

What a codec does to it is judged as a store would do it: whole chunks are encoded and decoded, one by one. The first of a text, on
which every position rests attention, and the tail after the last stay as they are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvdb.abstracts import ABSTRACTS
from kvdb.codecs import RAW, CodecPlan, RecordCodec
from kvdb.errors import Unsupported
from kvdb.geometry import div_ceil
from kvdb.runtime.identity import dtype_name
from kvdb.runtime.selection.base import Array, Resident, Selector
from kvdb.runtime.staging import storage_view
from kvdb.tools.evaluate.oracle import KEYS

BLOCK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Past:
    """KV of the first `tokens` tokens of a text. Never changed: `begun` hands out caches that go on from here.

    codec  of its whole chunks but the first, see `through`
    """

    cache: Cache
    tokens: int
    chunk_tokens: int
    codec: CodecPlan = RAW

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

    def through(self, codec: CodecPlan) -> Past:
        """The same text from a store of that codec. Chunks that have begun to leave a window stay as they are: the rest is not known.

        raises  InvalidInput for parameters that do not fit; NotFinite for numbers that a codec cannot keep
        """
        layers = [copy.copy(layer) for layer in self.cache.layers]
        for index, layer in enumerate(layers):
            _recode(layer, codec.of(index), self.tokens, self.chunk_tokens)
        return replace(self, cache=Cache(layers=layers), codec=codec)

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
        """Every selecting layer's abstracts as a store would make them, in the selector's form; those `of_blocks` as of a text that is
        stored in one piece."""
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

    def record_bytes(self, layer: int) -> Tensor:
        """Stored bytes of K and V of one KV head's part of each chunk: (chunks,) int64."""
        cached: Any = self.cache.layers[layer]
        first, later = (
            plan.of(layer).row_bytes(self.chunk_tokens, cached.keys.shape[3], dtype_name(cached.keys.dtype))
            for plan in (RAW, self.codec)
        )
        sizes = torch.full((self.chunks,), later)
        sizes[:1] = first
        return sizes

    def stored_bytes(self, layer: int) -> int:
        """Of a layer's whole chunks, all KV heads together: of a window, too, every chunk is stored."""
        return int(self.cache.layers[layer].keys.shape[1]) * int(self.record_bytes(layer).sum())

    @property
    def token_bytes(self) -> float:
        """Stored bytes of KV of one token of whole chunks, on average, all layers together."""
        return sum(map(self.stored_bytes, range(len(self.cache.layers)))) / (self.chunks * self.chunk_tokens)

    @property
    def records(self) -> dict[int, int]:
        """Of each selecting layer, how many records a store would hold."""
        return {layer: int(self.cache.layers[layer].keys.shape[1]) * self.chunks for layer in self.layers}


def _recode(layer: Any, codec: RecordCodec, tokens: int, chunk_tokens: int) -> None:
    """Encode and decode the chunks that a layer of a cache holds whole, but the first of the text. Tensors it held before stay as they are."""
    keys, values = layer.keys.clone(), layer.values.clone()  # [1, kv_heads, tokens, head_dim]
    position = tokens - keys.shape[2]  # of the first token held
    first, last = max(1, div_ceil(position, chunk_tokens)), tokens // chunk_tokens
    if first >= last:
        return
    span, dtype = slice(first * chunk_tokens - position, last * chunk_tokens - position), dtype_name(keys.dtype)
    halves = torch.stack([each[0, :, span].unflatten(1, (-1, chunk_tokens)) for each in (keys, values)])
    records = halves.flatten(1, 2)  # [2, kv_heads * chunks, chunk_tokens, head_dim]
    rows = codec.encode(storage_view(records).swapaxes(0, 1), dtype)
    decoded = torch.empty_like(records)
    codec.decode(rows, np.arange(len(rows)), storage_view(decoded), dtype)
    keys[0, :, span], values[0, :, span] = decoded.view(halves.shape).flatten(2, 3)
    layer.keys, layer.values = keys, values
