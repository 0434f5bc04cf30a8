"""Decoding on a GPU: GB/s of decoded KV, beside what it replaces and beside a copy on the device.

    python -m kvdb.tools.bench.dequantise --codec int4

Records of 16 tokens of made-up numbers lie in memory, as in the page cache; each round gathers as many of them as a decoding step reads of a
layer. Ways, all of which end with numbers on the device, and take turns:

    there     rows are gathered, taken there and decoded there
    here      rows are gathered and decoded on the CPU, and the numbers taken there: what is done without triton
    kernel    rows that are there already are decoded
    copy      a copy on the device of as many bytes as are decoded

Needs an NVIDIA or AMD GPU and triton; exits with 2 where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvdb.codecs import RecordCodec
from kvdb.geometry import CHUNK_TOKENS, STORAGE_DTYPES
from kvdb.runtime.dequantise import Decoder, decoder_on
from kvdb.runtime.staging import Coded, Staging, storage_view
from kvdb.tools.bench.setup import median, write_result
from kvdb.tools.bench.synthetic import Array, ratio, seconds

CODECS = ("int8", "int4", "int2", "planes", "planes:bits=8+int8")
RECORDS = 4096
"""More than caches hold of them."""


def run(
    dtype: Annotated[str, typer.Option(help=f"of {', '.join(STORAGE_DTYPES)}")] = "bfloat16",
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    gathered: Annotated[int, typer.Option(min=1, help="records that are decoded at a time")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="measured rounds")] = 100,
    codec: Annotated[list[str] | None, typer.Option(help=f"as {', '.join(CODECS)}; these if not given")] = None,
) -> None:
    """GB/s of decoded KV by each way."""
    device = torch.device("cuda")
    decoder = decoder_on(device) if torch.cuda.is_available() else None
    if decoder is None:
        typer.echo("dequantise: no GPU that triton compiles for, expected one; run it where the model runs", err=True)
        raise typer.Exit(2)
    rows = [
        measure(RecordCodec.parse(text), decoder, device, dtype, head_dim, gathered, steps) for text in codec or CODECS
    ]
    table = Table(
        "codec", "of raw", "there GB/s", "here GB/s", "kernel GB/s", "copy GB/s", "there / here", "kernel / copy",
        title=f"{gathered} records of {CHUNK_TOKENS} x {head_dim} x {dtype}, {torch.cuda.get_device_name(device)}",
    )  # fmt: skip
    for r in rows:
        speeds = [f"{r['gbs'][way]:.1f}" for way in ("there", "here", "kernel", "copy")]
        table.add_row(r["codec"], f"{r['share']:.1%}", *speeds, f"{r['gain']:.2f}", f"{r['of_copy']:.2f}")
    Console().print(table)
    write_result("dequantise", {"device": torch.cuda.get_device_name(device), "rows": rows})


def measure(
    codec: RecordCodec, decoder: Decoder, device: torch.device, dtype: str, head_dim: int, gathered: int, steps: int
) -> dict[str, Any]:
    """Median GB/s of each way, and ratios of speeds: `gain` there / here, `of_copy` kernel / copy."""
    kind, rng, shape = getattr(torch, dtype), np.random.default_rng(0), (2, gathered, CHUNK_TOKENS, head_dim)
    numbers = torch.from_numpy(rng.standard_normal((RECORDS, 2, CHUNK_TOKENS, head_dim), np.float32))
    stored = codec.encode(storage_view(numbers.to(kind)), dtype)
    staging, columns = Staging(kind, device, decoder), np.arange(gathered)
    on_device, to = torch.from_numpy(stored[:gathered]).to(device), torch.from_numpy(columns).to(device)
    out, source = torch.empty(shape, dtype=kind, device=device), torch.zeros(shape, dtype=kind, device=device)
    times: dict[str, list[float]] = {way: [] for way in ("there", "here", "kernel", "copy")}
    for step in range(steps + 1):
        which = rng.integers(0, RECORDS, gathered)

        def gather(rows: Array) -> None:
            np.take(stored, which, axis=0, out=rows, mode="clip")  # noqa: B023

        def decode(values: Array) -> None:
            codec.decode(stored, which, values, dtype)  # noqa: B023

        part = Coded(codec, stored.shape[1], columns, gather)
        ways: dict[str, Callable[[], Tensor | None]] = {
            "there": lambda: staging.read_coded(shape, [part]),  # noqa: B023
            "here": lambda: staging.read_into(shape, decode),
            "kernel": lambda: decoder.decode(codec, on_device, to, out),
            "copy": lambda: out.copy_(source),
        }
        for way, act in ways.items():
            taken = seconds(lambda: _finished(act, device))  # noqa: B023
            if step:  # the first compiles
                times[way].append(taken)
    return {
        "codec": str(codec), "dtype": dtype, "head_dim": head_dim, "gathered": gathered,
        "share": stored.shape[1] / (numbers[0].numel() * kind.itemsize),
        "gbs": {way: out.nbytes / median(taken) / 1e9 for way, taken in times.items()},
        "gain": ratio(times["there"], times["here"]), "of_copy": ratio(times["kernel"], times["copy"]),
    }  # fmt: skip


def _finished(act: Callable[[], Tensor | None], device: torch.device) -> None:
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    typer.run(run)
