"""Looking into a store from a process of its own: it finds what check() finds, changes nothing, and always ends."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import pytest
from helpers import extend, finish, flip, opened, python, token_list

from kvdb import KVDB
from kvdb.untrusted import verify_untrusted


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with opened(tmp_path / "s") as db:
        extend(db, token_list(40), name="a")
    return tmp_path / "s"


def _kinds(path: Path, **options: float) -> list[str]:
    return [problem.kind for problem in verify_untrusted(path, **options)]  # type: ignore[arg-type]


def everything(root: Path) -> dict[str, tuple[bytes, int, int, int]]:
    """Contents, mode and times of a tree, folders included."""
    return {
        str(p): (p.read_bytes() if p.is_file() else b"", s.st_mode, s.st_mtime_ns, s.st_ctime_ns)
        for p in [root, *root.rglob("*")]
        for s in [p.lstat()]
    }


def test_a_whole_store_has_no_problems_and_is_left_exactly_as_it_is(store: Path) -> None:
    before = everything(store)
    assert verify_untrusted(store) == []
    assert everything(store) == before


def test_nothing_is_left_in_a_store_that_has_no_lock_files(store: Path) -> None:
    for name in ("lock.mdb", "write.lock"):
        (store / "catalog" / name).unlink()
    before = everything(store)
    assert verify_untrusted(store) == []
    assert everything(store) == before


def test_it_tells_what_check_tells(store: Path) -> None:
    (shard,) = (store / "chunks").glob("*.kv0/c.*")
    flip(shard, 0)
    with KVDB.open_untrusted(store) as db:
        assert verify_untrusted(store) == db.check() != []


@pytest.mark.parametrize("what", ["nothing there", "a file", "an empty folder"])
def test_what_is_no_store_is_a_problem(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s"
    if what == "a file":
        path.write_bytes(b"x")
    elif what == "an empty folder":
        path.mkdir()
    assert len(verify_untrusted(path)) == 1


def test_code_in_the_current_folder_or_in_the_store_is_not_run(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kvdb.py", "numpy.py", "sitecustomize.py", "json.py"):
        (store / module).write_text(f"open({str(store / 'owned')!r}, 'w')\nraise SystemExit(3)\n")
    monkeypatch.chdir(store)
    assert _kinds(store) == []
    assert not (store / "owned").exists()


# What a store can do to the child is played by a child that does it to itself: the engine has no known way to be made to.


def _behave(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Have the child run `code` once it is confined."""
    program = tmp_path / "interpreter"
    program.write_text(
        f"#!{sys.executable} -B\nimport kvdb.untrusted as u, sys\nu.look = lambda path: exec({code!r}) or []\n"
        "sys.argv[1:] = sys.argv[5:]\nu.main()\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))


def test_a_child_that_behaves_says_that_all_is_well(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _behave(monkeypatch, tmp_path, "pass")
    assert verify_untrusted(store) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", f"status {-signal.SIGSEGV}"),
        ("import os; os.abort()", f"status {-signal.SIGABRT}"),
        ("raise ZeroDivisionError", "status 1"),
        ("import os; os._exit(0)", "no answer"),
        ("import sys; sys.stdout.buffer.write(b'x' * (64 << 20))", ""),
        ("a = bytearray(8 << 30)", "status 1"),
    ],
)
def test_a_child_that_dies_or_babbles_is_a_problem(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    _behave(monkeypatch, tmp_path, code)
    (problem,) = verify_untrusted(store)
    assert problem.kind == "crash"
    assert message in problem.message


@pytest.mark.parametrize(
    "code", ["while True: pass", "import time; time.sleep(60)", "import os, time; os.close(1); time.sleep(60)"]
)
def test_a_child_that_does_not_end_is_killed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    _behave(monkeypatch, tmp_path, code)
    assert _kinds(store, timeout_s=2) == ["hang"]


def test_a_child_can_write_no_byte_into_a_file(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "written"
    _behave(monkeypatch, tmp_path, f"import os; os.write(os.open({str(target)!r}, os.O_WRONLY | os.O_CREAT), b'x')")
    assert _kinds(store) == ["crash"]
    assert target.read_bytes() == b""


def test_the_child_is_confined() -> None:
    code = """
import resource
from kvdb.untrusted import confine
confine(7, 1 << 31)
print([resource.getrlimit(r)[1] for r in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)])
"""
    assert finish(python(code)).strip() == str([1 << 31, 8, 0, 0])
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] != 0  # ours is as it was
