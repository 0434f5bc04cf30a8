"""A series of benchmarks goes on where it was, and what one does harms no other.

The benchmarks here are short scripts; they are run, timed, interrupted and kept as the real ones.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kvdb.errors import InvalidInput
from kvdb.tools.bench import series, table
from kvdb.tools.bench.machine import code_digest, command_line, host, same

WRITES = """
import json, os, sys
from pathlib import Path
from kvdb.tools.bench.machine import host
here = host()
here["command"] = "-c gather"
Path(os.environ["KVDB_BENCH_RESULTS"], "gather.json").write_text(json.dumps({"benchmark": "gather", "machine": here, "rows": []}))
print("a table of", os.environ["COLUMNS"])
"""
SLEEPS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""
STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(__import__("os").getpid()))
time.sleep(60)
"""
RESULT = {"benchmark": "gather", "rows": list[object]()}


def run_instead(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(series, "command", lambda name, results: list(arguments))


def test_a_result_is_finished_for_this_code_machine_and_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead(monkeypatch, "-c", "gather")
    file = tmp_path / "gather.json"
    assert series.finished(["gather"], tmp_path) == set()
    good = {**host(), "command": "-c gather"}
    file.write_text(json.dumps({**RESULT, "machine": good}))
    assert series.finished(["gather", "append"], tmp_path) == {"gather"}
    for field in ("cpu", "cores", "python", "commit", "code", "versions", "threads_from", "command"):
        file.write_text(json.dumps({**RESULT, "machine": {**good, field: "another"}}))
        assert series.finished(["gather"], tmp_path) == set(), field
        file.write_text(json.dumps({**RESULT, "machine": {key: value for key, value in good.items() if key != field}}))
        assert series.finished(["gather"], tmp_path) == set(), field
    no_rows, another = {"benchmark": "gather", "machine": good}, {**RESULT, "benchmark": "append", "machine": good}
    for text in ("", "{", "[]", '{"machine": 3}', "{}", "[" * 100_000, json.dumps(no_rows), json.dumps(another)):
        file.write_text(text)
        assert series.finished(["gather"], tmp_path) == set(), text[:80]


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_result_of_another_number_of_threads_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    run_instead(monkeypatch, "-c", "gather")
    monkeypatch.setenv(variable, "2")
    (tmp_path / "gather.json").write_text(json.dumps({**RESULT, "machine": {**host(), "command": "-c gather"}}))
    assert series.finished(["gather"], tmp_path) == {"gather"}
    monkeypatch.setenv(variable, "1")
    assert series.finished(["gather"], tmp_path) == set()
    monkeypatch.delenv(variable)
    assert series.finished(["gather"], tmp_path) == set()


def test_a_result_of_other_options_is_not_finished(tmp_path: Path) -> None:
    own = {**host(), "command": command_line(table.command("gather", str(tmp_path)))}
    (tmp_path / "gather.json").write_text(json.dumps({**RESULT, "machine": own}))
    assert series.finished(["gather"], tmp_path) == {"gather"}
    (tmp_path / "gather.json").write_text(
        json.dumps({**RESULT, "machine": {**own, "command": own["command"] + " --mib 256"}})
    )
    assert series.finished(["gather"], tmp_path) == set()


def test_what_was_measured_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, "-c", WRITES)
    looked: list[float] = []
    found = series.measure("gather", tmp_path / "new", looked.append)
    assert (found.state, found.told[:10]) == ("measured", "a table of")
    assert found.seconds > 0
    assert looked == sorted(looked)
    run_instead(monkeypatch, "-c", "gather")
    assert series.finished(["gather"], tmp_path / "new") == {"gather"}


def test_one_that_says_why_it_cannot_is_skipped_and_one_that_ends_badly_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead(monkeypatch, "-c", "print('gather: SKIPPED, no disk')")
    assert series.measure("gather", tmp_path)[:3] == ("gather", "skipped", "gather: SKIPPED, no disk")
    run_instead(monkeypatch, "-c", "raise SystemExit('planted')")
    assert series.measure("gather", tmp_path)[:3] == ("gather", "failed", "exit code 1: planted")
    run_instead(monkeypatch, "-c", WRITES + "raise ValueError('late')")
    assert series.measure("gather", tmp_path)[1:3] == ("failed", "exit code 1: ValueError: late")


def test_what_a_benchmark_needs_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.NEEDS, "fio", table.Need("fio", "package fio", lambda: False))
    run_instead(monkeypatch, "-c", "raise SystemExit(9)")
    assert series.measure("cold", tmp_path)[:3] == ("cold", "skipped", "needs fio (package fio)")


def test_an_interrupt_ends_a_benchmark_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "_PATIENCE_S", 5.0)
    run_instead(monkeypatch, "-c", SLEEPS, str(tmp_path / "pid"))

    def interrupt(seconds: float) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        series.measure("gather", tmp_path, interrupt)
    assert time.monotonic() - started < 20
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.05)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("a process of the benchmark was left over")


def test_another_interrupt_while_it_cleans_up_kills_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, "-c", STUBBORN, str(tmp_path / "pid"))

    def interrupt(seconds: float) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            series.measure("gather", tmp_path, interrupt)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < series._PATIENCE_S
    pid = int((tmp_path / "pid").read_text())
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the benchmark was left over")


def test_how_long_it_takes_is_what_it_took_here(tmp_path: Path) -> None:
    assert series.expected_s("gather", tmp_path) == 60 * table.BENCHES["gather"].minutes
    file = tmp_path / "gather.json"
    file.write_text(json.dumps({**RESULT, "machine": {**host(), "took_s": 5.5}}))
    assert series.expected_s("gather", tmp_path) == 5.5
    file.write_text(json.dumps({**RESULT, "machine": {**host(), "took_s": 5.5, "cpu": "another"}}))
    assert series.expected_s("gather", tmp_path) == 60 * table.BENCHES["gather"].minutes
    for told in (math.nan, math.inf, -1.0, 10**400, "5.5"):
        file.write_text(json.dumps({**RESULT, "machine": {**host(), "took_s": told}}))
        assert series.expected_s("gather", tmp_path) == 60 * table.BENCHES["gather"].minutes, told


def test_names_are_taken_in_the_order_of_the_table_and_checked() -> None:
    assert series.chosen([]) == list(table.BENCHES)
    assert series.chosen(["scale", "append"]) == ["append", "scale"]
    with pytest.raises(InvalidInput, match="benchmark 'speed': not known, expected some of reuse, "):
        series.chosen(["append", "speed"])


def test_a_change_of_any_module_is_other_code(tmp_path: Path) -> None:
    """In a copy of the three packages: a digest of the files themselves, whatever git says."""
    import kvdb

    root = Path(kvdb.__file__).resolve().parents[1]
    for folder in ("kvdb", "runtime", "tools"):
        here = tmp_path / ("kvdb" if folder == "kvdb" else f"kvdb/{folder}")
        for path in (root / folder).rglob("*.py"):
            if "__pycache__" not in path.parts and path.relative_to(root / folder).parts[0] not in ("runtime", "tools"):
                (here / path.relative_to(root / folder)).parent.mkdir(parents=True, exist_ok=True)
                (here / path.relative_to(root / folder)).write_bytes(path.read_bytes())
    asks = "from kvdb.tools.bench.machine import code_digest, host; print(code_digest(), host()['commit'])"

    def digest() -> list[str]:
        told = subprocess.run(
            [sys.executable, "-c", asks], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return told.stdout.split()

    first = digest()
    assert first == digest()
    assert first[1] == "unknown"
    for module in ("kvdb/codecs/raw.py", "kvdb/runtime/cache.py", "kvdb/tools/bench/gather.py"):
        path = tmp_path / module
        path.write_text(path.read_text() + textwrap.dedent("# changed\n"))
        assert digest() != first, module
        path.write_text(path.read_text().removesuffix("# changed\n"))
    assert digest() == first


def test_sameness_is_of_the_code_that_runs() -> None:
    here = host()
    assert here["code"] == code_digest()
    assert same(here, here)
    assert not same({}, here)
