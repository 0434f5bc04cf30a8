"""Codecs by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from typing import Final

from kvdb.codecs.base import Codec
from kvdb.codecs.integers import Int2, Int4, Int8
from kvdb.codecs.planes import Planes
from kvdb.codecs.raw import Raw

CODECS: Final[dict[str, type[Codec]]] = {codec.name: codec for codec in (Raw, Int8, Int4, Int2, Planes)}
