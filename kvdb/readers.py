"""Ways to read, by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from typing import Final

from kvdb.direct import DirectReader
from kvdb.mapped import MmapReader
from kvdb.positioned import PreadReader
from kvdb.reader import Reader

READERS: Final[dict[str, type[Reader]]] = {reader.name: reader for reader in (MmapReader, PreadReader, DirectReader)}
