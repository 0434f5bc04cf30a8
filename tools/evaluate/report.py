"""What was found: one row per configuration, as JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import msgspec
from rich import box
from rich.table import Table

from kvdb.tools.sizes import bytes_text, share_text


class LayerCost(msgspec.Struct, frozen=True, kw_only=True):
    """mass: true share of attention mass that was attended to; kv_share: stored records read / stored records."""

    layer: int
    mass: float
    kv_share: float


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration on one text; everything but `same_greedy` is a mean over its teacher-forced positions.

    kl                       nats, KL(dense || selected)
    top1                     share of positions where the likeliest token is dense attention's
    perplexity_ratio         selected / dense
    same_greedy              greedy tokens until the first that dense attention would not have said; at most `greedy_tokens`
    mass                     true share of attention mass, over KV as stored, that was read, estimates not counted; mean over layers and heads
    mass_estimated           the same as the runtime estimates it, at every so many-th position
    token_bytes              stored KV of one token, all layers together: mean over what is stored, its exact first chunk included
    token_share              of what that is in the KV dtype
    kv_share, kv_bytes       of the stored KV of the selecting layers, read at one position
    abstract_bytes           abstract bytes read at one position, to score and to estimate
    abstract_bytes_resident  in memory all the time
    evaluated                ranges and records scored at one position, all layers
    """

    text: str
    kl: float
    top1: float
    perplexity_ratio: float
    same_greedy: int
    mass: float
    mass_estimated: float
    token_bytes: float
    token_share: float
    kv_share: float
    kv_bytes: float
    abstract_bytes: float
    abstract_bytes_resident: int
    evaluated: float
    layers: list[LayerCost]


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """One needle that dense attention found, under a configuration."""

    text: str
    depth: float
    answer: str
    found: bool


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration at one length. rule: the name of its fidelity, such as budget=0.1."""

    tokens: int
    codec: str
    selector: str
    rule: str
    texts: list[Quality]
    needles: list[Answered]

    def mean(self, of: Callable[[Quality], float]) -> float:
        return statistics.fmean(of(text) for text in self.texts)

    def spread(self, of: Callable[[Quality], float]) -> float:
        """Standard deviation over texts, 0 for a single one."""
        return statistics.stdev(of(text) for text in self.texts) if len(self.texts) > 1 else 0.0

    @property
    def found(self) -> int:
        return sum(needle.found for needle in self.needles)

    @property
    def bytes_read(self) -> float:
        """Of KV and abstracts, at one position."""
        return self.mean(lambda text: text.kv_bytes + text.abstract_bytes)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` prints, beside the machine.

    tokens         of a text; its last `positions` are predicted from all that come before
    needles_asked  per length, whether dense attention found them or not
    """

    model: str
    seed: int
    positions: int
    chunk_tokens: int
    greedy_tokens: int
    needles_asked: int
    rows: list[Row]


def table(report: Report) -> Table:
    shown = Table(
        box=box.HORIZONTALS,
        border_style="dim",
        padding=(0, 1),
        title=f"{report.model}, per position",
        title_justify="left",
    )
    for header in ("tokens", "codec", "selector", "rule"):
        shown.add_column(header, no_wrap=True)
    for header in (
        "KL", "top-1", "perplexity", f"same of {report.greedy_tokens}", "needles", "mass", "estimated", "KV a token", "of its dtype", "KV read", "of KV", "abstracts read",
        "resident", "ranges",
    ):  # fmt: skip
        shown.add_column(header, justify="right", no_wrap=True)
    for row in report.rows:
        shown.add_row(
            f"{row.tokens:,}",
            row.codec,
            row.selector,
            row.rule,
            f"{row.mean(lambda t: t.kl):.5f} ±{row.spread(lambda t: t.kl):.5f}",
            share_text(row.mean(lambda t: t.top1)),
            f"{row.mean(lambda t: t.perplexity_ratio):.3f} ±{row.spread(lambda t: t.perplexity_ratio):.3f}",
            f"{row.mean(lambda t: t.same_greedy):.1f}",
            f"{row.found} of {len(row.needles)}",
            share_text(row.mean(lambda t: t.mass)),
            share_text(row.mean(lambda t: t.mass_estimated)),
            f"{row.mean(lambda t: t.token_bytes):,.0f} B",
            share_text(row.mean(lambda t: t.token_share)),
            bytes_text(row.mean(lambda t: t.kv_bytes)),
            share_text(row.mean(lambda t: t.kv_share)),
            bytes_text(row.mean(lambda t: t.abstract_bytes)),
            bytes_text(row.mean(lambda t: t.abstract_bytes_resident)),
            f"{row.mean(lambda t: t.evaluated):,.0f}",
        )
    return shown


def layers_table(row: Row) -> Table:
    """Where in the model a configuration reads, and what it covers."""
    shown = Table("layer", "mass", "of KV", box=box.HORIZONTALS, border_style="dim", padding=(0, 1))
    for costs in zip(*(text.layers for text in row.texts), strict=True):
        mass, share = (statistics.fmean(values) for values in zip(*((c.mass, c.kv_share) for c in costs), strict=True))
        shown.add_row(str(costs[0].layer), share_text(mass), share_text(share))
    return shown
