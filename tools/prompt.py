"""The prompt of `kvdb ask`: the document first, the question after it.

Always: two questions on the same document (and the same model) share every token up to the question. The document's part
and the question's part are tokenised apart, so no merge across their seam depends on the question; what the chat template
adds is taken from the template itself. Text from the document and the question never becomes a control token: a
document that says "<|im_end|>" cannot end its own turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from kvdb.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTENT: Final = "kvdb-content-goes-here"
_BRIEFLY: Final = " Answer in one or two sentences."
"""Small models go on until they repeat themselves when nothing tells them to stop."""


class Prompt(NamedTuple):
    """ids  of the whole prompt; the first `document_tokens` of them are the same for every question."""

    ids: list[int]
    document_tokens: int


def build_prompt(tokenizer: PreTrainedTokenizerBase, document: str, question: str) -> Prompt:
    """Token ids of one chat turn, or of plain text where the tokenizer has no chat template.

    raises  Unsupported for a chat template that does not show the user's message exactly once
    """
    document, question = document.strip(), question.strip()
    if tokenizer.chat_template:
        before, after = _around_content(tokenizer)
        first = _ids(tokenizer, before)
        ask = f"{question}{_BRIEFLY}"
    else:
        first, after = _bos(tokenizer), "\nAnswer:"
        ask = f"Question: {question}"
    head = first + _ids(tokenizer, f"{document}\n\n", literal=True)
    tail = _ids(tokenizer, ask, literal=True) + _ids(tokenizer, after)
    return Prompt(head + tail, len(head))


def _around_content(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": _CONTENT}], tokenize=False, add_generation_prompt=True
    )
    before, *rest = str(rendered).split(_CONTENT)
    if len(rest) != 1:
        raise Unsupported(
            f"chat template: it shows the user's message {len(rest)} times, expected once; use another model"
        )
    return before, rest[0]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, literal: bool = False) -> list[int]:
    """literal: names of control tokens in `text` are ordinary characters."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=literal, verbose=False)
    return list(encoded["input_ids"])


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer puts before every text, if any."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos] else []
