"""Arguments that several commands take, and the panels of the help that commands stand in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

LOOK: Final = "Look inside"
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
