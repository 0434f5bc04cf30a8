"""`kvdb report`, `plot` and `trace`: a store, or a generation, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from kvdb.tools.commands.arguments import LOOK, Json, Store

app: Final = typer.Typer()

_Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="What 'kvdb ask --trace FILE' wrote, to be shown too.", show_default=False),
]


@app.command(epilog="Example: kvdb report notes.kvdb -o report.html", rich_help_panel=LOOK)
def report(
    store: Store,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The page, one HTML file.", show_default=False)
    ] = None,
    sequence: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SEQUENCE",
            help="Map the keys of this one, by name or key; may be repeated.",
            show_default="the longest four",
        ),
    ] = None,
    trace: _Trace = None,
    as_json: Json = False,
) -> None:
    """Show a store on one page: prefix tree, bytes, uses, keys by layer and position, all sequences.

    The page needs no network and no server. What is damaged is listed, the rest is shown; exits 1 then. --json prints what
    the page is made of.
    """
    from kvdb.tools.report import command

    raise typer.Exit(command.report(store, output, sequences=sequence or [], trace=trace, as_json=as_json))


@app.command(epilog="Example: kvdb plot notes.kvdb norms -o norms.svg", rich_help_panel=LOOK)
def plot(
    store: Store,
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="tree, bytes, hits, ages, norms or widths; with --trace skew or stages.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The SVG file.", show_default=False)],
    sequence: Annotated[
        str | None,
        typer.Option(metavar="SEQUENCE", help="Of norms and widths: whose.", show_default="the longest"),
    ] = None,
    trace: _Trace = None,
    as_json: Json = False,
) -> None:
    """Draw one picture of the report as an SVG file."""
    from kvdb.tools.report import command

    raise typer.Exit(command.plot(store, what, output, sequence=sequence, trace=trace, as_json=as_json))


@app.command(epilog="Example: kvdb trace steps.json", rich_help_panel=LOOK)
def trace(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="What 'kvdb ask --trace FILE' wrote.", show_default=False)
    ],
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Layers of this stage alone, such as read.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Print where the time of a generation went, by stage and by layer, and how much of reading was hidden behind computing."""
    from kvdb.tools.trace import show_trace

    raise typer.Exit(show_trace(file, stage=stage, as_json=as_json))
