"""`kvdb verify`, `repair`, `compact` and `abstracts`: a store as it should be."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvdb.errors import InvalidInput
from kvdb.tools import inspect, maintain
from kvdb.tools.commands.arguments import HEALTH, Json, SomeSequence, Store

app: Final = typer.Typer()


@app.command(epilog="Example: kvdb verify notes.kvdb", rich_help_panel=HEALTH)
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
