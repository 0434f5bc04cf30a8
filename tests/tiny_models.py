"""Tiny language models with random weights, by architecture, and the stock run they are compared with.

Weights are drawn wide (std 0.3 or so instead of 0.02): attention is peaked, logits are far apart, and greedy output
depends on every token of the prompt. With the usual narrow weights every prompt gives the same answer, and a test of
equal outputs could not fail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CONFIG_MAPPING, DynamicCache

VOCABULARY = 128
CONTEXT = 4096
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_FOUR_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_HYBRID: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": _FOUR_LAYERS, "sliding_window": 200}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 200}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32, "num_key_value_heads": 1, **_HYBRID}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"num_key_value_heads": None}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
    "cohere2": ("cohere2", {"logit_scale": 1.0, **_HYBRID}),
}
"""Name -> model type and what its config says besides the common fields."""


def tiny(architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A random model in eval mode; the same arguments give the same weights."""
    kind, special = ARCHITECTURES.get(architecture, (architecture, {}))
    config = CONFIG_MAPPING[kind](**{**_COMMON, **special, **changes})
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def prompt(tokens: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Random token ids, (batch, tokens)."""
    return torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model: nn.Module, input_ids: Tensor, cache: Any, new_tokens: int = 8, **options: Any) -> Tensor:
    """What `generate` appends, (batch, new_tokens)."""
    out = model.generate(  # type: ignore[operator]
        input_ids,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        **options,
    )
    return out[:, input_ids.shape[1] :]


def stock(model: nn.Module, input_ids: Tensor, new_tokens: int = 8, **options: Any) -> Tensor:
    """The oracle: the same, with the cache of transformers."""
    return greedy(model, input_ids, DynamicCache(config=model.config), new_tokens, **options)
