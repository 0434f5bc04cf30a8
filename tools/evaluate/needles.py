"""Passkeys hidden in real text: can the model still say one it was told thousands of tokens ago?

Only needles that dense attention finds are counted: what the model cannot do is no loss of selection.
source: passkey retrieval, Landmark Attention, arXiv 2305.16300, whose sentences these are.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, NamedTuple

from kvdb.errors import InvalidInput
from kvdb.tools.evaluate.texts import text_ids
from kvdb.tools.prompt import build_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTHS: Final = (0.1, 0.3, 0.5, 0.7, 0.9)
ANSWER_TOKENS: Final = 8
_BEGUN: Final = "The pass key is"
"""The answer begins so, and what is decoded are the digits: selection has few tokens in which to find them."""


class Needle(NamedTuple):
    """ids: a prompt whose greedy continuation should contain `key`, hidden at `depth` (a share) of a text."""

    ids: list[int]
    key: str
    text: str
    depth: float


def needle(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, depth: float, *, seed: int) -> Needle:
    """At most `tokens` tokens with the answer: a text of `TEXTS` or a file, the needle in it, and the question.

    raises  InvalidInput where there is no room for any text
    """
    key = str(random.Random(f"key {text} {depth} {seed}").randrange(10_000, 100_000))
    begun = tokenizer(f" {_BEGUN}" if not tokenizer.chat_template else _BEGUN, add_special_tokens=False)["input_ids"]
    length = tokens - ANSWER_TOKENS
    filler = length
    while filler > 0:
        hay = str(tokenizer.decode(text_ids(tokenizer, text, filler, seed=seed)))
        prompt = build_prompt(tokenizer, _hidden(hay, key, depth), "What is the pass key?")
        ids = [*prompt.ids, *begun]
        if len(ids) <= length:
            return Needle(ids, key, text, depth)
        filler -= len(ids) - length
    raise InvalidInput(f"needle: {tokens} tokens, expected room for some text around it; ask for more")


def _hidden(hay: str, key: str, depth: float) -> str:
    """The needle goes between two lines."""
    at = hay.find("\n", int(depth * len(hay)))
    at = len(hay) if at < 0 else at
    return f"{hay[:at]}\nThe pass key is {key}. Remember it. {key} is the pass key.\n{hay[at:]}"
