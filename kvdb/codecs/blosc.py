"""Blocks of many records, compressed whole and without loss: a tier for what is kept and seldom read.

In a block the numbers of each KV head lie in token order. Their bytes are regrouped by place within the number, so that signs and
exponents, which vary little, come together, and then go through zstd; mantissas hardly shrink. Nothing smaller than a block can
be read, and blocks shorter than 1 024 tokens compress worse.
source: the Blosc container, as the `blosc` codec of Zarr has it; each block ends with its crc32c, as by Zarr's `crc32c` codec.
"""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, NamedTuple

import google_crc32c
import numpy as np

from kvdb.codecs.base import Array, whole_number
from kvdb.errors import InvalidInput, OutOfMemory
from kvdb.geometry import SEGMENT_TOKENS, STORAGE_DTYPES, Geometry, div_ceil

_CNAME: Final = "zstd"
_ZSTD: Final = 4
_HEADER: Final = struct.Struct("<BBBBIII")  # two versions, flags, typesize, decoded, Blosc's own block, all of it
_CRC: Final = struct.Struct("<I")
_MOST_BYTES: Final = 64 << 20
"""Of a block decoded: what one read must find room for, whatever a file says."""
_WORKSPACE: Final = 16 << 20
"""Of the library, at most, beside a few blocks."""


class BlockForm(NamedTuple):
    """A block of one layer, decoded: numbers (kv_heads, 2, chunks * chunk_tokens, head_dim), K first. Whole chunks; zeros after the last."""

    chunks: int
    kv_heads: int
    chunk_tokens: int
    head_dim: int
    dtype: str

    @classmethod
    def of(cls, geometry: Geometry, group: int, capacity: int, tokens: int) -> BlockForm:
        """tokens: at most so many in a block, or one chunk; capacity: chunks that the array has room for."""
        g, ct = geometry.groups[group], geometry.chunk_tokens
        return cls(max(1, min(tokens // ct, capacity)), g.kv_heads, ct, g.head_dim, geometry.dtype)

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        return STORAGE_DTYPES[self.dtype]

    @property
    def records(self) -> int:
        return self.chunks * self.kv_heads

    @property
    def tokens(self) -> int:
        return self.chunks * self.chunk_tokens

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.kv_heads, 2, self.tokens, self.head_dim

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage_dtype.itemsize

    @property
    def most_stored(self) -> int:
        """Most bytes that it takes compressed, its checksum included."""
        return self.nbytes + _HEADER.size + _CRC.size

    def count(self, capacity: int) -> int:
        """Blocks of a layer with room for so many chunks."""
        return div_ceil(capacity, self.chunks)

    def numbers(self, rows: Array) -> Array:
        """Rows (n, row_bytes) uint8 of at most `records` records, by chunk, then by head -> the block."""
        padded = np.zeros((self.records, rows.shape[1]), np.uint8)
        padded[: len(rows)] = rows
        by_chunk = padded.view(self.storage_dtype).reshape(
            self.chunks, self.kv_heads, 2, self.chunk_tokens, self.head_dim
        )
        return np.ascontiguousarray(by_chunk.transpose(1, 2, 0, 3, 4)).reshape(self.shape)

    def rows(self, numbers: Array) -> Array:
        """Inverse of `numbers`: (records, row_bytes) uint8."""
        heads, chunks = self.kv_heads, self.chunks
        by_head = numbers.reshape(heads, 2, chunks, self.chunk_tokens, self.head_dim)
        return np.ascontiguousarray(by_head.transpose(2, 0, 1, 3, 4)).view(np.uint8).reshape(self.records, -1)


@dataclass(frozen=True, slots=True)
class Blosc:
    """clevel  of zstd
    tokens  of a block: as many whole chunks as they hold, one at least
    """

    name: ClassVar[str] = "blosc"

    clevel: int = 1
    tokens: int = 1024

    def __post_init__(self) -> None:
        whole_number(self.name, "clevel", self.clevel, range(1, 10))
        whole_number(self.name, "tokens", self.tokens, range(1, SEGMENT_TOKENS + 1))

    def config(self) -> dict[str, Any]:
        """See `Codec.config`."""
        return asdict(self)

    def check(self, form: BlockForm) -> None:
        """raises  InvalidInput for blocks that are too large to be unpacked whole"""
        if form.nbytes > _MOST_BYTES:
            raise InvalidInput(
                f"codec {self.name}: blocks of {form.nbytes} bytes, expected at most {_MOST_BYTES}; take fewer tokens"
            )

    def zarr(self, form: BlockForm) -> list[dict[str, Any]]:
        """What a Zarr reader must know, after the bytes of the numbers."""
        configuration = {
            "typesize": form.storage_dtype.itemsize,
            "cname": _CNAME,
            "clevel": self.clevel,
            "shuffle": "shuffle",
            "blocksize": form.nbytes,
        }
        return [{"name": self.name, "configuration": configuration}, {"name": "crc32c"}]

    def pack(self, numbers: Array) -> bytes:
        """Compress a block: C-contiguous, little-endian numbers. What it decodes to is the same whatever the version of the library.

        raises  OutOfMemory
        """
        from numcodecs import blosc

        _find_room(numbers.nbytes)
        packed: bytes = blosc.compress(
            numbers, _CNAME.encode(), self.clevel, shuffle=blosc.SHUFFLE, blocksize=numbers.nbytes
        )
        return packed + _CRC.pack(google_crc32c.value(packed))

    def unpack(self, data: bytes, out: Array) -> None:
        """Decode a block into `out`, C-contiguous, overwritten. Its size is known beforehand: what says otherwise is not decoded.

        raises  InvalidInput for what `pack` did not write; OutOfMemory
        """
        from numcodecs import blosc

        packed = data[: -_CRC.size]
        if len(packed) < _HEADER.size or _CRC.unpack(data[-_CRC.size :])[0] != google_crc32c.value(packed):
            raise InvalidInput(f"codec {self.name}: {len(data)} bytes that do not match their crc32c, expected a block")
        _, _, flags, typesize, decoded, _, whole = _HEADER.unpack_from(packed)
        if (flags >> 5, typesize, decoded, whole) != (_ZSTD, out.itemsize, out.nbytes, len(packed)):
            raise InvalidInput(
                f"codec {self.name}: a block of {whole} bytes, method {flags >> 5}, says that it holds {decoded} in numbers of "
                f"{typesize}, expected {len(packed)}, method {_ZSTD}, that hold {out.nbytes} in numbers of {out.itemsize}"
            )
        _find_room(out.nbytes)
        try:
            blosc.decompress(packed, out)
        except (RuntimeError, ValueError) as e:
            raise InvalidInput(f"codec {self.name}: {e}, expected a block") from e


def _find_room(block_bytes: int) -> None:
    """The library tells want of memory from damage neither when it packs, where it crashes, nor when it unpacks: so it is only called
    where what it needs can be had.

    raises  OutOfMemory
    """
    wanted = 4 * block_bytes + _WORKSPACE
    try:
        np.empty(wanted, np.uint8)
    except MemoryError as e:
        raise OutOfMemory(
            f"codec {Blosc.name}: no {wanted} bytes of memory for a block, expected them; free some"
        ) from e
