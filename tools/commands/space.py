"""`kvdb pin`, `unpin`, `rm`, `evict`, `cap` and `gc`: what a store may keep."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from kvdb.tools import maintain
from kvdb.tools.commands.arguments import SPACE, Json, OneSequence, Store

app: Final = typer.Typer()


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
