"""Effects on the file system: private, exclusive, typed when the disk is full."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvdb import files
from kvdb.errors import Damaged, StorageFull, StoreLocked


@pytest.fixture(params=[0o000, 0o077, 0o777], ids=lambda mask: f"umask{mask:03o}")
def any_umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("any_umask")
def test_files_and_folders_are_private_under_any_umask(tmp_path: Path) -> None:
    files.mkdir(tmp_path / "folder")
    files.write_new(tmp_path / "folder" / "file", b"x")
    assert mode_of(tmp_path / "folder") == 0o700
    assert mode_of(tmp_path / "folder" / "file") == 0o600


def test_an_existing_file_is_never_opened_for_writing(tmp_path: Path) -> None:
    files.write_new(tmp_path / "file", b"first")
    with pytest.raises(FileExistsError):
        files.write_new(tmp_path / "file", b"second")
    assert files.read_file(tmp_path / "file") == b"first"


def test_a_link_is_no_place_to_create_a_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        files.open_excl(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_may_exist_only_where_that_is_allowed(tmp_path: Path) -> None:
    files.mkdir(tmp_path / "folder")
    files.mkdir(tmp_path / "folder", exist_ok=True)
    with pytest.raises(FileExistsError):
        files.mkdir(tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        files.mkdir(tmp_path / "file", exist_ok=True)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    files.write_new(tmp_path / "file", b"eleven bytes")
    assert (tmp_path / "file").read_bytes() == b"eleven bytes"


def test_short_reads_are_continued_up_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(10)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: real(fd, min(count, 3), at))
    fd = files.open_read(tmp_path / "file")
    assert files.pread(fd, 8, 1) == bytes(range(1, 9))
    assert files.pread(fd, 80, 1) == bytes(range(1, 10))
    files.close(fd)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_storage_full_with_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFull, match=str(tmp_path / "file")):
        files.write_new(tmp_path / "file", b"x")


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output") as caught:
        files.write_new(tmp_path / "file", b"x")
    assert caught.value.errno == errno.EIO


def test_removing_a_tree_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file").touch()
    (tree / "link").symlink_to(outside)
    files.remove_tree(tree)
    files.remove_tree(tree)
    assert not tree.exists()
    assert (outside / "precious").exists()


def test_a_lock_is_held_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    fd = files.lock(tmp_path / "lock", timeout_s=0)
    with pytest.raises(StoreLocked, match="expected it to be free"):
        files.lock(tmp_path / "lock", timeout_s=0)
    files.close(fd)
    files.close(files.lock(tmp_path / "lock", timeout_s=0, create=False))
    with pytest.raises(FileNotFoundError):
        files.lock(tmp_path / "none", timeout_s=0, create=False)


def test_readers_of_a_lock_share_it_and_keep_writers_out(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    one, two = (files.lock(tmp_path / "lock", timeout_s=0, shared=True) for _ in range(2))
    with pytest.raises(StoreLocked):
        files.lock(tmp_path / "lock", timeout_s=0)
    files.close(one)
    files.close(two)
    files.close(files.lock(tmp_path / "lock", timeout_s=0))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_what_is_no_regular_file_is_damage_and_nobody_waits_for_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "link":
        (tmp_path / "precious").write_bytes(b"mine")
        path.symlink_to(tmp_path / "precious")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(Damaged, match=r"expected (a regular file|one)"):
        files.read_file(path)


def test_a_file_longer_than_it_may_be_is_not_read(tmp_path: Path) -> None:
    files.write_new(tmp_path / "file", b"12345")
    assert files.read_file(tmp_path / "file", limit=5) == b"12345"
    with pytest.raises(Damaged, match="5 bytes, expected at most 4"):
        files.read_file(tmp_path / "file", limit=4)


@pytest.mark.parametrize(("size", "at_least", "after"), [(10, 5, 8), (10, 9, 10), (6, 3, 8)])
def test_extending_adds_a_sparse_tail_where_one_is_missing_and_never_cuts(
    tmp_path: Path, size: int, at_least: int, after: int
) -> None:
    path = tmp_path / "file"
    files.write_new(path, b"8 bytes.")
    files.extend(path, size, at_least=at_least)
    assert path.stat().st_size == after
    assert path.read_bytes()[:8] == b"8 bytes."


def test_a_hole_costs_nothing_unless_it_is_reserved(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    fd = files.open_excl(path)
    files.truncate(fd, 64 << 20, path)
    files.close(fd)
    assert files.disk_bytes(path) == 0
    assert files.tree_bytes(path.parent) < 1 << 20
    assert files.tree_bytes(path.parent, reserved=True) >= 64 << 20


def test_a_copy_has_the_same_bytes_and_the_same_holes(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    with source.open("wb") as f:
        f.write(b"beginning")
        f.seek(5 << 20)
        f.write(b"middle")
        f.truncate(1 << 40)
    files.copy_file(source, copy)
    assert copy.stat().st_size == 1 << 40
    assert copy.stat().st_blocks <= source.stat().st_blocks
    with source.open("rb") as f, copy.open("rb") as g:
        assert f.read(6 << 20) == g.read(6 << 20)


@pytest.mark.parametrize("data", [b"", b"x", bytes(3 << 20) + b"y"])
def test_a_copy_is_the_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "source").write_bytes(data)
    files.copy_file(tmp_path / "source", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data


def test_a_copy_that_fails_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFull, match="copy"):
        files.copy_file(tmp_path / "source", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_second_name_never_replaces_a_first(tmp_path: Path) -> None:
    for name in ("one", "two"):
        files.write_new(tmp_path / name, name.encode())
    with pytest.raises(FileExistsError):
        files.link(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == b"two"


def test_trees_are_forced_to_disk_file_by_file_and_then_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "fsync", lambda fd, path: synced.append(path))
    expected = []
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        expected += [tmp_path / name / "file", tmp_path / name]
    files.fsync_trees([tmp_path / name for name in "abc"])
    assert sorted(synced) == sorted(expected)


def test_a_failing_fsync_of_a_tree_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(fd: int, path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        files.fsync_trees([tmp_path])


@pytest.mark.skipif(sys.platform != "linux", reason="MADV_POPULATE_READ is Linux's")
def test_starting_writeback_changes_nothing_and_tells_nothing(tmp_path: Path) -> None:
    fd = files.open_excl(tmp_path / "a")
    files.write_all(fd, b"x" * 8192, 4096, tmp_path / "a")
    files.start_writeback(fd, 4096, 8192)
    files.start_writeback(fd, 0, 1 << 40)  # past the end
    files.close(fd)
    files.start_writeback(fd, 0, 4096)  # whatever is wrong with a file, its fsync says so
    assert (tmp_path / "a").read_bytes() == bytes(4096) + b"x" * 8192


def test_pages_that_cannot_be_read_are_an_error_and_no_signal(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_new(path, bytes(8192))
    fd = files.open_read(path)
    view = files.mmap(fd, 8192)
    files.populate(view, 0, 8192)
    os.truncate(path, 4096)
    files.populate(view, 0, 4096)
    with pytest.raises(OSError, match="Bad address"):
        files.populate(view, 4096, 4096)
    view.close()
    files.close(fd)


def test_a_map_sees_later_writes_and_outlives_the_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = files.open_excl(path)
    files.truncate(fd, 4096, path)
    view = files.mmap(fd, 4096)
    files.write_all(fd, b"late", 8, path)
    files.remove_tree(path)
    assert view[8:12] == b"late"
    with pytest.raises(TypeError):
        view[0] = 1
    view.close()
    files.close(fd)
