"""`kvdb explain`: why a prompt is, or is not, found in a store. The model's weights are read only where nothing else tells it from
what is stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvdb.codecs import CodecPlan
from kvdb.entries import Sequence
from kvdb.errors import InvalidInput
from kvdb.identity import EXACT, Identity, joined_fidelity
from kvdb.inspection.explain import Explanation, Other, explain
from kvdb.inspection.snapshot import Snapshot, snapshot
from kvdb.tools.ask import read_document
from kvdb.tools.inspect import KEY_SHOWN, open_store
from kvdb.tools.output import PROBLEM, print_json, print_problems, problems_json, stdout_console, visible, working
from kvdb.tools.prompt import build_prompt
from kvdb.tools.show import load_tokenizer
from kvdb.tools.sizes import bytes_text, count_text, share_text

if TYPE_CHECKING:
    from kvdb.tools.models import Located

DTYPES: Final = ("float32", "bfloat16", "float16")
_AROUND: Final = 24
"""Tokens of text shown before the break, and after it."""
_LONGEST_VALUE: Final = 60
Ids = list[int]


class _Asker(NamedTuple):
    """Who asks. weights: how the model's weights were compared, in words."""

    identity: Identity | None
    weights: str


def show_explanation(
    store: Path,
    *,
    prompt: str,
    question: str | None,
    model: str | None,
    tokenizer: str | None,
    dtype: str,
    salt: str,
    codec: str,
    weights: bool,
    as_json: bool,
) -> int:
    """What matches, where it breaks and why, and what reuse saves. 0 also where nothing matches; 1 if the store is damaged."""
    if model is None and tokenizer is None:
        raise InvalidInput(
            "kvdb explain: no --model and no --tokenizer, expected one; the prompt is compared as token ids"
        )
    plan, text = CodecPlan.parse(codec), read_document(prompt)
    accepted = () if plan.lossless else (joined_fidelity(EXACT, str(plan)),)
    with open_store(store, "r") as db:
        snap = snapshot(db)
        loaded = load_tokenizer(tokenizer or model or "")
        ids = build_prompt(loaded, text, question).ids if question is not None else list(loaded(text)["input_ids"])
        asker = _asker(snap, model, dtype, salt, weights)
        found = explain(db, snap, np.array(ids, "<u4"), asker.identity, accepted=accepted)
    code = PROBLEM if snap.problems else 0
    decode = lambda some: str(loaded.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))  # noqa: E731
    if as_json:
        said = {"problems": problems_json(snap.problems)} if snap.problems else {}
        print_json({"store": str(store), **_as_json(found, ids, decode, asker), **said})
        return code
    _print(stdout_console(), found, ids, decode, asker)
    print_problems(snap.problems)
    return code


# -- who asks


def _asker(snap: Snapshot, model: str | None, dtype: str, salt: str, weights: bool) -> _Asker:
    """The identity that `kvdb ask` would have. Weights are digested only where a stored identity agrees in all else."""
    if model is None:
        return _Asker(None, "nothing but token ids: no --model")
    with working(f"loading the config of {model}", interrupted="nothing was changed"):
        from kvdb.runtime.identity import config_fields
        from kvdb.tools import models

        located = models.locate(model, offline=True)
        partial = Identity(weights="", config=config_fields(models.load_config(located)), dtype=dtype, salt=salt)
    alike = [stored for stored in snap.identities.values() if partial.difference(stored) == ["weights"]]
    if not alike:
        return _Asker(partial, "not read: other fields differ already")
    if not weights:
        return _Asker(alike[-1], "taken for equal (--no-weights)")
    return _Asker(_with_weights(located, dtype, salt), "compared")


def _with_weights(located: Located, dtype: str, salt: str) -> Identity:
    with working(f"reading the weights of {located.name}", interrupted="nothing was changed"):
        import torch

        from kvdb.runtime.identity import model_identity
        from kvdb.tools import models

        kv_dtype = getattr(torch, dtype)
        return model_identity(models.load(located, dtype=kv_dtype).model, kv_dtype=kv_dtype, salt=salt)


# -- what is told


def _as_json(found: Explanation, ids: Ids, decode: Callable[[Ids], str], asker: _Asker) -> dict[str, Any]:
    elsewhere, n = found.elsewhere, found.matched
    return {
        "tokens": found.tokens,
        "matched": n,
        "reusable": min(n, found.tokens - 1),
        "reason": found.reason,
        "identity": None if asker.identity is None else asker.identity.fields() | {"salt": "(not shown)"},
        "weights": asker.weights,
        "break": None if n == found.tokens else {
            "position": n,
            "asked": _token(found.asked_token, decode),
            "stored": _token(found.beside[0].token if found.beside else None, decode),
            "before": decode(ids[max(0, n - _AROUND) : n]),
            "asked_text": decode(ids[n : n + _AROUND]),
            "stored_text": decode(found.stored_next[:_AROUND]),
        },
        "beside": [{**_who(b.sequence), "token": b.token, "expired": b.expired} for b in found.beside],
        "beside_count": found.beside_count,
        "others": [
            {"tokens": o.tokens, "fidelity": o.fidelity, "fields": {k: list(v) for k, v in _fields(o, asker).items()},
             "sequences": [_who(s) for s in o.sequences]}
            for o in found.others
        ],
        "elsewhere": None if elsewhere is None else {
            "tokens": elsewhere.tokens, "at": elsewhere.at, "stored_at": elsewhere.stored_at,
            "sequences": [_who(s) for s in elsewhere.sequences],
        },
        "gone": None if found.gone is None else found.gone._asdict(),
        "saves": {"tokens": min(n, found.tokens - 1), "kv_bytes": found.kv_bytes, "read_bytes": found.read_bytes},
    }  # fmt: skip


def _who(sequence: Sequence) -> dict[str, Any]:
    return {"key": sequence.key, "name": sequence.name, "tokens": sequence.tokens}


def _token(token: int | None, decode: Callable[[Ids], str]) -> dict[str, Any] | None:
    return None if token is None else {"id": token, "text": decode([token])}


def _fields(other: Other, asker: _Asker) -> dict[str, tuple[str, str]]:
    """Weights that were not read are no difference that is known."""
    unread = asker.identity is not None and not asker.identity.weights
    return {name: pair for name, pair in other.fields.items() if not (unread and name == "weights")}


def _print(console: Console, found: Explanation, ids: Ids, decode: Callable[[Ids], str], asker: _Asker) -> None:
    n = found.matched
    verdict = Text.assemble(
        (f"{n:,} of {count_text(found.tokens, 'token')} match", "bold green" if n else "bold red"),
        f" ({share_text(n / found.tokens)}): {visible(found.reason)}",
    )
    console.print(verdict, soft_wrap=True)
    if not found.compared:
        console.print("only token ids were compared; with --model also what else must be equal", style="dim")
    elif asker.identity is not None:
        console.print(Text(f"weights: {asker.weights}"), style="dim")
    if n < found.tokens:
        _print_break(console, found, ids, decode)
    for line in _lines(found, asker):
        console.print(Text(visible(line)), soft_wrap=True)


def _print_break(console: Console, found: Explanation, ids: Ids, decode: Callable[[Ids], str]) -> None:
    """The two texts side by side around the first token that differs."""
    n, beside = found.matched, found.beside
    who = _label(beside[0].sequence) if beside else "nothing stored"
    before = visible(decode(ids[max(0, n - _AROUND) : n]))
    stored = beside[0].token if beside else None
    table = Table(box=box.SIMPLE_HEAD, border_style="dim", header_style="dim", padding=(0, 1), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("THE PROMPT", overflow="fold", ratio=1)
    table.add_column(Text(visible(f"STORED: {who}")), overflow="fold", ratio=1)
    table.add_row(
        "text",
        Text.assemble((before, "dim"), (visible(decode(ids[n : n + _AROUND])), "bold")),
        Text.assemble((before if beside else "", "dim"), (visible(decode(found.stored_next[:_AROUND])), "bold")),
    )
    table.add_row(
        f"token {n:,}",
        Text(_token_text(found.asked_token, decode)),
        Text(_token_text(stored, decode) if stored is not None or not beside else "it ends here"),
    )
    console.print(table)


def _token_text(token: int | None, decode: Callable[[Ids], str]) -> str:
    return "-" if token is None else f"{token}  {visible(repr(decode([token])))}"


def _lines(found: Explanation, asker: _Asker) -> list[str]:
    lines = []
    if found.matched and found.beside:
        named = ", ".join(f"{_label(b.sequence)}{', which has expired' if b.expired else ''}" for b in found.beside)
        more = f" and {found.beside_count - len(found.beside):,} more" if found.beside_count > len(found.beside) else ""
        lines.append(f"shared with {named}{more}")
    for other in found.others:
        lines.append(_other_text(other, asker))
    if (elsewhere := found.elsewhere) is not None:
        lines.append(
            f"{count_text(elsewhere.tokens, 'token')} from {elsewhere.at:,} on are stored at {elsewhere.stored_at:,} of "
            f"{_several(elsewhere.sequences)}, after other tokens: KV depends on all that comes before, so they do not count"
        )
    if found.gone is not None:
        lines.append(
            f"{found.gone.tokens:,} tokens were stored and are deleted: what is left of them is in {found.gone.where}"
        )
    if found.matched:
        reusable = min(found.matched, found.tokens - 1)
        last = " (a model computes the last token anyway)" if reusable < found.matched else ""
        lines.append(
            f"reuse saves computing {count_text(reusable, 'token')}{last}, {bytes_text(found.kv_bytes)} of KV; as it is stored, "
            f"{bytes_text(found.read_bytes)}"
        )
    if found.started and found.matched < found.tokens:
        lines.append(
            f"records are whole: the last {count_text(found.started, 'token')} of the match are stored anew with what follows"
        )
    return lines


def _other_text(other: Other, asker: _Asker) -> str:
    fields = _fields(other, asker)
    why = [f"{name} is {_short(stored)}, asked for {_short(asked)}" for name, (stored, asked) in fields.items()]
    if other.fidelity is not None:
        why.append(f"its fidelity is {other.fidelity!r}, asked for is {EXACT!r} or that of --codec")
    return (
        f"{count_text(other.tokens, 'token')} of {_several(other.sequences)} agree and do not count: {'; '.join(why)}"
    )


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."


def _several(sequences: list[Sequence]) -> str:
    return ", ".join(_label(sequence) for sequence in sequences[:2]) or "a sequence"


def _label(sequence: Sequence) -> str:
    return sequence.name or sequence.key[:KEY_SHOWN]
