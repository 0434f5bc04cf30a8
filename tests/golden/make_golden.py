"""Writes the golden store of the current format, tests/golden/v<format>.zip: run by hand once per released format, never by a test.

    python tests/golden/make_golden.py

What it holds follows from `CONTENT` and `helpers.model_kv`, so that any later version can say what must be read back.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import SMALL, TWO_GROUPS, Array, extend, identity, token_list

from kvdb import EXACT, KVDB, Geometry, Identity
from kvdb.format import FORMAT_VERSION

HERE: Final = Path(__file__).parent
_LEFT_OUT: Final = ("lock.mdb", "write.lock", "ballast")
"""Hold nothing between processes, and belong to a machine."""


class Known(NamedTuple):
    """One stored sequence."""

    name: str | None
    tokens: Array
    geometry: Geometry = SMALL
    ident: Identity = identity()
    fidelity: str = EXACT
    segment_tokens: int = 1 << 30


_BASE: Final = token_list(150, 1)
CONTENT: Final = (
    Known("report", _BASE, segment_tokens=64),
    Known("a branch, named ../thus", np.concatenate((_BASE[:70], token_list(40, 2)))),
    Known(None, np.concatenate((_BASE, token_list(25, 3)))),
    Known("two groups", token_list(33, 4), geometry=TWO_GROUPS, ident=identity("w1", dtype="float16")),
    Known("generated", token_list(20, 5), ident=identity("w0", salt="tenant"), fidelity="budget=0.1"),
)
SIZE_CAP: Final = 10**12
"""From format 1 on."""


def fill(path: Path) -> None:
    """Store CONTENT in a new store, with a pin, a cap and segments merged."""
    with KVDB.open(path, "w-") as db:
        for known in CONTENT:
            options: dict[str, Any] = known._asdict()
            extend(db, options.pop("tokens"), **options)
        assert db.compact() > 0
        db.pin("report")
        db.set_size_cap(SIZE_CAP)


def main() -> None:
    target = HERE / f"v{FORMAT_VERSION}.zip"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as archive:
        root = Path(folder) / "store"
        fill(root)
        for path in sorted(root.rglob("*")):
            if path.name not in _LEFT_OUT:
                archive.write(path, path.relative_to(root))
    print(target)


if __name__ == "__main__":
    main()
