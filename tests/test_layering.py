"""Imports go one way, `tools -> runtime -> kvdb`, and nothing in the product can run code that came from a store.

The syntax tree of every module is walked, so an import inside a function counts. And the interpreter is asked what really happens
when a store is opened, read and checked.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import finish, python

ROOT = Path(__file__).parents[1]
MODULES = {
    "kvdb."
    + ("" if folder == "kvdb" else folder + ".")
    + ".".join(path.relative_to(ROOT / folder).with_suffix("").parts): path
    for folder in ("kvdb", "runtime", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
ENGINE = {name for name, path in MODULES.items() if path.is_relative_to(ROOT / "kvdb")}
RUNTIME = {name for name, path in MODULES.items() if path.is_relative_to(ROOT / "runtime")}

FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code", "codeop",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen"}


def imports(source: str, package: str = "kvdb") -> Iterator[str]:
    """Every module a source imports, with the names taken from it: `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def upward(source: str, forbidden: tuple[str, ...], package: str = "kvdb") -> set[str]:
    return {name for name in imports(source, package) if any(name == f or name.startswith(f + ".") for f in forbidden)}


def dangers(source: str) -> set[str]:
    found = {name for name in imports(source) if name.partition(".")[0] in FORBIDDEN_MODULES}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS or called in ("builtins.eval", "builtins.exec"):
                found.add(called)
            if called == "torch.load" and not _says(node, "weights_only", True):
                found.add(called)
            if called.rpartition(".")[2] in ("load", "save") and called.split(".")[0] in ("np", "numpy"):
                found |= set() if _says(node, "allow_pickle", False) else {called}
    return found


def _says(call: ast.Call, option: str, value: bool) -> bool:
    """Whether a call has an option with this very value, written out."""
    return any(k.arg == option and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords)


@pytest.mark.parametrize("name", sorted(ENGINE))
def test_the_engine_knows_no_model_no_runtime_and_no_tool(name: str) -> None:
    above = ("kvdb.runtime", "kvdb.tools", "runtime", "tools", "torch", "transformers")
    assert upward(MODULES[name].read_text(), above, name.rpartition(".")[0]) == set()


@pytest.mark.parametrize("name", sorted(RUNTIME))
def test_the_runtime_knows_no_tool(name: str) -> None:
    assert upward(MODULES[name].read_text(), ("kvdb.tools", "tools"), name.rpartition(".")[0]) == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_can_run_code_from_a_store(name: str) -> None:
    assert dangers(MODULES[name].read_text()) == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_says_what_it_is(name: str) -> None:
    source = MODULES[name].read_text()
    assert ast.get_docstring(ast.parse(source))


def test_importing_the_engine_imports_neither_torch_nor_transformers_nor_numba_nor_an_oracle() -> None:
    code = """
import sys
import kvdb, kvdb.check, kvdb.store
print(sorted({"torch", "transformers", "numba", "zarr", "tensorstore", "kvdb.runtime", "kvdb.tools"} & set(sys.modules)))
"""
    assert finish(python(code)).strip() == "[]"


@pytest.mark.parametrize(
    "source",
    [
        "import kvdb.tools",
        "from kvdb import tools",
        "def f():\n    import kvdb.tools.cli",
        "if x:\n    from kvdb.tools import cli",
        "from . import tools",
        "from .tools import cli",
    ],
)
def test_the_walk_sees_planted_imports(source: str) -> None:
    assert upward(source, ("kvdb.tools",))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from marshal import loads",
        "eval(x)",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p)",
        "np.load(p, allow_pickle=True)",
        "exec('1')",
    ],
)
def test_the_walk_sees_planted_dangers(source: str) -> None:
    assert dangers(source)


# -- what really happens: the interpreter tells of every import, compilation, file and process

WATCHED = """
import os, sys
from pathlib import Path
from helpers import extend, token_list
from kvdb import KVDB
from kvdb.repair import repair
from kvdb.untrusted import look

root, planted = Path(sys.argv[1]), sys.argv[2]
told = []

def watch(event, arguments):
    if event in ("exec", "compile", "import", "marshal.loads", "marshal.load", "pickle.find_class", "os.system", "os.exec",
                 "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "ctypes.dlopen", "socket.connect"):
        told.append((event, str(arguments[0])))
    elif event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"):
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        paths = [a for a in arguments[:2] if isinstance(a, (str, bytes, Path))][: 2 if event in ("os.rename", "os.link") else 1]
        for path in paths if writes else []:
            if not Path(os.fsdecode(path)).is_relative_to(root):
                told.append((event, os.fsdecode(path)))

def use():
    look(root)
    for mode in ("r", "a"):
        with KVDB.open(root, mode) as db:
            db.check()
            for sequence in db.sequences():
                reader = db.reader()
                for segment in db.segments(sequence.spans):
                    reader.open(segment)
                reader.close()
            db.info()
    repair(root)

with KVDB.open(root) as db:
    extend(db, token_list(40), name="a")
use()  # what is imported late is imported now
exec("def act():\\n    " + planted)
sys.addaudithook(watch)
use()
act()
print(told)
"""


def test_opening_reading_and_checking_a_store_runs_no_code_and_writes_nothing_outside_it(tmp_path: Path) -> None:
    assert finish(python(WATCHED, str(tmp_path / "s"), "pass")).strip() == "[]"


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle; pickle.loads(b'cposix\\nsystem\\n.')",
        "import marshal; marshal.loads(b'N')",
        "import colorsys",
        "open(str(root) + '-outside', 'w')",
        "os.rename(root / 'kvdb.json', str(root) + '-outside')",
        "os.system('true')",
    ],
)
def test_the_watch_sees_planted_code_and_writes(tmp_path: Path, planted: str) -> None:
    assert finish(python(WATCHED, str(tmp_path / "s"), planted)).strip() != "[]"
