"""The codec of a record: one for its keys, one for its values. A row is the key half, then the value half, without padding.

    raw                     both halves as they are
    int4                    both halves; keys by channel, values by token
    planes:bits=6+int8      keys as planes, values as integers
    blosc                   both halves as they are, compressed with many others in blocks

Names stand for themselves; parameters follow a colon. One name is both halves; `planes` alone, which is made for keys, has `int4` values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvdb.codecs.base import Array, Codec
from kvdb.codecs.blosc import Blosc
from kvdb.codecs.raw import Raw
from kvdb.codecs.table import CODECS
from kvdb.errors import InvalidInput, Unsupported
from kvdb.geometry import STORAGE_DTYPES

_HALVES: Final = ("key", "value")
_BLOCKS: Final = "blocks"


@dataclass(frozen=True, slots=True)
class RecordCodec:
    """`records` and `out` are of the storage dtype of the KV dtype `dtype`.

    blocks  what compresses the rows of many records together; None: they lie in the file one by one
    """

    key: Codec
    value: Codec
    blocks: Blosc | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and not self.stored_as_is:
            raise Unsupported(
                f"codec {self.blocks.name}: of rows of {self.key.name} and {self.value.name}, expected rows of raw: others do not shrink"
            )

    @property
    def lossless(self) -> bool:
        return self.key.lossless and self.value.lossless

    @property
    def stored_as_is(self) -> bool:
        """Whether a row *is* the record, so that a reader may gather it without `decode`."""
        return self.key.stored_as_is and self.value.stored_as_is

    def at(self, bits: int) -> RecordCodec:
        """See `Codec.at`."""
        return RecordCodec(self.key.at(bits), self.value.at(bits))

    def check(self, chunk_tokens: int, head_dim: int, dtype: str) -> None:
        """raises  InvalidInput where parameters do not fit records of this shape"""
        self.key.check(chunk_tokens, head_dim, dtype)
        self.value.check(chunk_tokens, head_dim, dtype)

    def row_bytes(self, chunk_tokens: int, head_dim: int, dtype: str) -> int:
        """Stored bytes of one record, known before anything is decoded."""
        return sum(codec.half_bytes(chunk_tokens, head_dim, dtype) for codec in (self.key, self.value))

    def encode(self, records: Array, dtype: str) -> Array:
        """records (n, 2, chunk_tokens, head_dim), n may be 0 -> rows (n, row_bytes) uint8; stored as is, rows may be the records' own
        memory. Otherwise as `Codec.encode`."""
        if records.ndim != 4 or records.shape[1] != 2 or records.dtype != STORAGE_DTYPES.get(dtype):
            raise InvalidInput(
                f"codec {self}: records {records.shape} of {records.dtype}, expected (n, 2, chunk_tokens, head_dim) of "
                f"{STORAGE_DTYPES.get(dtype, 'a KV dtype')} for {dtype}"
            )
        if self.stored_as_is:
            n, _, chunk_tokens, head_dim = records.shape
            self.check(chunk_tokens, head_dim, dtype)
            return (
                np.ascontiguousarray(records).view(np.uint8).reshape(n, self.row_bytes(chunk_tokens, head_dim, dtype))
            )
        return np.concatenate((self.key.encode(records[:, 0], dtype), self.value.encode(records[:, 1], dtype)), axis=1)

    def decode(self, rows: Array, which: Array, out: Array, dtype: str) -> None:
        """Gather records out of rows and decode them: out (2, n, chunk_tokens, head_dim), keys first. Otherwise as `Codec.decode`."""
        if out.ndim != 4 or len(out) != 2 or not out.flags.c_contiguous:
            raise InvalidInput(f"codec {self}: out {out.shape}, expected (2, n, chunk_tokens, head_dim), C-contiguous")
        chunk_tokens, head_dim = out.shape[2:]
        self.check(chunk_tokens, head_dim, dtype)
        key_bytes = self.key.half_bytes(chunk_tokens, head_dim, dtype)
        self.key.decode(rows, which, 0, out[0], dtype)
        self.value.decode(rows, which, key_bytes, out[1], dtype)

    def spec(self) -> dict[str, dict[str, Any]]:
        """JSON-safe; `from_spec` is its inverse."""
        parts: dict[str, Codec | Blosc] = dict(zip(_HALVES, (self.key, self.value), strict=True))
        if self.blocks is not None:
            parts[_BLOCKS] = self.blocks
        return {part: {"name": codec.name, "config": codec.config()} for part, codec in parts.items()}

    @classmethod
    def from_spec(cls, spec: object) -> RecordCodec:
        """What `spec` gave, or anybody's file holds.

        raises  InvalidInput for what no version writes; Unsupported for a codec or parameter this version does not know
        """
        if not isinstance(spec, Mapping) or not set(spec) >= set(_HALVES):
            raise InvalidInput(f"codec: {spec!r}, expected an object of {_HALVES}, and {_BLOCKS!r} or not")
        if more := set(spec) - {*_HALVES, _BLOCKS}:
            raise Unsupported(f"codec: with {sorted(map(str, more))}, expected {_HALVES} and {_BLOCKS!r}; upgrade kvdb")
        key, value = (
            _made(f"codec of the {half}", *_named(f"codec of the {half}", spec[half]), lambda kind: kind)
            for half in _HALVES
        )
        if _BLOCKS not in spec:
            return cls(key, value)
        where = f"codec of {_BLOCKS}"
        return cls(key, value, _compressor(where, *_named(where, spec[_BLOCKS])))

    @classmethod
    def parse(cls, text: str) -> RecordCodec:
        """As on a command line: `str` is its inverse.

        raises  InvalidInput for what is no such text; Unsupported for a codec or parameter that is not known
        """
        keys, plus, values = text.partition("+")
        if not plus:
            if keys.partition(":")[0] == Blosc.name:
                return cls(Raw(), Raw(), _compressor(f"codec {text!r}", Blosc.name, _config(text, keys)))
            kind = CODECS.get(keys.partition(":")[0])
            values = (kind and kind.values_beside) or keys
        return cls(_parsed(text, keys, lambda kind: kind.of_keys), _parsed(text, values, lambda kind: kind.of_values))

    def __str__(self) -> str:
        if self.blocks is not None:
            return _text(self.blocks, Blosc())
        keys, values = _text(self.key, self.key.of_keys()), _text(self.value, self.value.of_values())
        beside = self.key.values_beside or keys
        return keys if values == beside else f"{keys}+{values}"


def _named(where: str, given: object) -> tuple[str, Mapping[str, Any]]:
    """raises  InvalidInput for what is no name with parameters"""
    if not isinstance(given, Mapping) or not set(given) >= {"name", "config"}:
        raise InvalidInput(f"{where}: {given!r}, expected an object of 'name' and 'config'")
    if more := set(given) - {"name", "config"}:
        raise Unsupported(f"{where}: with {sorted(map(str, more))}, expected 'name' and 'config'; upgrade kvdb")
    name, config = given["name"], given["config"]
    if not isinstance(name, str) or not isinstance(config, Mapping) or not all(isinstance(k, str) for k in config):
        raise InvalidInput(f"{where}: {given!r}, expected a name, and parameters by name")
    return name, config


def _compressor(where: str, name: str, config: Mapping[str, Any]) -> Blosc:
    known = Blosc().config()
    if name != Blosc.name or set(config) - set(known):
        raise Unsupported(
            f"{where}: {name!r} with {sorted(config)}, expected {Blosc.name!r} with parameters {sorted(known)}; upgrade kvdb"
        )
    return Blosc(**config)


def _made(
    where: str, name: str, config: Mapping[str, Any], how: Callable[[type[Codec]], Callable[..., Codec]]
) -> Codec:
    if name not in CODECS:
        raise Unsupported(f"{where}: {name!r}, expected one of {sorted([*CODECS, Blosc.name])}; upgrade kvdb")
    kind = CODECS[name]
    known = kind.of_keys().config()
    if unknown := sorted(set(config) - set(known)):
        raise Unsupported(f"{where}: {name} with {unknown}, expected parameters {sorted(known)}; upgrade kvdb")
    return how(kind)(**config)


def _parsed(text: str, half: str, how: Callable[[type[Codec]], Callable[..., Codec]]) -> Codec:
    return _made(f"codec {text!r}", half.partition(":")[0], _config(text, half), how)


def _config(text: str, part: str) -> dict[str, Any]:
    """Parameters behind a name."""
    _, colon, given = part.partition(":")
    config: dict[str, Any] = {}
    for item in given.split(",") if colon else ():
        field, equals, value = item.partition("=")
        if not equals or not field or field in config:
            raise InvalidInput(f"codec {text!r}: {item!r}, expected NAME=VALUE once for each")
        config[field] = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else value
    return config


def _text(codec: Codec | Blosc, usual: Codec | Blosc) -> str:
    before = usual.config()
    config = ",".join(f"{field}={value}" for field, value in codec.config().items() if value != before[field])
    return f"{codec.name}:{config}" if config else codec.name
