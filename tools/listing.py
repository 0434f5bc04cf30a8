"""Rows under column heads: a table that fits the terminal, or, where there are many rows, plain lines, of which ten thousand take 0.1 s."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

MANY: Final = 1000
"""Rows from which on a table is plain: laying one out takes rich about a millisecond a row."""

Cell = tuple[str, str]
"""Text, and its style."""


class Column(NamedTuple):
    """right: of numbers; folds: long text goes on in the next line, other columns keep theirs whole."""

    title: str
    right: bool = False
    folds: bool = False


def print_rows(console: Console, columns: list[Column], rows: Iterable[list[Cell]]) -> None:
    """Zero case: the heads alone."""
    found = list(rows)
    if len(found) >= MANY:
        for line in _plain(columns, found):
            print(line, file=console.file)
        return
    table = Table(box=box.SIMPLE_HEAD, border_style="dim", header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        if column.folds:
            table.add_column(column.title, overflow="fold")
        else:
            table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for row in found:
        table.add_row(*(Text(text, style=style) for text, style in row))
    console.print(table)


def _plain(columns: list[Column], rows: list[list[Cell]]) -> Iterable[str]:
    found = [[column.title for column in columns], *([text for text, _ in row] for row in rows)]
    widths = [max(map(_width, texts)) for texts in zip(*found, strict=True)]
    for row in found:
        padded = [_pad(text, width, c.right) for text, width, c in zip(row, widths, columns, strict=True)]
        yield "  ".join(padded).rstrip()


def _width(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def _pad(text: str, width: int, right: bool) -> str:
    width -= _width(text) - len(text)
    return text.rjust(width) if right else text.ljust(width)
