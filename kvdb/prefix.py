"""The prefix tree, as pure functions: which keys a token list has, and what is listed under a key.

Key k of a token list stands for its first k whole blocks of 64 tokens under one identity; it is chained, so equal keys
mean equal prefixes (and tokens are compared all the same before anything is reused). A segment is listed under key k
when it holds tokens of block k of a sequence with that prefix; its listing begins with a byte for its fidelity and the tokens of that
block, so that listings of a fidelity sort like token lists and the longest agreement with any list is a neighbour of it in that order.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import xxhash

from kvdb.identity import EXACT

BLOCK_TOKENS = 64
EXACT_FIRST: Final = 1
"""What listings of fidelity EXACT begin with, and no others."""
_PADDING: Final = 0xFFFF_FFFF
"""Stands for "no token" in a listing; no vocabulary is that large."""

Tokens = np.ndarray[Any, np.dtype[np.uint32]]


def block_keys(identity_digest: bytes, tokens: Tokens) -> list[bytes]:
    """Keys 0..len(tokens) // 64, 16 bytes each. Key 0 depends on the identity only."""
    key = hashlib.blake2b(b"kvdb prefix 1\0" + identity_digest, digest_size=16).digest()
    keys = [key]
    data = np.ascontiguousarray(tokens, "<u4").tobytes()
    step = 4 * BLOCK_TOKENS
    for offset in range(0, len(data) - step + 1, step):
        key = hashlib.blake2b(key + data[offset : offset + step], digest_size=16).digest()
        keys.append(key)
    return keys


def first_bytes(fidelity: str) -> tuple[int, ...]:
    """What listings of a fidelity may begin with: the first is written, the others are of earlier writers. Several fidelities may share a
    byte, but none shares that of EXACT."""
    if fidelity == EXACT:
        return (EXACT_FIRST,)
    return 2 + xxhash.xxh3_64_intdigest(fidelity.encode()) % 254, 0


def listing(first: int, block: Tokens) -> bytes:
    """How a segment is listed under a key, without its id: u8 for its fidelity, then the block's tokens, big-endian, padded.

    first  one of `first_bytes`
    block  at most 64 tokens: those of the path that lie in the key's block
    """
    padded = np.full(BLOCK_TOKENS, _PADDING, ">u4")
    padded[: len(block)] = block
    return bytes([first]) + padded.tobytes()


LISTING_BYTES: Final = 1 + 4 * BLOCK_TOKENS


def listed_tokens(listed: bytes) -> Tokens:
    """The tokens in a listing, padding included."""
    return np.frombuffer(listed, ">u4", BLOCK_TOKENS, 1)


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Number of leading tokens that are equal."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
