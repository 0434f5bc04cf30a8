"""The page: one HTML file that needs nothing else. Text from a store is escaped by the template, or set as text by the script.

A Content-Security-Policy in the page lets a browser run the page's own script, load nothing, and send nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from kvdb.inspection.maps import Grid
from kvdb.inspection.traces import Summary
from kvdb.tools.output import finite, visible
from kvdb.tools.report import pictures
from kvdb.tools.report.content import Content, Mapped
from kvdb.tools.report.drawing import STYLE
from kvdb.tools.report.heat import heat_map
from kvdb.tools.sizes import bytes_text, count_text, seconds_text, share_text, time_text

_PROBLEMS = 200
"""Findings that are listed; how many more there are is said."""
_MINUTES = "%Y-%m-%d %H:%M"


def page(content: Content) -> str:
    here = files(__package__)
    source = {name: (here / name).read_text() for name in ("page.html", "page.css", "page.js")}
    style = f"{source['page.css']}\n{STYLE}"
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source["page.html"]).render(
        store=visible(content.store),
        made=time_text(content.made, _MINUTES),
        version=content.version,
        style=Markup(style),
        script=Markup(source["page.js"]),
        style_hash=_hash(style),
        script_hash=_hash(source["page.js"]),
        facts=list(_facts(content)),
        problems=[{"where": visible(p.loc), "said": visible(p.message)} for p in content.survey.problems[:_PROBLEMS]],
        more_problems=max(0, len(content.survey.problems) - _PROBLEMS),
        damaged=sum(s.damaged for s in content.survey.sequences),
        pictures={
            name: Markup(draw(content.survey))
            for name, draw in (
                ("tree", pictures.tree),
                ("bytes", pictures.layer_bytes),
                ("hits", pictures.hits),
                ("ages", pictures.ages),
            )
        },
        mapped=[_mapped(i, each) for i, each in enumerate(content.mapped)],
        trace=None if content.trace is None else _trace(content.trace),
        data=_data(content),
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _facts(content: Content) -> Iterator[tuple[str, str]]:
    """What the summary says, as (label, value)."""
    info, found = content.info, content.survey
    named, pinned = sum(s.name is not None for s in found.sequences), sum(s.pinned for s in found.sequences)
    yield "Sequences", f"{len(found.sequences):,}, of which {named:,} named and {pinned:,} pinned"
    yield "Segments", f"{len(found.segments):,}"
    yield "Tokens stored", f"{sum(s.tokens for s in found.segments):,}"
    yield "KV and abstracts on disk", bytes_text(sum(s.disk_bytes for s in found.segments))
    yield (
        "Reused so far",
        count_text(sum(s.hits or 0 for s in found.segments if s.start == 0), "time") + ", of what is still stored",
    )
    if "used_bytes" in info:
        cap = "no cap" if info["size_cap"] is None else f"cap {bytes_text(info['size_cap'])}"
        yield "All files", f"{bytes_text(info['used_bytes'])}, {cap}; {bytes_text(info['catalog_bytes'])} of it catalog"
        yield (
            "Written so far",
            f"{bytes_text(info['bytes_written'])}, {bytes_text(info['bytes_compacted'])} of it by compaction",
        )
        yield "Evicted so far", count_text(info["segments_evicted"], "segment")
        yield "Identities", f"{info['identities']:,} (models, dtypes and salts whose KV is kept apart)"
    yield "Format", f"{info['format']}"
    yield "Created", time_text(info["created"], _MINUTES)


def _mapped(index: int, mapped: Mapped) -> dict[str, Any]:
    maps = mapped.maps
    read = maps.tokens_read
    of = "every key" if read == maps.tokens else f"the keys of {read:,} of {maps.tokens:,} tokens"
    return {
        "label": visible(mapped.name or mapped.key[:8]),
        "tokens": f"{maps.tokens:,}",
        "read": of,
        "sources": ", ".join(maps.sources),
        "problems": [visible(problem) for problem in maps.problems],
        "norms": Markup(norms(mapped, f"norms-{index}")),
        "widths": Markup(widths(mapped, f"widths-{index}")),
    }


def norms(mapped: Mapped, name: str = "norms") -> str:
    title = f"Key norm: {mapped.name or mapped.key[:8]}"
    return heat_map(name, title, mapped.maps.norms, "mean Euclidean norm of a key", "token")


def widths(mapped: Mapped, name: str = "widths") -> str:
    title = f"Box width: {mapped.name or mapped.key[:8]}"
    return heat_map(
        name, title, mapped.maps.widths, "mean width of a record\N{RIGHT SINGLE QUOTATION MARK}s box", "token"
    )


def skew(grid: Grid) -> str:
    return heat_map("skew", "KV read by layer and step", grid, "bytes a step", "step", bytes_text)


def _trace(summary: Summary) -> dict[str, Any]:
    def hidden(seconds: float, of: float) -> str:
        return f"{seconds_text(seconds)} of {seconds_text(of)}" + (f" ({share_text(seconds / of)})" if of else "")

    return {
        "stages": Markup(pictures.stages(summary)),
        "skew": None if summary.reads is None else Markup(skew(summary.reads)),
        "facts": [
            ("Length", f"{seconds_text(summary.wall_seconds)}, {count_text(summary.steps, 'step')}, {count_text(summary.spans, 'span')}"),
            ("Threads", f"{len(summary.threads)}, of which two or more were busy for {seconds_text(summary.overlap_seconds)}"),
            ("Reading behind computing", hidden(summary.reading.hidden_seconds, summary.reading.seconds)),
            ("Writing behind computing", hidden(summary.writing.hidden_seconds, summary.writing.seconds)),
        ],
        "layers": [
            (cost.layer, seconds_text(cost.own_seconds), share_text(min(1.0, cost.share)), f"{cost.spans:,}",
             _brief(cost.median_s), _brief(cost.p99_s), bytes_text(cost.bytes))
            for cost in summary.layers
        ],
    }  # fmt: skip


def _brief(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"


def _whole(at: float | None) -> int | None:
    return None if at is None or not math.isfinite(at) else round(at)


def _data(content: Content) -> str:
    """What the script shows, as JSON that can stand inside a script element."""
    found = content.survey
    place = {segment.segment: i for i, segment in enumerate(found.segments)}
    models: dict[str, int] = {}
    ways: dict[str, int] = {}
    grids: dict[str, tuple[Grid, str, str]] = {}
    for i, mapped in enumerate(content.mapped):
        grids[f"norms-{i}"] = mapped.maps.norms, "", "token"
        grids[f"widths-{i}"] = mapped.maps.widths, "", "token"
    if content.trace is not None and content.trace.reads is not None:
        grids["skew"] = content.trace.reads, "B", "step"
    data = {
        "now": found.now,
        "sequences": [
            [
                s.key[:12], visible(s.name or ""), models.setdefault(visible(s.model), len(models)),
                ways.setdefault(visible(s.fidelity), len(ways)), s.tokens, place.get(s.last or "", -1), s.segments, s.kv_bytes,
                s.own_bytes, _whole(s.last_used), s.hits, _whole(s.expires), int(s.pinned),
                int(s.damaged),
            ]
            for s in found.sequences
        ],
        "segments": [
            [
                place.get(s.parent or "", -1), s.start, s.tokens, s.disk_bytes, s.hits, s.sequences,
                ways.setdefault(" ".join(s.codecs), len(ways)), visible(s.problem or ""),
            ]
            for s in found.segments
        ],
        "models": list(models),
        "ways": list(ways),
        "grids": {
            name: {
                "rows": grid.rows, "bounds": grid.bounds, "unit": unit, "across": across,
                "values": [[None if value is None else float(f"{value:.4g}") for value in row] for row in grid.values],
            }
            for name, (grid, unit, across) in grids.items()
        },
    }  # fmt: skip
    dumped = json.dumps(finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(dumped.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
