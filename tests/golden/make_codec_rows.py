"""Writes rows of every codec of the table to tests/golden/codec_rows.json: run by hand when a codec is added, never by a test.

    python tests/golden/make_codec_rows.py

Rows that are there stay as they are: a codec that changes its bytes gets another name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvdb.codecs import CODECS, Codec, Planes
from kvdb.geometry import STORAGE_DTYPES, from_float32

FILE: Final = Path(__file__).with_name("codec_rows.json")
SHAPE: Final = (2, 9, 8)
"""An odd number of tokens: codes of the last ones share a byte with nothing."""


def numbers(dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """Halves of SHAPE: channels of other magnitudes, a constant one, one of zeros of both signs."""
    i = np.arange(np.prod(SHAPE), dtype=np.uint64).reshape(SHAPE)
    values = (i * np.uint64(2654435761) % np.uint64(4096)).astype(np.float32) / np.float32(2048) - np.float32(1)
    values *= np.float32(2) ** np.arange(-6, 10, 2, dtype=np.float32)
    values[..., 5] = 1.5
    values[..., 6] = np.where(i[..., 6] % 3 == 0, 0.0, -0.0)
    if dtype == "bfloat16":
        values = (values.view(np.uint32) & np.uint32(0xFFFF_0000)).view(np.float32)
    return from_float32(values, dtype)


def rows_of(codec: Codec, dtype: str) -> dict[str, Any]:
    rows = codec.encode(numbers(dtype), dtype)
    out = np.empty(SHAPE, STORAGE_DTYPES[dtype])
    codec.decode(rows, np.arange(len(rows)), 0, out, dtype)
    return {
        "codec": codec.name,
        "config": codec.config(),
        "dtype": dtype,
        "rows": [row.tobytes().hex() for row in rows],
        "decoded": out.tobytes().hex(),
    }


def main() -> None:
    kept = json.loads(FILE.read_text()) if FILE.exists() else []
    known = {json.dumps([entry[field] for field in ("codec", "config", "dtype")]) for entry in kept}
    codecs = [
        *(k.of_keys() for k in CODECS.values()),
        *(k.of_values() for k in CODECS.values()),
        Planes(bits=2),
        Planes(bits=8),
    ]
    for codec in codecs:
        for dtype in STORAGE_DTYPES:
            if (key := json.dumps([codec.name, codec.config(), dtype])) not in known:
                known.add(key)
                kept.append(rows_of(codec, dtype))
    FILE.write_text(json.dumps(kept, indent=1) + "\n")
    print(FILE, len(kept))


if __name__ == "__main__":
    main()
