"""The table of benchmarks is all there is, and says what their results are made of."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import kvdb
from kvdb.tools.bench import capped
from kvdb.tools.bench.compare import benchmark_of, compare, read_result
from kvdb.tools.bench.table import BENCHES, NEEDS, command, missing, name_of, result_file

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.json"))


def test_every_benchmark_that_can_be_run_stands_in_the_table() -> None:
    runnable = {path.stem for path in (ROOT / "tools/bench").glob("*.py") if "typer.run(run)" in path.read_text()}
    modules = {name.replace("-", "_") for name, bench in BENCHES.items() if not bench.arguments}
    assert modules == runnable


@pytest.mark.parametrize("name", [name for name, bench in BENCHES.items() if not bench.arguments])
def test_a_benchmark_writes_the_result_that_the_table_says(name: str) -> None:
    """What `write_result` is called with: a literal, or an expression that begins with one."""
    tree = ast.parse((ROOT / f"tools/bench/{name.replace('-', '_')}.py").read_text())
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "write_result")
    literals = [n.value for n in ast.walk(call.args[0]) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert any(literal and result_file(name, Path()).stem.startswith(literal) for literal in literals)
    assert name_of(result_file(name, Path()).stem) == name


def test_every_need_is_known_and_can_be_looked_at() -> None:
    for bench in BENCHES.values():
        assert set(bench.needs) <= set(NEEDS)
        lacking = [NEEDS[need] for need in bench.needs if not NEEDS[need].is_met()]
        assert missing(bench) == [f"{need.what} ({need.get})" for need in lacking]


def test_a_need_that_is_not_met_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "fio (package fio)" in missing(BENCHES["cold"])


def test_memory_can_be_limited_where_a_group_can_be_made() -> None:
    group = capped._group(0).with_name("kvdb-bench-test")
    try:
        group.mkdir()
        made = (group / "memory.max").exists() or (group / "memory.limit_in_bytes").exists()
        group.rmdir()
    except OSError:
        made = False
    assert capped.can_cap() == made


def test_commands_run_modules_that_exist() -> None:
    for name, bench in BENCHES.items():
        _, module, *arguments = command(name, "a folder")
        assert (Path(kvdb.__file__).parent / f"{module.removeprefix('kvdb.').replace('.', '/')}.py").exists() or (
            ROOT / f"{module.removeprefix('kvdb.').replace('.', '/')}.py"
        ).exists()
        assert bool(arguments) == bool(bench.arguments)
    assert command("eval", "r")[2:] == ["eval", "--stats", "r/eval.json", "--plot", "r/eval.svg"]


def test_a_result_belongs_to_the_longest_name_it_begins_with() -> None:
    assert name_of("replay-131072-compute") == "replay"
    assert name_of("selection-32x8x4x128") == "selection"
    assert name_of("side-by-side") == "side-by-side"
    assert name_of("replays") is None


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_every_stored_result_compares_with_itself_figure_by_figure(file: Path) -> None:
    result = read_result(file)
    found = compare(result, json.loads(file.read_text()))
    assert name_of(benchmark_of(result)) is not None
    assert found.figures
    assert {figure.ratio for figure in found.figures} <= {1.0, None}
    assert found.missing == (0, 0)
    assert (found.machines, found.settings) == ([], [])
    keys = [(tuple(figure.row), figure.name) for figure in found.figures]
    assert len(keys) == len(set(keys)), "rows that the table does not tell apart"
