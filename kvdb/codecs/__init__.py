"""Codecs by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from typing import Final

from kvdb.codecs.base import Codec
from kvdb.codecs.raw import Raw

CODECS: Final[dict[str, type[Codec]]] = {codec.name: codec for codec in (Raw,)}

__all__ = ["CODECS", "Codec", "Raw"]
