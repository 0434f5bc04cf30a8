"""The report page in a real browser: what a person does with it, by pointer and by keyboard.

What must hold: it asks the network for nothing and logs nothing; it folds, sorts, filters and tells values; text from a store runs nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser
from shown import NASTY

from kvdb import KVDB
from kvdb.inspection.maps import key_maps


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


@pytest.fixture
def tab(chromium: Browser, shown_page: Path) -> Iterator[Browser]:
    """The shown_page, newly opened. Nothing may have been logged or asked for when the test is over."""
    chromium.open(shown_page)
    yield chromium
    assert chromium.logged == []
    assert {url.partition(":")[0] for url in chromium.requested} <= {"file", "about"}
    assert {url for url in chromium.requested if url.endswith(".html")} == set(chromium.requested)


def names(tab: Browser) -> list[str]:
    found: list[str] = tab.run(
        "[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[0].textContent)"
    )
    return found


def column(tab: Browser, number: int) -> list[str]:
    found: list[str] = tab.run(
        f"[...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[{number}].textContent)"
    )
    return found


def click(tab: Browser, selector: str) -> None:
    """As a person does: where it is on the screen."""
    x, y = tab.run(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}}); "
        "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    tab.point(x, y, click=True)


# -- the page in a browser


def test_the_table_sorts_by_what_a_column_means(tab: Browser, shown_store: Path) -> None:
    with KVDB.open(shown_store, "r") as db:
        tokens = {s.name: s.tokens for s in db.sequences()}
    click(tab, "#table th:nth-child(3) button")
    down = [int(each.replace(",", "")) for each in column(tab, 2)]
    assert (down[0], down) == (3000, sorted(down, reverse=True))
    assert tab.run("document.querySelector('#table th:nth-child(3)').ariaSort") == "descending"
    click(tab, "#table th:nth-child(3) button")
    up = [int(each.replace(",", "")) for each in column(tab, 2)]
    assert up == sorted(tokens.values())[:50]
    click(tab, "#table th:nth-child(1) button")
    assert names(tab) == sorted((str(name) for name in tokens), key=str.lower)[:50]
    click(tab, "#next")
    assert names(tab) == sorted((str(name) for name in tokens), key=str.lower)[50:]
    assert tab.run("document.getElementById('which').textContent") == "51 to 72"


def test_the_table_filters_and_says_how_many(tab: Browser, shown_store: Path) -> None:
    with KVDB.open(shown_store, "r") as db:
        key = db.sequence("chat 07").key
    click(tab, "#filter")
    tab.write("chat 1")
    wanted = [name for name in (f"chat {i:02}" for i in range(70)) if "1" in name]
    assert sorted(names(tab)) == wanted
    assert tab.run("document.getElementById('count').textContent") == f"{len(wanted)} of 72 sequences"
    for typed in (key, key[:5]):
        tab.run("document.getElementById('filter').value = ''")
        tab.write(typed)
        assert names(tab) == ["chat 07"]
    tab.run("document.getElementById('filter').value = ''")
    tab.write("pinned")
    assert names(tab) == ["long"]
    tab.write(" nothing like it")
    assert names(tab) == []


def visible(tab: Browser) -> list[str]:
    found: list[str] = tab.run(
        "[...document.querySelectorAll('#list [role=treeitem] > .row')].filter((e) => e.checkVisibility()).map((e) => e.textContent)"
    )
    return found


def test_the_tree_folds_by_pointer_and_by_keyboard(tab: Browser) -> None:
    folded = visible(tab)
    assert len(folded) == 3
    assert folded[0].startswith("tokens 0 to ") or folded[0].startswith("chat ")
    assert "70 sequences" in folded[0]
    click(tab, "#list > li > .row")
    opened_ = visible(tab)
    assert len(opened_) > 60
    click(tab, "#list > li > .row")
    assert visible(tab) == folded
    tab.press("ArrowRight")
    assert visible(tab) == opened_
    tab.press("ArrowRight")
    assert tab.run("document.activeElement.parentElement.closest('[role=treeitem]') !== null")
    tab.press("ArrowLeft")
    tab.press("ArrowLeft")
    assert visible(tab) == folded
    tab.press("ArrowDown")
    assert tab.run("document.activeElement === document.querySelectorAll('#list > li')[1]")
    click(tab, "#unfold")
    assert visible(tab) == opened_
    click(tab, "#fold")
    assert visible(tab) == folded


def test_a_name_in_the_table_leads_to_its_place_in_the_tree(tab: Browser) -> None:
    click(tab, "#filter")
    tab.write("chat 42")
    click(tab, "#table tbody tr td button")
    assert tab.run("document.querySelector('#list .found > .row b').textContent") == "chat 42"
    assert tab.run("document.activeElement === document.querySelector('#list .found')")


def test_a_heat_map_tells_the_value_under_the_pointer_and_under_its_cursor(tab: Browser, shown_store: Path) -> None:
    with KVDB.open(shown_store, "r") as db:
        grid = key_maps(db, db.sequence("long")).norms
    tab.run("document.getElementById('norms-0').scrollIntoView({block: 'center'})")
    left, top, wide, high = tab.run(
        "(() => { const s = document.getElementById('norms-0'), c = s.querySelector('.cells').dataset.cells.split(' ').map(Number), "
        "m = s.getScreenCTM(); return [m.e + c[0] * m.a, m.f + c[1] * m.d, c[2] * m.a, c[3] * m.d]; })()"
    )

    def told() -> str:
        found: str = tab.run("document.getElementById('norms-0').closest('figure').querySelector('output').textContent")
        return found

    for row, each in ((0, 0), (1, 77), (1, len(grid.bounds) - 2)):
        columns, rows = len(grid.bounds) - 1, len(grid.rows)
        tab.point(left + wide * (each + 0.5) / columns, top + high * (row + 0.5) / rows)
        start, stop = grid.bounds[each], grid.bounds[each + 1] - 1
        value = grid.values[row][each]
        assert value is not None
        assert told().startswith(f"layer {grid.rows[row]}, tokens {start:,} to {stop:,}: ")
        assert float(told().rpartition(": ")[2]) == pytest.approx(value, rel=1e-3)
    tab.run("document.getElementById('norms-0').focus()")
    for _ in range(3):
        tab.press("ArrowUp")
    for _ in range(20):
        tab.press("ArrowLeft", shift=True)
    tab.press("ArrowRight")
    tab.press("ArrowDown")
    assert told().startswith(f"layer 2, tokens {grid.bounds[1]:,} to {grid.bounds[2] - 1:,}: ")


def test_a_map_of_reads_has_the_bytes_of_the_trace(tab: Browser) -> None:
    tab.run("document.getElementById('skew').focus()")
    tab.press("ArrowRight")
    tab.press("ArrowDown")
    output = "document.getElementById('skew').closest('figure').querySelector('output').textContent"
    assert tab.run(output) == "layer 1, step 1: 2.9 KiB"


def test_colours_follow_the_system_and_a_switch(tab: Browser, shown_page: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    assert tab.run(background) == "rgb(255, 255, 255)"
    for wanted in ("light", "dark"):
        click(tab, "#theme")
        assert tab.run("document.documentElement.dataset.theme") == wanted
    assert tab.run(background) == "rgb(22, 25, 29)"
    tab.open(shown_page, dark=True)
    assert tab.run(background) == "rgb(22, 25, 29)"
    assert tab.run("getComputedStyle(document.querySelector('.picture text')).fill") == "rgb(230, 233, 236)"


@pytest.mark.parametrize("width", [360, 1400])
def test_it_fits_its_window(tab: Browser, shown_page: Path, width: int) -> None:
    tab.open(shown_page, width=width)
    assert tab.run("document.documentElement.scrollWidth") <= width


def test_what_can_be_used_has_a_name_and_the_keyboard_reaches_it(tab: Browser) -> None:
    nameless = tab.run(
        "[...document.querySelectorAll('button, input, select, [tabindex=\"0\"], svg')].filter((e) => !(e.textContent.trim() || "
        "e.getAttribute('aria-label') || (e.labels && e.labels.length))).map((e) => e.outerHTML.slice(0, 90))"
    )
    assert nameless == []
    tab.run("document.activeElement.blur()")
    reached = set()
    for _ in range(400):
        tab.press("Tab")
        reached.add(
            tab.run(
                "document.activeElement.id || document.activeElement.getAttribute('role') || document.activeElement.tagName"
            )
        )
        if "skew" in reached:
            break
    assert {"theme", "filter", "next", "fold", "treeitem", "mapped", "norms-0", "widths-0", "skew"} <= reached


def test_text_from_a_store_runs_nowhere(tab: Browser) -> None:
    tab.run("document.getElementById('filter').value = ''")
    click(tab, "#filter")
    tab.write("onerror")
    assert names(tab) == [NASTY]
    assert tab.run("document.querySelectorAll('img').length") == 0


def test_the_page_may_run_nothing_else_and_ask_for_nothing(shown_page: Path, chromium: Browser, tmp_path: Path) -> None:
    """The policy in the page holds: the same page with something planted in it logs that it was refused."""
    for planted in (
        "<script>document.title = 'run'</script>",
        "<img src='https://example.invalid/x.png'>",
        "<audio src='https://example.invalid/x.mp3' preload='auto'></audio>",
    ):
        changed = tmp_path / "changed.html"
        changed.write_text(shown_page.read_text().replace("<main>", f"<main>{planted}"))
        chromium.open(changed)
        assert chromium.run("document.title") != "run"
        assert any("Content Security Policy" in line for line in chromium.logged), chromium.logged
        chromium.logged.clear()
    chromium.requested.clear()
