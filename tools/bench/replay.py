"""Decoding in the shape of Llama-3.1-8B, replayed: real keys, values and queries of a small model, no model that computes.

    python -m kvdb.tools.bench.replay --tokens 32768 --recording track.npz
    python -m kvdb.tools.bench.replay --tokens 131072 --recording track.npz --compute

KV of 32 layers, 8 KV heads and 128 dimensions lies in a store on disk (`kvdb.tools.bench.larger` says what it is made of), 4 GiB for 32 768 tokens, and is
decoded from under a memory limit, in ways that take turns, each in a process of its own:

    capped    as it is: selected records, read past the page cache into a host tier that takes most of the limit; reading ahead where it gains
    ahead     the same, always reading ahead
    behind    the same, never reading ahead
    mapped    through the page cache, never reading ahead
    memory    with no limit, through the page cache, every record that these steps select in memory before the first one
    apart     under the limit, many reads at a time, each step's from the disk: nothing is kept
    early     the same, always reading ahead
    single    as `apart`, and records that lie one after the other are asked for one by one
    reads     what `apart` reads, layer by layer, with nothing computed: what is to be read is known beforehand
    all       all KV under the limit, in large sequential reads one part ahead of dense attention (`kvdb.tools.bench.sequential`)

The limit counts what a process allocates and reads once its abstracts are loaded (`kvdb.tools.bench.capped`); at first it is full of something
else. Without --compute a step is attention alone, with nothing that reading could hide behind; with it, each layer also has its matrix
products (`kvdb.tools.bench.products`). Were all that is shorter hidden behind what is longer, a step would take as long as `memory`, which computes,
or as `reads`. With --codec the store's KV is coded; what `all` reads is not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final
from unittest.mock import patch

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB, arrivals, extents, format
from kvdb.codecs import RAW, CodecPlan
from kvdb.errors import InvalidInput, Unsupported
from kvdb.runtime import KVDBCache
from kvdb.runtime.cache import Prefix
from kvdb.runtime.gather import Gather, Lent
from kvdb.runtime.layers import FullLayer, Tail
from kvdb.runtime.selection import Budget, CentroidSelector
from kvdb.runtime.timeline import STAGES
from kvdb.sizes import parse_bytes
from kvdb.tools.bench.capped import force_out, memory_cap
from kvdb.tools.bench.larger import IDENTITY, NAME, Array, LayerStep, Shape, fidelity_of, layer_steps, write_store
from kvdb.tools.bench.products import Products
from kvdb.tools.bench.recording import Texts, Track, record, texts_in
from kvdb.tools.bench.sequential import Sequential, fastest
from kvdb.tools.bench.setup import median, write_result
from kvdb.tools.bench.synthetic import file_system, scratch

NOTHING_KEPT: Final = ("apart", "early", "single", "reads")
DIRECT: Final = ("capped", "ahead", "behind", *NOTHING_KEPT)
WAYS: Final = (*DIRECT, "mapped", "memory", "all")
AHEAD: Final = {"capped": None, "ahead": True, "early": True}
HOST_SHARE: Final = 0.85
"""Of the limit, for the host tier."""
FEWER: Final = {**dict.fromkeys(NOTHING_KEPT, 2), "all": 8}
"""Of the slow ways, one step in so many."""
TEXTS: Final = 4
TEXT_TOKENS: Final = 8032
"""With the steps after it, what the small model's context holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Of one way in one process.

    warm  steps before those that are measured
    """

    way: str
    store: Path
    recording: Path
    shape: Shape
    budget: int | None
    limit: int
    warm: int
    steps: int
    threads: int
    compute: bool
    codec: CodecPlan

    @property
    def open(self) -> dict[str, Any]:
        """Options of `KVDB.open`."""
        return {"read_mode": "direct", "host_budget": int(HOST_SHARE * self.limit)} if self.way in DIRECT else {}


@dataclass(slots=True, kw_only=True)
class Measured:
    """ms and disk_bytes are of each step, the others of one step on average, but for two.

    kept_bytes  abstracts in memory
    ahead       whether records were read ahead, and why
    read_way    of `kvdb.tools.bench.sequential.WAYS`, the one that was faster; empty where it was not used
    """

    ms: list[float] = field(default_factory=list)
    disk_bytes: list[int] = field(default_factory=list)
    read_bytes: float = 0.0
    kept_bytes: int = 0
    read_way: str = ""
    ahead: str = ""
    stage_ms: dict[str, float] = field(default_factory=dict)


def run(
    tokens: Annotated[int, typer.Option(help="context length, a multiple of 16")] = 32_768,
    limit: Annotated[str, typer.Option(help="memory under the limit")] = "2GiB",
    budget: Annotated[int | None, typer.Option(help="tokens per KV head; as attach has it if not given")] = None,
    steps: Annotated[int, typer.Option(help="measured steps of each way in a turn")] = 64,
    warm: Annotated[int, typer.Option(help="steps before them")] = 64,
    turns: Annotated[int, typer.Option(help="how often ways take turns")] = 3,
    layers: Annotated[int, typer.Option(help="of the shape")] = 32,
    compute: Annotated[bool, typer.Option("--compute", help="the matrix products of each layer, too")] = False,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    codec: Annotated[str, typer.Option(help="of the store's KV, as 'kvdb compact --codec' takes it")] = "raw",
    ways: Annotated[list[str] | None, typer.Option("--way", help=f"of {', '.join(WAYS)}; all if not given")] = None,
    recording: Annotated[
        Path | None, typer.Option(help="of keys, values and queries; made there if it does not exist")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="made there if it does not exist, and kept")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="for what is not kept; the system's temporary one by default")
    ] = None,
) -> None:
    """Milliseconds a step, median and 99th percentile, ratios within a turn, bytes from the disk and where the time went."""
    if unknown := {*(ways or ())} - {*WAYS}:
        raise InvalidInput(f"replay: way {', '.join(sorted(unknown))}, expected some of {', '.join(WAYS)}")
    plan = CodecPlan.parse(codec)
    possible = WAYS if plan == RAW else tuple(way for way in WAYS if way != "all")
    chosen = [way for way in possible if way in {*(ways or WAYS), "memory"}]
    shape, found = Shape(layers=layers), dict[str, list[Measured]]()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for the processes that measure, as the command line has it
    with scratch(folder) as place:
        path, tracks = store or place / "s.kvdb", recording or place / "r.npz"
        if file_system(path.parent) == "tmpfs":
            Console().print(f"replay: SKIPPED, {path.parent} is in memory; expected a disk, see --folder")
            return
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            if not tracks.exists():
                pool.submit(_record, tracks, warm + steps).result()
            texts, text_tokens = texts_in(tracks)
            pool.submit(_write, path, tracks, shape, tokens, plan).result()
            settings = [
                Setting(
                    way=way, store=path, recording=tracks, shape=shape, budget=budget, limit=parse_bytes("replay: limit", limit),
                    warm=warm, steps=min(steps, max(4, steps // FEWER.get(way, 1))), threads=threads, compute=compute, codec=plan,
                )
                for way in chosen
            ]  # fmt: skip
            try:
                for _ in range(turns):
                    for setting in settings:
                        found.setdefault(setting.way, []).append(pool.submit(_measure, setting).result())
            except Unsupported as e:
                Console().print(f"replay: SKIPPED, {e}")
                return
            except BrokenProcessPool as e:
                raise InvalidInput(
                    f"replay: limit is {limit}, of which a process was ended, expected room for what it computes; give it more"
                ) from e
    rows = [_row(way, found[way], found) for way in chosen]
    kv_bytes, kept = shape.geometry.token_bytes * tokens, found["memory"][0].kept_bytes
    title = f"{tokens} tokens, {kv_bytes >> 20} MiB of KV, {kept >> 20} MiB of abstracts, {limit} for the rest"
    for table in _tables(rows, title):
        Console().print(table)
    told = {
        "tokens": tokens, "layers": layers, "budget": budget, "kv_bytes": kv_bytes, "abstract_bytes": kept, "limit": limit,
        "steps": steps, "warm": warm, "turns": turns, "compute": compute, "threads": threads, "codec": codec,
        "texts": texts, "text_tokens": text_tokens, "text_repeated": tokens / (texts * text_tokens),
    }  # fmt: skip
    how = "".join(f"-{said}" for said, wanted in ((codec, plan != RAW), ("compute", compute)) if wanted)
    write_result(f"replay-{tokens}{how}", {**told, "rows": rows})


def _row(way: str, turns: list[Measured], found: dict[str, list[Measured]]) -> dict[str, Any]:
    """largest_ratio: to what computes, or what reads, whichever takes longer; None where the latter was not measured."""
    base, reads = found["memory"], found.get("reads")
    every, base_ms = ([ms for turn in which for ms in turn.ms] for which in (turns, base))
    ratios = [median(own.ms) / median(memory.ms) for own, memory in zip(turns, base, strict=True)]
    terms = [max(median(one.ms), median(other.ms)) for one, other in zip(base, reads or [], strict=False)]
    p99 = float(np.percentile(every, 99))
    stages = {stage: median([turn.stage_ms[stage] for turn in turns]) for stage in turns[0].stage_ms}
    return {
        "way": way, "ms": median(every), "p99_ms": p99, "ratio": median(ratios), "ratios": ratios,
        "p99_ratio": p99 / float(np.percentile(base_ms, 99)),
        "largest_ratio": median([median(own.ms) / term for own, term in zip(turns, terms, strict=True)]) if reads else None,
        "disk_bytes": float(np.mean([count for turn in turns for count in turn.disk_bytes])),
        "read_bytes": median([turn.read_bytes for turn in turns]), "stage_ms": {s: ms for s, ms in stages.items() if ms},
        "read_way": turns[-1].read_way, "ahead": turns[-1].ahead,
    }  # fmt: skip


def _tables(rows: list[dict[str, Any]], title: str) -> list[Table]:
    times = Table(
        "way", "ms", "p99 ms", "/ memory", "p99 / its p99", "/ larger of memory, reads", "read MiB", "from disk", title=title
    )  # fmt: skip
    stages = [stage for stage in STAGES if any(stage in r["stage_ms"] for r in rows)]
    where = Table("way", *stages, title="ms of a step, by stage")
    for r in rows:
        times.add_row(
            r["way"], f"{r['ms']:.0f}", f"{r['p99_ms']:.0f}", f"{r['ratio']:.2f}", f"{r['p99_ratio']:.2f}",
            f"{r['largest_ratio']:.2f}" if r["largest_ratio"] else "",
            f"{r['read_bytes'] / 2**20:.0f}", f"{r['disk_bytes'] / 2**20:.1f}",
        )  # fmt: skip
        if r["stage_ms"]:
            where.add_row(r["way"], *(f"{r['stage_ms'].get(stage, 0):.0f}" for stage in stages))
    return [times, where]


def _record(path: Path, steps: int) -> None:
    record(TEXTS, TEXT_TOKENS, steps).save(path)


def _write(path: Path, recording: Path, shape: Shape, tokens: int, codec: CodecPlan) -> None:
    """raises  InvalidInput for a store that is there and holds something else"""
    if path.exists():
        with KVDB.open(path, "r") as db:
            found = db.sequence(NAME)
            there = db.segments(found.spans)[0].info.geometry
            if there != shape.geometry or found.tokens != tokens or found.fidelity != fidelity_of(codec):
                raise InvalidInput(
                    f"store {path}: {found.tokens} tokens of {len(there.layers)} layers, {found.fidelity}, expected {tokens} of {shape.layers}, "
                    f"{fidelity_of(codec)}; name another one"
                )
        return
    with KVDB.open(path) as db:
        write_store(db, shape, Texts.load(recording), tokens, tuple(CentroidSelector().abstracts), codec)


def _measure(setting: Setting) -> Measured:
    torch.set_num_threads(setting.threads)
    track = Track.load(setting.recording)
    if (there := len(track.ids)) < (wanted := setting.warm + setting.steps):
        raise InvalidInput(
            f"recording {setting.recording}: {there} steps, expected {wanted}; record it again, or measure fewer"
        )
    rest = Products() if setting.compute else None
    single = patch.object(arrivals, "exactly", _one_by_one) if setting.way == "single" else contextlib.nullcontext()
    with single, KVDB.open(setting.store, "r", **setting.open) as db:
        if setting.way == "all":
            return _all(db, setting, track, rest)
        return _reads(db, setting, track) if setting.way == "reads" else _selected(db, setting, track, rest)


def _one_by_one(files: Array, rows: Array, slots: Array, row_bytes: int) -> extents.Extents:
    """As `kvdb.extents.exactly`, and neighbours are not asked for together."""
    every = np.arange(len(rows))
    return extents.Extents(rows * row_bytes, np.full(len(rows), row_bytes), every, every, np.zeros_like(every))


# -- selected records


def _selected(db: KVDB, setting: Setting, track: Track, rest: Products | None) -> Measured:
    measured, shards = Measured(), _shards(setting.store)
    cache = _restored(db, setting)
    tokens, whole = cache.length, range(setting.warm + setting.steps)

    def step(number: int) -> Callable[[], None]:
        layers, ids = (
            layer_steps(setting.shape, track, number),
            torch.from_numpy(track.ids[None, number : number + 1].astype(np.int64)),
        )
        return lambda: _step(cache, ids, layers, rest)

    for number in whole if setting.way == "memory" else whole[:1]:
        step(number)()  # the first one loads abstracts and loops
    _rewind(cache, tokens)
    if setting.way != "memory":
        _drop(cache, shards)
    with contextlib.nullcontext() if setting.way == "memory" else _full(setting):
        for number in whole[: setting.warm]:
            step(number)()
        read, stages = cache.metrics.decode_bytes_read, dict(cache.timeline.seconds)
        for number in whole[setting.warm :]:
            if setting.way in NOTHING_KEPT:
                _drop(cache, shards)
            _time(measured, step(number))
        measured.read_bytes = (cache.metrics.decode_bytes_read - read) / setting.steps
        measured.stage_ms = {
            stage: 1e3 * (seconds - stages[stage]) / setting.steps for stage, seconds in cache.timeline.seconds.items()
        }
        measured.ahead = cache.prefetch.stats()["why"]
        measured.kept_bytes = cache.stats()["abstract_bytes_resident"]
        cache.close()
    return measured


def _reads(db: KVDB, setting: Setting, track: Track) -> Measured:
    measured, shards = Measured(), _shards(setting.store)
    cache, asked = _restored(db, setting), list[tuple[int, torch.Tensor, torch.Tensor | None]]()
    history = cache.rows[0]
    lend: Callable[..., Iterator[Any]] = history.lend

    def noted(*chosen: Any) -> Iterator[Any]:
        asked.append(chosen)
        return lend(*chosen)

    def read(step: int) -> None:
        for chosen in asked[step * setting.shape.layers : (step + 1) * setting.shape.layers]:
            for _ in lend(*chosen):
                pass

    with patch.object(history, "lend", noted):
        for number in range(setting.warm + setting.steps):
            ids = torch.from_numpy(track.ids[None, number : number + 1].astype(np.int64))
            _step(cache, ids, layer_steps(setting.shape, track, number), None)
    with _full(setting):
        for number in range(setting.warm, setting.warm + setting.steps):
            _drop(cache, shards)
            before = cache._reader.bytes_read
            _time(measured, partial(read, number))
            measured.read_bytes += (cache._reader.bytes_read - before) / setting.steps
        cache.close()
    return measured


def _restored(db: KVDB, setting: Setting) -> KVDBCache:
    spans = db.sequence(NAME).spans
    cache = KVDBCache(
        db, IDENTITY, lambda: IDENTITY, setting.shape.geometry, {}, batch=1, dtype=torch.bfloat16, device=torch.device("cpu"),
        rule=Budget.of(setting.budget), selector=CentroidSelector(), codec=setting.codec, model_label=NAME, prefetch=AHEAD.get(setting.way, False),
    )  # fmt: skip
    cache.restore([Prefix(db.tokens(spans).tolist(), spans, db.segments(spans))])
    return cache


def _step(cache: KVDBCache, ids: torch.Tensor, layers: list[LayerStep], rest: Products | None) -> None:
    """A forward pass without its model."""
    cache.begin_step(ids, None, None)
    for index, (layer, given) in enumerate(zip(cache.layers, layers, strict=True)):
        if cache.reads_ahead and index + 1 < len(layers):
            with cache.timeline.span("predict", index + 1):
                cache.expect(index + 1, layers[index + 1].predicted)
        if rest is not None:
            rest.before()
        layer.update(given.k, given.v)
        assert isinstance(layer, FullLayer)
        layer.attend(given.query, 1.0)
        if rest is not None:
            rest.after()
    cache.end_step(failed=False)


def _rewind(cache: KVDBCache, tokens: int) -> None:
    """Forget every step."""
    for row in cache.rows:
        del row.tokens[tokens:]
    for layer in cache.layers:
        layer.stored.tail.drop(layer.stored.tail.length)


def _drop(cache: KVDBCache, shards: list[Path]) -> None:
    """Have nothing of the store's KV in memory; its files are opened again at once."""
    cache._reader.close()
    if cache.db.host is not None:
        cache.db.host.close()
    force_out(shards)
    for part in cache.rows[0]._sealed:
        cache._reader.open(part.segment)


# -- all KV


def _all(db: KVDB, setting: Setting, track: Track, rest: Products | None) -> Measured:
    segments, measured = db.segments(db.sequence(NAME).spans), Measured()
    tails = [Tail() for _ in range(setting.shape.layers)]
    for number in range(setting.warm):  # tails alone, which also loads loops
        _dense_step(iter(()), tails, layer_steps(setting.shape, track, number), 0, rest)
    force_out(_shards(setting.store))
    with _full(setting), Sequential(segments, fastest(segments)) as source:
        parts = source.layers()
        for number in range(setting.warm, setting.warm + setting.steps):
            layers = layer_steps(setting.shape, track, number)
            _time(measured, partial(_dense_step, parts, tails, layers, len(segments), rest))
        measured.read_bytes, measured.read_way = sum(part.bytes for part in source.parts), source.way
    return measured


def _dense_step(
    parts: Iterator[tuple[int, Lent]], tails: list[Tail], layers: list[LayerStep], segments: int, rest: Products | None
) -> None:
    for tail, given in zip(tails, layers, strict=True):
        if rest is not None:
            rest.before()
        tail.append(given.k, given.v)
        running = Gather(given.query[0, :, 0].unflatten(0, (given.k.shape[1], -1)).float(), "bfloat16")
        running.add(Lent.of_tail(tail.k[0], tail.v[0]))
        for _ in range(segments):
            running.add(next(parts)[1])
        running.finish()
        if rest is not None:
            rest.after()


# -- what both do


def _time(measured: Measured, step: Callable[[], None]) -> None:
    before, started = _disk_bytes(), time.perf_counter()
    step()
    measured.ms.append(1e3 * (time.perf_counter() - started))
    measured.disk_bytes.append(_disk_bytes() - before)


def _disk_bytes() -> int:
    """What this process has had the disk read, its page faults included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


@contextlib.contextmanager
def _full(setting: Setting) -> Iterator[None]:
    """A limit that is reached already: by pages of a file that nobody asks for again, and that has no blocks on the disk."""
    with memory_cap(setting.limit), tempfile.TemporaryFile(dir=setting.store.parent) as other:
        other.truncate(setting.limit)
        block = bytearray(1 << 20)
        while other.readinto(block):
            pass
        yield


def _shards(path: Path) -> list[Path]:
    return sorted((path / "chunks").glob(f"*.kv*/{format.SHARD_KEY}"))


if __name__ == "__main__":
    typer.run(run)
