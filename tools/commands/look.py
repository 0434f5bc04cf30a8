"""`kvdb ls`, `info` and `verify`: what is in a store. None of them changes anything."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvdb.tools import inspect
from kvdb.tools.commands.arguments import Json, Store

app: Final = typer.Typer()


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
