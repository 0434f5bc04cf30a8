"""The `kvdb` command: options, help, and the one place where errors become a line and an exit code.

Here stand only names and help texts; the work is in `ask`, `inspect`, `maintain` and `evaluate`. Nothing imported here imports torch.
KVDB_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from typer.core import TyperGroup

from kvdb import __version__
from kvdb.errors import InvalidInput
from kvdb.geometry import CHUNK_TOKENS
from kvdb.tools import inspect, maintain
from kvdb.tools.ask import ask as run_ask
from kvdb.tools.evaluate.command import evaluate
from kvdb.tools.output import BAD_INPUT, print_json, report_error

_UsageError: Final[Any] = typer.BadParameter.__mro__[1]  # typer exports only its subclass


class _Commands(TyperGroup):
    """The commands, with errors translated. Usage errors keep typer's own form unless --json asks for JSON."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta["json"] = "--json" in options
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        as_json = ctx.meta["json"]
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except _UsageError as e:
            if not as_json:
                raise
            print_json({"error": {"kind": "usage", "message": e.format_message()}})
            raise typer.Exit(BAD_INPUT) from None
        except (Exception, KeyboardInterrupt) as e:
            if os.environ.get("KVDB_DEBUG") == "1" or (isinstance(e, OSError) and e.errno == errno.EPIPE):
                raise
            raise typer.Exit(report_error(e, as_json=as_json)) from None


app: Final = typer.Typer(
    name="kvdb",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

HEALTH: Final = "Keep a store healthy"
SPACE: Final = "Keep a store small"
MOVE: Final = "Move sequences"
JUDGE: Final = "Judge"

Store = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.", show_default=False)]
StoreToWrite = Annotated[
    Path, typer.Argument(metavar="STORE", help="Folder of the store; created if missing.", show_default=False)
]
_NAMING: Final = "Its name, its key, or a unique beginning of the key."
OneSequence = Annotated[str, typer.Argument(metavar="SEQUENCE", help=_NAMING, show_default=False)]
SomeSequence = Annotated[
    str | None, typer.Argument(metavar="[SEQUENCE]", help=f"{_NAMING} Default: all.", show_default=False)
]
Model = Annotated[
    str, typer.Option(metavar="MODEL", help="smollm2, gemma3-270m, a model folder, or a hub id OWNER/NAME.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Threads to compute with; default: torch's choice.")
]
Stats = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write what --json prints to this file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _version(value: bool) -> None:
    if value:
        print(f"kvdb {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 fine, 1 a problem was found, 2 usage or bad input, 130 interrupted.")
def _kvdb(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A local database for the KV caches of language models: prefill once, keep on disk, decode from selected chunks.

    Example: `kvdb ask notes.kvdb "What is decided?" --document notes.txt`
    """


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


@app.command(epilog="Example: kvdb ls notes.kvdb")
def ls(store: Store, as_json: Json = False) -> None:
    """List the sequences of a store, oldest first."""
    raise typer.Exit(inspect.list_sequences(store, as_json=as_json))


@app.command(epilog="Example: kvdb info notes.kvdb --json")
def info(store: Store, as_json: Json = False) -> None:
    """Show what a store holds and the room it takes."""
    raise typer.Exit(inspect.show_info(store, as_json=as_json))


@app.command(epilog="Example: kvdb verify notes.kvdb")
def verify(
    store: Store,
    untrusted: Annotated[
        bool,
        typer.Option("--untrusted", help="For a store from somebody else: check in a process that can do no harm."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every byte of a store; exits 1 if anything is wrong.

    It repairs nothing; 'kvdb repair' does.
    """
    raise typer.Exit((inspect.verify_unknown if untrusted else inspect.verify)(store, as_json=as_json))


@app.command(epilog="Example: kvdb repair notes.kvdb --apply", rich_help_panel=HEALTH)
def repair(
    store: Store,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; otherwise only say what would be done.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make the catalog anew from the stored KV, whatever state it is in.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is wrong with a store and what would mend it; --apply mends it.

    Nothing is deleted: what is taken out goes to STORE/quarantine. Exits 1 if a dry run found problems, or if some are left.
    """
    raise typer.Exit(maintain.repair(store, apply=apply, rebuild=rebuild, as_json=as_json))


@app.command(epilog="Example: kvdb compact notes.kvdb report --codec int4", rich_help_panel=HEALTH)
def compact(
    store: Store,
    sequence: SomeSequence = None,
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="CODEC",
            help="Instead, store KV with another codec: raw, int8, int4, int2, planes:bits=6+int8, balanced, small; blosc loses nothing, "
            "for what is seldom read; 'int4;0-1=raw' excepts layers.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge the small segments that appended turns leave, of one sequence or of all; or store them with another codec.

    It needs room for a copy of what it writes. The old files go with a later write, or with 'kvdb gc'. What a lossy codec
    stored is reused by 'kvdb ask --codec' of the same name, never where exact KV is asked for.
    """
    raise typer.Exit(maintain.compact(store, sequence, codec=codec, as_json=as_json))


@app.command(epilog="Example: kvdb abstracts notes.kvdb report --set sketch", rich_help_panel=HEALTH)
def abstracts(
    store: Store,
    sequence: SomeSequence = None,
    wanted: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME",
            help="box, sketch, ...: have exactly these; may be repeated. Default: show what is there.",
            show_default=False,
        ),
    ] = None,
    none: Annotated[bool, typer.Option("--none", help="Have none: they are made from the keys when needed.")] = False,
    as_json: Json = False,
) -> None:
    """Show the abstracts that selection reads, or say which one sequence, or all, shall have.

    What is missing or damaged is made from the stored keys, what is not named goes; KV stays as it is. What sequences share
    changes for all of them.
    """
    if wanted and none:
        raise InvalidInput(f"--none and --set {wanted[0]}, expected one of them")
    if wanted or none:
        raise typer.Exit(maintain.set_abstracts(store, sequence, wanted or [], as_json=as_json))
    raise typer.Exit(inspect.list_abstracts(store, sequence, as_json=as_json))


@app.command(epilog="Example: kvdb pin notes.kvdb report", rich_help_panel=SPACE)
def pin(store: Store, sequence: OneSequence, as_json: Json = False) -> None:
    """Keep a sequence: neither eviction, expiry nor rm takes it."""
    raise typer.Exit(maintain.pin(store, sequence, pinned=True, as_json=as_json))


@app.command(epilog="Example: kvdb unpin notes.kvdb report", rich_help_panel=SPACE)
def unpin(store: Store, sequence: OneSequence, as_json: Json = False) -> None:
    """Let a pinned sequence go again."""
    raise typer.Exit(maintain.pin(store, sequence, pinned=False, as_json=as_json))


@app.command(epilog="Example: kvdb rm notes.kvdb report", rich_help_panel=SPACE)
def rm(store: Store, sequence: OneSequence, as_json: Json = False) -> None:
    """Remove a sequence and the KV that only it uses."""
    raise typer.Exit(maintain.remove(store, sequence, as_json=as_json))


@app.command(epilog="Example: kvdb evict notes.kvdb --to 10GB", rich_help_panel=SPACE)
def evict(
    store: Store,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Stop when KV takes this much; default: go on while any may go.", show_default=False
        ),
    ] = None,
    named: Annotated[bool, typer.Option("--named", help="Named sequences may go too; pinned ones never do.")] = False,
    as_json: Json = False,
) -> None:
    """Let unnamed KV go now, least recently used first.

    Exits 1 if what must stay is more than SIZE.
    """
    raise typer.Exit(maintain.evict(store, to=to, named=named, as_json=as_json))


@app.command(epilog="Example: kvdb cap notes.kvdb 50GB", rich_help_panel=SPACE)
def cap(
    store: Store,
    size: Annotated[
        str | None,
        typer.Argument(
            metavar="[SIZE|unlimited]", help="Such as 50GB or 512MiB; nothing: show it.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bound what a store may take on disk, all its files counted.

    The store remembers the bound. To keep it, unnamed KV goes, least recently used first. Exits 1 if what must stay is more
    than SIZE.
    """
    raise typer.Exit(maintain.cap(store, size, as_json=as_json))


@app.command(epilog="Example: kvdb gc notes.kvdb", rich_help_panel=SPACE)
def gc(store: Store, as_json: Json = False) -> None:
    """Remove now what only waits: expired sequences, deleted files."""
    raise typer.Exit(maintain.gc(store, as_json=as_json))


@app.command("export", epilog="Example: kvdb export notes.kvdb report report.zip", rich_help_panel=MOVE)
def export_(
    store: Store,
    sequence: OneSequence,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A new file, a zip that Zarr can open.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Write a sequence, its KV included, to one file that another store can take in."""
    raise typer.Exit(maintain.export_sequence(store, sequence, file, as_json=as_json))


@app.command("import", epilog="Example: kvdb import notes.kvdb report.zip", rich_help_panel=MOVE)
def import_(
    store: StoreToWrite,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What 'kvdb export' wrote.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another name than the one in the file.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Take in a sequence that 'kvdb export' wrote.

    Every byte is verified before anything becomes visible.
    """
    raise typer.Exit(maintain.import_sequence(store, file, name=name, as_json=as_json))


@app.command(
    "eval", epilog="Example: kvdb eval --selector box --selector sketch:bits=4 --plot eval.svg", rich_help_panel=JUDGE
)
def eval_(
    model: Model = "smollm2",
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Length of each text; may be repeated.", show_default="4000"),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a stored record.")] = CHUNK_TOKENS,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEYS[:SETTING=VALUE,...][+VALUES][;LAYERS=...]",
            help="How stored KV is encoded: raw, int8, int4, int2, planes, as in planes:bits=6+int8, balanced, small; other layers "
            "otherwise, as in int4;0-1=int8; may be repeated. With --budget 1.0, what a codec alone costs.",
            show_default="raw",
        ),
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:SETTING=VALUE,...]",
            help="centroid, sketch, box, mean, oracle or another package's, with settings as in box:beta=1; may be repeated.",
            show_default="all of ours",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE|TOKENS", help="As 'kvdb ask --budget'; may be repeated.", show_default="0.05, 0.1, 0.2"
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Read every record that is estimated to have this share of attention."),
    ] = None,
    mass: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Read until this share of attention is estimated to be covered."),
    ] = None,
    certified: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Read until at most this share of attention is proven to be unread."),
    ] = None,
    positions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens at the end of each text that are predicted.")
    ] = 256,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="prose, reference, code, or a UTF-8 file of your own; may be repeated.",
            show_default="the first three",
        ),
    ] = None,
    needles: Annotated[int, typer.Option(min=0, metavar="N", help="Pass keys hidden at each of five depths.")] = 1,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Decides where texts begin, and the keys.")] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Also show every layer.")] = False,
    threads: Threads = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw quality against bytes read to this SVG file.")
    ] = None,
    stats: Stats = None,
    as_json: Json = False,
) -> None:
    """Measure what selection and codecs cost in quality, per byte, against dense attention over exact KV.

    On real text and a real model: KL, top-1 agreement, perplexity, greedy tokens until the first other one, pass keys found, and
    the attention mass that was read. *oracle* ranks by the exact keys: no selector can be expected to do better.
    """
    evaluate(
        model=model,
        tokens=tokens,
        chunk_tokens=chunk_tokens,
        codecs=codec,
        selectors=selector,
        budgets=budget,
        thresholds=threshold,
        masses=mass,
        certified=certified,
        positions=positions,
        texts=text,
        needles=needles,
        seed=seed,
        layers=layers,
        threads=threads,
        stats=stats,
        plot=plot,
        as_json=as_json,
    )


def main() -> None:
    # Waiting OpenMP threads that spin starve the others where cores are shared: a busy 2-core machine decoded 1.4 tokens/s
    # with the default and 11 with this. Read when torch is loaded, so it must be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="kvdb")


if __name__ == "__main__":
    main()
