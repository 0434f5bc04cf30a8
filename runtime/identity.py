"""What identifies a model's KV: a digest of its weights, and the config fields that change the mathematics.

The weights digest covers names, shapes, dtypes and the bytes of every parameter and buffer, active adapters included
(they are parameters). Attaching reads them all; after that it is taken again when a change is seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from typing import Any, Final

import torch
import xxhash
from torch import nn

from kvdb.identity import Identity

IRRELEVANT_FIELDS: Final = frozenset({
    "_name_or_path", "architectures", "transformers_version", "auto_map", "dtype", "torch_dtype", "use_cache",
    "return_dict", "output_attentions", "output_hidden_states", "problem_type", "id2label", "label2id", "num_labels",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
    "prefix", "task_specific_params", "is_llama_config", "rope_interleaved", "initializer_range", "initializer_factor",
    "pretraining_tp", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "classifier_dropout", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "chunk_size_feed_forward", "max_length", "min_length", "quantization_config",
    "_attn_implementation", "_attn_implementation_internal", "transformers.js_config",
})  # fmt: skip
"""Fields that leave KV as it is. Every other field counts: an unknown one costs a miss, never a wrong reuse."""

_DIGESTS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def model_identity(model: nn.Module, *, kv_dtype: torch.dtype, salt: str = "", fresh: bool = True) -> Identity:
    """Identity of the KV this model computes. Runs at memory speed; `fresh` as in `weights_digest`."""
    config = config_fields(text_config(model))
    return Identity(weights=weights_digest(model, fresh=fresh), config=config, dtype=dtype_name(kv_dtype), salt=salt)


def config_fields(config: Any) -> dict[str, str]:
    """The fields of a decoder's config that change the mathematics, as canonical strings."""
    return {
        name: json.dumps(value, sort_keys=True, default=str)
        for name, value in config.to_dict().items()
        if name not in IRRELEVANT_FIELDS and value is not None
    }


def text_config(model: nn.Module) -> Any:
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights_digest(model: nn.Module, *, fresh: bool = True) -> str:
    """Hex SHA-256 over name, shape, dtype and xxh3-128 of the bytes of every parameter and buffer, in name order, and the
    plain attributes of modules that torch and transformers do not know (scalings and switches of adapters).

    fresh  read every byte. False: a digest taken before is trusted as long as no tensor was replaced, written to as torch
           counts it, or differs in a sample of its values (adapters are merged through `.data`, which torch does not count)
    """
    tensors = sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0])
    foreign = _foreign_state(model)
    state = (
        *foreign,
        *((name, t.data_ptr(), _version(t), tuple(t.shape), t.dtype, _sample(t)) for name, t in tensors),
    )
    known = _DIGESTS.get(model)
    if not fresh and known is not None and known[0] == state:
        return known[1]
    h = hashlib.sha256(b"kvdb weights 1\0")
    for name, tensor in tensors:
        h.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        h.update(xxhash.xxh3_128_digest(_bytes(tensor.detach())))
    for line in foreign:
        h.update(line.encode() + b"\0")
    _DIGESTS[model] = (state, h.hexdigest())
    return h.hexdigest()


def _sample(tensor: torch.Tensor) -> int:
    """Digest of some 256 values spread over a tensor; the stride is coprime to the row length, so no column is left out."""
    flat = tensor.detach().reshape(-1)
    stride = max(1, len(flat) // 256)
    while math.gcd(stride, tensor.shape[-1] if tensor.dim() else 1) > 1:
        stride += 1
    return xxhash.xxh3_64_intdigest(_bytes(flat[::stride]))


def _foreign_state(model: nn.Module) -> list[str]:
    """Plain attributes of modules that neither torch nor transformers wrote: adapters keep scalings and switches there."""
    return [
        f"{path}\0{type(module).__qualname__}\0{name}\0{value!r}"
        for path, module in model.named_modules()
        if not type(module).__module__.startswith(("torch.", "transformers."))
        for name, value in sorted(vars(module).items())
        if name != "training"
        and isinstance(value, bool | int | float | str | list | tuple | dict | set)
        and not name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_buffers_set"))
        and name not in ("_parameters", "_buffers", "_modules")
    ]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def _version(tensor: torch.Tensor) -> int:
    """In-place writes so far; tensors made in inference mode do not count them."""
    return -1 if tensor.is_inference() else tensor._version
