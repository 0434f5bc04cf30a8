"""What a commit costs beside one fsync, and how often it waits for the disk.

    python -m kvdb.tools.bench.commit --fsync-ms 5

On a machine whose disk answers from a cache an fsync is nearly free. To show a slower disk, every wait is made longer by
`--fsync-ms`: each fsync of the engine's sleeps (those of one commit in parallel, as a journal would merge them), and each
LMDB commit sleeps once for its data and, when durable, once for its meta page, which it writes to an O_DSYNC descriptor.
That is a model of a disk, not a disk. Waits one after the other are (ms on the slow disk - ms) / fsync-ms.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import lmdb
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB, files
from kvdb.environment import Environment
from kvdb.options import DURABILITY
from kvdb.tools.bench.setup import median, write_result
from kvdb.tools.bench.synthetic import file_system, geometry, ids, noise, scratch, seconds, store

PROMPT_TOKENS, TURN_TOKENS = 1000, 60


class Disk:
    """Counts the engine's waits for the disk, and makes them longer by `extra_s`."""

    def __init__(self) -> None:
        self.extra_s, self.syncs = 0.0, 0

    def _wait(self) -> None:
        self.syncs += 1
        time.sleep(self.extra_s)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        fsync, transaction = files.fsync, Environment.transaction

        def slow_fsync(fd: int, path: Path) -> None:
            fsync(fd, path)
            self._wait()

        @contextlib.contextmanager
        def slow_transaction(env: Environment, *, write: bool) -> Iterator[lmdb.Transaction]:
            with transaction(env, write=write) as raw:
                yield raw
            if write:
                for _ in range(1 + env.durable):
                    self._wait()

        with (
            mock.patch.object(files, "fsync", slow_fsync),
            mock.patch.object(Environment, "transaction", slow_transaction),
        ):
            yield


def run(
    folder: Annotated[
        Path | None, typer.Option(help="where to write; the system's temporary folder if not given")
    ] = None,
    rounds: Annotated[int, typer.Option(help="measured commits of each kind")] = 31,
    fsync_ms: Annotated[float, typer.Option(help="milliseconds that a wait takes longer on the slow disk")] = 5,
) -> None:
    """Milliseconds of a commit: a prompt of 1 000 tokens, a turn of 60, a turn that also takes a name."""
    disk = Disk()
    with scratch(folder) as place, disk.watched():
        kind = file_system(place)
        rows = [row for durability in DURABILITY for row in _measure(place, durability, disk, rounds, fsync_ms)]
    table = Table(
        "commit", "durability", "ms", "fsync ms", "syncs", "... in a row", f"ms if a sync takes {fsync_ms:g} ms more",
        title=f"commit, on {kind}",
    )  # fmt: skip
    for r in rows:
        table.add_row(
            r["commit"], r["durability"], f"{r['ms']:.1f}", f"{r['fsync_ms']:.2f}", f"{r['syncs']}",
            f"{r['in_a_row']:.1f}", f"{r['slow_ms']:.1f}",
        )  # fmt: skip
    Console().print(table)
    write_result("commit", {"file_system": kind, "rounds": rounds, "extra_fsync_ms": fsync_ms, "rows": rows})


def _measure(place: Path, durability: str, disk: Disk, rounds: int, fsync_ms: float) -> Iterator[dict[str, Any]]:
    shape = geometry()
    prompt, turn = noise(shape, PROMPT_TOKENS), noise(shape, TURN_TOKENS)
    seeds = itertools.count()
    with KVDB.open(place / f"{durability}.kvdb", durability=durability, grace_s=0) as db:
        aligned = shape.grid_floor(PROMPT_TOKENS)
        before = store(db, shape, noise(shape, aligned), ids(aligned, next(seeds))).segment
        db.put_sequence(before, aligned, name="prompt")

        def add_turn(name: str | None = None) -> None:
            last = store(db, shape, turn, ids(TURN_TOKENS, next(seeds)), after=before)
            if name is not None:
                db.put_sequence(last.segment, last.segment.info.stop, name=name, replaces=last.sequence)

        commits: dict[str, Callable[[], object]] = {
            f"{PROMPT_TOKENS} tokens": lambda: store(db, shape, prompt, ids(PROMPT_TOKENS, next(seeds))),
            f"turn of {TURN_TOKENS}": add_turn,
            f"turn of {TURN_TOKENS}, named": lambda: add_turn("conversation"),
        }
        for label, work in commits.items():
            yield {"commit": label, "durability": durability, **_time(work, db, disk, place, rounds, fsync_ms)}


def _time(
    work: Callable[[], object], db: KVDB, disk: Disk, place: Path, rounds: int, fsync_ms: float
) -> dict[str, Any]:
    times: dict[float, list[float]] = {0.0: [], fsync_ms / 1e3: []}
    single, syncs = [], 0
    for _ in range(rounds):
        for extra_s, taken in times.items():
            disk.extra_s, disk.syncs = extra_s, 0
            taken.append(1e3 * seconds(work))
            disk.extra_s, syncs = 0.0, disk.syncs
            db.evict()  # what is unnamed: the store stays small
        single.append(1e3 * seconds(lambda: _small_file(place / "small")))
    fast, slow = (median(taken) for taken in times.values())
    return {
        "ms": fast,
        "fsync_ms": median(single),
        "syncs": syncs,
        "in_a_row": (slow - fast) / fsync_ms,
        "slow_ms": slow,
    }


def _small_file(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.write(fd, bytes(4096))
        os.fsync(fd)
    finally:
        os.close(fd)


if __name__ == "__main__":
    typer.run(run)
