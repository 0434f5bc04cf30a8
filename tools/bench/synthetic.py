"""Stores of made-up KV for the benchmarks of the engine alone: no model computes anything here.

Times are taken in turn, one round of all candidates after the other, so that a change of the machine's speed hits all
alike; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvdb import EXACT, KVDB, Geometry, Identity, LayerGroup
from kvdb.segments import Segment
from kvdb.store import Committed
from kvdb.tools.bench.setup import median

Array = np.ndarray[Any, np.dtype[Any]]

IDENTITY = Identity(weights="made up", config={}, dtype="bfloat16")


def geometry(dtype: str = "bfloat16", *, layers: int = 30, kv_heads: int = 3, head_dim: int = 64) -> Geometry:
    """Unless told otherwise that of SmolLM2-135M: 23 040 bytes a token."""
    group = LayerGroup(layers=tuple(range(layers)), kv_heads=kv_heads, head_dim=head_dim)
    return Geometry(dtype=dtype, chunk_tokens=16, groups=(group,))


def noise(shape: Geometry, tokens: int) -> tuple[Array, Array]:
    """Keys and values of one layer, (kv_heads, tokens, head_dim) each, without NaN."""
    group = shape.groups[0]
    values = np.random.default_rng(0).standard_normal((2, group.kv_heads, tokens, group.head_dim), np.float32)
    if shape.dtype == "bfloat16":
        values = (values.view(np.uint32) >> 16).astype("<u2")
    keys, values = np.ascontiguousarray(values)
    return keys, values


def ids(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 50_000, count).astype("<u4")


def store(
    db: KVDB,
    shape: Geometry,
    kv: tuple[Array, Array],
    tokens: Array,
    *,
    after: Segment | None = None,
    abstracts: tuple[str, ...] = ("sketch",),
) -> Committed:
    """Write and commit one segment that holds the same KV in every layer, after another one if given."""
    writer = db.writer(
        identity=IDENTITY,
        fidelity=EXACT,
        geometry=shape,
        parent=after.info.segment if after else None,
        start=after.info.stop if after else 0,
        capacity=shape.chunks(len(tokens)),
        abstracts=abstracts,
    )
    for layer in shape.layers:
        writer.append(layer, *kv)
    return db.commit(writer, tokens)


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A folder of its own that goes away, in `folder` or where the system puts temporary files."""
    with tempfile.TemporaryDirectory(prefix="kvdb-bench-", dir=folder) as made:
        yield Path(made)


def file_system(folder: Path) -> str:
    """Its type, from /proc/mounts; the deepest mount counts."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    where = os.path.realpath(folder)
    above = [(len(point), kind) for point, kind in mounts if f"{where}/".startswith(f"{point.rstrip('/')}/")]
    return max(above)[1]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(times: list[float], baseline: list[float]) -> float:
    """How many times as fast as the baseline, by pairs."""
    return median([b / t for t, b in zip(times, baseline, strict=True)])
