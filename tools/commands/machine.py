"""`kvdb doctor`: what a store runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from kvdb.tools.commands.arguments import HEALTH, Json

app: Final = typer.Typer()


@app.command(epilog="Example: kvdb doctor notes.kvdb --probe", rich_help_panel=HEALTH)
def doctor(
    store: Annotated[
        Path | None,
        typer.Argument(
            metavar="[STORE]",
            help="Folder of a store, or an empty one for a store to be. Default: the machine alone.",
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also measure an fsync, in a file beside the store that is removed again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a store runs on: disk, memory, limits, versions; what is slow or unsafe there, and what to change.

    Writes nothing without --probe. Exits 1 if something makes the store unsafe or unusable.
    """
    from kvdb.tools.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(store, probe=probe, as_json=as_json))
