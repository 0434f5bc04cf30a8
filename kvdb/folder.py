"""The folder of a store: what makes it one, how it is created, and what dead writers left in it.

STORE/kvdb.json    format, id, defaults: readable by a person
      catalog/     LMDB: what exists
      chunks/      Zarr v3: the bytes
      names/       a manifest per named sequence
      tmp/         in flight, one folder per writer, owned through a lock
      trash/       deleted, still readable for a grace period
      quarantine/  what `repair` took out
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

import msgspec

from kvdb import files, format, manifests
from kvdb.catalog import Catalog
from kvdb.codecs import Raw
from kvdb.errors import Damaged, NewerFormat, NotAStore, StoreLocked
from kvdb.format import FORMAT_VERSION
from kvdb.geometry import CHUNK_TOKENS

_HEADER: Final = "kvdb.json"
_PARTS: Final = ("catalog", "chunks", "names", "quarantine", "tmp", "trash")


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """kvdb.json."""

    format: int
    store: str
    created: float
    chunk_tokens: int
    codec: str


def holds_store(root: Path) -> bool:
    """True for an existing store, False where one can be created; raises NotAStore for anything else."""
    if root.is_symlink() and not root.exists():
        raise NotAStore(f"{root}: a dangling symbolic link, expected a folder or nothing")
    if not root.exists():
        return False
    if not root.is_dir():
        raise NotAStore(f"{root}: a file, expected a folder with {_HEADER}; choose another path")
    if (root / _HEADER).exists():
        return True
    if not {path.name for path in root.iterdir()} <= set(_PARTS):  # the parts alone: somebody is, or was, creating it
        raise NotAStore(f"{root}: a folder without {_HEADER}, expected a store or an empty folder; choose another path")
    return False


def create(root: Path) -> None:
    """Make an empty store. kvdb.json comes last: a folder without it is no store yet.

    Two processes that create the same store at once both succeed: the first header wins.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    files.mkdir(root, exist_ok=True)
    make_parts(root)
    with contextlib.suppress(FileExistsError):
        files.write_new(root / "chunks" / format.METADATA_KEY, format.group_metadata())
    Catalog(root / "catalog", readonly=False, create=True).close()
    header = Header(
        format=FORMAT_VERSION,
        store=os.urandom(16).hex(),
        created=files.now(),
        chunk_tokens=CHUNK_TOKENS,
        codec=Raw.name,
    )
    draft = _draft(root, header)
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # another header won, and its opener may have swept
        files.link(draft, root / _HEADER)
    files.unlink(draft)
    for folder in (root / "chunks", root / "catalog", root, root.parent):
        files.fsync_dir(folder)


def make_parts(root: Path) -> None:
    """The folders inside a store's folder, where they are missing."""
    for part in _PARTS:
        files.mkdir(root / part, exist_ok=True)


def _draft(root: Path, header: Header) -> Path:
    draft = root / "tmp" / f"header-{os.urandom(8).hex()}"
    files.write_new(draft, msgspec.json.format(msgspec.json.encode(header), indent=2) + b"\n")
    return draft


def replace_header(root: Path, header: Header) -> None:
    files.rename(_draft(root, header), root / _HEADER)
    files.fsync_dir(root)


def read_header(root: Path) -> Header:
    """kvdb.json of a store.

    raises  NotAStore, NewerFormat, Damaged
    """
    try:
        data = files.read_file(root / _HEADER)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotAStore(f"{root}: no {_HEADER}, expected a store") from e
        raise
    try:
        found = msgspec.json.decode(data)["format"]
        if isinstance(found, int) and found > FORMAT_VERSION:
            raise NewerFormat(
                f"{root}: store of format {found}, expected at most {FORMAT_VERSION}; upgrade kvdb (nothing was changed)"
            )
        return msgspec.json.decode(data, type=Header)
    except (msgspec.MsgspecError, KeyError, TypeError) as e:
        raise Damaged(f"{root / _HEADER}: {e}, expected a KVDB header") from e


def hold(root: Path, *, exclusive: bool) -> int:
    """Lock the store for as long as a handle is open, shared, or to replace it, exclusive; closing the fd releases it.

    raises  StoreLocked when it is open elsewhere (exclusive) or being replaced (shared)
    """
    return files.lock(root / _HEADER, timeout_s=0 if exclusive else 5, create=False, shared=not exclusive)


def sweep(root: Path, catalog: Catalog) -> None:
    """Remove what dead writers left: all that is not locked in tmp/, arrays in chunks/ and manifests that no entry names.

    Publishing happens inside a write transaction, so inside this one nothing is half published. The arrays are only looked
    through when a writer died or their number is not the one the catalog has, and never by a catalog that is damaged: what
    it does not name may be all there is.
    """
    died = _sweep_workspaces(root)
    arrays = len(files.list_dir(root / "chunks")) - 1  # its zarr.json
    with contextlib.suppress(Damaged):
        with catalog.begin() as txn:
            expected = txn.counters().arrays
        if not died and arrays == expected:
            return
        with catalog.begin(write=True) as txn:
            known = set(txn.segments())
            for array in files.list_dir(root / "chunks"):
                if array != format.METADATA_KEY and array.partition(".")[0] not in known:
                    files.remove_tree(root / "chunks" / array)
            named = {f"{s.key}.json" for s in txn.sequences() if s.name is not None}
            for name in set(files.list_dir(root / manifests.NAMES)) - named:
                files.unlink(root / manifests.NAMES / name)


def dead_workspaces(root: Path) -> list[Path]:
    """What writers that are gone have left in tmp/."""
    found = []
    for name in files.list_dir(root / "tmp"):
        with contextlib.suppress(StoreLocked, FileNotFoundError, NotADirectoryError, PermissionError):
            files.close(files.lock(root / "tmp" / name / "lock", timeout_s=0, create=False, shared=True))
            found.append(root / "tmp" / name)
    return found


def _sweep_workspaces(root: Path) -> bool:
    """Whether any was left by a dead writer."""
    died = False
    for name in files.list_dir(root / "tmp"):
        workspace = root / "tmp" / name
        try:
            fd = files.lock(workspace / "lock", timeout_s=0)  # of a maker that died before taking it, too
        except StoreLocked:
            continue
        except (FileNotFoundError, NotADirectoryError):  # gone already, or a draft of kvdb.json
            files.remove_tree(workspace)
            continue
        died = True
        try:
            files.remove_tree(workspace)
        finally:
            files.close(fd)
    return died
