"""KL and needles found against bytes read, as an SVG that needs nothing else to be seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Final, NamedTuple

from kvdb.tools.evaluate.report import Report, Row
from kvdb.tools.sizes import bytes_text

_COLOURS: Final = ("#2f6fb0", "#d1651b", "#3a8f4d", "#8a5bb3", "#b03a4a", "#5f6b76", "#c29a1a", "#3aa0a8")
_WIDTH, _HEIGHT, _MARGIN = 360, 240, 56


class _Axis(NamedTuple):
    """Values `low`..`high` on pixels `start`..`stop`; log: equal distances are equal ratios."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def at(self, value: float) -> float:
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return self.start + (here - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> Iterator[float]:
        if not self.log:
            yield from (self.low + (self.high - self.low) * i / 4 for i in range(5))
            return
        for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            yield from (v for v in (10.0**power, 3 * 10.0**power) if self.low <= v <= self.high)


def svg(report: Report) -> str:
    """A row of panels per length: KL, and the share of needles found where any was asked. A line is a selector, of each codec."""
    lengths = sorted({row.tokens for row in report.rows})
    columns = 2 if any(row.needles for row in report.rows) else 1
    several = len({row.codec for row in report.rows}) > 1
    series: dict[str, list[Row]] = {}
    for row in report.rows:
        series.setdefault(f"{row.codec} {row.selector}" if several else row.selector, []).append(row)
    legend = 20 + 7 * max(20, *map(len, series))
    width, height = columns * (_WIDTH + _MARGIN) + legend, len(lengths) * (_HEIGHT + _MARGIN) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _label(12, 18, f"{report.model}: quality against bytes of KV and abstracts read per token", size=13),
    ]
    for index, tokens in enumerate(lengths):
        shown = {name: [row for row in rows if row.tokens == tokens] for name, rows in series.items()}
        top = 30 + index * (_HEIGHT + _MARGIN)
        parts += _panel(shown, _MARGIN, top, f"KL to dense attention, nats, {tokens:,} tokens", needles=False)
        if columns == 2:
            parts += _panel(
                shown,
                2 * _MARGIN + _WIDTH,
                top,
                "needles found, of those dense attention finds",
                needles=True,
            )
    for index, name in enumerate(series):
        x, y = width - legend + 20, 60 + 18 * index
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{_colour(index)}"/>' + _label(x + 10, y, name))
    return "\n".join([*parts, "</svg>", ""])


def _panel(series: dict[str, list[Row]], left: int, top: int, title: str, *, needles: bool) -> list[str]:
    points = {name: sorted(_points(rows, needles=needles)) for name, rows in series.items()}
    every = [point for found in points.values() for point in found]
    if not every:
        return []
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x = _Axis(min(xs) / 1.2, max(xs) * 1.2, left, left + _WIDTH, True)
    floor, roof = top + _HEIGHT - 20.0, top + 24.0
    y = _Axis(0.0, 1.0, floor, roof, False) if needles else _Axis(min(ys) / 1.5, max(ys) * 1.5, floor, roof, True)
    parts = [_label(left, top + 14, title)]
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e2e2e2"/>')
        parts.append(_label(left - 5, at + 4, f"{tick:.0%}" if needles else f"{tick:g}", anchor="end"))
    for step in range(4):
        tick = x.low * (x.high / x.low) ** (step / 3)
        parts.append(_label(x.at(tick), floor + 15, bytes_text(tick), anchor="middle"))
    for index, found in enumerate(points.values()):
        places = [(x.at(a), y.at(b)) for a, b in found]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{_colour(index)}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{_colour(index)}"/>' for a, b in places]
    return parts


def _points(rows: list[Row], *, needles: bool) -> Iterator[tuple[float, float]]:
    """(bytes read, KL or share found) of each rule; what a logarithm cannot show is left out."""
    for row in rows:
        if needles and row.needles:
            yield row.bytes_read, row.found / len(row.needles)
        elif not needles and (kl := row.mean(lambda text: text.kl)) > 0:
            yield row.bytes_read, kl


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _label(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
