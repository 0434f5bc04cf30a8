"""What the next layer will ask, from what enters this one: the hidden state changes little from layer to layer.

A layer's own code makes the query, up to its attention: its norm, its projection and its rotation, whatever they are called in this model. There
the probe ends. It computes the layer's newest keys and values too, which nobody keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kvdb.errors import Unsupported
from kvdb.runtime.cache import KVDBCache
from kvdb.runtime.layers import Asked


def watch(model: nn.Module, layers: int) -> ExitStack | None:
    """Have every decoder layer tell its cache what the next one will ask, while the cache wants to know.

    layers   of the cache
    returns  what ends it; None where the model's decoder layers are not found
    """
    stack = decoder_layers(model, layers)
    if stack is None:
        return None
    watching = ExitStack()
    for index, layer in enumerate(stack):
        watching.callback(layer.register_forward_pre_hook(_hook(stack, index), with_kwargs=True).remove)
    return watching


def decoder_layers(model: nn.Module, layers: int) -> list[nn.Module] | None:
    """The module list, one module a layer, whose every member has a part that knows its own number as `layer_idx`."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            found = [{getattr(part, "layer_idx", None) for part in layer.modules()} - {None} for layer in module]
            if found == [{index} for index in range(layers)]:
                return list(module)
    return None


def _hook(stack: list[nn.Module], index: int) -> Callable[..., None]:
    """Tells the cache of what enters layer `index` what the next one will ask. Only layers with full attention are predicted, by what the last
    such layer was given beside the hidden state: a model gives its layers with windows other masks and rotations."""

    def tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = next((each for each in (*kwargs.values(), *args) if isinstance(each, KVDBCache)), None)
        if cache is None or not cache.reads_ahead:
            return
        if cache.is_full(index):
            cache.given = args[1:], kwargs
        following = index + 1
        if following < len(stack) and cache.is_full(following) and cache.given is not None:
            others, named = cache.given
            with cache.timeline.span("predict", following), torch.no_grad():
                query = asked(stack[following], cache, (*args[:1], *others), named)
                if query is not None:
                    cache.expect(following, query)

    return tell


def asked(layer: nn.Module, cache: KVDBCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The query of a decoder layer that is given these arguments, scaled: (batch, heads, queries, head_dim). None where it asks nothing: then
    the cache is told."""
    try:
        if any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules() if part is not layer):
            raise Unsupported("parts of its layers have hooks, which would see more calls than the model makes")
        with cache.probing():
            layer.forward(*args, **kwargs)
        reason = "it did not come to KVDB's attention"
    except Asked as e:
        return e.query
    except Exception as e:  # the generation does not depend on it
        reason = f"{type(e).__name__}: {e}"
    cache.prefetch.give_up(f"this model's queries cannot be predicted: {reason}")
    return None
