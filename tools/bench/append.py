"""Writing segments against writing and syncing the same bytes to one plain file.

    python -m kvdb.tools.bench.append --folder /mnt/disk

A segment costs what the plain file does, and then: records are put in order, digested and summarised, the index and
metadata are written, five more files and folders are synced, and the catalog commits.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvdb import KVDB
from kvdb.tools.bench.setup import median, write_result
from kvdb.tools.bench.synthetic import Array, file_system, geometry, ids, noise, ratio, scratch, seconds, store

SIZES_MIB = (1, 16, 64, 256)


def run(
    folder: Annotated[
        Path | None, typer.Option(help="where to write; the system's temporary folder if not given")
    ] = None,
    rounds: Annotated[int, typer.Option(help="measured pairs of each size")] = 9,
    abstract: Annotated[str, typer.Option(help="what to summarise records by")] = "sketch",
) -> None:
    """GB/s of a committed segment in a real model's geometry, beside one sequential write and fsync."""
    with scratch(folder) as place:
        kind = file_system(place)
        rows = [_measure(place, dtype, mib, rounds, abstract) for dtype in ("bfloat16", "float32") for mib in SIZES_MIB]
    table = Table(
        "dtype", "MiB", "tokens", "segment GB/s", "plain file GB/s", "ratio", title=f"append with {abstract}, on {kind}"
    )
    for r in rows:
        table.add_row(
            r["dtype"], f"{r['mib']}", f"{r['tokens']}", f"{r['segment_gbs']:.2f}", f"{r['file_gbs']:.2f}",
            f"{r['ratio']:.0%}",
        )  # fmt: skip
    Console().print(table)
    write_result("append", {"file_system": kind, "rounds": rounds, "abstract": abstract, "rows": rows})


def _measure(place: Path, dtype: str, mib: int, rounds: int, abstract: str) -> dict[str, Any]:
    shape = geometry(dtype)
    tokens = (mib << 20) // shape.token_bytes // 16 * 16
    kv = noise(shape, tokens)
    size = tokens * shape.token_bytes
    ours: list[float] = []
    plain: list[float] = []
    with KVDB.open(place / f"{dtype}-{mib}.kvdb", grace_s=0) as db:
        for number in range(rounds + 1):
            key = ""

            def segment(number: int = number) -> None:
                nonlocal key
                key = store(db, shape, kv, ids(tokens, number), abstracts=(abstract,)).sequence

            ours.append(seconds(segment))
            plain.append(seconds(lambda: _plain_file(place / "plain", kv, len(shape.layers))))
            (place / "plain").unlink()
            db.delete(key)
    ours, plain = ours[1:], plain[1:]  # the first round warms up
    return {
        "dtype": dtype, "mib": mib, "tokens": tokens, "segment_gbs": size / median(ours) / 1e9,
        "file_gbs": size / median(plain) / 1e9, "ratio": ratio(ours, plain),
    }  # fmt: skip


def _plain_file(path: Path, kv: tuple[Array, Array], layers: int) -> None:
    with path.open("xb", buffering=0) as file:
        for _ in range(layers):
            for plane in kv:
                file.write(plane.data)
        os.fsync(file.fileno())


if __name__ == "__main__":
    typer.run(run)
