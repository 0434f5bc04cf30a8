"""Rows decoded by Triton are what codecs decode, to the bit: on a GPU where there is one, and else in Triton's interpreter.

The interpreter runs kernels with NumPy, a program at a time, and says nothing about the compiler, so they are compiled, too, which
takes no GPU.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import finish, python
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, Array, seeds

from kvdb.codecs import Codec, Int2, Int4, Int8, Planes, Raw, RecordCodec
from kvdb.geometry import STORAGE_DTYPES, as_float32
from kvdb.runtime.dequantise import Triton, decoder_on
from kvdb.runtime.staging import Coded, Staging, storage_view

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES: tuple[Codec, ...] = (
    Int8(),
    Int4(),
    Int2(),
    Int8(axis="token"),
    Int4(axis="token", group=8),
    Int2(axis="token"),
    *(Planes(bits=bits) for bits in (2, 6, 8)),
    Planes(bits=7).at(3),
    Raw(),
)
codecs = st.builds(RecordCodec, st.sampled_from(HALVES), st.sampled_from(HALVES))
shapes = st.tuples(st.sampled_from([16, 32, 7, 1]), st.sampled_from([64, 80, 128]))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
few = settings(
    max_examples=max(10, settings.default.max_examples // 3)
)  # a program takes milliseconds in the interpreter
needs_no_gpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter is not used where there is a GPU")


@pytest.fixture(scope="module")
def triton() -> Triton:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'kvdb[triton]'")
    return Triton()


def tensor(values: Array, dtype: str) -> torch.Tensor:
    """Stored numbers as a tensor on the device."""
    made = torch.from_numpy(values)
    return (made.view(torch.bfloat16) if dtype == "bfloat16" else made).to(DEVICE)


def on_device(triton: Triton, codec: RecordCodec, rows: Array, columns: Array, out: Array, dtype: str) -> Array:
    """`out` after rows were decoded into some of its records."""
    given = tensor(out.copy(), dtype)
    with np.errstate(all="ignore"):  # the interpreter's, of any bytes
        triton.decode(codec, torch.from_numpy(rows).to(DEVICE), torch.from_numpy(columns).to(DEVICE), given)
    return storage_view(given.cpu())


def on_cpu(codec: RecordCodec, rows: Array, columns: Array, out: Array, dtype: str) -> Array:
    some, expected = np.empty((2, len(rows), *out.shape[2:]), out.dtype), out.copy()
    codec.decode(rows, np.arange(len(rows)), some, dtype)
    expected[:, columns] = some
    return expected


def places(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Columns of `count` rows among a few more, in any order, and how many there are."""
    n = count + int(rng.integers(3))
    return rng.permutation(n)[:count], np.array(n)


@every_dtype
@few
@given(codec=codecs, shape=shapes, count=st.integers(0, 3), seed=seeds())
def test_rows_decode_as_on_the_cpu(
    triton: Triton, dtype: str, codec: RecordCodec, shape: tuple[int, int], count: int, seed: int
) -> None:
    """Channels of any magnitude, so that minima, steps and numbers lie far apart; records that no row is for stay as they are."""
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=(count, 2, *shape)) * 2.0 ** rng.integers(-26, 14, (count, 2, 1, shape[1]))
    records = storage_view(torch.from_numpy(numbers.clip(-65280, 65280)).to(getattr(torch, dtype)))
    rows, (columns, n) = codec.encode(records, dtype), places(rng, count)
    out = rng.integers(0, 100, (2, n, *shape)).astype(STORAGE_DTYPES[dtype])
    found = on_device(triton, codec, rows, columns, out, dtype)
    assert found.tobytes() == on_cpu(codec, rows, columns, out, dtype).tobytes()


@every_dtype
@few
@given(codec=codecs, shape=shapes, seed=seeds())
def test_any_bytes_decode_as_on_the_cpu_but_for_what_is_no_number(
    triton: Triton, dtype: str, codec: RecordCodec, shape: tuple[int, int], seed: int
) -> None:
    """NaN in float32 has other bits, and no place in float16's range, wherever it is made."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (2, codec.row_bytes(*shape, dtype)), np.uint8)
    out, exact = np.zeros((2, 2, *shape), STORAGE_DTYPES[dtype]), np.zeros((2, 2, *shape), np.float32)
    found, expected = (decode(rows, out) for decode in (
        lambda rows, out: on_device(triton, codec, rows, np.arange(2), out, dtype),
        lambda rows, out: on_cpu(codec, rows, np.arange(2), out, dtype),
    ))  # fmt: skip
    for half, first in ((0, 0), (1, codec.key.half_bytes(*shape, dtype))):
        one = (codec.key, codec.value)[half]
        if one.stored_as_is:
            assert found[half].tobytes() == expected[half].tobytes()
            continue
        one.decode(rows, np.arange(2), first, exact[half], "float32")
        real = ~np.isnan(exact[half])
        assert np.array_equal(as_float32(found[half], dtype)[real], as_float32(expected[half], dtype)[real])


@needs_no_gpu
@every_dtype
@few
@given(codec=codecs, shape=shapes, seed=seeds())
def test_nothing_but_the_row_is_read_and_nothing_but_its_record_written(
    triton: Triton, dtype: str, codec: RecordCodec, shape: tuple[int, int], seed: int
) -> None:
    """By the addresses that the interpreter is asked for: of one row amid others, and of one record."""
    from triton.runtime import interpreter

    rng, real = np.random.default_rng(seed), interpreter._interpreter
    rows = torch.from_numpy(rng.integers(0, 256, (3, codec.row_bytes(*shape, dtype)), np.uint8))
    columns, out = torch.tensor([4]), tensor(np.zeros((2, 6, *shape), STORAGE_DTYPES[dtype]), dtype)
    seen: dict[str, list[Array]] = {"load": [], "store": []}

    def load(at: Array, mask: Array, *others: Any) -> Any:
        seen["load"].append(at[mask])
        return real.load(at, mask, *others)

    def store(at: Array, value: Array, mask: Array) -> Any:
        seen["store"].append(at[mask])
        return real.store(at, value, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
        with np.errstate(all="ignore"):
            triton.decode(codec, rows[1:2], columns, out)
    allowed = {"load": [rows[1:2], columns], "store": [out[0, 4], out[1, 4]]}
    for kind, addresses in seen.items():
        found = np.concatenate([np.zeros(0, np.uint64), *(each.ravel() for each in addresses)]).astype(np.int64)
        inside = [(t.data_ptr() <= found) & (found < t.data_ptr() + t.nbytes) for t in allowed[kind]]
        assert np.logical_or.reduce(inside).all()
        assert len(found) or (codec.key.stored_as_is and codec.value.stored_as_is)


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvdb.runtime import dequantise_kernel as kernels

given = {"rows": "*u8", "columns": "*i64", "row_bytes": "i32", "first": "i32"}
by_token = (kernels.integers, {"TOKENS": 16, "DIM": 80, "NBITS": 4, "BY_TOKEN": True, "CHANNELS": 20, "BLOCK": 1024})
by_channel = (kernels.integers, {"TOKENS": 7, "DIM": 64, "NBITS": 2, "BY_TOKEN": False, "CHANNELS": 1, "BLOCK": 128})
planes = (kernels.planes, {"TOKENS": 16, "DIM": 128, "BITS": 6, "BLOCK": 256})
for kind, (kernel, constants) in (("fp32", by_token), ("fp16", by_token), ("bf16", by_channel), ("bf16", planes)):
    signature = {name: given.get(name, "constexpr") for name in kernel.arg_names} | {"out": "*" + kind}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False}).asm
    assert made["cubin"]
    print(*sorted(set(re.findall(r"(?:fma|mul|add)[.a-z]*[.]f32", made["ptx"]))))
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_round_every_product_and_sum(triton: Triton, tmp_path: Path) -> None:
    """Nothing is fused, and no subnormal taken for zero: with that, the numbers are NumPy's."""
    process = python(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert finish(process).splitlines() == ["add.rn.f32 mul.rn.f32"] * 4


# -- where it is used


def test_memory_has_no_decoder() -> None:
    assert decoder_on(torch.device("cpu")) is None


@needs_no_gpu
def test_a_gpu_has_none_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvdb.runtime.dequantise_kernel", None)
    assert decoder_on.__wrapped__(torch.device("cuda")) is None


@needs_no_gpu
def test_a_gpu_has_none_where_triton_does_not_work_and_says_so(
    triton: Triton, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert decoder_on.__wrapped__(torch.device("cuda")) is None
    assert "stored KV is decoded on the CPU" in caplog.text


@pytest.mark.parametrize("text", ["raw", "int8", "int4", "int2", "planes", "planes:bits=8+int4:group=8", "raw+int2"])
def test_every_codec_of_the_table_is_known(triton: Triton, text: str) -> None:
    assert triton.decodes(RecordCodec.parse(text))


def test_a_codec_made_from_a_known_one_is_not_known(triton: Triton) -> None:
    class Other(Int4):
        pass

    assert not triton.decodes(RecordCodec(Int4(), Other()))


# -- how rows get there


class Recorded:
    """Decodes with codecs themselves, in memory; what it does not know is in `unknown`."""

    def __init__(self, *unknown: RecordCodec) -> None:
        self.unknown = unknown

    def decodes(self, codec: RecordCodec) -> bool:
        return codec not in self.unknown

    def decode(self, codec: RecordCodec, rows: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
        some = torch.empty((2, len(rows), *out.shape[2:]), dtype=out.dtype)
        codec.decode(
            rows.cpu().numpy(), np.arange(len(rows)), storage_view(some), str(out.dtype).removeprefix("torch.")
        )
        out[:, columns] = some.to(out.device)


RAW, INT4, INT8 = (RecordCodec.parse(text) for text in ("raw", "int4", "int8"))


@pytest.mark.parametrize(
    ("unknown", "codecs", "expected"),
    [
        ([], [INT4], True),
        ([], [RAW, INT4, RAW], True),
        ([], [RAW], False),
        ([], [], False),
        ([INT8], [INT4], True),
        ([INT8], [INT4, INT8], False),
        ([RAW], [INT4, RAW], False),
    ],
)
def test_rows_go_as_they_are_if_all_are_known_and_one_is_coded(
    unknown: list[RecordCodec], codecs: list[RecordCodec], expected: bool
) -> None:
    staging = Staging(torch.float32, DEVICE, Recorded(*unknown))
    assert staging.decodes(iter(codecs)) is expected
    assert Staging(torch.float32, DEVICE).decodes(iter(codecs)) is False


@every_dtype
@given(data=st.data(), seed=seeds())
def test_parts_of_several_codecs_end_up_where_they_belong(dtype: str, data: st.DataObject, seed: int) -> None:
    """Reads follow each other at once, larger and smaller; what they gave stays as it was."""
    staging, rng = Staging(getattr(torch, dtype), DEVICE, Recorded()), np.random.default_rng(seed)
    found, expected = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
        n, parts = sum(counts), []
        numbers = torch.from_numpy(rng.normal(size=(n, 2, 16, 8)).astype(np.float32)).to(staging.dtype)
        records, out = storage_view(numbers), np.zeros((2, n, 16, 8), STORAGE_DTYPES[dtype])
        order = rng.permutation(n)
        for columns in np.split(order, np.cumsum(counts)[:-1]):
            codec = data.draw(st.sampled_from([RAW, INT4, RecordCodec.parse("planes+int2")]))
            rows = codec.encode(records[columns], dtype)
            parts.append(Coded(codec, rows.shape[1], columns, lambda into, rows=rows: np.copyto(into, rows)))
            out = on_cpu(codec, rows, columns, out, dtype)
        found.append(staging.read_coded((2, n, 16, 8), parts))
        expected.append(out)
    for tensor_of, wanted in zip(found, expected, strict=True):
        assert tensor_of.device.type == DEVICE.type
        assert storage_view(tensor_of.cpu()).tobytes() == wanted.tobytes()
    assert staging.nbytes > 0 or not any(out.size for out in expected)


def test_the_interpreter_is_asked_for_before_triton_is_loaded() -> None:
    assert DEVICE.type == "cuda" or os.environ["TRITON_INTERPRET"] == "1"
