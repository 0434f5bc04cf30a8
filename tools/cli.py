"""The `kvdb` command: options, help, and the one place where errors become a line and an exit code.

Here stand only names and help texts; the work is in `ask` and `inspect`. Nothing imported here imports torch.
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
from kvdb.tools import inspect
from kvdb.tools.ask import ask as run_ask
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

Store = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.", show_default=False)]
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
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="Folder of the store; created if missing.", show_default=False)
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.", show_default=False)],
    document: Annotated[str, typer.Option(metavar="FILE", help="UTF-8 text, or - for stdin.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="smollm2, gemma3-270m, a model folder, or a hub id OWNER/NAME.")
    ] = "smollm2",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|TOKENS",
            help="How much of the stored prompt each KV head attends to per step: a share (0.2) or tokens (2048). "
            "Default: 10 %, at most 2048 tokens.",
            show_default=False,
        ),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Attend to everything.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 200,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Save prompt and answer under this name, which keeps them from eviction."),
    ] = None,
    read_mode: Annotated[
        Literal["mmap", "pread"], typer.Option(help="How stored KV is read; pread for network file systems.")
    ] = "mmap",
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads to compute with; default: torch's choice.")
    ] = None,
    stats: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write what --json prints to this file.")
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
        exact=exact,
        max_new_tokens=max_new_tokens,
        name=name,
        read_mode=read_mode,
        threads=threads,
        stats=stats,
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
def verify(store: Store, as_json: Json = False) -> None:
    """Check every byte of a store; exits 1 if anything is wrong. Repairs nothing."""
    raise typer.Exit(inspect.verify(store, as_json=as_json))


@app.command(epilog="Example: kvdb rm notes.kvdb report")
def rm(
    store: Store,
    sequence: Annotated[
        str,
        typer.Argument(
            metavar="SEQUENCE", help="Its name, its key, or a unique beginning of the key.", show_default=False
        ),
    ],
    as_json: Json = False,
) -> None:
    """Remove a sequence and the KV that only it uses."""
    raise typer.Exit(inspect.remove(store, sequence, as_json=as_json))


def main() -> None:
    # Waiting OpenMP threads that spin starve the others where cores are shared: a busy 2-core machine decoded 1.4 tokens/s
    # with the default and 11 with this. Read when torch is loaded, so it must be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="kvdb")


if __name__ == "__main__":
    main()
