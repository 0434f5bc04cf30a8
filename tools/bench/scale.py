"""What opening and asking a store costs when it holds 100, 1 000 and 10 000 sequences.

    python -m kvdb.tools.bench.scale

One sequence in ten is a named prompt of 2 048 tokens, the others are answers of 512 tokens that continue one; one more of
8 000 tokens is what is looked up. KV is tiny: only the catalog counts here. Each opening is the first of its process. The
baseline is an SQLite file with the same listings, token ids and sequences, searched the same way: keys of blocks by
bisection, then token ids compared. Neither SQLite nor the KVDB columns read anything cold.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB, Geometry
from kvdb.prefix import block_keys, common_prefix
from kvdb.segments import Segment
from kvdb.tools.bench.setup import median, write_result
from kvdb.tools.bench.synthetic import IDENTITY, Array, file_system, geometry, ids, noise, scratch, store

PROMPT_TOKENS, ANSWER_TOKENS, LONG_TOKENS = 2048, 512, 8000
MEMORY = Path("/dev/shm")

Figures = dict[str, float]


def run(
    sizes: Annotated[list[int], typer.Option(help="numbers of sequences")] = [100, 1000, 10_000],  # noqa: B006  typer copies it
    folder: Annotated[
        Path | None, typer.Option(help="where the stores lie; in memory if not given and there is such a folder")
    ] = None,
    rounds: Annotated[int, typer.Option(help="processes that open each store")] = 9,
) -> None:
    """Milliseconds of each operation, medians over processes."""
    rows: list[dict[str, Any]] = []
    with scratch(folder or (MEMORY if MEMORY.is_dir() else None)) as place:
        kind = file_system(place)
        for size in sizes:
            _build(place / f"{size}.kvdb", size)
            _copy_to_sqlite(place / f"{size}.kvdb", place / f"{size}.sqlite")
            taken = [_in_new_process(_measure, place, size) for _ in range(rounds)]
            rows.append({"sequences": size, "ms": {name: median([t[name] for t in taken]) for name in taken[0]}})
    table = Table("ms", *(f"{row['sequences']} sequences" for row in rows), "growth", title=f"scale, on {kind}")
    for name in rows[0]["ms"]:
        figures = [row["ms"][name] for row in rows]
        table.add_row(name, *(f"{figure:.2f}" for figure in figures), f"{figures[-1] / figures[0]:.1f}x")
    Console().print(table)
    write_result("scale", {"file_system": kind, "rounds": rounds, "rows": rows})


def _build(path: Path, count: int) -> None:
    shape = geometry(layers=1, kv_heads=1, head_dim=8)
    prompt: Segment | None = None
    with KVDB.open(path, durability="relaxed") as db:
        for number in range(count):
            if number % 10 == 0:
                prompt = _store(db, shape, PROMPT_TOKENS, number)
                db.put_sequence(prompt, PROMPT_TOKENS, name=f"prompt {number}")
            else:
                _store(db, shape, ANSWER_TOKENS, number, after=prompt)
        _store(db, shape, LONG_TOKENS, count)


def _store(db: KVDB, shape: Geometry, tokens: int, seed: int, *, after: Segment | None = None) -> Segment:
    return store(db, shape, noise(shape, tokens), ids(tokens, seed), after=after).segment


def _copy_to_sqlite(path: Path, target: Path) -> None:
    """The tables of a catalog that finding and listing need."""
    with KVDB.open(path, "r") as db, db.catalog.begin() as txn, sqlite3.connect(target) as sql:
        sql.execute("CREATE TABLE tree (key BLOB, segment TEXT)")
        sql.execute("CREATE TABLE tokens (segment TEXT PRIMARY KEY, ids BLOB)")
        sql.execute("CREATE TABLE sequences (key TEXT PRIMARY KEY, name TEXT, tokens INT, model TEXT, created REAL)")
        sql.executemany("INSERT INTO tree VALUES (?, ?)", txn.listed_segments())
        paths = ((segment, txn.path_tokens(segment).tobytes()) for segment in txn.segments())
        sql.executemany("INSERT INTO tokens VALUES (?, ?)", paths)
        rows = ((s.key, s.name, s.tokens, s.model, s.created) for s in txn.sequences())
        sql.executemany("INSERT INTO sequences VALUES (?, ?, ?, ?, ?)", rows)
        sql.execute("CREATE INDEX by_key ON tree (key)")
    sql.close()


def _in_new_process(work: Callable[..., Figures], place: Path, size: int) -> Figures:
    """A forked child: nothing of the store is open in it, and imports cost nothing."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, (place, size))


def _measure(place: Path, size: int) -> Figures:
    hit = ids(LONG_TOKENS, size)
    miss, half = hit.copy(), hit.copy()
    miss[0] += 1
    half[LONG_TOKENS // 2] += 1
    figures: Figures = {}

    def take(name: str, work: Callable[[], Any], *, repeats: int = 1) -> Any:
        taken = []
        for _ in range(repeats):
            started = time.perf_counter()
            found = work()
            taken.append(1e3 * (time.perf_counter() - started))
        figures[name] = median(taken)
        return found

    with take("open, mode 'r'", lambda: KVDB.open(place / f"{size}.kvdb", "r")) as db:
        found = [take("first find", lambda: db.find(IDENTITY, hit)[0].tokens)]
        for label, tokens in (("hit", hit), ("half", half), ("miss", miss)):
            found.append(take(f"find {label}", lambda: db.find(IDENTITY, tokens)[0].tokens, repeats=21))  # noqa: B023
        assert found == [LONG_TOKENS, LONG_TOKENS, LONG_TOKENS // 2, 0], found
        take("match half", lambda: db.match(IDENTITY, half), repeats=5)
        take("sequence by name", lambda: db.sequence("prompt 0"), repeats=5)
        take("list", db.sequences, repeats=3)
        take("info", db.info, repeats=3)
    del db  # the environment goes with its last user
    with take("open, mode 'a'", lambda: KVDB.open(place / f"{size}.kvdb", durability="relaxed")) as db:
        shape, fresh = geometry(layers=1, kv_heads=1, head_dim=8), itertools.count(time.time_ns())
        take("commit", lambda: _store(db, shape, ANSWER_TOKENS, next(fresh)), repeats=9)
        db.set_size_cap("1TB")
        last = take("commit under a cap", lambda: _store(db, shape, ANSWER_TOKENS, next(fresh)), repeats=9)
        db.set_size_cap("unlimited")
        db.put_sequence(last, ANSWER_TOKENS, name="gone")
        take("delete", lambda: db.delete("gone"))
    sql = take("SQLite open", lambda: sqlite3.connect(place / f"{size}.sqlite"))
    take("SQLite first find", lambda: _find(sql, hit))
    for label, tokens in (("hit", hit), ("half", half)):
        take(f"SQLite find {label}", lambda: _find(sql, tokens), repeats=21)  # noqa: B023
    take("SQLite list", lambda: sql.execute("SELECT * FROM sequences ORDER BY created").fetchall(), repeats=3)
    sql.close()
    return figures


def _find(sql: sqlite3.Connection, tokens: Array) -> int:
    keys = block_keys(IDENTITY.digest(), tokens)

    def listed(block: int) -> list[str]:
        return [row[0] for row in sql.execute("SELECT segment FROM tree WHERE key = ?", (keys[block],))]

    low, high = -1, len(keys) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if listed(middle) else (low, middle - 1)
    paths = [sql.execute("SELECT ids FROM tokens WHERE segment = ?", (s,)).fetchone()[0] for s in listed(max(low, 0))]
    return max((common_prefix(np.frombuffer(path, "<u4"), tokens) for path in paths), default=0)


if __name__ == "__main__":
    typer.run(run)
