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
from kvdb.codecs import RAW
from kvdb.errors import Damaged, NewerFormat, NotAStore, StoreError, StoreLocked
from kvdb.format import FORMAT_VERSION
from kvdb.geometry import CHUNK_TOKENS

HEADER: Final = "kvdb.json"
_HOLD_ATTEMPTS: Final = 100
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
        raise NotAStore(f"{root}: a file, expected a folder with {HEADER}; choose another path")
    if (root / HEADER).exists():
        return True
    if not {path.name for path in root.iterdir()} <= set(_PARTS):  # the parts alone: somebody is, or was, creating it
        raise NotAStore(f"{root}: a folder without {HEADER}, expected a store or an empty folder; choose another path")
    return False


def create(root: Path) -> None:
    """Make an empty store. kvdb.json comes last, when all else is on disk: a folder without it is no store yet.

    Of two processes that create the same store at once, the second finds it made.
    """
    files.make_parents(root)
    files.mkdir(root, exist_ok=True)
    files.make_private(root)
    making = files.lock(root, timeout_s=30, create=False)
    try:
        if (root / HEADER).exists():
            return
        _clear(root)
        make_parts(root)
        files.write_new(root / "chunks" / format.METADATA_KEY, format.group_metadata())
        Catalog(root / "catalog", readonly=False, create=True).close()
        for part in _PARTS:
            files.fsync_dir(root / part)
        replace_header(root, new_header())
        force(root)
    finally:
        files.close(making)


def _clear(root: Path) -> None:
    """Remove what a creation that failed has left: it may be half written.

    raises  Damaged when it was a store: there is KV
    """
    chunks = root / "chunks"
    if chunks.is_dir() and set(files.list_dir(chunks)) - {format.METADATA_KEY}:
        raise Damaged(f"{root}: no {HEADER}, but KV in chunks/, expected both; run 'kvdb repair --apply'")
    for part in ("catalog", "chunks", "names", "tmp"):
        files.remove_tree(root / part)


def new_header() -> Header:
    return Header(
        format=FORMAT_VERSION,
        store=os.urandom(16).hex(),
        created=files.now(),
        chunk_tokens=CHUNK_TOKENS,
        codec=str(RAW),
    )


def force(root: Path) -> None:
    """Have the store's own entries on disk: its maker may have died before it could."""
    files.fsync_dir(root)
    with contextlib.suppress(PermissionError):  # a folder that may be passed through but not read
        files.fsync_dir(root.absolute().parent)


def make_parts(root: Path) -> None:
    """The folders inside a store's folder, where they are missing."""
    for part in _PARTS:
        files.mkdir(root / part, exist_ok=True)


def replace_header(root: Path, header: Header) -> None:
    draft = root / "tmp" / f"header-{os.urandom(8).hex()}"
    files.write_new(draft, msgspec.json.format(msgspec.json.encode(header), indent=2) + b"\n")
    files.rename(draft, root / HEADER)
    files.fsync_dir(root)


def read_header(root: Path) -> Header:
    """kvdb.json of a store.

    raises  NotAStore, NewerFormat, Damaged; StoreError when a folder inside is a link: what lies elsewhere is not the store's
    """
    for part in _PARTS:
        if not files.is_folder_or_nothing(root / part):
            raise StoreError(f"{root / part}: a link or no folder, expected one of the store's own; put it back")
    try:
        data = files.read_file(root / HEADER)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR):
            raise NotAStore(f"{root}: no {HEADER}, expected a store") from e
        raise
    try:
        found = msgspec.json.decode(data)["format"]
        if isinstance(found, int) and found > FORMAT_VERSION:
            raise NewerFormat(
                f"{root}: store of format {found}, expected at most {FORMAT_VERSION}; upgrade kvdb (nothing was changed)"
            )
        return msgspec.json.decode(data, type=Header)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise Damaged(f"{root / HEADER}: {e}, expected a KVDB header") from e


def hold(root: Path, *, exclusive: bool, timeout_s: float = 0) -> int:
    """Lock the store for as long as a handle is open, shared, or to replace it, exclusive; closing the fd releases it.

    It is the folder that is locked: what is in it may be replaced. A folder that was replaced while we waited is not it.
    raises  StoreLocked when it is open elsewhere (exclusive) or being replaced (shared); NotAStore when it is gone
    """
    for _ in range(_HOLD_ATTEMPTS):
        try:
            fd = files.lock(root, timeout_s=timeout_s, create=False, shared=not exclusive)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise NotAStore(f"{root}: no {HEADER}, expected a store") from e
        if files.is_at(fd, root):
            return fd
        files.close(fd)
    raise StoreLocked(f"{root}: replaced again and again, expected it to stay; try again later")


def sweep(root: Path, catalog: Catalog) -> None:
    """Remove what dead writers left: all that is not locked in tmp/, arrays in chunks/ and manifests that no entry names.

    Publishing happens inside a write transaction, so inside this one nothing is half published. The arrays are only looked
    through when a writer died or their number is not the one the catalog has, and never by a catalog that is damaged: what
    it does not name may be all there is.
    """
    died = _sweep_workspaces(root)
    with contextlib.suppress(Damaged):
        with catalog.begin() as txn:
            expected = txn.counters().arrays + 1, txn.totals("names").count  # chunks/ has a zarr.json
        found = tuple(len(files.list_dir(root / part)) for part in ("chunks", manifests.NAMES))
        if not died and found == expected:
            return
        with catalog.begin(write=True) as txn:
            known = {array for entry in txn.segments().values() for array in entry.info.array_names()}
            for array in files.list_dir(root / "chunks"):
                if array != format.METADATA_KEY and array not in known:
                    files.remove_tree(root / "chunks" / array)
            named = {f"{s.key}.json" for s in txn.sequences() if s.name is not None}
            for name in set(files.list_dir(root / manifests.NAMES)) - named:
                files.unlink(root / manifests.NAMES / name)


def _sweep_workspaces(root: Path) -> bool:
    """Whether any was left by a dead writer."""
    died = False
    for name in files.list_dir(root / "tmp"):
        workspace = root / "tmp" / name
        try:
            if not files.is_folder_or_nothing(workspace):
                raise NotADirectoryError
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
