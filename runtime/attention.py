"""The attention implementation "kvdb" of transformers, and its mask.

transformers looks both up by name in global tables; they are entered at the first `attach`, never at import. Layers that
KVDB does not hold (sliding windows, other caches) go to torch's scaled dot-product attention with its usual mask.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Final

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvdb.errors import Unsupported
from kvdb.runtime.layers import Handle

IMPLEMENTATION: Final = "kvdb"
_IGNORED_BY_SDPA: Final = ("softcap", "s_aux", "sinks", "indices", "head_mask")
CHANGES_ATTENTION: Final = (*_IGNORED_BY_SDPA, "position_bias")
"""Keywords that change what attention computes: refused unless None, by whichever function would not heed them."""

_full_causal: ContextVar[bool] = ContextVar("kvdb_full_causal", default=False)


def full_attention_is_causal(yes: bool) -> None:
    """True while full-attention layers belong to a KVDB cache and need no mask.

    Set anew at the beginning of every forward pass: an interrupt (Ctrl-C) can leave a pass without its end.
    """
    _full_causal.set(yes)


def kvdb_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Handle,
    value: Tensor | Handle,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (batch, heads, queries, head_dim) -> (batch, queries, heads, head_dim).

    raises  Unsupported for anything that is not plain causal softmax attention
    """
    if not isinstance(key, Handle):
        if changed := [name for name in _IGNORED_BY_SDPA if kwargs.get(name) is not None]:
            raise Unsupported(
                f"attention with {', '.join(changed)}, expected plain softmax attention; leave attach() to run it"
            )
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    changed = [name for name in CHANGES_ATTENTION if kwargs.get(name) is not None]
    layer = key.layer()
    if changed or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        found = [*changed, *(["dropout"] if dropout else []), *(["a mask"] if attention_mask is not None else [])]
        raise Unsupported(
            f"layer {layer.stored.index}: attention with {', '.join(found) or 'no causal order'}, expected plain causal "
            "softmax attention; this model is not supported yet"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, scale).transpose(1, 2).contiguous(), None


def kvdb_mask(*args: Any, **kwargs: Any) -> Any:
    """No mask for full causal layers of a KVDB cache, torch's usual one for everything else."""
    plain = kwargs.get("local_size") is None and kwargs.get("allow_is_causal_skip", True)
    if _full_causal.get() and plain:
        return None
    return sdpa_mask(*args, **kwargs)


def register() -> None:
    """Enter both functions into transformers' tables; doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, kvdb_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, kvdb_mask)
