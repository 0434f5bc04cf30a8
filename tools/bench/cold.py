"""Reading records that are not in the page cache, against fio: random reads of the same size from the same file.

    python -m kvdb.tools.bench.cold --folder /mnt/disk

fio reads past the page cache (libaio, O_DIRECT) and keeps as many requests in flight as a reader is asked for records at
a time: 256, or 8 MiB. A reader's queue drains at the end of each read, and it fills the page cache, or memory of its own, and copies,
which fio does not: all that is part of what is measured. What helps a reader is measured too: records that happen to follow each other
are read together, and of large ones a layer has so few that many do. Before each run the file is forced out of the page cache.

A host tier has room for all that is read, and is empty at first; "direct, tier full" has a tier of two reads at a time that is full of other records, so that each
read must evict as many.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB, format
from kvdb.direct import DirectReader
from kvdb.readers import READERS
from kvdb.segments import Segment
from kvdb.tools.bench.capped import force_out
from kvdb.tools.bench.setup import median, write_result
from kvdb.tools.bench.synthetic import file_system, geometry, ids, noise, scratch, seconds, store

RECORD_KIB = (4, 16, 64, 256)
LAYERS, KV_HEADS = 32, 4
DEPTH, BATCH_BYTES = 256, 8 << 20
FULL, FILLED = "direct, tier full", 4


def run(
    folder: Annotated[
        Path | None, typer.Option(help="where the store lies; the system's temporary folder by default")
    ] = None,
    mib: Annotated[int, typer.Option(help="size of the store")] = 512,
    rounds: Annotated[int, typer.Option(help="measured pairs of runs")] = 5,
    batches: Annotated[int, typer.Option(help="reads in a run", max=LAYERS - FILLED)] = 16,
) -> None:
    """Records a second, medians of interleaved runs."""
    if shutil.which("fio") is None:
        Console().print("cold: SKIPPED, fio is not installed; expected it as the baseline (package fio)")
        return
    rows: list[dict[str, Any]] = []
    with scratch(folder) as place:
        kind = file_system(place)
        if kind == "tmpfs":
            Console().print(f"cold: SKIPPED, {place} is in memory; expected a disk, see --folder")
            return
        for kib in RECORD_KIB:
            rows += _measure(place / f"{kib}.kvdb", kib, mib, rounds, batches)
    table = Table(
        "record KiB", "at once", "reader", "records/s", "fio IOPS", "ratio", "MB/s", title=f"cold gather, on {kind}"
    )
    for r in rows:
        table.add_row(
            f"{r['record_kib']}", f"{r['depth']}", r["reader"], f"{r['records_s']:.0f}", f"{r['fio_iops']:.0f}", f"{r['ratio']:.0%}",
            f"{r['records_s'] * r['record_kib'] * 1.024e-3:.0f}",
        )  # fmt: skip
    Console().print(table)
    write_result("cold", {"file_system": kind, "mib": mib, "rounds": rounds, "batches": batches, "rows": rows})


def _measure(path: Path, kib: int, mib: int, rounds: int, batches: int) -> Iterator[dict[str, Any]]:
    shape = geometry(layers=LAYERS, kv_heads=KV_HEADS, head_dim=16 * kib)
    tokens = (mib << 20) // shape.token_bytes
    with KVDB.open(path) as db:
        segment = store(db, shape, noise(shape, tokens), ids(tokens, 0)).segment
    shard = path / "chunks" / format.kv_array(segment.info.segment, 0) / format.SHARD_KEY
    depth = min(DEPTH, BATCH_BYTES // (kib << 10))
    speeds: dict[str, list[float]] = {name: [] for name in (*READERS, FULL)}
    ample, full = mib << 20, 2 * depth * (kib << 10)
    fio: list[float] = []
    for number in range(rounds):
        for name, taken in speeds.items():
            force_out([shard])
            budget = full if name == FULL else ample if name == DirectReader.name else None
            way = DirectReader.name if name == FULL else name
            with KVDB.open(path, "r", read_mode=way, verify="never", host_budget=budget) as db:
                taken.append(_records_per_second(db, segment, depth, number, batches, fill=name == FULL))
        force_out([shard])
        fio.append(_fio(shard, kib, depth))
    for name, taken in speeds.items():
        yield {
            "record_kib": kib, "depth": depth, "reader": name, "records_s": median(taken), "fio_iops": median(fio),
            "ratio": median([t / f for t, f in zip(taken, fio, strict=True)]),
        }  # fmt: skip


def _records_per_second(db: KVDB, segment: Segment, depth: int, seed: int, batches: int, *, fill: bool) -> float:
    """Of layers that are asked once each. fill: read some of FILLED others first."""
    shape, rng = segment.info.geometry, np.random.default_rng(seed)
    records = segment.info.chunks * KV_HEADS
    out = np.empty((2, depth, shape.chunk_tokens, shape.groups[0].head_dim), shape.storage_dtype)
    wanted = [
        (layer, rng.permutation(records)[:depth])
        for layer in rng.permutation(np.arange(FILLED, LAYERS))[:batches].tolist()
    ]
    reader = db.reader()
    reader.open(segment)
    for layer in range(FILLED * fill):
        reader.read(segment, layer, rng.permutation(records)[:depth], out)
    try:
        return depth * batches / sum(seconds(lambda: reader.read(segment, *what, out)) for what in wanted)  # noqa: B023
    finally:
        reader.close()


def _fio(path: Path, kib: int, depth: int) -> float:
    command = [
        "fio", "--name=cold", f"--filename={path}", "--rw=randread", f"--bs={kib}k", f"--iodepth={depth}", "--ioengine=libaio",
        "--direct=1", "--readonly", "--runtime=1", "--time_based", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: float = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["iops"]
    return found


if __name__ == "__main__":
    typer.run(run)
