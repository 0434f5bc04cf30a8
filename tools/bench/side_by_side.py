"""KVDB beside what a user would otherwise pick to keep the KV of a long prompt: same model, same text, same memory.

    python -m kvdb.tools.bench.side_by_side --tokens 7500 --cap 0.45

First each way saves the prompt's KV, whole and synced. Then, in turn and each in a process of its own whose model is loaded and whose
files are not in the page cache, it gives the first token again and reads 64 more, the text's own, so that all see the same. Then
once more under a limit: `cap` times the bytes of float32 KV for all that is allocated and read after the model is loaded.

KL is that of the next token's distribution from DynamicCache's, over the steps; of llama.cpp also from its own float32 KV, as its weights
stay quantised. Memory is what was allocated at the most, and beside it what was left in the page cache, which the kernel may take back.
A way whose package is missing, that this machine cannot run, or that the limit kills, is told as such.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb.errors import InvalidInput, Unsupported
from kvdb.tools.bench import llama, rivals
from kvdb.tools.bench.apart import NoResult, apart
from kvdb.tools.bench.capped import NO_LIMIT, force_out, memory_cap, page_cache_bytes
from kvdb.tools.bench.charged import PeakMemory, disk_bytes
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result
from kvdb.tools.bench.synthetic import file_system, scratch, seconds
from kvdb.tools.evaluate.measure import distance

WAYS: Final[dict[str, type[rivals.Way]]] = {
    way.name: way
    for way in (
        rivals.Prefilled, rivals.Kvdb, rivals.KvdbExact, rivals.KvdbInt4, rivals.TorchFile, rivals.Safetensors, rivals.Offloaded,
        rivals.Quanto, rivals.Hqq, rivals.Fp8, llama.LlamaF32, llama.LlamaF16, llama.LlamaQ8, llama.LlamaQ4,
    )
}  # fmt: skip
"""In the order of a turn. The first is needed by the others: it prefills for them, and is what they are compared with."""
BASE: Final = rivals.Kvdb.name
"""What ratios are to."""
DENSE: Final = rivals.Prefilled.name
"""What KL is from; of an engine that computes in its own way also from its own float32 KV:"""
OWN: Final = {"llama.cpp": llama.LlamaF32.name}
PATIENCE_S: Final = 900.0
INSTALL: Final = "pip install 'kvdb[side-by-side]'"


def run(
    tokens: Annotated[int, typer.Option(help="context length")] = 7500,
    cap: Annotated[
        float, typer.Option(help="of the bytes of float32 KV: memory under the limit; 0: no such runs")
    ] = 0.45,
    steps: Annotated[int, typer.Option(help="measured steps of each way in a turn")] = 64,
    turns: Annotated[int, typer.Option(help="how often ways take turns without a limit")] = 3,
    threads: Annotated[int, typer.Option(help="threads of torch and of llama.cpp")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="ways whose names begin so; all by default")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="where files lie; the system's temporary folder by default")
    ] = None,
) -> None:
    """Seconds to the first token, milliseconds a token, bytes, memory and KL of each way, and ratios to KVDB."""
    names = [name for name in WAYS if only is None or name in (BASE, DENSE) or name.startswith(tuple(only))]
    if only is not None and (unknown := [each for each in only if not any(name.startswith(each) for name in WAYS)]):
        raise InvalidInput(f"--only {unknown[0]}: no such way, expected the beginning of one of {', '.join(WAYS)}")
    torch.set_num_threads(threads)  # as in the processes of the ways; the result says so
    with scratch(folder) as place:
        if file_system(place) == "tmpfs":
            Console().print(f"side_by_side: SKIPPED, {place} is in memory; expected a disk, see --folder")
            return
        ids, kv_bytes = apart(_text, tokens, steps + 1, limit_s=PATIENCE_S)
        rows = {name: _row(name) for name in names}
        for row in rows.values():
            _try(row, "saved", _save, row["way"], place, ids, tokens, threads)
        trial = (place, ids, tokens, steps, threads)
        for turn in range(turns):
            for row in rows.values():
                _try(row, "free", _reuse, row["way"], *trial, NO_LIMIT, turn == 0)
        limit = int(cap * kv_bytes)
        for row in rows.values() if limit else ():
            _try(row, "capped", _reuse, row["way"], *trial, limit, False)
    _judged(rows, ids[tokens + 1 :])
    told = [_summary(row, rows) for row in rows.values()]
    title = f"{tokens} tokens, {kv_bytes >> 20} MiB of float32 KV, {threads} threads; limit {limit >> 20} MiB"
    _show(told, title)
    settings = {"tokens": tokens, "steps": steps, "turns": turns, "threads": threads}
    write_result("side-by-side", {**settings, "kv_bytes": kv_bytes, "limit_bytes": limit, "rows": told})


def _row(name: str) -> dict[str, Any]:
    way = WAYS[name]
    versions = {package: _version(package) for package in way.packages}
    told = {"way": name, "how": way.how, "computes": way.computes, "versions": versions}
    return {**told, "saved": [], "free": [], "capped": [], "cannot": {}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _try(row: dict[str, Any], kind: str, work: Any, *arguments: Any) -> None:
    """A measurement more in the row, or why there is none. What could not save is not asked again."""
    if "saved" in row["cannot"]:
        return
    try:
        row[kind].append(found := apart(work, *arguments, limit_s=PATIENCE_S))
        told = {key: value for key, value in found.items() if isinstance(value, (int, float))}
        said = ", ".join(f"{key} {value:.4g}" for key, value in told.items())
    except NoResult as error:
        if kind == "capped" and error.killed:
            row["cannot"][kind] = f"does not fit: {error}"
        else:
            row["cannot"][kind] = f"SKIPPED: {error}; {INSTALL}" if error.missing else f"cannot run: {error}"
        said = row["cannot"][kind]
    Console(stderr=True).print(f"{row['way']}, {kind}: {said}", highlight=False, markup=False, soft_wrap=True)


# -- what runs in a process of its own


def _text(tokens: int, more: int) -> tuple[list[int], int]:
    """Ids of the prompt and of what comes after it; bytes of the prompt's KV in float32."""
    loaded = real_model()
    config = loaded.model.config
    kv_bytes = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    return document_ids(loaded, tokens + more)[0].tolist(), kv_bytes


def _save(name: str, place: Path, ids: list[int], tokens: int, threads: int) -> dict[str, Any]:
    (folder := place / _file_name(name)).mkdir()
    way = WAYS[name](threads, len(ids))
    way.load()
    saved = way.save(folder, torch.tensor([ids[:tokens]]))
    way.close()
    return {"prefill_s": saved.prefill_s, "save_s": saved.save_s, "disk_bytes": disk_bytes(folder)}


def _reuse(
    name: str, place: Path, ids: list[int], tokens: int, steps: int, threads: int, limit: int, keep: bool
) -> dict[str, Any]:
    """keep: give the logits of the steps, of which memory is taken before any is measured. Under a limit nothing is asked twice."""
    folder, prompt, coming = place / _file_name(name), torch.tensor([ids[:tokens]]), ids[tokens:]
    way = WAYS[name](threads, len(ids))
    way.load()
    force_out([file for file in folder.rglob("*") if file.is_file()])
    logits = np.ones((steps, way.vocabulary), np.float32) if keep else None
    again_s, charged, taken = None, None, list[float]()
    with ExitStack() as stack:
        group = _enter(stack, limit)
        with PeakMemory() as memory:
            first_s = seconds(lambda: way.first(folder, prompt).argmax())
            for at in range(steps):
                started = time.perf_counter()
                after = way.step(coming[at])
                taken.append(1e3 * (time.perf_counter() - started))
                if logits is not None:
                    logits[at] = after.numpy()
        if group is not None:
            charged = page_cache_bytes(group)
        if limit == NO_LIMIT:
            again_s = seconds(lambda: way.again(folder, prompt).argmax())
        way.close()
    told = {"first_s": first_s, "again_s": again_s, "ms": taken, "logits": logits}
    return {**told, "memory_bytes": memory.peak_bytes, "page_cache_bytes": charged}


def _enter(stack: ExitStack, limit: int) -> Path | None:
    """The control group from now on; without a limit it only counts, and None does where there is none to be had.

    raises  Unsupported where there can be no limit
    """
    try:
        return stack.enter_context(memory_cap(limit))
    except Unsupported:
        if limit != NO_LIMIT:
            raise
        return None


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


# -- what is told


def _judged(rows: dict[str, dict[str, Any]], targets: list[int]) -> None:
    """KL and equal first choices, in the rows of all ways that gave logits."""
    logits = {name: torch.from_numpy(row["free"][0].pop("logits")) for name, row in rows.items() if row["free"]}
    for name, given in logits.items():
        own = OWN.get(rows[name]["way"].partition(",")[0])
        for field, dense in (("", DENSE), ("_own", own or DENSE)):
            if dense in logits:
                kl, top1, _ = distance(logits[dense], given, targets)
                rows[name] |= {f"kl{field}": kl, f"top1{field}": top1}


def _summary(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Medians and ratios in the place of single measurements."""
    told = {key: value for key, value in row.items() if key not in ("saved", "free", "capped")}
    for saved in row["saved"]:
        shared = rows[DENSE]["saved"]
        prefill_s = saved["prefill_s"] if saved["prefill_s"] is not None else shared[0]["prefill_s"] if shared else None
        told |= {"prefill_s": prefill_s, "save_s": saved["save_s"], "disk_bytes": saved["disk_bytes"]}
    for kind in ("free", "capped"):
        if row[kind] and kind not in row["cannot"]:
            told[kind] = _medians(row[kind], rows[BASE][kind])
    return told


def _medians(own: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios are of the same turn, and their median."""
    told: dict[str, Any] = {"ms": median([ms for turn in own for ms in turn["ms"]])}
    for field in ("first_s", "again_s", "memory_bytes", "page_cache_bytes"):
        told[field] = median([turn[field] for turn in own]) if own[0][field] is not None else None
    if len(own) == len(base):
        pairs = list(zip(own, base, strict=True))
        told["first_ratio"] = median([a["first_s"] / b["first_s"] for a, b in pairs])
        told["ms_ratio"] = median([median(a["ms"]) / median(b["ms"]) for a, b in pairs])
    return told


def _show(rows: list[dict[str, Any]], title: str) -> None:
    console = Console()
    for kind, named in (("free", "without a limit"), ("capped", "under the limit")):
        table = Table("way", "prefill + save s", "first token s", f"/ {BASE}", "again s", "ms a token", f"/ {BASE}", "disk MiB",
                      "memory MiB", "page cache MiB", "KL", "KL, own", "top-1", title=f"{title}, {named}")  # fmt: skip
        for r in rows:
            if (reason := r["cannot"].get("saved") or r["cannot"].get(kind)) is not None:
                table.add_row(r["way"], reason)
            elif (m := r.get(kind)) is not None:
                table.add_row(
                    r["way"], _number(r["prefill_s"] + r["save_s"], 1), _number(m["first_s"], 3), _number(m.get("first_ratio"), 2),
                    _number(m["again_s"], 3), _number(m["ms"], 1), _number(m.get("ms_ratio"), 2), _mib(r["disk_bytes"]),
                    _mib(m["memory_bytes"]), _mib(m["page_cache_bytes"]), _number(r.get("kl"), 5), _number(r.get("kl_own"), 5),
                    _share(r.get("top1")),
                )  # fmt: skip
        console.print(table)
    calls = Table("way", "computes with", "calls", "versions", title="what was called")
    for r in rows:
        calls.add_row(
            r["way"],
            r["computes"],
            r["how"],
            ", ".join(f"{package} {v or '-'}" for package, v in r["versions"].items()),
        )
    console.print(calls)


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{round(value, places) + 0.0:.{places}f}"  # no -0.00


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


if __name__ == "__main__":
    typer.run(run)
