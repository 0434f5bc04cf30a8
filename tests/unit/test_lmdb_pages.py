"""The walk over LMDB's pages: whatever LMDB writes passes, and what LMDB could not bear does not."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import lmdb
import pytest

from kvdb.errors import Damaged
from kvdb.lmdb_pages import META_BYTES, check_pages, transaction_id, used_bytes

PAGE = 4096


def walk(data: bytes) -> None:
    meta = max((data[at : at + META_BYTES] for at in (0, PAGE)), key=transaction_id)
    check_pages(data[: used_bytes(meta, PAGE)], PAGE, meta, "catalog")


def write(env: lmdb.Environment, rng: random.Random) -> None:
    """Some transactions like the catalog's, and wilder: keys and values of all lengths, many duplicates, deletions."""
    plain, dups = env.open_db(b"plain"), env.open_db(b"tree", dupsort=True)
    for _ in range(rng.randrange(1, 6)):
        with env.begin(write=True) as txn:
            for _ in range(rng.choice([1, 10, 200])):
                key = rng.randbytes(rng.choice([1, 8, 16, 16, 16, 33, 511]))
                txn.put(key, rng.randbytes(rng.choice([0, 1, 8, 50, 300, 2_000, 2_100, 5_000, 70_000])), db=plain)
                node = bytes([rng.randrange(4)]) * 16
                txn.put(node, rng.randbytes(rng.choice([16, 281, 281, 500])), db=dups)
            for db in (plain, dups):
                for key, value in list(txn.cursor(db=db)):
                    if rng.random() < rng.choice([0.05, 0.6]):
                        txn.delete(key, value, db=db)


@pytest.fixture
def env(tmp_path: Path) -> Iterator[lmdb.Environment]:
    with lmdb.open(str(tmp_path / "db"), map_size=256 << 20, max_dbs=2, sync=False) as env:
        yield env


def contents(env: lmdb.Environment) -> bytes:
    return (Path(env.path()) / "data.mdb").read_bytes()


def test_an_empty_file_passes(env: lmdb.Environment) -> None:
    walk(contents(env))


@pytest.mark.parametrize("seed", range(10))
def test_whatever_lmdb_writes_passes(env: lmdb.Environment, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        write(env, rng)
        walk(contents(env))


def pages_of(data: bytes, flags: int) -> list[int]:
    """Places of pages with these flags; some may be free already."""
    return [
        at for at in range(2 * PAGE, len(data) - PAGE + 1, PAGE) if struct.unpack_from("<H", data, at + 10)[0] == flags
    ]


FIELDS = {
    "another page's number": (1, 0, "<Q", 7),
    "a leaf's flags on a branch page": (1, 10, "<H", 2),
    "no node on a branch page": (1, 12, "<H", 16),
    "one node on a branch page": (1, 12, "<H", 18),
    "nodes beyond the page": (2, 12, "<H", 5_000),
    "an odd number of bytes of places": (2, 12, "<H", 17),
    "free room beyond the page": (2, 14, "<H", 5_000),
    "a node in the page's header": (2, 16, "<H", 4),
    "a node beyond the page": (2, 16, "<H", 4_094),
    "two nodes at one place": (2, 16, "<I", 0x0FA0_0FA0),
    "an overflow run without end": (4, 12, "<I", 0xFFFF_FFFF),
    "an overflow run of no page": (4, 12, "<I", 0),
}


@pytest.mark.parametrize("what", sorted(FIELDS))
def test_what_lmdb_could_not_bear_is_damage(env: lmdb.Environment, what: str) -> None:
    write(env, random.Random(3))
    good = contents(env)
    flags, offset, form, value = FIELDS[what]
    data = bytearray(good)
    for at in pages_of(good, flags):
        struct.pack_into(form, data, at + offset, value)
    assert bytes(data) != good
    with pytest.raises(Damaged, match="run 'kvdb repair --rebuild'"):
        walk(bytes(data))


@pytest.mark.parametrize("field", ["depth", "root", "entries", "flags"])
@pytest.mark.parametrize("record", [40, 88])
def test_a_record_of_a_tree_that_is_not_so_is_damage(env: lmdb.Environment, record: int, field: str) -> None:
    write(env, random.Random(3))
    data = bytearray(contents(env))
    offset, value = {"flags": (4, 0x44), "depth": (6, 9), "entries": (32, 10**6), "root": (40, 10**9)}[field]
    for meta in (0, PAGE):
        struct.pack_into("<H" if offset < 8 else "<Q", data, meta + record + offset, value)
    with pytest.raises(Damaged):
        walk(bytes(data))


def test_two_trees_that_share_a_page_are_damage(env: lmdb.Environment) -> None:
    write(env, random.Random(3))
    data = bytearray(contents(env))
    for meta in (0, PAGE):
        data[meta + 40 + 40 : meta + 48 + 40] = data[meta + 88 + 40 : meta + 96 + 40]
    with pytest.raises(Damaged):
        walk(bytes(data))


def test_a_free_page_that_is_in_use_is_damage(env: lmdb.Environment) -> None:
    table = env.open_db(b"plain")
    for key in (b"a", b"b", b"c"):
        with env.begin(write=True) as txn:
            txn.put(key, key, db=table)
    data = bytearray(contents(env))
    meta = max((0, PAGE), key=lambda at: transaction_id(data[at : at + META_BYTES]))
    free, main = (struct.unpack_from("<Q", data, meta + at)[0] for at in (80, 128))
    page = free * PAGE
    count = struct.unpack_from("<H", data, page + 12)[0] - 16 >> 1
    for i in range(count):  # lists of free pages: key of 8 bytes, then a count and the pages
        node = page + struct.unpack_from("<H", data, page + 16 + 2 * i)[0]
        struct.pack_into("<QQ", data, node + 8 + 8, 1, main)
    with pytest.raises(Damaged, match="used twice"):
        walk(bytes(data))
