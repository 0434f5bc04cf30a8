"""Two results of one benchmark: the ratio new / old of every figure, and which way is better where that is known.

A figure is a number in a row; rows are matched by the fields that the table of benchmarks names. What stands outside of rows is a
setting: it is told where it differs, as figures then differ for that.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from kvdb.errors import InvalidInput
from kvdb.tools.bench.machine import MACHINE
from kvdb.tools.bench.table import BENCHES, Bench, Better, name_of

EVAL: Final = "eval"
"""What a result without a name is of: `kvdb eval --stats`."""
_UNITS: Final[dict[Better, str]] = {
    "higher": r"(^|_)(gbs|gb_s|iops|records_s|per_s|per_second)$",
    "lower": r"(^|_)(ms|s|seconds|bytes|bytes_per_token|bytes_a_token)$",
}
_MOVED: Final = 1.25
_NAME: Final = re.compile(r"[\w.-]{1,100}", re.ASCII)
_LEVELS: Final = 32
"""Lists and objects inside each other: results have less than ten."""
_TOLD: Final = ("machine", "benchmark", "model")
Label = tuple[str, ...]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number, old and new.

    row     fields that tell its row, as name=value
    name    dotted, inside the row
    better  None: not known, or a baseline
    ratio   new / old; None where that says nothing: old is 0, one is negative, or it is too large
    """

    row: list[str]
    name: str
    old: float
    new: float
    ratio: float | None
    better: Better | None
    baseline: bool


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """
    machines  fields of the machine that differ, as "cpu: AMD EPYC -> Intel"
    settings  the same of settings
    missing   rows that only one of both has: [old, new]
    """

    benchmark: str
    old_commit: str
    new_commit: str
    machines: list[str]
    settings: list[str]
    missing: tuple[int, int]
    figures: list[Figure]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A figure over all rows: the median of its ratios, the least and the largest."""

    name: str
    better: Better | None
    baseline: bool
    rows: int
    median: float
    least: float
    most: float


def read_result(file: Path) -> dict[str, Any]:
    """raises  InvalidInput for a file that is no result"""
    try:
        result = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        reason = e.strerror if isinstance(e, OSError) else "no JSON that can be read"
        raise InvalidInput(f"{file}: {reason}, expected a result of 'kvdb bench' or of 'kvdb eval --stats'") from None
    if (
        not isinstance(result, dict)
        or not isinstance(result.get("machine"), dict)
        or not isinstance(result.get("rows"), list)
    ):
        raise InvalidInput(f"{file}: no machine and rows, expected a result of 'kvdb bench' or of 'kvdb eval --stats'")
    if not _NAME.fullmatch(str(result.get("benchmark", EVAL))) or _is_deeper(result, _LEVELS):
        raise InvalidInput(
            f"{file}: its benchmark is no name, or more than {_LEVELS} levels, expected a result of 'kvdb bench' or of 'kvdb eval --stats'"
        )
    return result


def _is_deeper(value: Any, levels: int) -> bool:
    inside = [value]
    for _ in range(levels):
        inside = [
            part
            for each in inside
            if isinstance(each, dict | list)
            for part in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, dict | list) for each in inside)


def compare(old: dict[str, Any], new: dict[str, Any]) -> Compared:
    """raises  InvalidInput where they are of two benchmarks"""
    name, other = benchmark_of(new), benchmark_of(old)
    known = name_of(name)
    if known is None or known != name_of(other):
        raise InvalidInput(f"results of {other!r} and {name!r}: expected two of one known benchmark")
    bench = BENCHES[known]
    before, after = dict(_figures(old, bench)), dict(_figures(new, bench))
    both = [key for key in after if key in before]
    only = [len({row for row, _ in one} - {row for row, _ in two}) for one, two in ((before, after), (after, before))]
    return Compared(
        benchmark=name,
        old_commit=str(old["machine"].get("commit", "unknown")),
        new_commit=str(new["machine"].get("commit", "unknown")),
        machines=_differences(*({field: result["machine"].get(field) for field in MACHINE} for result in (old, new))),
        settings=_differences(_settings(old), _settings(new)),
        missing=(only[0], only[1]),
        figures=[_figure(key, before[key], after[key], bench) for key in both],
    )


def benchmark_of(result: dict[str, Any]) -> str:
    return str(result.get("benchmark", EVAL))


def moved_baselines(compared: Compared) -> list[str]:
    """Baselines whose median ratio is far from 1: then it was not the same machine, or not as busy."""
    return [
        f"{summary.name} {summary.median:.2f}x"
        for summary in summaries(compared)
        if summary.baseline and not 1 / _MOVED < summary.median < _MOVED
    ]


def summaries(compared: Compared) -> list[Summary]:
    """In the order in which figures come; those of which no row has a ratio are left out."""
    by_name: dict[str, list[Figure]] = {}
    for figure in compared.figures:
        if figure.ratio is not None:
            by_name.setdefault(figure.name, []).append(figure)
    return [_summary(name, figures) for name, figures in by_name.items()]


def _summary(name: str, figures: list[Figure]) -> Summary:
    ratios = [figure.ratio for figure in figures if figure.ratio is not None]
    first = figures[0]
    return Summary(
        name=name,
        better=first.better,
        baseline=first.baseline,
        rows=len(ratios),
        median=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
    )


def _figure(key: tuple[Label, str], old: float, new: float, bench: Bench) -> Figure:
    row, name = key
    parts = name.split(".")
    baseline = any(part in bench.baselines for part in parts)
    ratio = new / old if old > 0 and new >= 0 else math.nan
    better = None if baseline else next((way for part in reversed(parts) if (way := _better(part, bench))), None)
    return Figure(
        row=list(row),
        name=name,
        old=old,
        new=new,
        ratio=ratio if math.isfinite(ratio) else None,
        better=better,
        baseline=baseline,
    )


def _better(part: str, bench: Bench) -> Better | None:
    known = bench.better.get(part)
    return known or next((way for way, unit in _UNITS.items() if re.search(unit, part)), None)


def _figures(result: dict[str, Any], bench: Bench) -> Iterator[tuple[tuple[Label, str], float]]:
    for field, value in result.items():
        if field not in _TOLD and isinstance(value, list | dict):
            yield from _inside(value, () if field == "rows" else (field,), "", bench)


def _inside(value: Any, row: Label, name: str, bench: Bench) -> Iterator[tuple[tuple[Label, str], float]]:
    """Numbers, by row and dotted name; of yes and no in rows, the share of yes. Of lists only rows are looked at: turns one by one are no
    figures."""
    if isinstance(value, dict):
        told = [f"{field}={value[field]}" for field in bench.rows_by if isinstance(value.get(field), str | int | float)]
        for field, found in value.items():
            if not (field in bench.rows_by and isinstance(found, str | int | float)):
                yield from _inside(found, (*row, *told), f"{name}.{field}" if name else field, bench)
    elif isinstance(value, list):
        rows = [each for each in value if isinstance(each, dict)]
        for each in rows:
            yield from _inside(each, row, name, bench)
        for field in rows[0] if rows else ():
            if field not in bench.rows_by and all(isinstance(each.get(field), bool) for each in rows):
                yield (row, f"{name}.{field}" if name else field), sum(each[field] for each in rows) / len(rows)
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:  # no NaN
        yield (row, name), float(value)


def _settings(result: dict[str, Any]) -> dict[str, Any]:
    return {
        field: value for field, value in result.items() if field not in _TOLD[:2] and not isinstance(value, list | dict)
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [f"{field}: {old[field]} -> {new[field]}" for field in new if field in old and old[field] != new[field]]
