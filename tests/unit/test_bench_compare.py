"""Ratios of two results are those of their rows, whatever order these come in."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from kvdb.errors import InvalidInput
from kvdb.tools.bench.command import _judgement
from kvdb.tools.bench.compare import compare, moved_baselines, read_result, summaries

MACHINE = {"cpu": "one", "cores": 2, "threads": 2, "commit": "abc"}


def gather(values: dict[tuple[int, str, str], tuple[float, float]], **more: Any) -> dict[str, Any]:
    rows = [
        {"record_kib": kib, "reader": reader, "verify": verify, "gbs": gbs, "memcpy_gbs": base, "ratio": gbs / base}
        for (kib, reader, verify), (gbs, base) in values.items()
    ]
    return {"benchmark": "gather", "machine": MACHINE, "mib": 512, "rows": rows, **more}


def made(seed: int) -> dict[tuple[int, str, str], tuple[float, float]]:
    draw = random.Random(seed)
    keys = [(kib, reader, verify) for kib in (4, 64) for reader in ("mmap", "pread") for verify in ("first", "never")]
    draw.shuffle(keys)
    return {key: (draw.uniform(1, 9), draw.uniform(5, 20)) for key in keys}


@pytest.mark.parametrize("seed", range(5))
def test_every_ratio_is_that_of_the_same_row(seed: int) -> None:
    old, new = made(seed), made(seed + 100)
    found = compare(gather(old), gather(new))
    told = {(tuple(figure.row), figure.name): (figure.old, figure.new, figure.ratio) for figure in found.figures}
    expected = {}
    for key, (gbs, base) in new.items():
        label = tuple(f"{field}={value}" for field, value in zip(("record_kib", "reader", "verify"), key, strict=True))
        was, was_base = old[key]
        for name, one, two in (
            ("gbs", was, gbs),
            ("memcpy_gbs", was_base, base),
            ("ratio", was / was_base, gbs / base),
        ):
            expected[label, name] = (one, two, two / one)
    assert told == expected


def test_which_way_is_better_comes_from_the_unit_or_the_table() -> None:
    found = compare(gather(made(0)), gather(made(0)))
    ways = {figure.name: (figure.better, figure.baseline) for figure in found.figures}
    assert ways == {"gbs": ("higher", False), "memcpy_gbs": (None, True), "ratio": ("higher", False)}
    row = {
        "way": "capped",
        "ms": 1.0,
        "ratio": 2.0,
        "p99_ratio": 3.0,
        "odd": 4.0,
        "stage_ms": {"read": 1.0},
        "disk_bytes": 7,
    }
    replay = {"benchmark": "replay-32768", "machine": MACHINE, "rows": [row]}
    ways = {figure.name: (figure.better, figure.baseline) for figure in compare(replay, replay).figures}
    assert ways["ms"] == ways["ratio"] == ways["stage_ms.read"] == ways["disk_bytes"] == ("lower", False)
    assert ways["odd"] == (None, False)


@pytest.mark.parametrize(
    ("ratio", "better", "word"),
    [
        (0.5, "lower", "better"),
        (2, "lower", "worse"),
        (2, "higher", "better"),
        (0.5, "higher", "worse"),
        (1.001, "lower", "lower is better"),
        (2, None, ""),
    ],
)
def test_better_and_worse_are_told_where_it_is_known(ratio: float, better: str | None, word: str) -> None:
    assert _judgement(ratio, better, baseline=False).plain == word
    assert _judgement(ratio, better, baseline=True).plain == "a baseline"


def test_other_machines_settings_and_rows_are_told() -> None:
    old, new = gather(made(1)), gather(made(2), mib=256)
    new["machine"] = {**MACHINE, "cpu": "two", "threads": 1}
    del new["rows"][0], old["rows"][0], old["rows"][1]
    found = compare(old, new)
    keys = [{(row["record_kib"], row["reader"], row["verify"]) for row in result["rows"]} for result in (old, new)]
    assert found.missing == (len(keys[0] - keys[1]), len(keys[1] - keys[0]))
    assert found.machines == ["cpu: one -> two"]
    assert found.settings == ["mib: 512 -> 256"]


def test_a_summary_is_the_median_and_the_range_of_its_rows() -> None:
    new = gather(made(3))
    old = copy.deepcopy(new)
    for at, row in enumerate(old["rows"]):
        row["gbs"] = row["gbs"] / (at + 1)
    found = compare(old, new)
    gbs = next(summary for summary in summaries(found) if summary.name == "gbs")
    assert (gbs.rows, gbs.median, gbs.least, gbs.most) == (8, pytest.approx(4.5), pytest.approx(1), pytest.approx(8))
    assert moved_baselines(found) == []
    for row in old["rows"]:
        row["memcpy_gbs"] /= 2
    assert moved_baselines(compare(old, new)) == ["memcpy_gbs 2.00x"]


def test_a_ratio_of_nothing_is_none() -> None:
    zero = gather(dict.fromkeys(made(0), (0.0, 1.0)))
    found = compare(zero, gather(made(0)))
    assert {figure.ratio for figure in found.figures if figure.name == "gbs"} == {None}
    assert "gbs" not in {summary.name for summary in summaries(found)}


def test_evaluations_are_compared_by_text_and_layer() -> None:
    def evaluated(kl: float, mass: float) -> dict[str, Any]:
        texts = [{"text": "prose", "kl": kl, "layers": [{"layer": 3, "mass": mass, "kv_share": 0.1}]}]
        row = {"tokens": 4000, "codec": "raw", "selector": "box", "rule": "budget=0.1", "texts": texts}
        row["needles"] = [{"text": "prose", "depth": 0.1, "answer": "7", "found": at < 8 * kl} for at in range(4)]
        return {"machine": MACHINE, "model": "m", "rows": [row]}

    found = compare(evaluated(0.2, 0.5), evaluated(0.1, 0.75))
    told = {(figure.row[-1], figure.name): (figure.ratio, figure.better) for figure in found.figures}
    assert told["text=prose", "texts.kl"] == (0.5, "lower")
    assert told["rule=budget=0.1", "needles.found"] == (0.5, "higher")
    assert told["layer=3", "texts.layers.mass"] == (1.5, None)


def test_numbers_that_are_none_are_no_figures(tmp_path: Path) -> None:
    text = json.dumps({"benchmark": "append", "machine": MACHINE, "rows": [{"ms": 1e-300, "a": 1, "b": 1, "c": 1}]})
    (tmp_path / "old.json").write_text(text)
    for given, told in (
        ("1e-300", "1e300"),
        ('"a": 1', '"a": NaN'),
        ('"b": 1', '"b": 1e999'),
        ('"c": 1', '"c": 1' + "0" * 400),
    ):
        text = text.replace(given, told)
    (tmp_path / "new.json").write_text(text)
    compared = compare(read_result(tmp_path / "old.json"), read_result(tmp_path / "new.json"))
    assert [(figure.name, figure.ratio) for figure in compared.figures] == [("ms", None)]


def test_what_is_no_pair_of_results_is_refused(tmp_path: Path) -> None:
    append = {"benchmark": "append", "machine": MACHINE, "rows": []}
    with pytest.raises(InvalidInput, match="results of 'append' and 'gather'"):
        compare(append, gather(made(0)))
    unknown = {"benchmark": "speed", "machine": MACHINE, "rows": []}
    with pytest.raises(InvalidInput, match="expected two of one known benchmark"):
        compare(unknown, unknown)
    for text, reason in (
        ("{", "no JSON"),
        ("[]", "no machine and rows"),
        (json.dumps({"machine": 1, "rows": []}), "no machine and rows"),
        ("[" * 100_000, "no JSON"),
        ('{"machine": {}, "rows": ' + "[" * 40 + "]" * 40 + "}", "more than 32 levels"),
        (json.dumps({"benchmark": "../gather", "machine": {}, "rows": []}), "its benchmark is no name"),
        ('{"machine": {}, "rows": [{"ms": 1' + "0" * 5000 + "}]}", "no JSON"),
    ):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(InvalidInput, match=reason):
            read_result(tmp_path / "r.json")
    with pytest.raises(InvalidInput, match="No such file"):
        read_result(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="no JSON"):
        read_result(tmp_path / "binary.json")
