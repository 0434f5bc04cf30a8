"""`kvdb ask`: the main job. A question about a document, answered from KV on disk.

Bad input is refused before the model is loaded wherever that can be known. The answer goes to stdout, everything about it
to stderr. torch and transformers are imported inside: `kvdb ls` must not wait for them.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from kvdb.codecs import CodecPlan
from kvdb.entries import check_name
from kvdb.errors import InvalidInput, OlderFormat, StoreNotFound
from kvdb.sizes import parse_bytes
from kvdb.store import KVDB, UNLIMITED
from kvdb.tools.output import Interrupted, print_json, stderr_console, visible
from kvdb.tools.progress import prefill_bar
from kvdb.tools.prompt import Prompt, build_prompt
from kvdb.tools.sizes import bytes_text, parse_seconds, seconds_text, share_text
from kvdb.tools.streamer import AnswerStream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvdb.runtime import Attachment
    from kvdb.runtime.selection import Selector
    from kvdb.tools.models import LoadedModel


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints, field for field.

    restore_seconds     opening the store, hashing the weights, finding the stored prefix and mapping it
    time_to_first_token_seconds  restore + prefill + the first step of decoding; loading the model is not in it
    kv_bytes_stored     KV of this sequence on disk, shared prefixes included
    kv_bytes_read       requested from segments while decoding
    """

    answer: str
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float
    restore_seconds: float
    time_to_first_token_seconds: float
    decode_tokens: int
    decode_seconds: float
    kv_bytes_stored: int
    kv_bytes_read: int
    kv_bytes_resident_peak: int
    mass_covered_estimate: float


class _Kept(NamedTuple):
    """Under which name prompt and answer are saved, if at all, and for how long."""

    name: str | None
    ttl_s: float | None


class _Shown(NamedTuple):
    """What the table shows beyond the result."""

    read_share: float
    limit: str


def ask(
    store: Path,
    question: str,
    *,
    document: str,
    model: str,
    budget: str | None,
    threshold: float | None,
    mass: float | None,
    certified: float | None,
    exact: bool,
    selector: str | None,
    codec: str,
    max_new_tokens: int,
    name: str | None,
    ttl: str | None,
    opening: dict[str, Any],
    prefetch: bool | None,
    threads: int | None,
    stats: Path | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """See `kvdb ask --help`.

    document  a path or "-"
    budget    a share or a number of tokens, as text
    selector  a name, or a name with settings; None: the default
    codec     what KV is stored with, as text
    opening   options of `KVDB.open`
    """
    shares: dict[str, Any] = {"threshold": threshold, "mass": mass, "certified": certified}
    limit = check_limits(budget, shares, exact=exact)
    if not question.strip():
        raise InvalidInput("question: empty, expected some text; put it in quotes after the store")
    if not _is_unicode(question):
        raise InvalidInput("question: not UTF-8, expected text; check the terminal's encoding")
    if name is not None:
        check_name(name)
    if ttl is not None and name is None:
        raise InvalidInput(f"--ttl {ttl}: no --name, expected one; what has no name goes when room is needed")
    keep = _Kept(name, None if ttl is None else parse_seconds("--ttl", ttl))
    if opening["size_cap"] not in (None, UNLIMITED):
        parse_bytes("--size-cap", opening["size_cap"])
    if opening["host_budget"] is not None:
        parse_bytes("--host-budget", opening["host_budget"])
    plan = CodecPlan.parse(codec)
    text = read_document(document)
    _check_store(store)
    for option, file in (("--stats", stats), ("--trace", trace)):
        if file is not None and not file.parent.is_dir():
            raise InvalidInput(f"{option} {file}: no folder {file.parent}, expected an existing one")

    console = stderr_console()
    chosen = _selector(selector, certified, console)
    loaded = load(model, console, threads)
    prompt = build_prompt(loaded.tokenizer, text, question)
    _check_context(loaded, prompt, max_new_tokens)

    from kvdb.runtime import attach

    loaded.model.config._name_or_path = loaded.name  # shown by `kvdb ls`: a short name rather than a cache folder
    started = time.perf_counter()
    with (
        KVDB.open(store, **opening) as db,
        attach(
            loaded.model,
            db,
            budget=limit,
            **shares,
            exact=exact,
            selector=chosen,
            codec=plan,
            trace=trace,
            prefetch=prefetch,
        ) as kv,
    ):
        result, shown = _answer(kv, loaded, prompt, max_new_tokens, keep, console, as_json, started)
    if stats is not None:
        stats.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    if as_json:
        print_json(msgspec.to_builtins(result))
    else:
        console.print()
        console.print(_table(result, shown, name))


# -- input, checked before the model is loaded


def check_limits(budget: str | None, shares: dict[str, float | None], *, exact: bool) -> float | int | None:
    """What bounds attention: at most one of the options; returns the budget.

    shares  the other options by name
    raises  InvalidInput
    """
    given = [f"--{name} {value}" for name, value in {"budget": budget, **shares}.items() if value is not None]
    if exact:
        given.insert(0, "--exact")
    if len(given) > 1:
        raise InvalidInput(f"{' and '.join(given)}: expected one of them; --exact attends to everything")
    for name, share in shares.items():
        if share is not None and not 0.0 < share < 1.0:
            raise InvalidInput(f"--{name} {share}: expected a share between 0 and 1")
    return parse_budget(budget)


def parse_budget(text: str | None) -> float | int | None:
    """A share if written with a point, a number of tokens if written without.

    raises  InvalidInput
    """
    if text is None:
        return None
    found: float | int
    try:
        found = int(text)
        good = found >= 1
    except ValueError:
        try:
            found = float(text)
            good = 0.0 < found <= 1.0
        except ValueError:
            good = False
    if not good:
        raise InvalidInput(
            f"--budget {text}: expected a share above 0 and up to 1.0, such as 0.2, or a number of tokens such as 2048"
        )
    return found


def _selector(text: str | None, certified: float | None, console: Console) -> Selector:
    """raises  InvalidInput; Unsupported for one that cannot prove what is asked"""
    with console.status("loading torch and transformers"):
        from kvdb.runtime.selection import DEFAULT_SELECTOR, Certified
        from kvdb.tools.selectors import parse_selector
    found = parse_selector(text or DEFAULT_SELECTOR)
    if certified is not None:
        Certified.of(certified).check(found)
    return found


def read_document(source: str) -> str:
    """Text of a file, or of stdin for "-".

    raises  InvalidInput for a missing, unreadable, empty or not UTF-8 document
    """
    where = "document from stdin" if source == "-" else f"document {source}"
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as e:
        raise InvalidInput(f"{where}: {e.strerror}, expected a text file, or - for stdin") from e
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InvalidInput(
            f"{where}: byte {data[e.start]:#04x} at offset {e.start} is not UTF-8, expected UTF-8 text; "
            "convert it first, for example with iconv or pdftotext"
        ) from e
    if not text.strip():
        raise InvalidInput(f"{where}: empty ({len(data)} bytes), expected some text")
    return text


def _is_unicode(text: str) -> bool:
    """False for arguments with bytes that the terminal's encoding could not decode."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _check_store(store: Path) -> None:
    """Refuse what is no store; what is not there yet is created later, when there is something to store."""
    try:
        KVDB.open(store, "r").close()
    except OlderFormat:  # opening it for writing upgrades it
        pass
    except StoreNotFound:
        nearest = next(folder for folder in store.absolute().parents if os.path.lexists(folder))
        if not nearest.is_dir():
            raise InvalidInput(f"{store}: {nearest} is a file, expected a folder; choose another path") from None


def _check_context(loaded: LoadedModel, prompt: Prompt, max_new_tokens: int) -> None:
    config = loaded.model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    tokens = len(prompt.ids)
    if context is not None and tokens + max_new_tokens > context:
        advice = (
            f"ask for at most {context - tokens} new tokens"
            if tokens < context
            else f"shorten the document, which is {prompt.document_tokens:,} tokens"
        )
        raise InvalidInput(
            f"prompt: {tokens:,} tokens and up to {max_new_tokens:,} new ones, expected at most {context:,} in all, "
            f"the context of {loaded.name}; {advice}"
        )


# -- the job


def load(name: str, console: Console, threads: int | None) -> LoadedModel:
    """A model by name, saying on the console what takes long. threads: to compute with; None: torch's choice."""
    with console.status("loading torch and transformers") as status:
        import torch
        from transformers.utils import logging

        from kvdb.tools.models import load_model

        logging.set_verbosity_error()  # its advice is for programmers
        if threads is not None:
            torch.set_num_threads(threads)
        status.update(f"loading {visible(name)}")
        return load_model(name, progress=lambda line: console.print(line, style="dim", soft_wrap=True))


def _answer(
    kv: Attachment,
    loaded: LoadedModel,
    prompt: Prompt,
    max_new_tokens: int,
    keep: _Kept,
    console: Console,
    as_json: bool,
    started: float,
) -> tuple[Result, _Shown]:
    import torch

    input_ids = torch.tensor([prompt.ids])
    with _says_what_is_kept(kv, prompt):
        reused = kv.match(input_ids[:, :-1]).tokens
        matched = time.perf_counter()
        if reused:
            console.print(f"reused {reused:,} of {len(prompt.ids):,} prompt tokens", style="dim")
        with prefill_bar(console, total=len(prompt.ids) - 1, reused=reused) as progress:
            cache = kv.cache(input_ids, progress=progress)
        console.print()
        stream = AnswerStream(loaded.tokenizer, (lambda _: None) if as_json else _write)
        before = time.perf_counter()
        loaded.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=stream,
            **_stop_tokens(loaded),
        )
        done = time.perf_counter()
        if not as_json:
            _write("\n")
        if keep.name is not None:
            kv.save(cache, name=keep.name, ttl_s=keep.ttl_s)
    stats = cache.stats()
    result = Result(
        answer=stream.text.strip(),
        prompt_tokens=len(prompt.ids),
        reused_tokens=stats["reused_tokens"],
        prefill_seconds=stats["prefill_seconds"],
        restore_seconds=matched - started + stats["restore_seconds"],
        time_to_first_token_seconds=(stream.first_token_at or done) - started,
        decode_tokens=stream.tokens,
        decode_seconds=done - before,
        kv_bytes_stored=stats["kv_bytes_stored"],
        kv_bytes_read=stats["kv_bytes_read"],
        kv_bytes_resident_peak=stats["kv_bytes_resident_peak"],
        mass_covered_estimate=stats["mass_covered_estimate"],
    )
    return result, _Shown(stats["kv_bytes_read_share"], "all" if kv.rule is None else "chosen chunks")


@contextmanager
def _says_what_is_kept(kv: Attachment, prompt: Prompt) -> Iterator[None]:
    """Ctrl-C leaves whole blocks of the prompt in the store; asking again goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        kept = kv.db.match(kv.identity(), _array(prompt.ids)).tokens
        advice = "the same command goes on from there" if kept else "nothing had been stored yet"
        raise Interrupted(f"{kept:,} of {len(prompt.ids):,} prompt tokens are kept in {kv.db.path}; {advice}") from None


def _array(ids: list[int]) -> Any:
    import numpy as np

    return np.asarray(ids, "<u4")


def _stop_tokens(loaded: LoadedModel) -> dict[str, Any]:
    """The end tokens of the model and of its tokenizer: chat models end their turn with either."""
    of_model: Any = loaded.model.generation_config.eos_token_id
    found = [*(of_model if isinstance(of_model, list) else [of_model]), loaded.tokenizer.eos_token_id]
    stop = list(dict.fromkeys(token for token in found if token is not None))
    # Only rows of a batch that end early are padded, and there is one row; `generate` warns without it.
    return {"eos_token_id": stop or None, "pad_token_id": stop[0] if stop else 0}


def _write(piece: str) -> None:
    sys.stdout.write(visible(piece))
    sys.stdout.flush()


# -- what it cost


def _table(result: Result, shown: _Shown, name: str | None) -> Table:
    table = Table(box=box.HORIZONTALS, show_header=False, border_style="dim", padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(style="dim")
    rate = result.decode_tokens / result.decode_seconds if result.decode_seconds else 0.0
    computed = result.prompt_tokens - 1 - result.reused_tokens
    prefill_rate = f"{computed / result.prefill_seconds:,.0f} tokens/s" if computed > 0 else ""
    rows = [
        ("prompt", f"{result.prompt_tokens:,} tokens", f"saved as {name}" if name else ""),
        ("reused", f"{result.reused_tokens:,} tokens", share_text(result.reused_tokens / result.prompt_tokens)),
        ("prefill", seconds_text(result.prefill_seconds), prefill_rate),
        ("restore", seconds_text(result.restore_seconds), ""),
        ("first token after", seconds_text(result.time_to_first_token_seconds), ""),
        ("decode", f"{rate:.1f} tokens/s", f"{result.decode_tokens} tokens in {seconds_text(result.decode_seconds)}"),
        ("KV on disk", bytes_text(result.kv_bytes_stored), ""),
        ("KV read to decode", bytes_text(result.kv_bytes_read), f"{share_text(shown.read_share)} of reading all KV each step"),
        ("KV in memory, peak", bytes_text(result.kv_bytes_resident_peak), ""),
        ("attention covered", share_text(result.mass_covered_estimate), "estimated" if result.mass_covered_estimate < 1 else "all of it"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*(visible(cell) for cell in row))
    return table
