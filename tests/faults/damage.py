"""Stores damaged by a seed, and a judge who knows what was in them.

A trial copies a store, damages one file (or takes one thing away), and asks in a forked child: does every read through
every reader give the right bytes, a typed error, or a miss; do sequences that have nothing to do with the damage read whole;
does the error name the place; does `check` find whatever made a read fail; is nothing left to find after `repair`?
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import lmdb
import numpy as np
import pytest
from faults.forked import in_child
from helpers import extend, identity, model_kv, read_kv, takes_direct, token_list, tree_bytes

from kvdb import EXACT, KVDB, Geometry, LayerGroup, Span, files
from kvdb.environment import TABLES
from kvdb.errors import KVDBError, NewerFormat, OlderFormat
from kvdb.format import SHARD_KEY, ShardLayout, kv_array
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.repair import repair
from kvdb.segments import Segment, layout

PAGE: Final = 4096
VERIFY = "first"
GEOMETRY: Final = Geometry(
    dtype="float16",
    chunk_tokens=16,
    groups=(LayerGroup(layers=(0, 2), kv_heads=2, head_dim=8), LayerGroup(layers=(1,), kv_heads=1, head_dim=4)),
)
_LONG = token_list(700, 1)
SEQUENCES: Final = {
    "long": _LONG,  # its token ids need overflow pages
    "parts": np.concatenate((_LONG[:96], token_list(120, 2))),
    "branch": np.concatenate((_LONG[:96], token_list(50, 3))),
    **{f"short {i}": token_list(20 + i, 10 + i) for i in range(10)},  # a key with more duplicates than fit into a leaf
}
EXPECTED: Final = {name: model_kv(GEOMETRY, tokens, 0, len(tokens), salt=EXACT) for name, tokens in SEQUENCES.items()}


class Base(NamedTuple):
    """A store, where its sequences lie, and where what lies in its shards."""

    root: Path
    spans: dict[str, tuple[Span, ...]]
    shards: dict[str, ShardLayout]


def build(root: Path) -> Base:
    with KVDB.open(root, min_free=0) as db:
        for name, tokens in SEQUENCES.items():
            extend(db, tokens, name=name, geometry=GEOMETRY, segment_tokens=128 if name == "parts" else 1 << 30)
        spans = {name: db.sequence(name).spans for name in SEQUENCES}
        shards = {
            name: layout(segment.info, int(name[-1]))
            for segment in db.segments(tuple({span.segment: span for s in spans.values() for span in s}.values()))
            for name in segment.info.array_names()
            if ".kv" in name
        }
    return Base(root, spans, shards)


# -- damage


class Damage(NamedTuple):
    """What was done to which file; `row` says which record's bytes were changed, if a record's were."""

    what: str
    path: str
    row: tuple[str, int, int] | None = None  # segment, layer row, offset

    @property
    def segment(self) -> str | None:
        found = re.match(r"chunks/([0-9a-f]{32})\.", self.path)
        return found[1] if found else None


def _ranges(base: Base, path: str, rng: random.Random) -> dict[str, tuple[int, int]]:
    """Named byte ranges of a file that damage is aimed at."""
    size = (base.root / path).stat().st_size
    if path.endswith("c.0.0.0.0.0") and ".kv" in path:
        at = base.shards[path.split("/")[1]]
        return {
            "payload": (0, at.payload_bytes),
            "digests": (at.digests_offset, at.tokens_offset),
            "tokens": (at.tokens_offset, at.index_offset),
            "index": (at.index_offset, at.file_bytes),
        }
    if path.endswith("data.mdb"):
        data = (base.root / path).read_bytes()
        last = max(struct.unpack_from("<Q", data, 136 + meta * PAGE)[0] for meta in (0, 1))
        page = rng.randrange(last + 1) * PAGE
        return {"meta": (0, 2 * PAGE), "pages": (2 * PAGE, (last + 1) * PAGE), "page": (page, page + PAGE)}
    return {"file": (0, size)}


def _change(data: bytearray, start: int, stop: int, rng: random.Random) -> str:
    """Damage bytes of [start, stop) in place and say how."""
    at = rng.randrange(start, stop)
    until = min(stop, at + rng.choice((1, 8, 64, 512, 4096)))
    how = rng.choice(("flip", "flip", "flip", "few flips", "zeros", "noise", "swap", "header"))
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "few flips":
        for _ in range(rng.randrange(2, 9)):
            data[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        data[at:until] = bytes(until - at)
    elif how == "noise":
        data[at:until] = rng.randbytes(until - at)
    elif how == "swap":
        other = rng.randrange(start, stop)
        n = min(until - at, stop - other, abs(other - at))
        data[at : at + n], data[other : other + n] = data[other : other + n], data[at : at + n]
    else:  # of an LMDB page or node, or of whatever is there
        where = at // PAGE * PAGE + rng.randrange(32)
        if start <= where < stop:
            data[where] ^= 1 << rng.randrange(8)
    return how


def harm(base: Base, root: Path, rng: random.Random) -> Damage:
    """Damage one file of the copy at `root`: bytes, length, existence, or another file in its place."""
    kind = rng.choice(("shard", "shard", "data", "data", "metadata", "abstract", "manifest", "kvdb.json", "lock.mdb"))
    paths = {
        "shard": [f"chunks/{array}/c.0.0.0.0.0" for array in base.shards],
        "metadata": ["chunks/zarr.json"] + [str(p.relative_to(root)) for p in root.glob("chunks/*/zarr.json")],
        "abstract": [str(p.relative_to(root)) for p in root.glob("chunks/*.box*/c.*")],
        "manifest": [str(p.relative_to(root)) for p in root.glob("names/*")],
        "data": ["catalog/data.mdb"],
        "lock.mdb": ["catalog/lock.mdb"],
        "kvdb.json": ["kvdb.json"],
    }[kind]
    path = rng.choice(sorted(paths))
    target = root / path
    data = bytearray(target.read_bytes())
    how = rng.choices(("bytes", "cut", "longer", "gone", "replaced"), (16, 2, 1, 1, 1))[0]
    row = None
    if how == "bytes":
        where, (start, stop) = rng.choice(
            [item for item in _ranges(base, path, rng).items() if item[1][0] < item[1][1]]
        )
        before = bytes(data)
        how = f"{_change(data, start, stop, rng)} in {where}"
        if where == "payload" and data != before:
            offset = next(i for i, (a, b) in enumerate(zip(before, data, strict=True)) if a != b)
            row = (path.split("/")[1], offset, len(data))
    elif how == "cut":
        del data[rng.choice((0, rng.randrange(len(data) + 1), len(data) - 1)) :]
    elif how == "longer":
        data += rng.randbytes(rng.choice((1, PAGE)))
    elif how == "replaced":
        data[:] = (root / rng.choice(sorted(paths))).read_bytes()
    target.unlink()  # the copy shares its files with the base: none is changed in place
    if how != "gone":
        target.write_bytes(data)
    return Damage(f"{how}: {path}", path, row)


def cut(base: Base, root: Path, rng: random.Random) -> Damage:
    """Cut a shard anywhere, most often inside its payload."""
    path = f"chunks/{rng.choice(sorted(base.shards))}/c.0.0.0.0.0"
    data = (root / path).read_bytes()
    (root / path).unlink()
    (root / path).write_bytes(data[: rng.randrange(len(data))])
    return Damage(f"cut: {path}", path)


def take_away(base: Base, root: Path, rng: random.Random) -> Damage:
    """Delete a shard, a whole array, a chunk (its slot becomes a hole), or an entry of the catalog."""
    what = rng.choice(("shard", "array", "chunk", "entry"))
    array = rng.choice(sorted(base.shards))
    path = f"chunks/{array}/c.0.0.0.0.0"
    if what == "shard":
        (root / path).unlink()
    elif what == "array":
        shutil.rmtree(root / "chunks" / array)
    elif what == "chunk":
        heads = GEOMETRY.groups[int(array[-1])].kv_heads
        slot = heads * GEOMETRY.record_bytes(int(array[-1]))
        data = bytearray((root / path).read_bytes())
        at = rng.randrange(base.shards[array].payload_bytes // slot) * slot
        data[at : at + slot] = bytes(slot)
        (root / path).unlink()
        (root / path).write_bytes(data)
        return Damage(f"hole at {at}: {path}", path)
    else:
        return _take_entry(root, rng)
    return Damage(f"{what} gone: {path}", path)


def _take_entry(root: Path, rng: random.Random) -> Damage:
    env = lmdb.open(str(root / "catalog"), max_dbs=len(TABLES))
    try:
        with env.begin(write=True) as txn:
            tables = {}
            for table in TABLES:
                db = env.open_db(table.encode(), txn, dupsort=table == "tree")
                if txn.stat(db)["entries"]:
                    tables[table] = db
            table = rng.choice(sorted(tables))
            entries = list(txn.cursor(db=tables[table]))
            key, value = rng.choice(entries)
            txn.delete(key, value if table == "tree" else b"", db=tables[table])
    finally:
        env.close()
    return Damage(f"entry gone: {table} {key.hex()}", "catalog/data.mdb")


HARMS: Final = {"harm": harm, "cut": cut, "take away": take_away}


# -- the judge


class Wrong(Exception):
    """Something was read, without an error, that is not what was written."""


def _expect(right: bool, what: object) -> None:
    if not right:
        raise Wrong(what)


class Judge:
    """Looks at one damaged store; `violations` says what must not be, `outcome` what came of the reads."""

    def __init__(self, base: Base, root: Path, damage: Damage) -> None:
        self.base, self.root, self.damage = base, root, damage
        self.violations: list[str] = []
        self.outcome: Counter[str] = Counter()

    def look(self) -> dict[str, Any]:
        for mode in self._modes():
            self._read_all(mode)
        problems = self._check()
        if (self.outcome["error"] or self.outcome["miss"]) and not problems:
            self.violations.append("unseen: a read failed, and check() finds nothing")
        return {"violations": self.violations, "outcome": dict(self.outcome), "problems": problems}

    def mend(self) -> list[str]:
        """Repair, then what is still wrong. Repaired stores serve right bytes or a miss, and no errors."""
        try:
            report = repair(self.root, apply=True)
        except (NewerFormat, OlderFormat):
            return [] if self.damage.path == "kvdb.json" else ["unrepaired: another format"]
        if report.remaining or (problems := self._check()):
            return [f"unrepaired: {[str(p) for p in report.remaining or []] or problems}"]
        self.outcome.clear()
        for mode in self._modes():
            self._read_all(mode, whole=True)
        return self.violations + (["unrepaired: reads still fail"] if self.outcome["error"] else [])

    def _modes(self) -> list[str]:
        """All ways to read that the file system of this store has: in memory there is no direct one (its own tests say so)."""
        direct = takes_direct(self.root.parent)
        return [mode for mode in READERS if direct or mode != "direct"]

    def _check(self) -> list[str]:
        try:
            with KVDB.open(self.root, "r") as db:
                return [str(problem) for problem in db.check()]
        except KVDBError as e:
            return [str(e)]

    def _read_all(self, mode: str, *, whole: bool = False) -> None:
        try:
            db = KVDB.open(self.root, "r", read_mode=mode, verify=VERIFY)
        except KVDBError as e:
            self._failed(e, None)
            return
        with db:
            self._attempt(None, self._list, db)
            for name in SEQUENCES:
                if not whole:
                    self._attempt(name, self._named, db, name)
                self._attempt(name, self._matched, db, name)

    def _attempt(self, name: str | None, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
            self.outcome["correct"] += 1
        except KVDBError as e:
            self._failed(e, name)
        except Wrong as e:
            self.violations.append(f"wrong: {name}: {e}")

    def _failed(self, error: KVDBError, name: str | None) -> None:
        self.outcome["error"] += 1
        segment = self.damage.segment
        if name is not None and segment not in {span.segment for span in self.base.spans[name]}:
            if segment is not None or not self.damage.path.startswith("catalog"):
                self.violations.append(f"spread: {name} has nothing to do with it, but {error}")
        elif name is not None and self.damage.row is not None:
            array, offset, _ = self.damage.row
            wanted = (
                f"segment {segment}",
                "layer ",
                "chunk ",
                f"{array}/c.0.0.0.0.0",
                "offset ",
                "xxh3 is 0x",
                "expected 0x",
            )
            if not all(part in str(error) for part in wanted):
                self.violations.append(f"unnamed: offset {offset}, but {error}")

    def _list(self, db: KVDB) -> None:
        for sequence in db.sequences():
            _expect(sequence.name in SEQUENCES or sequence.name is None, sequence)
            _expect(sequence.name is None or sequence.tokens == len(SEQUENCES[sequence.name]), sequence)

    def _named(self, db: KVDB, name: str) -> None:
        self._read(db, name, db.sequence(name).spans)

    def _matched(self, db: KVDB, name: str) -> None:
        match = db.match(identity(), SEQUENCES[name])
        if match.tokens < len(SEQUENCES[name]):
            self.outcome["miss"] += 1
        if match.spans != self.base.spans[name]:  # else just read by name
            self._read(db, name, match.spans)

    def _read(self, db: KVDB, name: str, spans: tuple[Span, ...]) -> None:
        tokens, expected, position = SEQUENCES[name], EXPECTED[name], 0
        _expect(np.array_equal(db.tokens(spans), tokens[: sum(s.stop - s.start for s in spans)]), "token ids")
        with contextlib.closing(db.reader()) as reader:
            for segment, span in zip(db.segments(spans), spans, strict=True):
                _expect((segment.info.start, span.start) == (position, 0), span)
                for layer in GEOMETRY.layers:
                    wanted = [plane[:, position : position + span.stop] for plane in expected[layer]]
                    where = f"segment {segment.info.segment}, layer {layer}"
                    for found, right in zip(read_kv(reader, segment, layer, span.stop), wanted, strict=True):
                        _expect(np.array_equal(found, right), where)
                    self._bounds(reader, segment, layer, wanted[0])
                position += span.stop

    def _bounds(self, reader: Reader, segment: Segment, layer: int, keys: Any) -> None:
        found = reader.abstract(segment, "box", layer)
        chunks = keys.shape[1] // GEOMETRY.chunk_tokens  # whole ones: another branch may fill the last
        by_chunk = keys[:, : chunks * GEOMETRY.chunk_tokens].reshape(len(keys), chunks, GEOMETRY.chunk_tokens, -1)
        _expect(np.array_equal(found[:chunks, :, 0], by_chunk.min(2).swapaxes(0, 1)), "abstract")
        _expect(np.array_equal(found[:chunks, :, 1], by_chunk.max(2).swapaxes(0, 1)), "abstract")


# -- planted bugs


def _no_digest_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kvdb.reader.Reader._check", lambda *_: None)


def _no_size_check(patch: pytest.MonkeyPatch) -> None:
    """Shards of any size are opened, and digests, which would miss their seal, are not read."""

    def open_unchecked(segment: Segment, group: int, *_: Any) -> tuple[Path, int]:
        path = segment.folder / kv_array(segment.info.segment, group) / SHARD_KEY
        return path, files.open_read(path)

    patch.setattr("kvdb.reader._open_checked", open_unchecked)
    patch.setattr("faults.damage.VERIFY", "never")


def _no_page_walk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("kvdb.environment.check_pages", lambda *_: None)


def _no_first_touch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "populate", lambda *_: None)


PLANTS: Final = {
    "no first touch": _no_first_touch,
    "no digest check": _no_digest_check,
    "no size check": _no_size_check,
    "no page walk": _no_page_walk,
}


# -- trials, in a process that is cheap to fork


def main(folder: str, first: int, stop: int, step: int, damage: str, plant: str) -> None:
    """One line of JSON per trial: the seed, what was done, the child's end."""
    base = build(Path(folder) / "base")
    before = tree_bytes(base.root)
    root = Path(folder) / "copy"
    with pytest.MonkeyPatch.context() as patch:
        if plant:
            PLANTS[plant](patch)
        for seed in range(first, stop, step):
            _copy(base.root, root)
            done = HARMS[damage](base, root, random.Random(seed))
            ended = in_child(functools.partial(_trial, base, root, done, plant))
            sys.stdout.write(json.dumps([seed, done.what, ended]) + "\n")
            sys.stdout.flush()
            shutil.rmtree(root)
    assert tree_bytes(base.root) == before, "a trial changed the store it was copied from"


def _copy(source: Path, target: Path) -> None:
    """The catalog is copied; all other files get a second name, since the engine never changes one in place."""

    def place(a: str, b: str) -> None:
        shutil.copyfile(a, b) if "/catalog/" in a else os.link(a, b)

    shutil.copytree(source, target, copy_function=place)


def _trial(base: Base, root: Path, damage: Damage, plant: str) -> dict[str, Any]:
    judge = Judge(base, root, damage)
    found = judge.look()
    if not plant and found["problems"]:
        found["violations"] = found["violations"] + judge.mend()
    return found


# -- damage while a store is open, or to the pages of its catalog


def cut_after_opening(root: Path, mode: str) -> str:
    """Cut a shard that a reader has open, then read it for the first time; returns what was said."""
    with KVDB.open(root, "r", read_mode=mode) as db, contextlib.closing(db.reader()) as reader:
        (segment,) = db.segments(db.sequence("short 0").spans)
        reader.open(segment)
        path = segment.folder / kv_array(segment.info.segment, 0) / SHARD_KEY
        os.truncate(path, 0)
        try:
            read_kv(reader, segment, 0, segment.info.tokens)
        except KVDBError as e:
            return str(e)
    return "nothing"


def break_branches(root: Path) -> None:
    """Every branch page of the catalog says that it has one node: LMDB ends the process when it meets one."""
    data = bytearray((root / "catalog" / "data.mdb").read_bytes())
    for page in range(2 * PAGE, len(data), PAGE):
        if struct.unpack_from("<H", data, page + 10)[0] == 1:
            struct.pack_into("<H", data, page + 12, 18)
    (root / "catalog" / "data.mdb").write_bytes(data)


def special(folder: str, what: str, plant: str) -> None:
    """One special trial; prints the child's end."""
    base = build(Path(folder) / "base")
    if what == "branches":
        break_branches(base.root)
    with pytest.MonkeyPatch.context() as patch:
        if plant:
            PLANTS[plant](patch)
        act = {
            "branches": lambda: Judge(base, base.root, Damage(what, "catalog/data.mdb")).look(),
            "mmap": lambda: cut_after_opening(base.root, "mmap"),
            "pread": lambda: cut_after_opening(base.root, "pread"),
            "direct": lambda: cut_after_opening(base.root, "direct"),
        }[what]
        sys.stdout.write(json.dumps(in_child(act)))
