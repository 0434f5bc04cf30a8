"""Stores that somebody made to do harm: one function per idea, and mutations by the thousand that combine them.

Each idea changes a good store; frames, totals and digests are made anew where that gets the idea further: they are no
secret. `visit` is what a careless user does with such a store: look at it, open it for reading and for writing, check, use and
mend it. It may say anything typed; it must not crash, hang, eat memory, or touch what lies outside the store.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec
import numpy as np
import pytest
from faults import coded
from faults.forked import in_child
from helpers import SMALL, TWO_GROUPS, extend, identity, token_list

from kvdb import KVDB, files
from kvdb.codecs import CodecPlan
from kvdb.entries import framed
from kvdb.environment import TABLES
from kvdb.errors import KVDBError
from kvdb.repair import repair
from kvdb.transaction import Transaction

Rng = random.Random
FIRST: Final = token_list(100, 1)
OUTSIDE: Final = "outside"
"""A folder beside the store that no visit may change."""


CODED: Final = {"int4": token_list(70, 4), "planes": token_list(52, 5)}


def build(root: Path) -> None:
    with KVDB.open(root, min_free=0) as db:
        extend(db, FIRST, name="first", geometry=TWO_GROUPS, segment_tokens=64)
        extend(db, np.concatenate((FIRST[:64], token_list(20, 2))), name="second", geometry=TWO_GROUPS)
        extend(db, token_list(30, 3), geometry=SMALL)
        for codec, tokens in CODED.items():
            coded.store(db, tokens, codec, codec, geometry=TWO_GROUPS, segment_tokens=32)
            coded.assert_reads_back(db, tokens, db.sequence(codec).spans)  # loops are loaded before anything is forked


def prepare(folder: Path) -> Path:
    """A folder with a victim, and a copy of a store beside it; returns the copy."""
    (folder / OUTSIDE / "deep").mkdir(parents=True)
    for name in ("precious", "deep/zarr.json"):
        (folder / OUTSIDE / name).write_bytes(b"mine" * 4096)
    return folder / "s"


# -- tools


def forge(root: Path, table: str, edit: Callable[[dict[bytes, Any]], None], *, raw: bool = False) -> None:
    """Change a table's values, decoded unless `raw`, and make frames and totals right again."""
    env = lmdb.open(str(root / "catalog"), max_dbs=len(TABLES), map_size=64 << 20)
    try:
        with env.begin(write=True) as txn:
            db, meta = env.open_db(table.encode(), txn), env.open_db(b"meta", txn)
            values = {
                bytes(key): value[8:] if raw else msgspec.msgpack.decode(value[8:]) for key, value in txn.cursor(db=db)
            }
            edit(values)
            txn.drop(db, delete=False)
            frames = {
                key: framed(key, value if raw else msgspec.msgpack.encode(value)) for key, value in values.items()
            }
            for key, frame in frames.items():
                txn.put(key, frame, db=db)
            if table != "meta":
                root_sum = sum(struct.unpack_from("<Q", frame)[0] for frame in frames.values()) % (1 << 64)
                totals = msgspec.msgpack.encode({"count": len(frames), "root": root_sum})
                txn.put(b"totals:" + table.encode(), framed(b"totals:" + table.encode(), totals), db=meta)
    finally:
        env.close()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values lie inside a structure, containers included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inner for found in leaves(each, (*path, key)))]


def extreme(rng: Rng) -> Any:
    return rng.choice(
        [
            0, 1, -1, 7, 16, 1 << 16, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, (1 << 64) - 1, 1e308, -0.5, True, None, "", "x", "..",
            "../../outside/precious", "/etc/passwd", "a" * 70_000, "0" * 32, "f" * 64, "\0", "\ud7ff\u202e", [], {}, [[[[]]]],
            {"a": {"a": {}}}, ["x"] * 5000, list(range(3000)),
        ]
    )  # fmt: skip


def put_extreme(value: Any, rng: Rng) -> Any:
    """One place of a structure gets an extreme value, is dropped, or is doubled."""
    path = rng.choice(leaves(value))
    if not path:
        return extreme(rng)
    at = value
    for key in path[:-1]:
        at = at[key]
    how = rng.randrange(8)
    if how == 0 and isinstance(at, dict):
        del at[path[-1]]
    elif how == 1 and isinstance(at, list):
        at.append(at[path[-1]])
    else:
        at[path[-1]] = extreme(rng)
    return value


def some_path(root: Path, rng: Rng, pattern: str = "*") -> Path:
    return rng.choice(sorted(p for p in root.rglob(pattern) if p != root))


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# -- ideas


def extreme_entry(root: Path, rng: Rng) -> None:
    """A value of an absurd size or type in an entry whose frame is right."""

    def edit(values: dict[bytes, Any]) -> None:
        key = rng.choice(sorted(values))
        values[key] = put_extreme(values[key], rng)

    forge(root, rng.choice(["segments", "sequences", "identities", "names", "uses", "meta"]), edit)


def huge_geometry(root: Path, rng: Rng) -> None:
    """A model of 65 536 heads and layers: what is computed from it must not be allocated."""

    def edit(values: dict[bytes, Any]) -> None:
        for entry in values.values():
            geometry = entry["info"]["geometry"]
            geometry["chunk_tokens"] = rng.choice([1, 16, 16_384])
            for group in geometry["groups"]:
                group["kv_heads"] = group["head_dim"] = rng.choice([1, 1 << 16, 1 << 15])
                group["layers"] = rng.choice([[0], list(range(1 << 16))])
            entry["info"]["capacity"] = rng.choice([1, 1024, 16_384])

    forge(root, "segments", edit)


def some_half(rng: Rng) -> Any:
    """A codec that is known, or none, with parameters that are right, absurd, or another's."""
    config = {name: rng.choice([extreme(rng), rng.choice([0, 1, 5, 6, 8, 1 << 16])]) for name in ("bits", "group")}
    known = [{}, {"axis": "token"}, {"axis": "token", "group": config["group"]}, {"bits": config["bits"]}]
    name = rng.choice(["raw", "int8", "int4", "int2", "planes", "planes", "pickle", extreme(rng)])
    return {"name": name, "config": rng.choice([*known, config, extreme(rng)])}


def other_codec(root: Path, rng: Rng) -> None:
    """Segments that are said to be stored otherwise, by codecs, parameters and rows that do not fit or that nobody knows; in the
    catalog, and as often in the metadata of their arrays."""
    alike = rng.random() < 0.5
    made: dict[str, Any] = {}

    def edit(values: dict[bytes, Any]) -> None:
        for entry in values.values():
            info = entry["info"]
            halves = [{"key": some_half(rng), "value": some_half(rng)} for _ in info["geometry"]["groups"]]
            groups = rng.choice([halves, halves, halves, halves[:1], halves * 1_000, [], extreme(rng)])
            spec = {"name": "groups", "config": {"groups": groups}}
            info["codec"] = rng.choice([spec, spec, {"name": "raw", "config": {}}, {"name": "raw", "config": spec}])
            if rng.random() < 0.5:
                info["fidelity"] = "int4"
            made[info["segment"]] = info

    forge(root, "segments", edit)
    for path in sorted((root / "chunks").glob("*.kv*/zarr.json")) if alike else ():
        metadata, info = json.loads(path.read_bytes()), made[path.parent.name.partition(".")[0]]
        metadata["attributes"]["kvdb"]["info"] |= {"codec": info["codec"], "fidelity": info["fidelity"]}
        path.write_text(json.dumps(metadata))


def other_fidelity(root: Path, rng: Rng) -> None:
    """KV that a codec rounded is said to be exact, or the other way round: of segments, or of sequences only."""
    table, said = rng.choice(["segments", "sequences"]), rng.choice(["exact", "exact", "int4", "planes int4 again"])

    def edit(values: dict[bytes, Any]) -> None:
        for entry in values.values():
            (entry["info"] if table == "segments" else entry)["fidelity"] = said

    forge(root, table, edit)


def cut_file(root: Path, rng: Rng) -> None:
    """A shard, an abstract or a page of the catalog that ends early, or is longer by a little."""
    path = rng.choice(sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size))
    os.truncate(path, rng.choice([rng.randrange(path.stat().st_size), path.stat().st_size + rng.choice([1, 8, 4096])]))


def circle_of_parents(root: Path, rng: Rng) -> None:
    """Segments that are each other's ancestors."""

    def edit(values: dict[bytes, Any]) -> None:
        keys = sorted(values)
        for key, other in zip(keys, keys[1:] + keys[:1], strict=True):
            values[key]["info"]["parent"] = rng.choice([key, other]).hex()
            values[key]["info"]["start"] = rng.choice([16, 64, 1 << 40])

    forge(root, "segments", edit)


def circle_of_moves(root: Path, rng: Rng) -> None:
    """Segments that a compaction is said to have moved, in a circle."""

    def edit(values: dict[bytes, Any]) -> None:
        ids = sorted({path.name.partition(".")[0] for path in (root / "chunks").iterdir() if path.is_dir()})
        for a, b in zip(ids, ids[1:] + ids[:1], strict=True):
            values[bytes.fromhex(a)] = rng.choice([a, b])

    forge(root, "moved", edit)


def overlapping_spans(root: Path, rng: Rng) -> None:
    """A sequence of spans that overlap, run backwards, or are there a hundred thousand times."""

    def edit(values: dict[bytes, Any]) -> None:
        for value in values.values():
            span = rng.choice(value["spans"])
            span["start"], span["stop"] = rng.choice([(0, 1 << 60), (-5, 10), (50, 10), (0, 0), (1, 2)])
            value["spans"] = value["spans"] * rng.choice([1, 3, 2_000])

    forge(root, "sequences", edit)


def garbage_entry(root: Path, rng: Rng) -> None:
    """MessagePack that is cut, nested without end, or promises more than is there."""

    def edit(values: dict[bytes, Any]) -> None:
        key = rng.choice(sorted(values))
        values[key] = rng.choice(
            [
                b"",
                b"\xc1",
                values[key][: len(values[key]) // 2],
                b"\x91" * 100_000,
                b"\xdd\xff\xff\xff\xff",
                b"\xc6\xff\xff\xff\xff",
            ]
        )

    forge(root, rng.choice(["segments", "sequences", "identities", "names", "tokens", "uses"]), edit, raw=True)


def strange_key(root: Path, rng: Rng) -> None:
    """Entries under keys of other lengths than ids have."""

    def edit(values: dict[bytes, Any]) -> None:
        values[rng.choice([b"\0", b"x" * 17, b"\xff" * 500])] = values[rng.choice(sorted(values))]

    forge(root, rng.choice(["segments", "sequences", "identities", "names", "tokens", "uses", "meta"]), edit)


def many_token_ids(root: Path, rng: Rng) -> None:
    """Token ids whose number is not the segment's."""

    def edit(values: dict[bytes, Any]) -> None:
        for key in values:
            values[key] = rng.choice([b"", b"x", b"\xff" * 400, bytes(900_000)])

    forge(root, "tokens", edit)


def json_extreme(root: Path, rng: Rng) -> None:
    """A value of an absurd size or type in kvdb.json, a manifest or an array's metadata."""
    path = some_path(root, rng, "*.json")
    path.write_text(json.dumps(put_extreme(json.loads(path.read_bytes()), rng)))


def json_garbage(root: Path, rng: Rng) -> None:
    """JSON nested a hundred thousand deep, of bytes that are no text, of keys given twice, or of numbers without end."""
    some_path(root, rng, "*.json").write_bytes(
        rng.choice(
            [
                b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\0", b"", b"null", b'{"format": 1e999}', b"9" * 100_000,
                b'{"format": ' + b"9" * 5000 + b"}", b'{"format": "\\ud800"}', b'{"attributes": {"kvdb": []}}',
            ]
        )
    )  # fmt: skip


def link_outside(root: Path, rng: Rng) -> None:
    """A symbolic link to the world outside where a file or folder should be."""
    path = some_path(root, rng)
    folder = path.is_dir()
    remove(path)
    outside = root.parent / OUTSIDE
    path.symlink_to(
        rng.choice(
            [outside, outside / "deep"] if folder else [outside / "precious", outside / "new", path, "/dev/zero"]
        )
    )


def link_in_passing(root: Path, rng: Rng) -> None:
    """Symbolic links where leftovers are tidied away: tmp/, trash/, names/, quarantine/, chunks/."""
    part = rng.choice(["tmp", "trash", "names", "quarantine", "chunks"])
    (root / part / rng.choice(["a", "lock", "x.json", "0" * 32 + ".kv0"])).symlink_to(root.parent / OUTSIDE)


def hard_link(root: Path, rng: Rng) -> None:
    """A file of the store is a second name of a file outside."""
    path = rng.choice([root / "catalog" / name for name in ("lock.mdb", "write.lock", "ballast", "data.mdb")])
    outside = root.parent / OUTSIDE / "precious"
    if path.name == "data.mdb":
        outside = root.parent / OUTSIDE / "data"
        shutil.copyfile(path, outside)
    path.unlink(missing_ok=True)
    path.hardlink_to(outside)


def no_file(root: Path, rng: Rng) -> None:
    """A pipe, a socket or a folder where a file should be, or a file where a folder should be."""
    path = some_path(root, rng)
    folder = path.is_dir()
    remove(path)
    kind = rng.choice(["pipe", "socket", "other"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        before = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name[-60:])
        os.rename(path.name[-60:], path.name)
        os.chdir(before)
    elif folder:
        path.write_bytes(b"")
    else:
        path.mkdir()


def giant_file(root: Path, rng: Rng) -> None:
    """A sparse file of a tebibyte."""
    os.truncate(rng.choice(sorted(p for p in root.rglob("*") if p.is_file())), 1 << rng.choice([31, 36, 40]))


def empty_file(root: Path, rng: Rng) -> None:
    """A file of no bytes."""
    os.truncate(rng.choice(sorted(p for p in root.rglob("*") if p.is_file())), 0)


def strange_names(root: Path, rng: Rng) -> None:
    """Files of names that are no text, in folders that are listed."""
    part = rng.choice(["chunks", "names", "tmp", "trash", "quarantine", "catalog"])
    for name in (b"\xff\xfe", b"-rf", b"a\nb", b"%s", b"." * 50, b"0" * 32 + b".kv0", b"x" * 255):
        Path(os.fsdecode(bytes(root / part) + b"/" + name)).write_bytes(b"")


def many_files(root: Path, rng: Rng) -> None:
    """Thousands of files in a folder that is listed."""
    part = rng.choice(["chunks", "names", "tmp", "trash"])
    for i in range(2_000):
        (root / part / f"{i:032x}.json").touch()


def wild_catalog(root: Path, rng: Rng) -> None:
    """Noise in the pages of the catalog."""
    path = root / "catalog" / "data.mdb"
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 3, 30])):
        at = rng.randrange(0, 40) * 4096 + rng.choice([0, 8, 10, 12, 14, 16, 18, rng.randrange(4096)])
        struct.pack_into(
            "<H", data, min(at, len(data) - 2), rng.choice([0, 1, 2, 0xFFFF, 4096, rng.randrange(1 << 16)])
        )
    path.write_bytes(data)


IDEAS: Final[dict[str, Callable[[Path, Rng], None]]] = {
    idea.__name__.replace("_", " "): idea
    for idea in (
        extreme_entry, huge_geometry, other_codec, other_fidelity, circle_of_parents, circle_of_moves, overlapping_spans, garbage_entry, strange_key, many_token_ids,
        json_extreme, json_garbage, link_outside, link_in_passing, hard_link, no_file, giant_file, empty_file, cut_file, strange_names,
        many_files, wild_catalog,
    )
}  # fmt: skip


def mutate(root: Path, rng: Rng, ideas: list[str]) -> list[str]:
    """Ideas carried out one after the other, as far as each is possible after the others; says which."""
    done = []
    for idea in ideas:
        try:
            IDEAS[idea](root, rng)
            done.append(idea)
        except (OSError, lmdb.Error, ValueError, KeyError, TypeError, IndexError, AttributeError):
            done.append(f"half of {idea}")
    return done


# -- the visit


def visit(root: Path) -> list[str]:
    """Everything a user may do with a store; returns the errors, all of them typed."""
    said = []
    for act in (_look, _read, _write, _mend, _read):
        try:
            act(root)
        except (KVDBError, OSError) as e:
            said.append(f"{type(e).__name__}: {e}"[:300])
    return said


def _look(root: Path) -> None:
    with KVDB.open_untrusted(root) as db:
        db.check()


def _read(root: Path) -> None:
    with KVDB.open(root, "r", lock_timeout_s=1) as db:
        db.check()
        _use(db)


def _use(db: KVDB) -> None:
    db.info()
    db.match(identity(), FIRST)
    for sequence in db.sequences():
        segments = db.segments(sequence.spans)
        db.tokens(sequence.spans)
        reader = db.reader()
        try:
            for segment in segments:
                for layer in segment.info.geometry.layers[:2]:
                    g = segment.info.geometry.groups[segment.info.geometry.locate(layer)[0]]
                    records, ct = np.arange(min(g.kv_heads, 4)), segment.info.geometry.chunk_tokens
                    reader.rows(segment, layer, records)
                    reader.abstract(segment, "box", layer)
                    out = np.empty((2, len(records), ct, g.head_dim), segment.info.geometry.storage_dtype)
                    reader.read(segment, layer, records, out)
        finally:
            reader.close()


def _write(root: Path) -> None:
    with KVDB.open(root, "a", lock_timeout_s=1, grace_s=0, min_free=0) as db:
        extend(db, np.concatenate((FIRST, token_list(20, 9))), name="new", geometry=TWO_GROUPS)
        for sequence in db.sequences():
            db.pin(sequence.key)
            db.pin(sequence.key, False)
        db.compact()
        for sequence, codec in zip(db.sequences(), ("planes", "int4", "raw") * 2, strict=False):
            db.recode(sequence.key, CodecPlan.parse(codec))
        db.delete("first")
        db.evict(0, named=True)
        db.gc()


def _mend(root: Path) -> None:
    repair(root, apply=True)


def snapshot(folder: Path) -> dict[str, Any]:
    """What a change to a tree would change: of a file, which an idea may have made giant, the beginning and the time."""

    def beginning(path: Path) -> bytes:
        with path.open("rb") as f:
            return f.read(1 << 16)

    return {
        str(path): (s.st_mode, s.st_mtime_ns, s.st_size, beginning(path) if path.is_file() else b"")
        for path in [folder, *sorted(folder.rglob("*"))]
        for s in [path.lstat()]
    }


# -- planted bugs


def _links_followed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files, "is_folder_or_nothing", lambda path: True)
    patch.setattr(os, "O_NOFOLLOW", 0)


def _circles_walked(patch: pytest.MonkeyPatch) -> None:
    def current(self: Transaction, segment: str) -> str:
        while (moved := self._get("moved", bytes.fromhex(segment), str)) is not None:
            segment = moved
        return segment

    patch.setattr(Transaction, "current", current)


def _sizes_believed(patch: pytest.MonkeyPatch) -> None:
    def read_all(fd: int, *_: object, **__: object) -> bytes:
        return os.pread(fd, os.fstat(fd).st_size, 0)

    patch.setattr(files, "read_all", read_all)


PLANTS: Final = {
    "links are followed": _links_followed,
    "circles are walked": _circles_walked,
    "sizes are believed": _sizes_believed,
}


def main(folder: str, first: int, stop: int, step: int, idea: str = "", plant: str = "") -> None:
    """One line of JSON per store: the seed, what was done, how the visit ended; in a process that is cheap to fork."""
    top = Path(folder)
    build(top / "base")
    with pytest.MonkeyPatch.context() as patch:
        if plant:
            PLANTS[plant](patch)
        _run(top, range(first, stop, step), idea)


def _run(top: Path, seeds: Iterable[int], idea: str) -> None:
    for seed in seeds:
        trial = top / "trial"
        root = prepare(trial)
        shutil.copytree(top / "base", root)
        rng = random.Random(seed)
        ideas = [idea] if idea else rng.choices(sorted(IDEAS), k=rng.choice([1, 1, 2, 3]))
        # In a child as well: a second idea may open what the first has made a pipe of, or walk pages that it spoiled.
        made = in_child(functools.partial(mutate, root, rng, ideas))
        done = made.answer if made.harm is None else [f"{', '.join(ideas)}: {made.harm} half-way"]
        before = snapshot(trial / OUTSIDE)
        ended = in_child(functools.partial(visit, root))
        touched = snapshot(trial / OUTSIDE) != before
        sys.stdout.write(json.dumps([seed, done, ended, touched, sorted(os.listdir(trial))]) + "\n")
        sys.stdout.flush()
        shutil.rmtree(trial)
