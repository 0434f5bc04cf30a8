"""KVDB: an embedded storage engine for the KV cache of language models.

This package is the engine: bytes, files, LMDB, prefix tree, codecs, abstracts. It knows no model and no GPU;
`kvdb.runtime` joins it to transformers, `kvdb.tools` is the command line.
"""

from __future__ import annotations

import logging

from kvdb.entries import Sequence, Span
from kvdb.errors import KVDBError, Problem
from kvdb.geometry import Geometry, LayerGroup
from kvdb.identity import EXACT, Identity
from kvdb.store import KVDB, Match

logging.getLogger("kvdb").addHandler(logging.NullHandler())

__version__ = "0.2.0"
__all__ = [
    "EXACT", "KVDB", "Geometry", "Identity", "KVDBError", "LayerGroup", "Match", "Problem", "Sequence", "Span",
]  # fmt: skip
