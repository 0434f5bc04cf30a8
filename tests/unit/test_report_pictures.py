"""Pictures show the numbers they are given: cells read back from a map's paths, bars from a bar chart; text from a store stays text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

from kvdb.errors import Problem
from kvdb.inspection.maps import Grid
from kvdb.inspection.survey import LayerBytes, Survey, SurveyedSegment, SurveyedSequence
from kvdb.tools.report import pictures
from kvdb.tools.report.drawing import SCALE, alone, clean, number, shortened, ticks
from kvdb.tools.report.heat import Classes, heat_map

HOSTILE = "\"><script>alert(1)</script>\x1b[2J\x00\u202e&'"


def grid(values: Any) -> Grid:
    values = [[None if v is None or math.isnan(v) else float(v) for v in row] for row in values]
    return Grid(
        rows=tuple(range(len(values))),
        bounds=tuple(range(0, 16 * len(values[0]) + 1, 16)),
        values=tuple(map(tuple, values)),
    )


def shown(svg: str) -> dict[tuple[int, int], str]:
    """The class of each cell, from the paths."""
    found: dict[tuple[int, int], str] = {}
    cells = next(g for g in ElementTree.fromstring(svg).iter() if g.get("class") == "cells")
    for path in cells:
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.get("d") or ""):
            for column in range(int(x), int(x) + int(width)):
                assert (int(y), column) not in found
                found[int(y), column] = path.get("class") or ""
    return found


def test_every_cell_has_the_colour_of_its_class() -> None:
    values = np.random.default_rng(0).random((7, 40)) * 9 + 3
    values[2, 5:9], values[6, 39] = math.nan, math.nan
    low, high = np.nanmin(values), np.nanmax(values)
    found = shown(heat_map("m", "A map", grid(values), "units", "token"))
    assert len(found) == 7 * 40
    for (y, x), kind in found.items():
        value = values[y, x]
        wanted = "empty" if math.isnan(value) else f"s{min(11, int((value - low) / (high - low) * 12))}"
        assert kind == wanted


def test_far_apart_numbers_have_classes_of_equal_ratios() -> None:
    classes = Classes(grid([[1.0, 1000.0, 31.0, 32.0]]))
    assert classes.log
    assert [classes.of(v) for v in (1.0, 31.0, 32.0, 1000.0)] == ["s0", "s5", "s6", "s11"]
    assert classes.edge(0.5) == pytest.approx(1000**0.5)
    assert ", log scale" in heat_map("m", "", grid([[1.0, 1000.0]]), "u", "token")


def test_few_cells_far_above_the_others_share_the_last_colour() -> None:
    values = [[float(i % 10) for i in range(100)], [float(i % 10) for i in range(99)] + [50.0]]
    classes = Classes(grid(values))
    assert (classes.low, classes.high, classes.most, classes.cut) == (0.0, 9.0, 50.0, True)
    assert (classes.of(50.0), classes.of(9.0), classes.of(0.0)) == ("s11", "s11", "s0")
    assert "the last colour up to 50.0" in heat_map("m", "", grid(values), "u", "step")


@pytest.mark.parametrize("values", [[[None]], [[2.0]], [[None, 3.0]], [[0.0, 0.0]], [[-1.0, 1.0]]])
def test_maps_of_nothing_of_one_number_and_of_any_sign_are_drawn(values: Any) -> None:
    svg = heat_map("m", "t", grid(values), "u", "token")
    assert len(shown(svg)) == len(values[0])
    assert ("could not be read" in svg) == (None in values[0])


def segment(name: str, start: int, tokens: int, **more: Any) -> SurveyedSegment:
    fields: dict[str, Any] = {
        "segment": name, "parent": None, "start": start, "tokens": tokens, "fidelity": "exact", "codecs": ("raw",),
        "abstracts": (), "disk_bytes": 5, "sequences": 1, "hits": 0, "last_used": 0.0, "problem": None,
    }  # fmt: skip
    return SurveyedSegment(**(fields | more))


def sequence(key: str, last: str, **more: Any) -> SurveyedSequence:
    fields: dict[str, Any] = {
        "key": key, "name": None, "model": "", "fidelity": "exact", "tokens": 1, "last": last, "segments": 1, "kv_bytes": 1,
        "own_bytes": 1, "created": 0.0, "last_used": 0.0, "hits": 0, "expires": None, "pinned": False, "damaged": False,
    }  # fmt: skip
    return SurveyedSequence(**(fields | more))


def surveyed(segments: list[SurveyedSegment], sequences: list[SurveyedSequence], **more: Any) -> Survey:
    fields: dict[str, Any] = {"now": 1e6, "layers": (), "problems": ()}
    return Survey(segments=tuple(segments), sequences=tuple(sequences), **(fields | more))


def texts(svg: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


def bars(svg: str) -> dict[str, float]:
    """Width of each bar by what it says."""
    found = {}
    for rect in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect"):
        for title in rect:
            found[title.text or ""] = float(rect.get("width") or 0)
    return found


def test_the_tree_draws_each_segment_once_where_it_stands() -> None:
    segments = [
        segment("a", 0, 100), segment("b", 100, 50, parent="a"), segment("c", 48, 400, parent="a"),
        segment("d", 448, 10, parent="c", problem="its file is gone"), segment("e", 0, 30),
    ]  # fmt: skip
    svg = pictures.tree(surveyed(segments, [sequence("k1", "d", name="long"), sequence("k2", "b", name="short")]))
    root = ElementTree.fromstring(svg)
    places = sorted(
        (float(r.get("x") or 0), float(r.get("width") or 0), r.get("class"))
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
    )
    wide = (760 - 14 - 190) / 458
    wanted = sorted(
        (14.5 + wide * s.start, max(wide * s.tokens - 1, 1.5), "bad" if s.problem else "bar") for s in segments
    )
    for one, other in zip(places, wanted, strict=True):
        assert one == (pytest.approx(other[0], abs=0.06), pytest.approx(other[1], abs=0.06), other[2])
    assert {"long (damaged)", "short", "Prefix tree: 5 segments, 3 branches"} <= set(texts(svg))


def test_a_tree_of_many_branches_draws_forty_and_counts_the_rest() -> None:
    svg = pictures.tree(surveyed([segment(f"{i:03}", 0, 10 + i) for i in range(100)], []))
    assert len(bars(svg)) == 40
    assert "and 60 more branches" in texts(svg)
    assert "tokens 0 to 108, 5 B, 1 sequence, 0 hits" in bars(svg)  # the longest are the ones that are drawn


def test_parents_in_a_circle_draw_nothing_and_end() -> None:
    svg = pictures.tree(surveyed([segment("a", 16, 16, parent="b"), segment("b", 32, 16, parent="a")], []))
    assert len(bars(svg)) == 0


def test_bars_of_layers_are_as_long_as_their_bytes() -> None:
    layers = (
        LayerBytes(layer=0, kv={"raw": 3000, "int4": 1000}, abstracts={"box": 500}),
        LayerBytes(layer=7, kv={"int4": 1000}, abstracts={}),
    )
    found = bars(pictures.layer_bytes(surveyed([], [], layers=layers)))
    wide = (760 - 52 - 84) / 4500
    assert found == {
        "layer 0, KV as raw: 2.9 KiB": pytest.approx(3000 * wide, abs=0.06),
        "layer 0, KV as int4: 1.0 KiB": pytest.approx(1000 * wide, abs=0.06),
        "layer 0, abstract box: 500 B": pytest.approx(500 * wide, abs=0.06),
        "layer 7, KV as int4: 1.0 KiB": pytest.approx(1000 * wide, abs=0.06),
    }


def test_hits_leave_out_what_was_reused_as_often_as_what_it_continues() -> None:
    segments = [
        segment("a", 0, 100, hits=9, last_used=1e6 - 90), segment("b", 100, 50, parent="a", hits=9),
        segment("c", 150, 50, parent="b", hits=2), segment("d", 0, 5),
    ]  # fmt: skip
    svg = pictures.hits(surveyed(segments, [sequence("k", "c", name="n")]))
    assert list(bars(svg)) == ["n, to 100: 9, last 1 min ago", "n, to 200: 2, last 11 days ago"]
    assert "1 segment never reused" in texts(svg)


def test_ages_count_every_sequence_once() -> None:
    used = [1e6 - age for age in (0, 59, 61, 3601, 90_000, 700_000)] + [1e6 + 5, -9e6]
    svg = pictures.ages(surveyed([], [sequence(str(i), "a", last_used=at) for i, at in enumerate(used)]))
    assert [said.rpartition(": ")[2] for said in bars(svg)] == [
        "3 sequences", "1 sequence", "1 sequence", "1 sequence", "1 sequence", "1 sequence",
    ]  # fmt: skip


def test_text_from_a_store_stays_text_and_controls_do_not() -> None:
    found = surveyed(
        [segment("a", 0, 100, hits=1, problem=HOSTILE)], [sequence("k", "a", name=HOSTILE)],
        layers=(LayerBytes(layer=0, kv={HOSTILE: 4}, abstracts={}),), problems=(Problem("x", "y", HOSTILE),),
    )  # fmt: skip
    for draw in (pictures.tree, pictures.layer_bytes, pictures.hits, pictures.ages):
        svg = alone(draw(found))
        assert "<script" not in svg
        assert not set("\x1b\x00") & set(svg)
        ElementTree.fromstring(svg)


def test_numbers_and_ticks_are_round() -> None:
    assert [number(v) for v in (0, 0.01234, 1.5, 17.36, 123.4, 1234.5, 12_345_678.0, 1e-5)] == [
        "0", "0.0123", "1.50", "17.4", "123", "1,234", "1.23e+07", "1.00e-05",
    ]  # fmt: skip
    assert ticks(0, 1705) == [0, 500, 1000, 1500]
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(5, 5) == [5]
    assert shortened("abcdef", 4) == "abc\u2026"
    assert clean('a<b>"&\n') == "a&lt;b&gt;&quot;&amp; "
    assert len(SCALE) == 12
