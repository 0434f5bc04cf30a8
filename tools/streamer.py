"""An answer as it comes: token ids from `generate` in, text out, and when the first token was there.

Always: the pieces handed out, joined, are the decoded answer without blanks at its beginning. A character that takes
several tokens is handed out when it is whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class AnswerStream:
    """A streamer for `generate(streamer=...)`: it calls `put` with the prompt, then with every new token, then `end`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        self.tokens = 0
        self.first_token_at: float | None = None
        self.text = ""
        self._tokenizer, self._show = tokenizer, show
        self._prompt_seen = False
        self._pending: list[int] = []  # decoded together: a token's text depends on its neighbours
        self._shown = 0  # characters of the pending tokens' text

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        ids = value.reshape(-1).tolist()
        self.tokens += len(ids)
        self._pending += ids
        text = self._decoded()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        self._hand_out(text[self._shown :])
        self._shown = len(text)
        if text.endswith("\n"):
            self._pending, self._shown = [], 0

    def end(self) -> None:
        self._hand_out(self._decoded()[self._shown :])
        self._pending, self._shown = [], 0

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._pending, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _hand_out(self, piece: str) -> None:
        if not self.text:
            piece = piece.lstrip()
        if piece:
            self.text += piece
            self._show(piece)
