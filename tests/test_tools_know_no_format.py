"""Nothing in `tools/` knows the format: it prints what the engine computes. Where bytes lie, what files are called and how the catalog is
keyed stands in `kvdb/` alone, so that a change of the format touches no tool.

The syntax tree of every module is walked: imports of the modules that hold layouts, names of a store's files in strings that are no
docstrings, parts of its folder in paths, and the catalog behind an open store. Benchmarks that measure below the surface are excused by
name, each for what it needs and no more.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_layering import imports

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "tools").rglob("*.py"))
LAYOUTS = {
    "lmdb", "zarr", "kvdb.arrays", "kvdb.blocks", "kvdb.catalog", "kvdb.environment", "kvdb.extents", "kvdb.folder", "kvdb.format",
    "kvdb.lmdb_pages", "kvdb.manifests", "kvdb.prefix", "kvdb.segments", "kvdb.slabs", "kvdb.slots", "kvdb.transaction",
}  # fmt: skip
FILES = re.compile(r"\b(data|lock)\.mdb\b|\bzarr\.json\b|\bkvdb\.json\b|\bc\.0\b|\.kv[\d*]")
PARTS = {"catalog", "chunks", "names", "quarantine", "tmp", "trash"}

EXCUSED: dict[str, set[str]] = {
    "bench/cold.py": {"kvdb.format", "kvdb.segments", "/ 'chunks'"},  # fio reads the shard that a reader does
    "bench/commit.py": {"kvdb.environment", "lmdb"},  # every wait of LMDB for the disk is made longer
    "bench/recoded.py": {"kvdb.format", "/ 'chunks'", "'*.kv*/'"},  # forces shards out of the page cache
    "bench/replay.py": {
        "kvdb.extents",
        "kvdb.format",
        "/ 'chunks'",
        "'*.kv*/'",
    },  # the same, and reads that are not merged
    "bench/scale.py": {"kvdb.prefix", "kvdb.segments", ".catalog"},  # SQLite is given the same rows and keys
    "bench/sequential.py": {"kvdb.format", "kvdb.segments"},  # reads shards without a reader
    "bench/synthetic.py": {"kvdb.segments"},
    "bench/tiers.py": {"kvdb.format", "/ 'chunks'", "'*.kv*/'"},
}
"""What benchmarks measure lies below what is public."""
WAITING: dict[str, set[str]] = {}
"""May know it until the engine has a call for it; no more may be added."""


def known(source: str) -> set[str]:
    """What a module knows of the format."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        *_layouts(source),
        *(found for node in ast.walk(tree) if id(node) not in docstrings for found in _in_node(node)),
    }


def _layouts(source: str) -> set[str]:
    named = set(imports(source))
    return {layout for layout in LAYOUTS if any(name == layout or name.startswith(layout + ".") for name in named)}


def _in_node(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and FILES.search(node.value):
        yield repr(node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        last = node.right
        if isinstance(last, ast.Constant) and isinstance(last.value, str) and set(Path(last.value).parts) & PARTS:
            yield f"/ {last.value!r}"
    if isinstance(node, ast.Attribute) and node.attr == "catalog":
        yield ".catalog"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_tool_knows_no_format(path: Path) -> None:
    name = str(path.relative_to(ROOT / "tools"))
    excused = EXCUSED.get(name, set())
    assert known(path.read_text()) - WAITING.get(name, set()) == excused


def test_only_benchmarks_are_excused() -> None:
    assert {name.partition("/")[0] for name in EXCUSED} == {"bench"}
    assert not [name for name in EXCUSED if not (ROOT / "tools" / name).exists()]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from kvdb import format", "kvdb.format"),
        ("from kvdb import KVDB, format as f", "kvdb.format"),
        ("def f():\n    from kvdb.lmdb_pages import walk", "kvdb.lmdb_pages"),
        ("import kvdb.environment", "kvdb.environment"),
        ("import lmdb", "lmdb"),
        ("from kvdb.segments import layout", "kvdb.segments"),
        ("open(p / 'data.mdb')", "'data.mdb'"),
        ("x = f'{p}/zarr.json'", "'/zarr.json'"),
        ("files = p.glob('*.kv0/c.0.0')", "'*.kv0/c.0.0'"),
        ("header = store / 'kvdb.json'", "'kvdb.json'"),
        ("shards = store / 'chunks'", "/ 'chunks'"),
        ("db.catalog.begin()", ".catalog"),
    ],
)
def test_the_walk_sees_what_is_planted(source: str, found: str) -> None:
    assert known(source) == {found}


@pytest.mark.parametrize(
    "source",
    [
        '"""Reads kvdb.json."""',
        "def f():\n    'Not a word of data.mdb.'",
        "from kvdb.codecs import CodecPlan",
        "Problem('catalog', 'catalog', 'bad')",
        "a = 'kvdb.jsonl'",
        "ratio = chunks / names",
        "kvdb.formats",
    ],
)
def test_the_walk_sees_nothing_where_nothing_is(source: str) -> None:
    assert known(source) == set()
