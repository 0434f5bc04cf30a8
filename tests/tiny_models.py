"""Tiny language models with random weights, by architecture, and the stock run they are compared with.

Weights are drawn wide (std 0.3 or so instead of 0.02): attention is peaked, logits are far apart, and greedy output
depends on every token of the prompt. With the usual narrow weights every prompt gives the same answer, and a test of
equal outputs could not fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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


def tiny(
    architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> nn.Module:
    """A random model in eval mode; the same arguments give the same weights."""
    kind, special = ARCHITECTURES.get(architecture, (architecture, {}))
    config = CONFIG_MAPPING[kind](**{**_COMMON, **special, **changes})
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Any:
    """One token per byte, two control tokens, and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_llama(folder: Path, *, context: int = CONTEXT) -> None:
    """A random llama of bytes, in the layout that `--model PATH` takes."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), max_position_embeddings=context, bos_token_id=None, initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)


def prompt(tokens: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Random token ids, (batch, tokens)."""
    return torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def _generate(model: nn.Module, input_ids: Tensor, cache: Any, new_tokens: int, **options: Any) -> Any:
    return model.generate(  # type: ignore[operator]
        input_ids,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        **options,
    )


def greedy(model: nn.Module, input_ids: Tensor, cache: Any, new_tokens: int = 8, **options: Any) -> Tensor:
    """What `generate` appends, (batch, new_tokens)."""
    out: Tensor = _generate(model, input_ids, cache, new_tokens, **options)
    return out[:, input_ids.shape[1] :]


class Answer(NamedTuple):
    """What a greedy run said, and the logits it chose from: (batch, new_tokens) and (batch, new_tokens, vocabulary)."""

    tokens: Tensor
    logits: Tensor


def answer(model: nn.Module, input_ids: Tensor, cache: Any, new_tokens: int = 4) -> Answer:
    """As `greedy`, with logits: they show an error long before another token wins."""
    out = _generate(model, input_ids, cache, new_tokens, output_logits=True, return_dict_in_generate=True)
    return Answer(out.sequences[:, input_ids.shape[1] :], torch.stack(out.logits, 1).detach())


def stock_answer(model: nn.Module, input_ids: Tensor, new_tokens: int = 4) -> Answer:
    return answer(model, input_ids, DynamicCache(config=model.config), new_tokens)


def rounding(model: nn.Module, double: nn.Module, tokens: int, *, runs: int = 4) -> float:
    """How far two correct runs of `model` may differ in a logit: ten times what the stock run errs.

    The error of the stock run is measured against the same weights in float64, over several prompts: bounds by hand do not survive
    the amplification of a random network. An error of attention (a chunk, a token, a head amiss) is a thousand times larger.
    """
    worst = 0.0
    for seed in range(runs):
        ids = prompt(tokens, seed=900 + seed)
        with torch.no_grad():
            mine, truth = (each(input_ids=ids, logits_to_keep=1).logits.double() for each in (model, double))
        worst = max(worst, (mine - truth).abs().max().item())
    return 10 * worst


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tiny operations gain nothing from a second thread, and lose much where the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stock(model: nn.Module, input_ids: Tensor, new_tokens: int = 8, **options: Any) -> Tensor:
    """The oracle: the same, with the cache of transformers."""
    return greedy(model, input_ids, DynamicCache(config=model.config), new_tokens, **options)
