"""A disk in memory beside the real one: it sees every effect a life has and can show what a crash may leave of them.

The model, after any beginning of the journal and a loss of power:
- fsync of a file makes its writes so far durable; of a folder, its entries so far. Neither does the other's work.
- A write that is not durable may be there, not, or in parts, cut at sectors of 512 B or pages of 4 KiB; writes come in any order.
- Entries of one folder come in order: what is there of them is a beginning. A rename between folders is one step in both.
- After a failed fsync what it should have written may be lost for good, whatever a second fsync says.
- A committed LMDB transaction is one durable write of data.mdb. (That LMDB keeps to that is for the power cuts.)
A killed process loses nothing it wrote: then only its last write may be cut.

The same wrapping makes the Nth effect fail, or cuts writes short.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from faults import plants
from faults.workload import LIFE, Life, Step, Violation, judge, repeatable

EFFECTS: Final = (
    "open", "write", "pwrite", "pwritev", "ftruncate", "truncate", "fsync", "fdatasync", "rename", "replace", "mkdir", "unlink",
    "remove", "rmdir", "link",
)  # fmt: skip
"""What the engine may call in `os` to change a file system. A journal that misses one does not replay to the real store."""
CATALOG: Final = "s/catalog/data.mdb"
META_BYTES: Final = 2 * 4096
"""Every commit of LMDB changes one of its first two pages."""


@dataclass
class Write:
    """Bytes at an offset, or, without bytes, a new size."""

    offset: int
    data: bytes | None
    durable: bool = False
    lost: bool = False  # by an fsync that failed: no later one brings it back

    @property
    def size(self) -> int:
        return len(self.data or b"")


Kept = Callable[[Write], list[tuple[int, int]]]
"""Which parts of a write are there, each (start, stop); a new size is all or nothing."""


@dataclass(eq=False)
class File:
    writes: list[Write] = field(default_factory=list)

    def content(self, kept: Kept) -> bytes:
        content = bytearray()
        for write in self.writes:
            for start, stop in kept(write):
                end = write.offset if write.data is None else write.offset + stop
                content.extend(bytes(max(0, end - len(content))))
                if write.data is None:
                    del content[end:]
                else:
                    content[write.offset + start : end] = write.data[start:stop]
        return bytes(content)


@dataclass(eq=False)
class Folder:
    entries: dict[str, File | Folder] = field(default_factory=dict)


@dataclass
class Change:
    """Entries of one or two folders that change in one step; None takes an entry away."""

    entries: tuple[tuple[Folder, str, File | Folder | None], ...]
    durable: bool = False

    def touches(self, folders: list[Folder]) -> bool:
        return any(folder is other for folder, _, _ in self.entries for other in folders)

    def apply(self, where: Callable[[File | Folder | None], Any]) -> None:
        for folder, name, node in self.entries:
            if node is None:
                where(folder).entries.pop(name)
            else:
                where(folder).entries[name] = where(node)


class Disk:
    """What the system believes is in a folder, and what of it is durable. An event of a journal is a method and its arguments."""

    def __init__(self) -> None:
        self.root = Folder()
        self._opened: dict[int, File | Folder] = {}
        self._changes: list[Change] = []
        self._last: Write | None = None

    def play(self, event: tuple[Any, ...]) -> None:
        self._last = None
        getattr(self, event[0])(*event[1:])

    def at(self, path: str) -> File | Folder | None:
        node: File | Folder | None = self.root
        for part in Path(path).parts:
            node = node.entries.get(part) if isinstance(node, Folder) else None
        return node

    # -- events

    def open(self, handle: int, path: str) -> None:
        node = self.at(path)
        if node is None:
            node = File()
            self._change((path, node))
        self._opened[handle] = node

    def mkdir(self, path: str) -> None:
        self._change((path, Folder()))

    def remove(self, path: str) -> None:
        if self.at(path) is not None:  # LMDB makes files of its own, without an event
            self._change((path, None))

    def rename(self, source: str, target: str) -> None:
        self._change((source, None), (target, self.at(source)))

    def link(self, source: str, target: str) -> None:
        self._change((target, self.at(source)))

    def _change(self, *entries: tuple[str, File | Folder | None]) -> None:
        steps = []
        for path, node in entries:
            folder = self.at(os.path.dirname(path))
            assert isinstance(folder, Folder), path
            steps.append((folder, os.path.basename(path), node))
        self._changes.append(Change(tuple(steps)))
        self._changes[-1].apply(lambda node: node)

    def write(self, handle: int, offset: int, data: bytes | None) -> None:
        file = self._opened[handle]
        assert isinstance(file, File)
        self._last = Write(offset, data)
        file.writes.append(self._last)

    def commit(self, data: bytes) -> None:
        if self.at(CATALOG) is None:
            self._change((CATALOG, File()))
        file = self.at(CATALOG)
        assert isinstance(file, File)
        file.writes = [Write(0, data, durable=True)]

    def sync(self, handle: int) -> None:
        node = self._opened[handle]
        if isinstance(node, File):
            for write in node.writes:
                write.durable = not write.lost
            return
        reached = [node]
        for change in reversed(self._changes):
            if change.touches(reached):
                change.durable = True
                reached += [folder for folder, _, _ in change.entries]

    def fail_to_sync(self, handle: int) -> None:
        node = self._opened[handle]
        for write in node.writes if isinstance(node, File) else ():
            write.lost = not write.durable

    # -- crashes

    def kill(self, target: Path, rng: random.Random) -> None:
        """Write what a killed process leaves into the new folder `target`: everything, but its last write may be cut."""

        def kept(write: Write) -> list[tuple[int, int]]:
            return [(0, rng.randint(0, write.size) if write is self._last else write.size)]

        _pour(self.root, target, kept, {})

    def cut_power(self, target: Path, rng: random.Random) -> None:
        """Write one of the states that a loss of power may leave into the new folder `target`."""
        unit = rng.choice([512, 4096])
        copies: dict[int, Folder] = {}
        unlucky: dict[int, float] = {}
        stopped: list[Folder] = []

        def copy(node: File | Folder | None) -> Any:
            return copies.setdefault(id(node), Folder()) if isinstance(node, Folder) else node

        for change in self._changes:
            folders = [folder for folder, _, _ in change.entries]
            risk = max(unlucky.setdefault(id(folder), rng.choice([0, 0.3, 1])) for folder in folders)
            if not change.durable and (change.touches(stopped) or rng.random() < risk):
                stopped += folders
            else:
                change.apply(copy)

        def kept(write: Write) -> list[tuple[int, int]]:
            fate = "whole" if write.durable else rng.choice(["whole", "none", "torn"])
            if fate != "torn" or write.data is None:
                return [(0, write.size)] if fate == "whole" else []
            edges = [0, *range(unit - write.offset % unit, write.size, unit), write.size]
            return [part for part in itertools.pairwise(edges) if rng.random() < 0.5]

        _pour(copy(self.root), target, kept, {})


def _pour(folder: Folder, target: Path, kept: Kept, poured: dict[int, bytes]) -> None:
    target.mkdir()
    for name, node in folder.entries.items():
        if isinstance(node, Folder):
            _pour(node, target / name, kept, poured)
        else:
            (target / name).write_bytes(poured.setdefault(id(node), node.content(kept)))


@dataclass
class Fault:
    """The `at`th effect, from 0, says `number`, an errno; so do all later ones if `lasting`."""

    at: int
    number: int
    lasting: bool = False

    def hits(self, effect: int) -> bool:
        return effect == self.at or (self.lasting and effect > self.at)


class Vfs:
    """Wraps `os` while `active`: journals what is done in the folder `root`, to a store root/s, and lets it fail."""

    def __init__(self, root: Path, *, fault: Fault | None = None, short_writes: bool = False) -> None:
        self.root, self.fault, self.short_writes = root, fault, short_writes
        self.journal: list[tuple[Any, ...]] = []
        self.acks: list[tuple[int, str]] = []
        """Each with how long the journal was."""
        self.effects: list[str] = []
        self.failed: list[tuple[int, str]] = []
        """The effects that failed, as the acks."""
        self._disk = Disk()
        self._handles: dict[int, int] = {}  # of open descriptors
        self._meta = b""

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in EFFECTS:
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield
        self._notice_commit()

    def acknowledge(self, line: str) -> None:
        self._notice_commit()
        self.acks.append((len(self.journal), line))

    def crash(self, length: int, target: Path, rng: random.Random, *, power: bool) -> list[str]:
        """Into the new folder `target`, what a crash after `length` events may leave; returns the acks so far."""
        disk = Disk()
        for event in self.journal[:length]:
            disk.play(event)
        (disk.cut_power if power else disk.kill)(target, rng)
        return [line for when, line in self.acks if when <= length]

    # -- what happens

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def effect(*arguments: Any, **options: Any) -> Any:
            self._notice_commit()
            if not self._is_ours(arguments[0]):
                return real(*arguments, **options)
            self.effects.append(name)
            if self.fault is not None and self.fault.hits(len(self.effects) - 1):
                self.failed.append((len(self.journal), name))
                if name in ("fsync", "fdatasync"):
                    self._happens("fail_to_sync", self._handles[arguments[0]])
                where = () if isinstance(arguments[0], int) else (str(arguments[0]),)
                raise OSError(self.fault.number, os.strerror(self.fault.number), *where)
            if self.short_writes and name == "pwrite":
                arguments = (arguments[0], memoryview(arguments[1])[: -(-len(arguments[1]) // 2)], arguments[2])
            result = real(*arguments, **options)
            self._note(name, arguments, result)
            return result

        return effect

    def _happens(self, *event: Any) -> None:
        self.journal.append(event)
        self._disk.play(event)

    def _note(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        match name, arguments:
            case "open", (path, flags, *_):
                if flags & os.O_CREAT or self._disk.at(self._relative(path)) is not None:
                    self._handles[result] = len(self.journal)
                    self._happens("open", len(self.journal), self._relative(path))
            case "pwrite", (fd, data, offset):
                self._happens("write", self._handles[fd], offset, bytes(memoryview(data).cast("B")[:result]))
            case "ftruncate", (fd, size):
                self._happens("write", self._handles[fd], size, None)
            case (("fsync" | "fdatasync"), (fd,)):
                self._happens("sync", self._handles[fd])
            case (("rename" | "replace"), (source, target)):
                self._happens("rename", self._relative(source), self._relative(target))
            case "link", (source, target):
                self._happens("link", self._relative(source), self._relative(target))
            case "mkdir", (path, *_):
                self._happens("mkdir", self._relative(path))
            case (("unlink" | "remove" | "rmdir"), (path,)):
                self._happens("remove", self._relative(path))
            case "truncate", (path, _) if self._relative(path) == CATALOG:
                pass  # part of the next commit
            case _:
                raise NotImplementedError(f"os.{name}: the engine has not used it so far; say here what it does")

    def _notice_commit(self) -> None:
        try:
            with open(self.root / CATALOG, "rb") as file:
                meta = file.read(META_BYTES)
                if len(meta) == META_BYTES and meta != self._meta:
                    self._meta = meta
                    self._happens("commit", meta + file.read())
        except FileNotFoundError:
            pass

    def _is_ours(self, at: Any) -> bool:
        return at in self._handles if isinstance(at, int) else not self._relative(at).startswith("..")

    def _relative(self, path: Any) -> str:
        return os.path.relpath(path, self.root)


def lived(root: Path, script: tuple[Step, ...] = LIFE, *, plant: str | None = None, **options: Any) -> Vfs:
    """A life under a Vfs, in the new folder `root`; it looks at its store in the end unless a fault lasts."""
    root.mkdir()
    vfs = Vfs(root, **options)
    with plants.planted(plant), repeatable():
        life = Life(root / "s", vfs.acknowledge)
        with vfs.active():
            life.live(script)
        if vfs.fault is None or not vfs.fault.lasting:
            life.look(script)
    return vfs


def crashed(
    vfs: Vfs, target: Path, rng: random.Random, script: tuple[Step, ...] = LIFE, *, since: int = 0
) -> Violation | None:
    """What is wrong with one store that a crash at a random moment (after `since` events) may leave of a life."""
    length, power = rng.randint(since, len(vfs.journal)), rng.random() < 0.8
    acks = vfs.crash(length, target, rng, power=power)
    try:
        judge(target / "s", acks, script)
    except Violation as violation:
        return violation
    return None
