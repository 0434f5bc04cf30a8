"""How the bytes of keys and values look on disk: the table of codecs, and what puts two of them together for a record."""

from __future__ import annotations

from kvdb.codecs.base import Codec
from kvdb.codecs.blosc import BlockForm, Blosc
from kvdb.codecs.integers import Int2, Int4, Int8
from kvdb.codecs.plan import POLICIES, RAW, CodecPlan
from kvdb.codecs.planes import Planes
from kvdb.codecs.raw import Raw
from kvdb.codecs.record import RecordCodec
from kvdb.codecs.table import CODECS

__all__ = [
    "CODECS",
    "POLICIES",
    "RAW",
    "BlockForm",
    "Blosc",
    "Codec",
    "CodecPlan",
    "Int2",
    "Int4",
    "Int8",
    "Planes",
    "Raw",
    "RecordCodec",
]
