"""`kvdb export` and `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from kvdb.tools import maintain
from kvdb.tools.commands.arguments import MOVE, Json, OneSequence, Store, StoreToWrite

app: Final = typer.Typer()


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
