"""What all pictures share: text, axes, colours. Pictures are SVG without scripts, links or fonts; their colours follow the reader's theme.

The sequential scale is cividis, which looks alike with and without colour vision (Nunez et al., 2018, PLOS ONE 13(7)); kinds have
Okabe and Ito's colours.
"""

from __future__ import annotations

import math
from html import escape
from typing import Final

from kvdb.tools.output import visible

WIDTH: Final = 760
SCALE: Final = (
    "#00224e", "#0f2f6b", "#2b3d6d", "#414d6b", "#565c6c", "#696c71", "#7d7c77", "#918e78", "#a69f75", "#bbb16c",
    "#d2c55e", "#e9d94b",
)  # fmt: skip
"""From low to high."""
KINDS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a", "#b8a800")
STYLE: Final = (
    """
.picture { --ink: #1d2329; --soft: #5c6670; --line: #dde1e5; --paper: #ffffff; --bar: #3f6d9c; --bad: #b3261e; --empty: #eceef0 }
@media (prefers-color-scheme: dark) {
  .picture { --ink: #e6e9ec; --soft: #9aa5b0; --line: #343b43; --paper: #16191d; --bar: #7fa8d1; --bad: #ff8a80; --empty: #23282e } }
:root[data-theme=light] .picture { --ink: #1d2329; --soft: #5c6670; --line: #dde1e5; --paper: #ffffff; --bar: #3f6d9c; --bad: #b3261e; --empty: #eceef0 }
:root[data-theme=dark] .picture { --ink: #e6e9ec; --soft: #9aa5b0; --line: #343b43; --paper: #16191d; --bar: #7fa8d1; --bad: #ff8a80; --empty: #23282e }
.picture { font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums }
.picture text { fill: var(--ink); font-size: 12px } .picture text.soft { fill: var(--soft) } .picture .strong { font-weight: 600 }
.picture rect.bad { fill: var(--bad) } .picture .paper { fill: var(--paper) } .picture .bar { fill: var(--bar) } .picture .empty { fill: var(--empty) }
.picture .line { stroke: var(--line); stroke-width: 1; fill: none } .picture .frame { stroke: var(--soft); stroke-width: 1; fill: none }
.picture .joint { stroke: var(--soft); stroke-width: 1; fill: none }
"""
    + "".join(f".picture .s{i} {{ fill: {colour} }}\n" for i, colour in enumerate(SCALE))
    + "".join(f".picture .k{i} {{ fill: {colour} }}\n" for i, colour in enumerate(KINDS))
)


def picture(name: str, said: str, height: float, parts: list[str], *, focusable: bool = False) -> str:
    """An SVG of `WIDTH` by `height`. said: what it shows, for who cannot see it."""
    more = ' tabindex="0"' if focusable else ""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" id="{name}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{clean(said)}"{more}>',
        *parts,
        "</svg>",
    ])  # fmt: skip


def alone(svg: str) -> str:
    """A picture as a file of its own: with its style and a background."""
    head, rest = svg.split("\n", 1)
    return f'{head}\n<style>{STYLE}</style>\n<rect class="paper" width="100%" height="100%"/>\n{rest}\n'


def clean(text: str) -> str:
    return escape(visible(text).replace("\n", " "))


def text(x: float, y: float, said: str, *, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    where = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{where}{named}>{clean(said)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str, said: str = "") -> str:
    title = f"><title>{clean(said)}</title></rect>" if said else "/>"
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" class="{kind}"{title}'


def line(x: float, y: float, to_x: float, to_y: float, kind: str = "line") -> str:
    return f'<path class="{kind}" d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"/>'


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers of low..high, 1, 2 or 5 times a power of ten apart; `about` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def shortened(said: str, characters: int) -> str:
    said = visible(said)
    return said if len(said) <= characters else said[: characters - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number(value: float) -> str:
    """Three significant digits, all of a whole number's, thousands apart."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.2e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, digits):,.{digits}f}"
