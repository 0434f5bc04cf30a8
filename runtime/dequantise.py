"""Decoding stored records on the device that computes with them, so that coded bytes cross the bus and not what they stand for."""

from __future__ import annotations

import logging
from functools import cache
from typing import Final, Protocol

import torch
from torch import Tensor

from kvdb.codecs import Codec, Int2, Int4, Int8, Planes, Raw, RecordCodec
from kvdb.codecs.integers import Integers
from kvdb.geometry import div_ceil
from kvdb.runtime.identity import dtype_name

_LOG: Final = logging.getLogger(__name__)
_KNOWN: Final = (Raw, Int8, Int4, Int2, Planes)
_BLOCK: Final = 1024
"""Most bytes of codes that one program takes."""


class Decoder(Protocol):
    """Contract. Numbers are those of `RecordCodec.decode`, to the bit."""

    def decodes(self, codec: RecordCodec) -> bool:
        """Whether it knows both halves."""

    def decode(self, codec: RecordCodec, rows: Tensor, columns: Tensor, out: Tensor) -> None:
        """Decode rows into records anywhere in `out`, all on one device. Queued there: it may return before it is done.

        rows     (m, row_bytes) uint8, contiguous; m may be 0, and then nothing is done
        columns  (m,) int64, contiguous: the record of each row, in any order, none twice
        out      (2, n, chunk_tokens, head_dim) of a KV dtype, contiguous, keys first; other records are left as they are
        """


class Triton:
    """The decoder of GPUs; and with Triton's interpreter (TRITON_INTERPRET=1), slowly, of tensors in memory.

    raises  ImportError where triton is not installed
    """

    def __init__(self) -> None:
        from kvdb.runtime import dequantise_kernel

        self._kernels = dequantise_kernel

    def decodes(self, codec: RecordCodec) -> bool:
        return type(codec.key) in _KNOWN and type(codec.value) in _KNOWN

    def decode(self, codec: RecordCodec, rows: Tensor, columns: Tensor, out: Tensor) -> None:
        _, _, chunk_tokens, head_dim = out.shape
        key_bytes = codec.key.half_bytes(chunk_tokens, head_dim, dtype_name(out.dtype))
        assert rows.shape == (len(columns), codec.row_bytes(chunk_tokens, head_dim, dtype_name(out.dtype)))
        if len(rows):
            with torch.cuda.device_of(out):  # where Triton launches; in memory it does nothing
                self._half(codec.key, rows, columns, 0, out[0])
                self._half(codec.value, rows, columns, key_bytes, out[1])

    def _half(self, codec: Codec, rows: Tensor, columns: Tensor, first: int, out: Tensor) -> None:
        _, tokens, dim = out.shape
        match codec:
            case Integers():
                form, line_bytes = codec.form(dim), div_ceil(tokens * codec.nbits, 8) * dim
                block, grid = _blocks(len(rows), line_bytes)
                self._kernels.integers[grid](
                    rows, columns, out, rows.shape[1], first, TOKENS=tokens, DIM=dim, NBITS=form.nbits, BY_TOKEN=form.by_token,
                    CHANNELS=form.channels, BLOCK=block, enable_fp_fusion=False,
                )  # fmt: skip
            case Planes():
                block, grid = _blocks(len(rows), div_ceil(tokens, 8) * dim)
                self._kernels.planes[grid](
                    rows, columns, out, rows.shape[1], first, TOKENS=tokens, DIM=dim, BITS=codec.taken or codec.bits,
                    BLOCK=block, enable_fp_fusion=False,
                )  # fmt: skip
            case _:
                stored = out.view(torch.uint8).flatten(1)  # [n, half_bytes]
                stored.index_copy_(0, columns, rows[:, first : first + stored.shape[1]])


def _blocks(rows: int, code_bytes: int) -> tuple[int, tuple[int, int]]:
    """Bytes of codes to a program, a power of two, and the grid of programs."""
    block = min(_BLOCK, 1 << (code_bytes - 1).bit_length())
    return block, (rows, div_ceil(code_bytes, block))


@cache
def decoder_on(device: torch.device) -> Decoder | None:
    """None where nothing is gained or nothing can decode: no GPU, no triton, or none that can compile for this GPU."""
    if device.type != "cuda":
        return None
    try:
        triton = Triton()
        codec, out = RecordCodec(Int8(), Int8()), torch.empty((2, 1, 1, 1), device=device)
        rows = torch.zeros((1, codec.row_bytes(1, 1, "float32")), dtype=torch.uint8, device=device)
        triton.decode(codec, rows, torch.zeros(1, dtype=torch.int64, device=device), out)
    except ImportError:
        return None
    except Exception as e:  # of what it needs, a C compiler or a driver, Triton's errors have no common class
        _LOG.warning("%s: Triton cannot compile for it (%s); stored KV is decoded on the CPU", device, e)
        return None
    return triton
