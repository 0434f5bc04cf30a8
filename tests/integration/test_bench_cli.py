"""`kvdb bench` as a user meets it; benchmarks run as themselves, the shortest of them with few rounds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_llama
from typer.testing import CliRunner

from kvdb.tools.bench import series, table
from kvdb.tools.bench.machine import host
from kvdb.tools.cli import app

TWICE_AS_SLOW = """
import json, sys
from pathlib import Path
file = Path(sys.argv[1])
told = json.loads(file.read_text())
for row in told["rows"]:
    row["ms"] *= 2
file.write_text(json.dumps(told))
"""


def here(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """`commit`, with few rounds of each kind."""
    monkeypatch.setattr(
        series, "command", lambda name, results: ["-m", f"kvdb.tools.bench.{name}", "--rounds", "2", "--fsync-ms", "1"]
    )


def result(ms: float, **more: Any) -> dict[str, Any]:
    rows = [
        {"commit": "a turn", "durability": durability, "ms": ms, "fsync_ms": 1.0, "syncs": 4}
        for durability in ("commit", "relaxed")
    ]
    return {"benchmark": "commit", "machine": host(), "rounds": 1, "rows": rows, **more}


def kept(folder: Path, name: str, content: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"


@pytest.mark.slow
def test_a_benchmark_runs_once_and_again_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch)
    results = tmp_path / "results"
    code, out, err = here("bench", "commit", "-o", results)
    assert code == 0, err
    assert "commits, on" in out or "durability" in out
    assert "commit: measured in " in err
    file = results / "commit.json"
    told = json.loads(file.read_text())
    assert told["benchmark"] == "commit"
    assert {"cpu", "cores", "python", "commit", "code", "versions", "command", "took_s", "threads", "torch"} <= set(
        told["machine"]
    )
    assert [path.name for path in results.iterdir()] == ["commit.json"]

    before = file.stat().st_mtime_ns
    code, out, err = here("bench", "commit", "-o", results, "--json")
    assert (code, json.loads(out)["benchmarks"][0]["state"]) == (0, "kept")
    assert file.stat().st_mtime_ns == before

    monkeypatch.setattr(series, "command", lambda name, results: ["-c", TWICE_AS_SLOW, str(file)])
    code, out, err = here("bench", "commit", "-o", results, "--again", "--compare", results, "--json")
    said = json.loads(out)
    assert (code, said["benchmarks"][0]["state"]) == (0, "measured")
    (compared,) = said["compared"]  # what was there before it was written over
    assert compared["old_commit"] == compared["new_commit"] == told["machine"]["commit"]
    ratios = {tuple(figure["row"]): figure["ratio"] for figure in compared["figures"] if figure["name"] == "ms"}
    assert ratios == {(f"commit={row['commit']}", f"durability={row['durability']}"): 2.0 for row in told["rows"]}


def test_the_list_says_what_each_needs_and_which_are_finished(tmp_path: Path) -> None:
    command = " ".join(table.command("commit", str(tmp_path)))
    kept(tmp_path, "commit", result(1, machine={**host(), "command": command}))
    kept(tmp_path, "append", result(1, benchmark="append", machine={**host(), "commit": "old\x1b[31m"}))
    code, out, err = here("bench", "--list", "-o", tmp_path)
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(table.BENCHES) <= set(lines)
    assert "finished" in lines["commit"]
    assert "\x1b" not in out
    told = {
        each["name"]: each for each in json.loads(here("bench", "--list", "-o", tmp_path, "--json")[1])["benchmarks"]
    }
    assert [name for name in told if told[name]["finished"]] == ["commit"]
    assert told["cold"]["needs"] == [table.NEEDS[need].what for need in table.BENCHES["cold"].needs]


def test_results_are_compared_without_running_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "_run", lambda *_: pytest.fail("something was run"))
    old, new = kept(tmp_path / "old", "commit", result(2.0)), kept(tmp_path / "new", "commit", result(1.0, rounds=3))
    (tmp_path / "old" / "notes.json").write_text("[]")
    options = ("bench", "--no-run", "-o", new.parent)
    code, out, err = here(*options, "--compare", old)
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if line.split()[:1] == ["ms"])
    assert row.split() == ["ms", "2", "0.50x", "0.50x", "0.50x", "better"]
    assert "measured with different settings: rounds: 1 -> 3" in out
    assert "different machines" not in out
    assert here(*options, "--compare", old.parent) == (code, out, err)
    each = here(*options, "--compare", old, "--each")[1]
    assert "commit=a turn, durability=relaxed" in each
    elsewhere = {**host(), "cpu": "a slow one"}
    kept(tmp_path / "old", "commit", result(2.0, machine=elsewhere))
    assert "measured on different machines (cpu: a slow one -> " in here(*options, "--compare", old)[1]


def test_a_result_is_compared_with_the_new_one_of_its_benchmark_whatever_its_file_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = kept(tmp_path / "results", "before", result(2.0)), kept(tmp_path / "results", "commit", result(1.0))
    code, out, err = here("bench", "--no-run", "-o", new.parent, "--compare", old, "--json")
    assert code == 0, err
    (compared,) = json.loads(out)["compared"]
    assert {figure["ratio"] for figure in compared["figures"] if figure["name"] == "ms"} == {0.5}
    monkeypatch.setattr(series, "_run", lambda *_: pytest.fail("something was run"))
    code, out, err = here("bench", "append", "-o", new.parent, "--compare", old)
    assert (code, out) == (2, "")
    assert "before.json: of benchmark 'commit', expected one of append" in err


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_bad_input_exits_with_2(tmp_path: Path, as_json: bool) -> None:
    file = kept(tmp_path, "commit", result(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "not.json").write_text("{}")
    for arguments, message in (
        (["bench", "speed"], "benchmark 'speed': not known, expected some of reuse, prefill"),
        (["bench", "--list", "speed"], "benchmark 'speed': not known"),
        (["bench", "--no-run"], "--no-run: no --compare, expected one"),
        (["bench", "--no-run", "--compare", tmp_path / "none.json"], "No such file or directory, expected a result"),
        (["bench", "--no-run", "--compare", tmp_path / "not.json"], "no machine and rows, expected a result"),
        (["bench", "--no-run", "--compare", tmp_path / "empty"], "a folder without results of reuse, prefill"),
        (["bench", "--no-run", "--compare", file, "-o", tmp_path], "it would be compared with itself"),
        (
            ["bench", "--no-run", "--compare", file, "-o", tmp_path / "empty"],
            "none of its results has one of its benchmark in",
        ),
        (["eval", "--compare", file], "of benchmark 'commit', expected what 'kvdb eval --stats' wrote"),
        (["eval", "--compare", tmp_path / "none.json"], "No such file or directory, expected a result"),
    ):
        code, out, err = here(*arguments, *(["--json"] if as_json else []))
        assert code == 2, (arguments, out, err)
        assert message in (json.loads(out)["error"]["message"] if as_json else err), arguments


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "command", lambda name, results: ["-c", f"raise SystemExit('no {name}')"])
    code, out, err = here("bench", "append", "commit", "-o", tmp_path, "--json")
    assert code == 1
    assert [(each["name"], each["state"], each["told"]) for each in json.loads(out)["benchmarks"]] == [
        ("append", "failed", "exit code 1: no append"),
        ("commit", "failed", "exit code 1: no commit"),
    ]
    assert "append: failed: exit code 1: no append" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_it_is_told_what_is_kept_and_no_process_is_left(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvdb.tools.cli", "bench", "gather", "-o", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip

    def running() -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            except OSError:
                continue
            if b"kvdb.tools.bench.gather" in line and f"TMPDIR={tmp_path}".encode() in environment:
                found.append(int(folder.name))
        return found

    deadline = time.monotonic() + 60
    while not running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out, err.splitlines()[-1].split(":")[0]) == ("", "interrupted")
    assert f"0 of 1 benchmarks are done, their results in {tmp_path}; the same command goes on from there" in err
    assert running() == []
    assert not list(tmp_path.glob("*.json"))


def test_the_list_and_the_help_import_no_torch(tmp_path: Path) -> None:
    for arguments in (["bench", "--list"], ["bench", "--help"]):
        asks = f"import sys; sys.argv = ['kvdb', *{arguments}]\nfrom kvdb.tools.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        asks += "print({'torch', 'transformers', 'zarr', 'numba'} & set(sys.modules))"
        told = subprocess.run(
            [sys.executable, "-c", asks], capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ}
        )
        assert told.stdout.splitlines()[-1] == "set()", arguments


def test_an_evaluation_is_compared_with_an_older_one(tmp_path: Path) -> None:
    """The same figures come again, so every ratio is 1, but for the one that is planted in the older result."""
    save_tiny_llama(tmp_path / "tiny")
    own, stats = tmp_path / "own.txt", tmp_path / "old.json"
    own.write_text("".join(f"Line {i}: {i * i} lazy dogs.\n" for i in range(100)))
    job = (
        "eval",
        "--model",
        tmp_path / "tiny",
        "--tokens",
        1100,
        "--positions",
        4,
        "--text",
        own,
        "--selector",
        "box",
        "--budget",
        "0.2",
    )
    code, _, err = here(*job, "--needles", 0, "--threads", 1, "--stats", stats)
    assert code == 0, err
    older = json.loads(stats.read_text())
    older["rows"][0]["texts"][0]["kl"] *= 2
    stats.write_text(json.dumps(older))
    code, out, err = here(*job, "--needles", 0, "--threads", 1, "--compare", stats, "--json")
    assert code == 0, err
    (compared,) = json.loads(out)["compared"]
    ratios = {figure["name"]: figure["ratio"] for figure in compared["figures"]}
    assert ratios.pop("texts.kl") == 0.5
    assert set(ratios.values()) <= {1.0, None}
    assert "texts.layers.mass" in ratios
    out = here(*job, "--needles", 0, "--threads", 1, "--compare", stats)[1]
    row = next(line for line in out.splitlines() if line.split()[:1] == ["texts.kl"])
    assert row.split()[1:] == ["1", "0.50x", "0.50x", "0.50x", "better"]
