"""Manifests: one small file per named sequence, so that names survive the loss of the catalog.

STORE/names/<sequence key>.json is the sequence's entry. It is written before the commit that makes the name visible and removed
after the one that takes it away; the catalog decides, a manifest only helps to rebuild it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from kvdb import files
from kvdb.entries import Sequence
from kvdb.errors import Damaged

NAMES: Final = "names"


@contextlib.contextmanager
def following(names: Path, changes: dict[str, Sequence | None]) -> Iterator[None]:
    """Around a commit: manifests of what it enters are there before, of what it takes away gone after.
    They are forced to disk whatever the durability of the rest: names are few, and somebody chose them.

    changes  key -> the named sequence, or None for one that goes
    """
    fresh: list[Path] = []
    try:
        for key, sequence in changes.items():
            if sequence is not None:
                path = names / f"{key}.json"
                if not path.exists():
                    fresh.append(path)
                _write(path, sequence)
        if any(changes.values()):
            files.fsync_dir(names)
        yield
    except BaseException:
        for path in fresh:
            files.unlink(path)
        raise
    for key, sequence in changes.items():
        if sequence is None:
            files.unlink(names / f"{key}.json")


def _write(path: Path, sequence: Sequence) -> None:
    draft = path.with_name(f"{path.name}.part")
    files.unlink(draft)
    try:
        files.write_new(draft, msgspec.json.format(msgspec.json.encode(sequence), indent=1) + b"\n")
        files.rename(draft, path)
    except BaseException:
        files.unlink(draft)
        raise


def write(names: Path, sequence: Sequence) -> None:
    """Put one manifest in its place, durably."""
    _write(names / f"{sequence.key}.json", sequence)
    files.fsync_dir(names)


def read(names: Path) -> list[Sequence]:
    """Every readable manifest, oldest first: of two with the same name the later one counts."""
    found = []
    for name in files.list_dir(names):
        with contextlib.suppress(OSError, Damaged, ValueError, RecursionError):
            sequence = msgspec.json.decode(files.read_file(names / name), type=Sequence)
            if name == f"{sequence.key}.json" and sequence.name is not None:
                found.append(sequence)
    return sorted(found, key=lambda s: (s.created, s.key))


def agree(a: Sequence, b: Sequence) -> bool:
    """Whether two descriptions are of the same sequence in the same KV. Pins and expiry may change in a commit that fails after
    the manifest was written, and are not worth a second write to take back; the root changes with the segments' abstracts."""
    may_differ = {"pinned": False, "expires": None, "model": "", "root": "", "last_used": 0.0, "hits": 0}
    return msgspec.structs.replace(a, **may_differ) == msgspec.structs.replace(b, **may_differ)
