"""Shapes, sizes and dtypes of stored KV: chunks, records, layer groups. Pure arithmetic, no I/O.

A *chunk* is `chunk_tokens` consecutive tokens of one layer, K and V of all KV heads. A *record* is one KV head's part of a
chunk: K (chunk_tokens, head_dim), then V, contiguous. Chunk k of a sequence always holds positions
[k * chunk_tokens, (k + 1) * chunk_tokens), whichever segment it lies in.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from kvdb.errors import InvalidInput

CHUNK_TOKENS = 16
SEGMENT_TOKENS = 16_384
"""A segment never holds more tokens than this."""

_MOST: Final = 1 << 16
"""No model has more heads, dimensions or layers; a store that says so is not to be believed."""

STORAGE_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""KV dtype -> the dtype its bytes are stored as. NumPy and Zarr have no bfloat16: it travels as uint16."""


def as_float32(stored: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Stored values as float32, exactly."""
    if dtype == "bfloat16":
        bits: np.ndarray[Any, np.dtype[np.uint32]] = np.left_shift(stored, 16, dtype=np.uint32)
        return bits.view(np.float32)
    return stored.astype(np.float32, copy=False)


def from_float32(values: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> np.ndarray[Any, Any]:
    """Inverse of `as_float32` for values that the dtype represents."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2")
    return values.astype("<f2" if dtype == "float16" else "<f4", copy=False)


def div_ceil(a: int, b: int) -> int:
    return -(-a // b)


class LayerGroup(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Layers that share one KV shape and therefore one array. `layers` are model layer indices, in order."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise InvalidInput(f"layer group: layers are {self.layers}, expected ascending non-negative indices")
        if not (1 <= self.kv_heads <= _MOST and 1 <= self.head_dim <= _MOST and self.layers[-1] < _MOST):
            raise InvalidInput(
                f"layer group: kv_heads={self.kv_heads}, head_dim={self.head_dim}, last layer {self.layers[-1]}, expected "
                f"them positive and at most {_MOST}"
            )


class Geometry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The KV shape of a whole model: dtype, chunk size and layer groups."""

    dtype: str
    chunk_tokens: int
    groups: tuple[LayerGroup, ...]

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPES:
            raise InvalidInput(f"geometry: dtype is {self.dtype!r}, expected one of {sorted(STORAGE_DTYPES)}")
        if not 1 <= self.chunk_tokens <= SEGMENT_TOKENS:
            raise InvalidInput(f"geometry: chunk_tokens is {self.chunk_tokens}, expected 1..{SEGMENT_TOKENS}")
        layers = [layer for group in self.groups for layer in group.layers]
        if not layers or len(layers) != len(set(layers)):
            raise InvalidInput(f"geometry: layers are {layers}, expected each layer exactly once")

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        return STORAGE_DTYPES[self.dtype]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted(layer for group in self.groups for layer in group.layers))

    def locate(self, layer: int) -> tuple[int, int]:
        """(group index, row of the layer inside the group). Raises InvalidInput for a layer without stored KV."""
        for index, group in enumerate(self.groups):
            if layer in group.layers:
                return index, group.layers.index(layer)
        raise InvalidInput(f"layer {layer}: not stored, expected one of {self.layers}")

    def plane_bytes(self, group: int) -> int:
        """Bytes of K (or of V) in one record."""
        return self.chunk_tokens * self.groups[group].head_dim * self.storage_dtype.itemsize

    def record_bytes(self, group: int) -> int:
        return 2 * self.plane_bytes(group)

    def slot_bytes(self, group: int) -> int:
        """Bytes of one chunk: its records back to back. No padding: rows of all records stay uniformly spaced."""
        return self.groups[group].kv_heads * self.record_bytes(group)

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return sum(2 * g.kv_heads * g.head_dim * len(g.layers) for g in self.groups) * self.storage_dtype.itemsize

    def chunks(self, tokens: int) -> int:
        return div_ceil(tokens, self.chunk_tokens)

    def grid_floor(self, tokens: int) -> int:
        return tokens - tokens % self.chunk_tokens
