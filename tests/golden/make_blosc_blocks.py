"""Writes a block of every dtype to tests/golden/blosc_blocks.json: run by hand, once, never by a test.

python tests/golden/make_blosc_blocks.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np

from kvdb.codecs import Blosc
from kvdb.geometry import STORAGE_DTYPES, from_float32

FILE: Final = Path(__file__).with_name("blosc_blocks.json")
SHAPE: Final = (2, 2, 32, 8)


def main() -> None:
    values = np.sin(np.arange(np.prod(SHAPE), dtype=np.float32)).reshape(SHAPE)
    values = (values.view(np.uint32) & np.uint32(0xFFFF_0000)).view(np.float32)
    blocks = [(dtype, from_float32(values, dtype)) for dtype in STORAGE_DTYPES]
    entries = [
        {"dtype": dtype, "shape": SHAPE, "block": Blosc().pack(block).hex(), "decoded": block.tobytes().hex()}
        for dtype, block in blocks
    ]
    FILE.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
