"""What the benchmarks share: the real model, a prefilled store, a dense cache with the same KV, and where results go."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from kvdb import KVDB
from kvdb.runtime import KVDBCache
from kvdb.tools.bench import RESULTS_FOLDER
from kvdb.tools.bench.machine import RESULTS_VARIABLE, host
from kvdb.tools.documents import reference_document
from kvdb.tools.models import LoadedModel, load_model

RESULTS = Path(os.environ.get(RESULTS_VARIABLE) or RESULTS_FOLDER)


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
    return {**host(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def median(values: list[float]) -> float:
    return statistics.median(values)


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Keep a result as JSON, with the machine it came from."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_whole(path, json.dumps({"benchmark": name, "machine": machine(), **result}, indent=1) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing; what is a link or no file, such as /dev/stdout, is written to as it is."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text)
        return
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text)
    unfinished.replace(path)
