"""What codecs cost and lose: bytes, speed of encoding and of gathering and decoding, and errors, on real keys and values.

    python -m kvdb.tools.bench.codecs --dtype bfloat16 --head-dim 128

Records of 16 tokens, of all layers and heads, are gathered in random order, so many at a time as a decoding step reads of a layer. Two
baselines take turns with every codec: `np.copyto` of as many bytes as are decoded, and `np.take` of whole raw records by the same
numbers. Raw rows are the records' own memory, so to encode them takes no time. Heads of 128 channels are two real ones side by side. Errors are of numbers decoded to float32, beside the bound that the codec
gives for each of them. Blocks of `blosc` are packed and unpacked whole, each with its crc32c, beside `np.copyto` of as many bytes.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from kvdb.codecs import BlockForm, Blosc, Codec, RecordCodec
from kvdb.geometry import CHUNK_TOKENS, STORAGE_DTYPES
from kvdb.tools.bench.setup import document_ids, median, real_model, write_result
from kvdb.tools.bench.synthetic import Array, ratio, seconds

REAL_TOKENS = 4096
KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODECS = ("raw", "int8", "int4", "int2", "planes:bits=8+int8", "planes", "planes:bits=4+int4", "planes:bits=2+int2")


def run(
    dtype: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(STORAGE_DTYPES)}; all if not given")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="64 or 128; both if not given")] = None,
    gathered: Annotated[int, typer.Option(help="records that are decoded at a time")] = 512,
    steps: Annotated[int, typer.Option(help="measured gathers of each kind")] = 200,
    codec: Annotated[list[str] | None, typer.Option(help=f"as {', '.join(CODECS)}; these if not given")] = None,
) -> None:
    """GB/s of decoded KV, beside memcpy and a gather of raw records; bytes and errors."""
    torch.set_num_threads(1)
    real, rows, blocks = _real(), [], []
    codecs = [RecordCodec.parse(text) for text in codec or CODECS]
    for dim in head_dim or (64, 128):
        records = np.concatenate(np.split(real, dim // 64), axis=-1)
        for name in dtype or STORAGE_DTYPES:
            rows += _measure(records, name, codecs, gathered, steps)
            blocks.append(_measure_blocks(records, name))
    table = Table(
        "dtype", "head_dim", "codec", "of raw", "encode GB/s", "decode GB/s", "take GB/s", "memcpy GB/s", "decode / take",
        "RMS error K, V", "max error / bound K, V", title=f"codecs, {gathered} records at a time",
    )  # fmt: skip
    for r in rows:
        table.add_row(
            r["dtype"], str(r["head_dim"]), r["codec"], f"{r['share']:.1%}", f"{r['encode_gbs']:.2f}", f"{r['decode_gbs']:.1f}",
            f"{r['take_gbs']:.1f}", f"{r['memcpy_gbs']:.1f}", f"{r['ratio']:.2f}", f"{r['key']['rms']:.4f}, {r['value']['rms']:.4f}",
            f"{r['key']['of_bound']:.2f}, {r['value']['of_bound']:.2f}",
        )  # fmt: skip
    packed = Table(
        "dtype",
        "head_dim",
        "raw / blosc",
        "pack GB/s",
        "unpack GB/s",
        "memcpy GB/s",
        title="blosc, blocks of 1,024 tokens",
    )
    for b in blocks:
        packed.add_row(
            b["dtype"], str(b["head_dim"]), f"{b['ratio']:.3f}", f"{b['pack_gbs']:.2f}", f"{b['unpack_gbs']:.2f}", f"{b['memcpy_gbs']:.1f}"
        )  # fmt: skip
    Console().print(table, packed)
    result = {"gathered": gathered, "steps": steps, "chunk_tokens": CHUNK_TOKENS, "rows": rows, "blocks": blocks}
    write_result("codecs", result)


def _real() -> Array:
    """Records of every layer and head, (n, 2, chunk_tokens, head_dim) float32."""
    loaded = real_model()
    model: Any = loaded.model
    with torch.no_grad():
        past = model(input_ids=document_ids(loaded, REAL_TOKENS), use_cache=True, logits_to_keep=1).past_key_values
    kv = torch.stack([torch.stack((layer.keys[0], layer.values[0]), 1) for layer in past.layers]).float().numpy()
    layers, heads, _, tokens, dim = kv.shape
    by_chunk = kv.reshape(layers * heads, 2, tokens // CHUNK_TOKENS, CHUNK_TOKENS, dim).swapaxes(1, 2)
    return np.ascontiguousarray(by_chunk).reshape(-1, 2, CHUNK_TOKENS, dim)


def _measure(numbers: Array, dtype: str, codecs: list[RecordCodec], gathered: int, steps: int) -> list[dict[str, Any]]:
    tokens, dim = numbers.shape[2:]
    records = _stored(numbers, dtype)
    stored = {str(codec): codec.encode(records, dtype) for codec in codecs}
    raw, flat = records.reshape(len(records), -1), np.empty((gathered, records[0].size), records.dtype)
    out, source = np.empty((2, gathered, tokens, dim), records.dtype), np.ones_like(flat)
    times: dict[str, list[float]] = {name: [] for name in ("take", "memcpy", *stored)}
    rng = np.random.default_rng(0)
    for _ in range(steps):
        which = rng.integers(0, len(records), gathered)
        times["take"].append(seconds(lambda: np.take(raw, which, axis=0, out=flat, mode="clip")))  # noqa: B023
        times["memcpy"].append(seconds(lambda: np.copyto(flat, source)))
        for codec in codecs:
            rows = stored[str(codec)]
            times[str(codec)].append(seconds(lambda: codec.decode(rows, which, out, dtype)))  # noqa: B023
    speeds = {name: out.nbytes / median(taken) / 1e9 for name, taken in times.items()}
    few = records[: 4 * gathered]
    return [
        {
            "dtype": dtype, "head_dim": dim, "codec": str(codec), "row_bytes": stored[str(codec)].shape[1],
            "share": stored[str(codec)].shape[1] / records[0].nbytes,
            "encode_gbs": few.nbytes / median([seconds(lambda: codec.encode(few, dtype)) for _ in range(5)]) / 1e9,  # noqa: B023
            "decode_gbs": speeds[str(codec)], "take_gbs": speeds["take"], "memcpy_gbs": speeds["memcpy"],
            "ratio": ratio(times[str(codec)], times["take"]),
            "key": _errors(codec.key, numbers[:, 0]), "value": _errors(codec.value, numbers[:, 1]),
        }
        for codec in codecs
    ]  # fmt: skip


def _measure_blocks(numbers: Array, dtype: str) -> dict[str, Any]:
    """Of all records, in blocks of one head, as long as `Blosc` makes them: how much smaller, and how fast."""
    codec, dim = Blosc(), numbers.shape[3]
    form = BlockForm(codec.tokens // CHUNK_TOKENS, 1, CHUNK_TOKENS, dim, dtype)
    records = _stored(numbers, dtype)
    rows = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), -1)
    whole = [form.numbers(rows[at : at + form.records]) for at in range(0, len(rows) - form.records + 1, form.records)]
    packed = [codec.pack(block) for block in whole]
    out, times = np.empty_like(whole[0]), dict[str, list[float]](pack=[], unpack=[], memcpy=[])
    for block, data in zip(whole, packed, strict=True):
        times["pack"].append(seconds(lambda: codec.pack(block)))  # noqa: B023
        times["unpack"].append(seconds(lambda: codec.unpack(data, out)))  # noqa: B023
        times["memcpy"].append(seconds(lambda: np.copyto(out, block)))  # noqa: B023
    speeds = {f"{name}_gbs": form.nbytes / median(taken) / 1e9 for name, taken in times.items()}
    ratio = sum(block.nbytes for block in whole) / sum(map(len, packed))
    return {"dtype": dtype, "head_dim": dim, "block_bytes": form.nbytes, "ratio": ratio, **speeds}


def _stored(numbers: Array, dtype: str) -> Array:
    """Rounded to a KV dtype, in its storage dtype."""
    return torch.from_numpy(numbers).to(KINDS[dtype]).view(torch.uint8).numpy().view(STORAGE_DTYPES[dtype])


def _errors(codec: Codec, halves: Array) -> dict[str, float]:
    """rms and max: of the error; bound: the greatest; of_bound: the greatest error as a part of its own bound, 0 where nothing is lost."""
    rows, out = codec.encode(halves, "float32"), np.empty_like(halves, order="C")
    codec.decode(rows, np.arange(len(rows)), 0, out, "float32")
    error, bound = abs(out - halves), codec.bound(rows, *halves.shape[1:])
    part = np.divide(error, bound, where=bound > 0, out=np.zeros_like(error))
    return {
        "rms": float(np.sqrt(np.mean(np.square(error, dtype=np.float64)))),
        "max": float(error.max()),
        "bound": float(bound.max()),
        "of_bound": float(part.max()),
    }


if __name__ == "__main__":
    typer.run(run)
