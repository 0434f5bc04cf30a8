"""Prefilling a prompt with KVDB that writes its KV to disk, beside prefilling it without.

    python -m kvdb.tools.bench.prefill --tokens 1000 --tokens 7500 --threads 2

The real model prefills the same text in these ways, each in a process of its own and in turn with the others. The first three are
baselines:

    blocks    transformers alone: DynamicCache and sdpa, in blocks as long as KVDB's
    whole     the same in one forward pass
    memory    attached to a store that is open for reading: KVDB's attention, nothing written
    raw       attached and writing, KV as it is, with the abstracts of the default selector
    pread     the same, reading back without a map
    int4      attached and writing, KV coded

A time ends when everything is committed, which is when it is forced to disk. Memory is what the process allocates above what it had
before, at its peak; files that are mapped are counted apart: they are the page cache's, which the kernel takes back when it must.
CPU time stands beside wall time because all threads share few cores; what loops cost to compile, once for a machine, is in neither.
"""

from __future__ import annotations

import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, NamedTuple, Self

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from kvdb import KVDB
from kvdb.options import Mode
from kvdb.runtime import attach
from kvdb.runtime.prefill import BLOCK_TOKENS
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result
from kvdb.tools.bench.synthetic import file_system, scratch

ATTACHED: Final[dict[str, tuple[Mode, str, str]]] = {
    "memory": ("r", "mmap", "raw"),
    "raw": ("a", "mmap", "raw"),
    "pread": ("a", "pread", "raw"),
    "int4": ("a", "mmap", "int4"),
}
"""Mode and read mode of the store, and codec."""
BASES: Final[tuple[str, ...]] = ("blocks", "whole", "memory")
WAYS: Final = ("blocks", "whole", *ATTACHED)
WARM_TOKENS: Final = 48
SAMPLE_S: Final = 0.005
SHOWN: Final = ("read", "attend", "tail", "wait", "write", "commit")


class Taken(NamedTuple):
    """What one prefill took. anonymous_bytes and file_bytes: at the peak, above what there was before."""

    seconds: float
    cpu_seconds: float
    anonymous_bytes: int
    file_bytes: int
    kv_bytes: int
    stages: dict[str, float]


class Peak:
    """The most memory of this process while the block runs, above what it has at its beginning; sampled, so short peaks may be missed."""

    def __enter__(self) -> Self:
        self._before = self._most = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @property
    def above(self) -> tuple[int, int]:
        """Bytes of anonymous memory and of mapped files."""
        anonymous, mapped = (most - before for most, before in zip(self._most, self._before, strict=True))
        return anonymous, mapped

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            anonymous, mapped = resident()
            self._most = max(self._most[0], anonymous), max(self._most[1], mapped)


def resident() -> tuple[int, int]:
    """Bytes of anonymous memory and of mapped files that this process has in memory now. Linux."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, mapped = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return anonymous, mapped


def run(
    tokens: Annotated[list[int], typer.Option(help="prompt lengths")] = [1000, 4000, 7500],  # noqa: B006  typer copies it
    threads: Annotated[list[int], typer.Option(help="torch threads")] = [1, 2],  # noqa: B006
    way: Annotated[list[str], typer.Option(help="which ways; 'blocks' is always one")] = list(WAYS),  # noqa: B006
    turns: Annotated[int, typer.Option(help="how often ways take turns")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="where the store lies; the system's temporary folder by default")
    ] = None,
) -> None:
    """Medians of seconds and memory, and of ratios to each baseline within a turn."""
    ways = [each for each in WAYS if each in way or each == "blocks"]
    rows: list[dict[str, Any]] = []
    with scratch(folder) as place:
        if file_system(place) == "tmpfs":
            Console().print(f"prefill: SKIPPED, {place} is in memory; expected a disk, see --folder")
            return
        for count in threads:
            for length in tokens:
                rows += _compared(place, ways, length, count, turns)
    for count in threads:
        _show([row for row in rows if row["threads"] == count], count)
    slopes = {f"{each}, {count} threads": _slope(rows, each, count) for count in threads for each in ways}
    if len(tokens) > 1:
        _show_slopes(slopes, rows[0]["kv_bytes"] / rows[0]["tokens"])
    write_result("prefill", {"turns": turns, "rows": rows, "memory_bytes_a_token": slopes})


def _compared(place: Path, ways: list[str], length: int, threads: int, turns: int) -> list[dict[str, Any]]:
    """A row for every way, of one prompt length."""
    taken: dict[str, list[Taken]] = {each: [] for each in ways}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for turn in range(turns):
            for each in ways if turn % 2 == 0 else ways[::-1]:
                path = place / f"{threads}-{length}-{turn}-{each}.kvdb"
                taken[each].append(pool.apply(measured, (path, length, each, threads)))
                shutil.rmtree(path, ignore_errors=True)
                _tell(f"{threads} threads, {length} tokens, {each}", taken[each][-1])
    bases = {each: taken[each] for each in BASES if each in ways}
    return [{"threads": threads, "tokens": length, "way": each, **_medians(taken[each], bases)} for each in ways]


def _tell(what: str, t: Taken) -> None:
    """Prefills take minutes: each is shown when it is over."""
    mib = f"{t.anonymous_bytes / (1 << 20):.0f} MiB, {t.file_bytes / (1 << 20):.0f} MiB mapped"
    Console().print(f"{what}: {t.seconds:.2f} s, {t.cpu_seconds:.2f} s of CPU, {mib}")


def _medians(own: list[Taken], bases: dict[str, list[Taken]]) -> dict[str, Any]:
    """Ratios are to each baseline, of pairs of one turn."""
    pairs = {name: list(zip(own, base, strict=True)) for name, base in bases.items()}
    return {
        "seconds": median([t.seconds for t in own]),
        "ratio": {name: median([t.seconds / b.seconds for t, b in each]) for name, each in pairs.items()},
        "cpu_seconds": median([t.cpu_seconds for t in own]),
        "cpu_ratio": {name: median([t.cpu_seconds / b.cpu_seconds for t, b in each]) for name, each in pairs.items()},
        "anonymous_bytes": median([t.anonymous_bytes for t in own]),
        "file_bytes": median([t.file_bytes for t in own]),
        "kv_bytes": own[0].kv_bytes,
        "stage_seconds": {name: median([t.stages[name] for t in own]) for name in own[0].stages},
    }


def measured(path: Path, length: int, way: str, threads: int) -> Taken:
    """Prefill `length` tokens once, in this process, after a few that load the weights and compile what is compiled."""
    torch.set_num_threads(threads)
    loaded = real_model()
    ids = document_ids(loaded, length + 1)  # the last token is left for `generate`
    if way not in ATTACHED:
        _stock(loaded.model, ids[:, :WARM_TOKENS], BLOCK_TOKENS)
        return _stock(loaded.model, ids[:, :-1], length if way == "whole" else BLOCK_TOKENS)
    mode, read_mode, codec = ATTACHED[way]
    KVDB.open(path).close()
    with (
        KVDB.open(path, mode, read_mode=read_mode) as db,
        attach(loaded.model, db, exact=True, codec=codec) as kv,
    ):
        kv.cache(ids[:, -WARM_TOKENS:])  # its end as a prompt of its own: nothing of it is reused
        return _timed(lambda: kv.cache(ids))


def _stock(model: Any, ids: torch.Tensor, block: int) -> Taken:
    def prefill() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for start in range(0, ids.shape[1], block):
                model(input_ids=ids[:, start : start + block], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    return _timed(prefill)


def _timed(prefill: Callable[[], Any]) -> Taken:
    """Memory is looked at meanwhile, which takes 0.2 ms of 5."""
    cpu, started = time.process_time(), time.perf_counter()
    with Peak() as peak:
        cache = prefill()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    if isinstance(cache, DynamicCache):
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return Taken(seconds, cpu_seconds, *peak.above, kv_bytes, {})
    kv_bytes = cache.length * cache.geometry.token_bytes
    return Taken(seconds, cpu_seconds, *peak.above, kv_bytes, cache.stats()["stage_seconds"])


def _slope(rows: list[dict[str, Any]], way: str, threads: int) -> float:
    """Bytes of anonymous memory that a token more takes at the peak, least squares over lengths of more than one block."""
    own = [r for r in rows if r["way"] == way and r["threads"] == threads and r["tokens"] > BLOCK_TOKENS]
    if len(own) < 2:
        return 0.0
    return float(np.polyfit([r["tokens"] for r in own], [r["anonymous_bytes"] for r in own], 1)[0])


def _show(rows: list[dict[str, Any]], threads: int) -> None:
    bases = list(rows[0]["ratio"])
    table = Table("tokens", "way", "s", *(f"/ {base}" for base in bases), "CPU s", *(f"/ {base}" for base in bases))
    table.title = f"prefill, {threads} threads"
    beside = Table("tokens", "way", "memory MiB", "mapped MiB", "KV MiB", *(f"{stage} s" for stage in SHOWN))
    beside.title = f"memory at the peak, and seconds of stages, {threads} threads"
    for r in rows:
        wall, cpu = ((f"{r[name][base]:.2f}" for base in bases) for name in ("ratio", "cpu_ratio"))
        table.add_row(f"{r['tokens']}", r["way"], f"{r['seconds']:.2f}", *wall, f"{r['cpu_seconds']:.2f}", *cpu)
        mib = (f"{r[name] / (1 << 20):.0f}" for name in ("anonymous_bytes", "file_bytes", "kv_bytes"))
        stages = (f"{r['stage_seconds'].get(stage, 0.0):.2f}" for stage in SHOWN)
        beside.add_row(f"{r['tokens']}", r["way"], *mib, *stages)
    Console().print(table, beside)


def _show_slopes(slopes: dict[str, float], token_bytes: float) -> None:
    table = Table("way", "bytes a token", "of its KV", title="memory at the peak, by length")
    for name, slope in slopes.items():
        table.add_row(name, f"{slope:.0f}", f"{slope / token_bytes:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(run)
