"""Greedy decoding by drafts: exact, in at most one pass more than the draft has errors.

One pass tells what greedy decoding says after every beginning of a draft. The tokens that agree are accepted, the first that
does not is replaced, and the rest of the draft is tried again.
source: speculative decoding, arXiv 2211.17192, with a draft that is given and greedy verification.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Feed = Callable[[list[int]], Tensor]
"""Tokens that follow the context -> logits after each of them, (tokens, vocabulary)."""


def greedy(feed: Feed, first: int, tokens: int, draft: list[int]) -> list[int]:
    """The `tokens` tokens that greedy decoding says after `first`; `draft` is a guess of them, of any length."""
    guess = draft[: tokens - 1]
    while True:
        said = feed([first, *guess]).argmax(-1).tolist()
        right = agreeing(guess, said)
        if right + 1 >= tokens:
            return said[:tokens]
        guess = [*said[: right + 1], *guess[right + 1 :]]


def agreeing(draft: list[int], said: list[int]) -> int:
    """How many tokens of a draft are said before the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(draft, said, strict=False)) if a != b), min(len(draft), len(said)))
