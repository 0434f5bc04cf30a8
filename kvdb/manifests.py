"""Manifests: one small file per named sequence, so that names survive the loss of the catalog.

STORE/names/<sequence key>.json is the sequence's entry. It is written before the transaction that makes the name visible and
removed after the one that takes it away; the catalog decides, a manifest only helps to rebuild it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import msgspec

from kvdb import files
from kvdb.entries import Sequence
from kvdb.errors import Damaged

NAMES: Final = "names"


def write(root: Path, workspace: Path, sequence: Sequence) -> None:
    """Put a sequence's manifest in its place, durably; an older one of the same key is replaced."""
    draft = workspace / f"{sequence.key}.json"
    files.unlink(draft)
    files.write_new(draft, msgspec.json.format(msgspec.json.encode(sequence), indent=1) + b"\n")
    files.rename(draft, _path(root, sequence.key))
    files.fsync_dir(root / NAMES)


def remove(root: Path, key: str) -> None:
    files.unlink(_path(root, key))


def read(root: Path) -> list[Sequence]:
    """Every readable manifest, oldest first: of two with the same name the later one counts."""
    found = []
    for name in files.list_dir(root / NAMES):
        with contextlib.suppress(OSError, Damaged, msgspec.MsgspecError):
            sequence = msgspec.json.decode(files.read_file(root / NAMES / name), type=Sequence)
            if name == f"{sequence.key}.json" and sequence.name is not None:
                found.append(sequence)
    return sorted(found, key=lambda s: (s.created, s.key))


def keys(root: Path) -> list[str]:
    """Keys that have a manifest, readable or not."""
    return [name.removesuffix(".json") for name in files.list_dir(root / NAMES)]


def _path(root: Path, key: str) -> Path:
    return root / NAMES / f"{key}.json"
