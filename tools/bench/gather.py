"""Reading records that are in the page cache, against copying records of the same size within memory.

    python -m kvdb.tools.bench.gather --mib 512

The baseline is one `numpy.take` of whole records out of an array in memory, by the same record numbers: memcpy per record
without anything around it. A reader splits each record into K and V (what that alone costs in memory is the row "split"),
and looks at what must be verified or fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB
from kvdb.reader import VERIFY
from kvdb.readers import READERS
from kvdb.tools.bench.setup import median, write_result
from kvdb.tools.bench.synthetic import Array, geometry, ids, noise, ratio, scratch, seconds, store

RECORD_KIB = (4, 8, 16, 64, 256)
LAYERS, KV_HEADS = 32, 4
BATCH_BYTES = 8 << 20
"""What one read asks for: half a layer of 512 MiB."""


def run(
    folder: Annotated[
        Path | None, typer.Option(help="where the store lies; the system's temporary folder by default")
    ] = None,
    mib: Annotated[int, typer.Option(min=256, help="size of the store")] = 512,
    passes: Annotated[int, typer.Option(help="measured passes over the whole store")] = 3,
) -> None:
    """GB/s of every way to read, first pass and later ones, beside memcpy."""
    rows: list[dict[str, Any]] = []
    with scratch(folder) as place:
        for kib in RECORD_KIB:
            rows += _measure(place / f"{kib}.kvdb", kib, mib, passes)
    table = Table(
        "record KiB",
        "reader",
        "verify",
        "GB/s",
        "memcpy GB/s",
        "ratio",
        "first pass GB/s",
        title=f"gather of {mib} MiB",
    )
    for r in rows:
        table.add_row(
            f"{r['record_kib']}", r["reader"], r["verify"], f"{r['gbs']:.2f}", f"{r['memcpy_gbs']:.2f}",
            f"{r['ratio']:.0%}", f"{r['first_gbs']:.2f}",
        )  # fmt: skip
    Console().print(table)
    write_result("gather", {"mib": mib, "passes": passes, "batch_bytes": BATCH_BYTES, "rows": rows})


def _measure(path: Path, kib: int, mib: int, passes: int) -> Iterator[dict[str, Any]]:
    shape = geometry(layers=LAYERS, kv_heads=KV_HEADS, head_dim=16 * kib)
    tokens = (mib << 20) // shape.token_bytes
    keys, values = noise(shape, tokens)
    with KVDB.open(path) as db:
        segment = store(db, shape, (keys, values), ids(tokens, 0)).segment
    records = tokens // shape.chunk_tokens * KV_HEADS
    memory = np.empty((LAYERS * records, kib << 10), np.uint8)
    memory[:] = np.resize(keys.view(np.uint8).ravel(), kib << 10)
    flat = np.empty((BATCH_BYTES // (kib << 10), kib << 10), np.uint8)
    out = flat.view(shape.storage_dtype).reshape(2, len(flat), shape.chunk_tokens, -1)
    ways = [(reader, verify) for reader in READERS for verify in VERIFY]
    handles = {way: KVDB.open(path, "r", read_mode=way[0], verify=way[1]) for way in ways}
    readers = {way: db.reader() for way, db in handles.items()}
    times: dict[tuple[str, str], list[list[float]]] = {way: [] for way in ways}
    plain: list[list[float]] = []
    split: list[list[float]] = []
    planes, halves = memory.reshape(2 * len(memory), -1), flat.reshape(2 * len(flat), -1)
    for number in range(passes + 1):
        for taken in (*times.values(), plain, split):
            taken.append([])
        batches = list(_batches(records, len(flat), number))
        for step in range(len(batches)):
            count = 2 + len(ways)
            apart = (
                batches[(step + i * len(batches) // count) % len(batches)] for i in range(count)
            )  # never what is in the CPU's cache
            layer, wanted = next(apart)
            plain[-1].append(seconds(lambda: np.take(memory, wanted + layer * records, axis=0, out=flat, mode="clip")))  # noqa: B023
            layer, wanted = next(apart)
            rows = 2 * (wanted + layer * records)
            pieces = np.concatenate((rows, rows + 1))
            split[-1].append(seconds(lambda: np.take(planes, pieces, axis=0, out=halves, mode="clip")))  # noqa: B023
            for way, (layer, wanted) in zip(ways, apart, strict=True):
                times[way][-1].append(seconds(lambda: readers[way].read(segment, layer, wanted, out)))  # noqa: B023
    for way in ways:
        readers[way].close()
        handles[way].close()
    baseline = [t for p in plain[1:] for t in p]
    for (reader, verify), passed in {("memory", "split"): split, **times}.items():
        later = [t for p in passed[1:] for t in p]
        yield {
            "record_kib": kib, "reader": reader, "verify": verify, "gbs": BATCH_BYTES / median(later) / 1e9,
            "memcpy_gbs": BATCH_BYTES / median(baseline) / 1e9, "ratio": ratio(later, baseline),
            "first_gbs": BATCH_BYTES / median(passed[0]) / 1e9,
        }  # fmt: skip


def _batches(records: int, batch: int, seed: int) -> Iterator[tuple[int, Array]]:
    """(layer, record numbers): every record of the store once, in random order."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(np.arange(records), (LAYERS, 1)), axis=1)
    starts = [(layer, at) for layer in range(LAYERS) for at in range(0, records - batch + 1, batch)]
    for layer, at in rng.permutation(starts).tolist():
        yield layer, shuffled[layer, at : at + batch]


if __name__ == "__main__":
    typer.run(run)
