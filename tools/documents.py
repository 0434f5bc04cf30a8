"""Long real English text that every Python carries: the language reference, from `pydoc_data.topics`.

Always: the same arguments and the same Python give the same text; a document ends at a paragraph and is never
longer than asked for. It does not promise the same text on two versions of Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

from kvdb.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reference_document(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    *,
    start_topic: str | None = None,
    offset: int = 0,
    needle: str | None = "with",
    needle_at: float = 0.5,
) -> str:
    """At most `tokens` tokens (short by a paragraph or two) of the Python language reference.

    start_topic  the topic to begin at; the alphabetical order goes on from there and wraps around
    offset       how many tokens of the reference to skip: steps of `tokens` give disjoint documents
    needle       a topic placed whole at `needle_at` of the length, taken from its own place (so it is in
                 every document, whatever the offset); None for plain text
    raises       InvalidInput for an unknown topic, a needle that does not fit, or more text than there is
                 (about 110 000 tokens)
    """
    for topic in (start_topic, needle):
        if topic is not None and topic not in topics:
            raise InvalidInput(f"topic {topic!r}: not in the language reference; see pydoc_data.topics")
    if tokens < 1 or offset < 0 or not 0 <= needle_at <= 1:
        raise InvalidInput(
            f"document: tokens {tokens}, offset {offset}, needle_at {needle_at}, "
            "expected tokens >= 1, offset >= 0 and 0 <= needle_at <= 1"
        )

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    needle_text = "" if needle is None else topics[needle].strip() + "\n\n"
    needle_tokens = length(needle_text) if needle_text else 0
    if needle_tokens > tokens:
        raise InvalidInput(
            f"document: topic {needle!r} is {needle_tokens} tokens, expected at most {tokens}; "
            "ask for more tokens or pass needle=None"
        )

    parts: list[str] = []
    skipped = used = 0
    needle_from = min(int(needle_at * tokens), tokens - needle_tokens)
    pending = needle_text
    for paragraph in _paragraphs(start_topic, without=needle):
        paragraph_tokens = length(paragraph)
        if skipped < offset:
            skipped += paragraph_tokens
            continue
        if pending and used + paragraph_tokens > needle_from:
            parts.append(pending)
            used += needle_tokens
            pending = ""
        if used + paragraph_tokens > tokens:
            break
        parts.append(paragraph)
        used += paragraph_tokens
    else:
        raise InvalidInput(
            f"document: the reference ends after {skipped + used} tokens, "
            f"expected offset {offset} + {tokens}; ask for less"
        )
    # Counted apart, paragraphs come to up to 2 % less than together: tokens do not stop at their seams.
    while len(parts) > 1 and length("".join(parts)) > tokens:
        del parts[-2 if parts[-1] == needle_text else -1]
    return "".join(parts).rstrip() + "\n"


def _paragraphs(start_topic: str | None, *, without: str | None) -> Iterator[str]:
    order = sorted(topics)
    start = order.index(start_topic) if start_topic is not None else 0
    for topic in order[start:] + order[:start]:
        if topic != without:
            for paragraph in topics[topic].strip().split("\n\n"):
                yield paragraph + "\n\n"
