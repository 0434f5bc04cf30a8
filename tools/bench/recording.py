"""Keys, values and queries of the real model, recorded once and kept in a file: what a replay of another model's shape is made of.

    texts, track = record(texts=4, tokens=8032, steps=160)
    save(path, texts, track); Texts.load(path); Track.load(path)

Each text is prefilled alone, from position 0. The first one goes on, a token at a time and as the text itself does, not as the model
would: every layer's new key and value and its query are kept, and the query that could have been predicted one layer before.
bfloat16 is kept as uint16.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvdb.errors import InvalidInput
from kvdb.geometry import CHUNK_TOKENS
from kvdb.tools.bench.setup import document_ids, real_model

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_TOKENS: Final = 1024
"""Of a text, computed at once."""
_APART_TOKENS: Final = 1024
"""Between texts: a document is so much longer than what of it is used, at most."""


class _Kept:
    """Arrays in a file, each under the name of its class and its field."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """raises  InvalidInput for a file that has no such arrays"""
        with np.load(path, allow_pickle=False) as stored:
            names = {field: _entry(cls, field) for field in _names(cls)}
            if missing := [name for name in names.values() if name not in stored]:
                raise InvalidInput(f"recording {path}: no {', '.join(missing)}, expected them; record it again")
            return cls(**{field: stored[name] for field, name in names.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(_Kept):
    """What was prefilled.

    ids           (texts, tokens) uint32
    keys, values  (texts, layers, kv_heads, tokens, head_dim) bfloat16, keys after RoPE
    """

    ids: Array
    keys: Array
    values: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Track(_Kept):
    """How text 0 went on.

    ids           (steps,) uint32
    keys, values  (steps, layers, kv_heads, head_dim) bfloat16
    queries       (steps, layers, kv_heads, group, head_dim) float32, after RoPE and scaled
    predicted     the same shape: of layer l, what its projection makes of the hidden state that enters layer l - 1; of layer 0,
                  which has none before, its query of the step before
    """

    ids: Array
    keys: Array
    values: Array
    queries: Array
    predicted: Array


class Recording(NamedTuple):
    texts: Texts
    track: Track

    def save(self, path: Path) -> None:
        """A new file, or another one's place."""
        arrays = {_entry(type(part), field): getattr(part, field) for part in self for field in _names(type(part))}
        with path.open("wb") as file:
            np.savez(file, **arrays)


def texts_in(path: Path) -> tuple[int, int]:
    """How many texts a recording has, and tokens of each."""
    with np.load(path, allow_pickle=False) as stored:
        count, tokens = stored[_entry(Texts, "ids")].shape
    return count, tokens


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def _entry(kind: type, field: str) -> str:
    return f"{kind.__name__.lower()}.{field}"


def record(texts: int, tokens: int, steps: int) -> Recording:
    """Run SmolLM2-135M in float32 over different parts of the language reference.

    tokens  of each text, whole chunks
    steps   tokens after text 0, one at a time
    cost    about a minute a text of 8 000 tokens and 0.2 s a step, on two cores
    raises  InvalidInput for tokens that are no whole chunks, and for more than the model's context holds
    """
    if tokens % CHUNK_TOKENS or not tokens:
        raise InvalidInput(f"recording: texts of {tokens} tokens, expected a multiple of {CHUNK_TOKENS}; round it")
    loaded, whole = real_model(), tokens + steps
    if whole > (most := loaded.model.config.max_position_embeddings):
        raise InvalidInput(
            f"recording: {tokens} tokens and {steps} steps, expected at most {most} in all; record fewer"
        )
    ids = [document_ids(loaded, whole, offset=text * (whole + _APART_TOKENS)) for text in range(texts)]
    with torch.no_grad():
        goes_on = _prefilled(loaded.model, ids[0][:, :tokens])
        stored = [_stored(goes_on, 0, tokens)]
        stored += [_stored(_prefilled(loaded.model, each[:, :tokens]), 0, tokens) for each in ids[1:]]
        queries, predicted = _decode(loaded.model, goes_on, ids[0][:, tokens:])
    keys, values = (np.stack(both) for both in zip(*stored, strict=True))
    new_keys, new_values = (np.ascontiguousarray(new.transpose(2, 0, 1, 3)) for new in _stored(goes_on, tokens, whole))
    numbers = torch.cat(ids).numpy().astype("<u4")
    return Recording(
        Texts(ids=numbers[:, :tokens], keys=keys, values=values),
        Track(ids=numbers[0, tokens:], keys=new_keys, values=new_values, queries=queries, predicted=predicted),
    )


def _prefilled(model: Any, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for block in ids.split(BLOCK_TOKENS, 1):
        model(input_ids=block, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _stored(cache: DynamicCache, start: int, stop: int) -> tuple[Array, Array]:
    """Keys and values of positions [start, stop): (layers, kv_heads, tokens, head_dim) each."""
    layers: list[Any] = cache.layers
    keys = torch.stack([layer.keys[0, :, start:stop].bfloat16() for layer in layers])
    values = torch.stack([layer.values[0, :, start:stop].bfloat16() for layer in layers])
    return keys.view(torch.uint16).numpy(), values.view(torch.uint16).numpy()


def _decode(model: Any, cache: DynamicCache, ids: Tensor) -> tuple[Array, Array]:
    """Run the model over tokens one by one; queries and predicted ones, as in `Track`."""
    listener = _Listener(model.model.layers)
    try:
        for token in ids.split(1, 1):
            model(input_ids=token, past_key_values=cache, use_cache=True)
    finally:
        listener.stop()
    queries = torch.stack(listener.queries).unflatten(0, (ids.shape[1], -1))
    predicted = torch.stack(listener.predicted).unflatten(0, (ids.shape[1], -1))
    before = torch.cat((queries[:1, :1], queries[:-1, :1]))  # of layer 0, a step late
    return queries.numpy(), torch.cat((before, predicted), 1).numpy()


class _Listener:
    """Queries of each layer as it runs, and those of the next one that its input predicts, one after the other."""

    def __init__(self, layers: Any) -> None:
        self.queries: list[Tensor] = []
        self.predicted: list[Tensor] = []
        self._hooks = [
            layer.register_forward_pre_hook(self._hear(layer, after), with_kwargs=True)
            for layer, after in zip(layers, [*layers[1:], None], strict=True)
        ]

    def _hear(self, layer: Any, after: Any | None) -> Any:
        def heard(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rotary = args[0], kwargs["position_embeddings"]
            self.queries.append(_query(layer, hidden, rotary))
            if after is not None:
                self.predicted.append(_query(after, hidden, rotary))

        return heard

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _query(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The scaled query a layer makes of a hidden state (1, 1, hidden): (kv_heads, group, head_dim) float32."""
    attention = layer.self_attn
    heads = attention.q_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    turned, _ = apply_rotary_pos_emb(heads, heads, *rotary)
    group: int = attention.num_key_value_groups
    whole: Tensor = turned[0, :, 0].unflatten(0, (-1, group)).float() * attention.scaling
    return whole
