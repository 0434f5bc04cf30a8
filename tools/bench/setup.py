"""What the benchmarks share: the real model, a prefilled store, a dense cache with the same KV, and where results go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvdb
from kvdb import KVDB
from kvdb.runtime import KVDBCache
from kvdb.tools.documents import reference_document
from kvdb.tools.models import LoadedModel, load_model

RESULTS = Path("benchmarks/results")


def real_model() -> LoadedModel:
    return load_model("smollm2")


def document_ids(loaded: LoadedModel, tokens: int, *, offset: int = 0) -> torch.Tensor:
    """(1, tokens) ids of real text."""
    text = reference_document(loaded.tokenizer, tokens + 600, offset=offset)
    return torch.tensor([loaded.tokenizer(text)["input_ids"][:tokens]])


@contextmanager
def temporary_store() -> Iterator[KVDB]:
    with tempfile.TemporaryDirectory(prefix="kvdb-bench-") as folder, KVDB.open(Path(folder) / "bench.kvdb") as db:
        yield db


def dense_cache(cache: KVDBCache, config: Any) -> DynamicCache:
    """A DynamicCache that holds what a KVDB cache of one row holds."""
    dense = DynamicCache(config=config)
    row = cache.rows[0]
    for layer in cache.geometry.layers:
        k, v = row.last_tokens(layer, 0, cache.length)
        dense.update(k[None], v[None], layer)
    return dense


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kvdb": kvdb.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def median(values: list[float]) -> float:
    return statistics.median(values)


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Keep a result as JSON, with the machine it came from."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), **result}, indent=1) + "\n")
    return path
