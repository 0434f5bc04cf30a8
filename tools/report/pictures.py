"""The pictures of a store that are no heat maps: its prefix tree, bytes by layer, uses, and the stages of a trace."""

from __future__ import annotations

from collections import defaultdict
from typing import Final, NamedTuple

from kvdb.inspection.survey import Survey, SurveyedSegment
from kvdb.inspection.traces import Summary
from kvdb.tools.report.drawing import KINDS, WIDTH, line, picture, rect, shortened, text, ticks
from kvdb.tools.sizes import age_text, bytes_text, count_text, seconds_text, share_text

_BRANCHES: Final = 40
"""Rows of the tree that are drawn; the report's list has all of them."""
_BARS: Final = 20
_AGES: Final = ((60, "1 min"), (3600, "1 h"), (86400, "1 day"), (7 * 86400, "1 week"), (30 * 86400, "30 days"))


class _Branch(NamedTuple):
    """Segments one after the other, and the row of the branch that they leave; None for a root, or where that row is not drawn."""

    segments: list[SurveyedSegment]
    above: int | None


def tree(survey: Survey) -> str:
    """Segments by position: a branch to a row, the longest paths first."""
    left, right, top, each = 14.0, 190.0, 34.0, 15.0
    branches, most = _laid_out(survey), max((s.start + s.tokens for s in survey.segments), default=1)
    drawn, ends, wide = branches[:_BRANCHES], _ends(survey), WIDTH - left - right
    count = f"{len(branches):,} branch{'' if len(branches) == 1 else 'es'}"
    title = f"Prefix tree: {count_text(len(survey.segments), 'segment')}, {count}"
    parts, floor = [text(left, 18, title, kind="strong")], top + each * len(drawn)
    for tick in ticks(0, most, 5):
        x = left + wide * tick / most
        parts += [line(x, top, x, floor + 4), text(x, floor + 18, f"{tick:,.0f}", anchor="middle", kind="soft")]
    parts.append(text(left + wide, floor + 34, "token", anchor="end", kind="soft"))
    for row, branch in enumerate(drawn):
        y, last = top + each * row, branch.segments[-1]
        if branch.above is not None:
            x = left + wide * branch.segments[0].start / most
            parts.append(f'<path class="joint" d="M{x:.1f} {top + each * branch.above + 11:.1f}V{y + 6:.1f}h3"/>')
        for segment in branch.segments:
            x, width = left + wide * segment.start / most, wide * segment.tokens / most
            kind = "bad" if segment.problem else "bar"
            parts.append(rect(x + 0.5, y + 2, max(width - 1, 1.5), each - 5, kind, _segment_said(segment)))
        damaged = " (damaged)" if any(s.problem for s in branch.segments) else ""
        x = left + wide * (last.start + last.tokens) / most
        parts.append(text(x + 6, y + 11, shortened(f"{ends.get(last.segment, '')}{damaged}", 30), kind="soft"))
    if len(branches) > len(drawn):
        parts.append(text(left, floor + 34, f"and {len(branches) - len(drawn):,} more branches", kind="soft"))
    return picture("tree", title, floor + 44, parts)


def _laid_out(survey: Survey) -> list[_Branch]:
    """Each segment once. A branch goes on with the child through which the longest path goes; the others begin branches of their own,
    below it."""
    known = {s.segment for s in survey.segments}
    reach = _reach(survey.segments, known)
    children: dict[str | None, list[SurveyedSegment]] = defaultdict(list)
    for segment in sorted(survey.segments, key=lambda s: (reach[s.segment], s.segment)):
        children[segment.parent if segment.parent in known else None].append(segment)
    branches: list[_Branch] = []
    waiting: list[tuple[SurveyedSegment, int | None]] = [(root, None) for root in children[None]]
    while waiting:
        segment, above = waiting.pop()
        here, path = len(branches), [segment]
        while after := children[path[-1].segment]:
            waiting += [(other, here if here < _BRANCHES else None) for other in after[:-1]]
            path.append(after[-1])
        branches.append(_Branch(path, above))
    return branches


def _reach(segments: tuple[SurveyedSegment, ...], known: set[str]) -> dict[str, int]:
    """Where the longest path through each segment ends."""
    reach = {s.segment: s.start + s.tokens for s in segments}
    for s in sorted(segments, key=lambda s: -s.start):
        if s.parent in known:
            assert s.parent is not None
            reach[s.parent] = max(reach[s.parent], reach[s.segment])
    return reach


def _ends(survey: Survey) -> dict[str, str]:
    """What to call the end of a branch: a sequence's name, else its key."""
    ends: dict[str, str] = {}
    for sequence in survey.sequences:
        if sequence.last is not None and (sequence.name is not None or sequence.last not in ends):
            ends[sequence.last] = sequence.name or sequence.key[:8]
    return ends


def _segment_said(segment: SurveyedSegment) -> str:
    said = (
        f"tokens {segment.start:,} to {segment.start + segment.tokens - 1:,}, {bytes_text(segment.disk_bytes)}, "
        f"{count_text(segment.sequences, 'sequence')}, {'unknown' if segment.hits is None else f'{segment.hits:,}'} hits"
    )
    return f"{said}; {segment.problem}" if segment.problem else said


def layer_bytes(survey: Survey) -> str:
    """A bar for each layer: KV by codec, then abstracts."""
    totals: dict[str, int] = {}
    for layer in survey.layers:
        for kind, size in [*_kinds(layer.kv, "KV as"), *_kinds(layer.abstracts, "abstract")]:
            totals[kind] = totals.get(kind, 0) + size
    order = sorted(totals, key=lambda kind: (not kind.startswith("KV"), -totals[kind]))
    left, right, each = 52.0, 84.0, 15.0 if len(survey.layers) <= 40 else 9.0
    legend_rows = -(-len(order) // 3)
    top = 34.0 + 18 * legend_rows
    wide = WIDTH - left - right
    most = max((sum(layer.kv.values()) + sum(layer.abstracts.values()) for layer in survey.layers), default=0) or 1
    parts = [
        text(left, 18, "Bytes by layer and codec", kind="strong"),
        text(left - 6, 18, "layer", anchor="end", kind="soft"),
    ]
    for i, kind in enumerate(order):
        x, y = left + 216.0 * (i % 3), 36.0 + 18 * (i // 3)
        parts += [
            rect(x, y - 9, 10, 10, f"k{i % len(KINDS)}"),
            text(x + 16, y, f"{shortened(kind, 20)}  {bytes_text(totals[kind])}", kind="soft"),
        ]
    step = 1 if each > 10 else 4
    for row, layer in enumerate(survey.layers):
        y, x = top + each * row, left
        sizes = dict([*_kinds(layer.kv, "KV as"), *_kinds(layer.abstracts, "abstract")])
        for i, kind in enumerate(order):
            if size := sizes.get(kind, 0):
                said = f"layer {layer.layer}, {kind}: {bytes_text(size)}"
                parts.append(rect(x, y, wide * size / most, each - 3, f"k{i % len(KINDS)}", said))
                x += wide * size / most
        if row % step == 0:
            parts.append(text(left - 6, y + each - 5, str(layer.layer), anchor="end", kind="soft"))
            parts.append(text(x + 6, y + each - 5, bytes_text(sum(sizes.values())), kind="soft"))
    return picture("bytes", "Bytes by layer and codec", top + each * len(survey.layers) + 12, parts)


def _kinds(sizes: dict[str, int], what: str) -> list[tuple[str, int]]:
    return [(f"{what} {name}", size) for name, size in sizes.items()]


def hits(survey: Survey) -> str:
    """The segments that were reused most; one that was reused as often as what it continues adds nothing and is left out."""
    by_id, names = {s.segment: s for s in survey.segments}, _names(survey)

    def of_parent(segment: SurveyedSegment) -> int | None:
        parent = by_id.get(segment.parent or "")
        return None if parent is None else parent.hits

    used = sorted(
        (s for s in survey.segments if s.hits and s.hits != of_parent(s)), key=lambda s: (-(s.hits or 0), s.segment)
    )
    rows = [
        (
            f"{shortened(names.get(s.segment, ''), 10)}, to {s.start + s.tokens:,}",
            float(s.hits or 0),
            f"{s.hits:,}, last {age_text(survey.now - (s.last_used or 0.0))}",
        )
        for s in used[:_BARS]
    ]
    more = f"and {len(used) - _BARS:,} more; " if len(used) > _BARS else ""
    never = count_text(sum(s.hits == 0 for s in survey.segments), "segment")
    return _bars("hits", "Hits by prefix: a sequence, to a token", rows, f"{more}{never} never reused")


def _names(survey: Survey) -> dict[str, str]:
    """A sequence through each segment: the one that was used last, named ones before others."""
    parents, names = {s.segment: s.parent for s in survey.segments}, dict[str, str]()
    for sequence in sorted(survey.sequences, key=lambda s: (s.name is None, -s.last_used, s.key)):
        segment: str | None = sequence.last
        while segment in parents and segment not in names:
            names[segment] = sequence.name or sequence.key[:8]
            segment = parents[segment]
    return names


def ages(survey: Survey) -> str:
    """How long ago sequences were used last."""
    counts = [0] * (len(_AGES) + 1)
    for s in survey.sequences:
        age = survey.now - s.last_used
        counts[next((i for i, (limit, _) in enumerate(_AGES) if age < limit), len(_AGES))] += 1
    labels = [f"less than {name}" for _, name in _AGES] + [f"{_AGES[-1][1]} or more"]
    rows = [(label, float(count), count_text(count, "sequence")) for label, count in zip(labels, counts, strict=True)]
    return _bars("ages", "Last used, time ago", rows, "")


def stages(summary: Summary) -> str:
    """Own time of each stage of a trace."""
    rows = [
        (cost.stage or "", cost.own_seconds, f"{seconds_text(cost.own_seconds)}, {share_text(min(1.0, cost.share))}")
        for cost in summary.stages
    ]
    said = f"own time, and its share of {seconds_text(summary.wall_seconds)}; threads overlap"
    return _bars("stages", "Where the time went, by stage", rows, said)


def _bars(name: str, title: str, rows: list[tuple[str, float, str]], below: str) -> str:
    """A bar for each (label, length, what is said beside it)."""
    left, right, top, each = 170.0, 190.0, 32.0, 20.0
    most = max((value for _, value, _ in rows), default=0.0) or 1.0
    parts = [text(14, 18, title, kind="strong")]
    for i, (label, value, said) in enumerate(rows):
        y, width = top + each * i, (WIDTH - left - right) * value / most
        parts.append(text(left - 8, y + 13, shortened(label, 24), anchor="end"))
        parts.append(rect(left, y + 3, width, each - 7, "bar", f"{label}: {said}"))
        parts.append(text(left + width + 6, y + 13, said, kind="soft"))
    floor = top + each * len(rows)
    if below:
        parts.append(text(14, floor + 16, below, kind="soft"))
    return picture(name, title, floor + 28, parts)
