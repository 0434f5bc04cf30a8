"""What must be equal for stored KV to mean the same, and how exactly it was computed.

The identity is kept as named fields, compared field by field, and addressed by a SHA-256 over tagged, length-prefixed
fields: plain concatenation lets different field splits collide. Names of models are not part of it: a name is not an
identity, the digest of the weights is. This module does not know how a model yields its fields.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import msgspec

from kvdb.errors import InvalidInput

TENSOR_SEMANTICS = "kv-after-rope/1"
"""Version of what stored tensors mean: keys after RoPE, token order, [kv_heads, tokens, head_dim]."""

MIXED = "mixed"
"""Fidelity of KV that was computed and stored in more ways than can be named."""
_LONGEST_FIDELITY, _LONGEST_PART = 64, 31
EXACT = "exact"
"""Fidelity of KV that dense attention computed from exact KV and a lossless codec stored."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that decide whether KV may be reused.

    weights  digest over names, shapes, dtypes and bytes of every parameter (and adapter)
    config   config fields that change the mathematics, as canonical strings
    dtype    KV dtype
    salt     tenant salt: the same text of two tenants never shares KV
    """

    weights: str
    config: dict[str, str]
    dtype: str
    salt: str = ""
    semantics: str = TENSOR_SEMANTICS

    def fields(self) -> dict[str, str]:
        """Flat, ordered view of every field: `weights`, `dtype`, `salt`, `semantics`, `config.<name>`."""
        flat = {"weights": self.weights, "dtype": self.dtype, "salt": self.salt, "semantics": self.semantics}
        flat |= {f"config.{name}": self.config[name] for name in sorted(self.config)}
        return flat

    def digest(self) -> bytes:
        """32 bytes; equal exactly when all fields are equal."""
        return tagged_digest(self.fields())

    def difference(self, other: Identity) -> list[str]:
        """Names of the fields that differ, in order."""
        mine, theirs = self.fields(), other.fields()
        return [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]


def tagged_digest(fields: Mapping[str, str]) -> bytes:
    """SHA-256 over (tag, value) pairs, each prefixed with its length as a little-endian u64."""
    h = hashlib.sha256(b"kvdb identity 1\0")
    for tag, value in fields.items():
        for part in (tag.encode(), value.encode()):
            h.update(struct.pack("<Q", len(part)))
            h.update(part)
    return h.digest()


def joined_fidelity(fidelity: str, more: str) -> str:
    """The fidelity of KV that both descriptions say something of: their parts, each once, separated by spaces. A long part is cut, with a
    digest of the whole; where there are too many, all that is left to say is `MIXED`. Joining again changes nothing."""
    parts = dict.fromkeys(_short(part) for part in (*fidelity.split(" "), *more.split(" ")) if part != EXACT)
    whole = " ".join(parts) or EXACT
    return MIXED if MIXED in parts or len(whole) > _LONGEST_FIDELITY else whole


def _short(part: str) -> str:
    if len(part) <= _LONGEST_PART:
        return part
    return f"{part[: _LONGEST_PART - 17]}~{hashlib.sha256(part.encode()).hexdigest()[:16]}"


def check_fidelity(fidelity: str) -> str:
    if not fidelity or len(fidelity) > _LONGEST_FIDELITY or not fidelity.isprintable():
        raise InvalidInput(f"fidelity: {fidelity!r}, expected 1..64 printable characters such as {EXACT!r}")
    return fidelity
