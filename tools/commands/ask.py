"""`kvdb ask`: the one command that runs a model to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from kvdb.tools.ask import ask as run_ask
from kvdb.tools.commands.arguments import Json, Model, Stats, StoreToWrite, Threads

app: Final = typer.Typer()


@app.command(epilog='Example: kvdb ask notes.kvdb "What was decided?" --document notes.txt')
def ask(
    store: StoreToWrite,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.", show_default=False)],
    document: Annotated[str, typer.Option(metavar="FILE", help="UTF-8 text, or - for stdin.", show_default=False)],
    model: Model = "smollm2",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|TOKENS",
            help="How much of the stored prompt each KV head attends to per step: a share (0.2) or tokens (2048). "
            "Default: 10 %, at most 2048 tokens.",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Instead of a budget: read every record whose share of attention, as estimated, is at least this (0.004).",
            show_default=False,
        ),
    ] = None,
    mass: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Instead of a budget: read until this share of attention mass, as estimated, is attended to (0.95).",
            show_default=False,
        ),
    ] = None,
    certified: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Instead of a budget: read until at most this share of every head's attention is proven unread (0.05).",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Attend to everything.")] = False,
    selector: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:SETTING=VALUE,...]",
            help="By what is chosen: centroid, sketch, box, mean or another package's, with settings as in sketch:bits=4.",
            show_default="centroid",
        ),
    ] = None,
    codec: Annotated[
        str,
        typer.Option(
            metavar="CODEC",
            help="Store KV as raw, int8, int4, int2, planes:bits=6+int8, ...; balanced and small are such. What the same codec stored is reused.",
        ),
    ] = "raw",
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 200,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Save prompt and answer under this name, which keeps them from eviction."),
    ] = None,
    ttl: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Let what --name saves go after 90s, 30m, 12h or 7d.", show_default=False),
    ] = None,
    size_cap: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="As 'kvdb cap': most the store may take, such as 50GB.", show_default=False),
    ] = None,
    durability: Annotated[
        Literal["commit", "relaxed"],
        typer.Option(help="relaxed: commits do not wait for the disk; a power failure may lose the last ones."),
    ] = "commit",
    verify: Annotated[
        Literal["first", "always", "never"], typer.Option(help="When stored KV is compared with its digests.")
    ] = "first",
    read_mode: Annotated[
        Literal["auto", "mmap", "pread", "direct"],
        typer.Option(help="How stored KV is read; pread for network file systems, direct past the page cache."),
    ] = "auto",
    host_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for what is read past the page cache, such as 2GiB.", show_default=False
        ),
    ] = None,
    prefetch: Annotated[
        bool | None,
        typer.Option(
            "--prefetch/--no-prefetch",
            help="Read ahead what the next layer is likely to choose.",
            show_default="where steps turn out to be faster",
        ),
    ] = None,
    threads: Threads = None,
    stats: Stats = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write where the time went, by stage, layer and step, for chrome://tracing or Perfetto.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a question about a document.

    The document is computed once and its KV kept in the store, so the next question on it starts at once. The answer goes
    to stdout; progress and a table of what it cost go to stderr.
    """
    run_ask(
        store,
        question,
        document=document,
        model=model,
        budget=budget,
        threshold=threshold,
        mass=mass,
        certified=certified,
        exact=exact,
        selector=selector,
        codec=codec,
        max_new_tokens=max_new_tokens,
        name=name,
        ttl=ttl,
        opening={
            "size_cap": size_cap,
            "durability": durability,
            "verify": verify,
            "read_mode": read_mode,
            "host_budget": host_budget,
        },
        prefetch=prefetch,
        threads=threads,
        stats=stats,
        trace=trace,
        as_json=as_json,
    )
