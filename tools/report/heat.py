"""Heat maps: a grid of numbers as an SVG that stays small, a path for each colour.

Colours are classes of equal width between the least and the greatest number, or, where these lie more than `_LOG_FROM` apart, of equal
ratios. Where few cells are far above all others, the last class holds them, and the rest can be told apart. The legend says all of it, and
that cells of which nothing is known are empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from kvdb.inspection.maps import Grid
from kvdb.tools.report.drawing import SCALE, WIDTH, line, number, picture, rect, text, ticks

_LEFT, _TOP, _RIGHT = 52, 34, 14
_LOG_FROM: Final = 100.0
_USUAL, _FAR = 0.95, 3.0
"""The scale ends at this quantile where the greatest number is more than so many times as large."""
_EMPTY: Final = "empty"


class Classes:
    """Which colour a number has.

    low, high, most  where the scale begins and ends, and the greatest number
    empty            cells of which nothing is known
    """

    def __init__(self, grid: Grid) -> None:
        known = [value for row in grid.values for value in row if value is not None]
        self.low, self.most = (min(known), max(known)) if known else (0.0, 0.0)
        self.empty = sum(value is None for row in grid.values for value in row)
        self.log = self.low > 0 and self.most / self.low > _LOG_FROM
        usual = sorted(known)[int(_USUAL * (len(known) - 1))] if known else 0.0
        self.cut = not self.log and self.low < usual < self.most / _FAR
        self.high = usual if self.cut else self.most

    def of(self, value: float | None) -> str:
        if value is None:
            return _EMPTY
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (here - low) / (high - low) if high > low else 0.0
        return f"s{min(len(SCALE) - 1, int(share * len(SCALE)))}"

    def edge(self, share: float) -> float:
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + (self.high - self.low) * share


def heat_map(name: str, title: str, grid: Grid, unit: str, across: str, said: Callable[[float], str] = number) -> str:
    """A map as SVG, and where its cells lie for a script: `data-cells` is x, y, width, height of all of them.

    unit    of the numbers, after them in the legend
    across  what columns are, such as "token"
    said    numbers as text
    """
    columns, rows = len(grid.bounds) - 1, len(grid.rows)
    wide, high = WIDTH - _LEFT - _RIGHT, max(60.0, min(18.0, max(6.0, 400 / max(rows, 1))) * rows)
    classes = Classes(grid)
    parts = [
        text(_LEFT, 18, title, kind="strong"),
        f'<g transform="translate({_LEFT} {_TOP}) scale({wide / columns:.6g} {high / rows:.6g})" shape-rendering="crispEdges" '
        f'class="cells" data-cells="{_LEFT} {_TOP} {wide} {high:.1f}">',
        *_cells(grid, classes),
        "</g>",
        f'<rect x="{_LEFT}" y="{_TOP}" width="{wide}" height="{high:.1f}" class="frame"/>',
        *_axes(grid, wide, high, across),
        *_legend(classes, _TOP + high + 50, unit, said),
    ]
    known = f"from {said(classes.low)} to {said(classes.most)} {unit}".strip()
    return picture(
        name, f"{title}: {rows} layers by {columns} columns, {known}", _TOP + high + 84, parts, focusable=True
    )


def _cells(grid: Grid, classes: Classes) -> list[str]:
    """A path for each colour, in units of cells; neighbours of a colour in a row are one piece."""
    pieces: dict[str, list[str]] = {}
    for y, row in enumerate(grid.values):
        begin = 0
        kinds = [classes.of(value) for value in row]
        for x in range(1, len(kinds) + 1):
            if x == len(kinds) or kinds[x] != kinds[begin]:
                pieces.setdefault(kinds[begin], []).append(f"M{begin} {y}h{x - begin}v1h{begin - x}z")
                begin = x
    return [f'<path class="{kind}" d="{"".join(found)}"/>' for kind, found in sorted(pieces.items())]


def _axes(grid: Grid, wide: float, high: float, across: str) -> list[str]:
    parts, last = [], grid.bounds[-1]
    step = math.ceil(len(grid.rows) / 12)
    cell = high / max(len(grid.rows), 1)
    for i in range(0, len(grid.rows), step):
        parts.append(text(_LEFT - 6, _TOP + (i + 0.5) * cell + 4, str(grid.rows[i]), anchor="end", kind="soft"))
    parts.append(text(_LEFT - 6, 18, "layer", anchor="end", kind="soft"))
    for tick in ticks(grid.bounds[0], last):
        x = _LEFT + wide * _place(grid.bounds, tick)
        parts += [line(x, _TOP + high, x, _TOP + high + 4, "frame")]
        parts.append(text(min(x, WIDTH - _RIGHT - 4), _TOP + high + 17, f"{tick:,.0f}", anchor="middle", kind="soft"))
    parts.append(text(_LEFT + wide, _TOP + high + 33, across, anchor="end", kind="soft"))
    return parts


def _place(bounds: tuple[int, ...], value: float) -> float:
    """Where a position lies, 0..1: columns are equally wide whatever they stand for."""
    for column, (start, stop) in enumerate(pairwise(bounds)):
        if value <= stop:
            return (column + (value - start) / max(stop - start, 1)) / (len(bounds) - 1)
    return 1.0


def _legend(classes: Classes, top: float, unit: str, said: Callable[[float], str]) -> list[str]:
    each = 24.0
    parts = [rect(_LEFT + each * i, top, each, 10, f"s{i}") for i in range(len(SCALE))]
    for share in (0.0, 0.5, 1.0):
        anchor = {0.0: "start", 1.0: "end"}.get(share, "middle")
        x = _LEFT + each * len(SCALE) * share
        parts.append(text(x, top + 24, said(classes.edge(share)), anchor=anchor, kind="soft"))
    right = _LEFT + each * len(SCALE) + 14
    more = ", log scale" if classes.log else f"; the last colour up to {said(classes.most)}" if classes.cut else ""
    parts.append(text(right, top + 9, unit + more, kind="soft"))
    if classes.empty:
        parts.append(rect(right, top + 15, 12, 10, _EMPTY))
        parts.append(text(right + 18, top + 24, "could not be read", kind="soft"))
    return parts
