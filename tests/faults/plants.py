"""Bugs on purpose, each of which a harness must see: a table of names and of what to patch.

They are planted through the functions every effect goes through, so they outlive changes of the engine.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvdb import KVDB, Sequence, files, folder, recode, summarise
from kvdb.segments import Segment, SegmentWriter

Patch = pytest.MonkeyPatch


def _no_file_fsync(patch: Patch) -> None:
    real = files.fsync

    def fsync(fd: int, path: Path) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            real(fd, path)

    patch.setattr(files, "fsync", fsync)


def _no_directory_fsync(patch: Patch) -> None:
    real = files.fsync

    def fsync(fd: int, path: Path) -> None:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            real(fd, path)

    patch.setattr(files, "fsync", fsync)


def _commit_before_data(patch: Patch) -> None:
    """The entry is committed, then the files are moved to where it says they are."""
    late: list[Callable[[], object]] = []
    publish, commit = SegmentWriter.publish, KVDB.commit

    def publish_later(self: SegmentWriter, chunks: Path, **options: Any) -> Segment:
        late.append(lambda: publish(self, chunks, **options))
        return Segment(self.info, chunks)

    def commit_first(self: KVDB, *arguments: Any, **options: Any) -> Any:
        committed = commit(self, *arguments, **options)
        while late:
            late.pop()()
        return committed

    patch.setattr(SegmentWriter, "publish", publish_later)
    patch.setattr(KVDB, "commit", commit_first)


def _unlink_before_commit(patch: Patch) -> None:
    """The files that only a deleted sequence uses go before its entries do."""
    delete = KVDB.delete

    def unlink_first(self: KVDB, name_or_key: str) -> int:
        gone = self.sequence(name_or_key)
        used = {span.segment for s in self.sequences() if s.key != gone.key for span in s.spans}
        for segment in self.segments(gone.spans):
            if segment.info.segment not in used:
                for array in segment.info.array_names():
                    files.remove_tree(self.path / "chunks" / array)
        return delete(self, name_or_key)

    patch.setattr(KVDB, "delete", unlink_first)


def _abstracts_by_segment(patch: Patch) -> None:
    """The segments of a sequence get other abstracts one after the other, each in a transaction of its own."""
    real = summarise._settle

    def settle(db: KVDB, segments: list[str], wanted: tuple[str, ...]) -> int:
        return sum(real(db, [segment], wanted) for segment in segments)

    patch.setattr(summarise, "_settle", settle)


def _recoded_in_place(patch: Patch) -> None:
    """The files that only a recoded sequence used go before it leads to the new ones."""
    lead = recode._lead

    def unlink_first(db: KVDB, sequence: Sequence, last: Segment, temporary: str | None) -> None:
        used = {span.segment for s in db.sequences() if s.key != sequence.key for span in s.spans}
        for segment in db.segments(sequence.spans):
            if segment.info.segment not in used:
                db.space.dispose(segment.info.array_names())
        lead(db, sequence, last, temporary)

    patch.setattr(recode, "_lead", unlink_first)


def _retried_fsync(patch: Patch) -> None:
    """The second fsync after a failed one says yes: the kernel has dropped the pages and forgotten the error."""
    real = files.fsync

    def fsync(fd: int, path: Path) -> None:
        try:
            real(fd, path)
        except OSError:
            real(fd, path)

    patch.setattr(files, "fsync", fsync)


def _lock_skipped(patch: Patch) -> None:
    patch.setattr("fcntl.flock", lambda fd, operation: None)


def _no_sweep(patch: Patch) -> None:
    patch.setattr(folder, "sweep", lambda *_, **__: None)


def _rename_error_ignored(patch: Patch) -> None:
    real = files.rename

    def rename(source: Path, target: Path) -> None:
        with contextlib.suppress(OSError):
            real(source, target)

    patch.setattr(files, "rename", rename)


PLANTS: Final[dict[str, Callable[[Patch], None]]] = {
    "no file fsync": _no_file_fsync,
    "no directory fsync": _no_directory_fsync,
    "commit before data": _commit_before_data,
    "unlink before commit": _unlink_before_commit,
    "abstracts by segment": _abstracts_by_segment,
    "recoded in place": _recoded_in_place,
    "retried fsync": _retried_fsync,
    "lock skipped": _lock_skipped,
    "no sweep": _no_sweep,
    "rename error ignored": _rename_error_ignored,
}


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            PLANTS[name](patch)
        yield
