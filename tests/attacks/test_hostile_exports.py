"""Exported files made to do harm: a typed error, nothing imported, nothing written outside, no memory or time wasted.

One file per idea. Names in them have their own test (test_hostile_names.py).
"""

from __future__ import annotations

import json
import os
import resource
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from faults import coded
from helpers import SMALL, assert_healthy, assert_reads_back, extend, flip, identity, opened, token_list, tree_bytes

from kvdb import KVDB
from kvdb.codecs import CODECS, CodecPlan
from kvdb.errors import Damaged, IdentityMismatch, InvalidInput, StorageFull

TOKENS = token_list(100)
DESCRIPTION = "kvdb-sequence.json"
Members = dict[str, bytes]
MEMORY_BYTES = 32 << 20


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    folder = tmp_path_factory.mktemp("export")
    with opened(folder / "source") as db:
        extend(db, TOKENS, name="n", segment_tokens=64)
        db.export_sequence("n", folder / "good.zip")
    with zipfile.ZipFile(folder / "good.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def described(change: Callable[[Any], object]) -> Callable[[Members], Members]:
    """The file with another description."""

    def do(members: Members) -> Members:
        found = json.loads(members[DESCRIPTION])
        change(found)
        return {**members, DESCRIPTION: json.dumps(found).encode()}

    return do


def info(found: Any, segment: int = 0) -> Any:
    return found["segments"][segment]["info"]


def group(found: Any) -> Any:
    return info(found)["geometry"]["groups"][0]


def put(target: Any, key: str, value: object) -> None:
    target[key] = value


def nested(depth: int) -> bytes:
    return b'{"export": 1, "sequence": ' + b"[" * depth + b"]" * depth + b"}"


DESCRIPTIONS: dict[str, Callable[[Members], Members]] = {
    "no JSON": lambda m: {**m, DESCRIPTION: b"\0\xff"},
    "JSON that is no text": lambda m: {**m, DESCRIPTION: b'{"export": "\xff"}'},
    "JSON that is no object": lambda m: {**m, DESCRIPTION: b"[]"},
    "an empty object": lambda m: {**m, DESCRIPTION: b"{}"},
    "very deep JSON": lambda m: {**m, DESCRIPTION: nested(200_000)},
    "export of no version": described(lambda d: put(d, "export", "1")),
    "export of a later version": described(lambda d: put(d, "export", 1 << 80)),
    "no segments": described(lambda d: put(d, "segments", [])),
    "segments in another order": described(lambda d: d["segments"].reverse()),
    "one segment twice": described(lambda d: d["segments"].append(d["segments"][-1])),
    "a segment that is its own parent": described(lambda d: put(info(d), "parent", info(d)["segment"])),
    "another parent": described(lambda d: put(info(d, 1), "parent", "ab" * 16)),
    "the first segment begins later": described(lambda d: put(info(d), "start", 16)),
    "a gap between segments": described(lambda d: put(info(d, 1), "start", 96)),
    "a segment off the grid": described(lambda d: put(info(d, 1), "start", 63)),
    "a negative start": described(lambda d: put(info(d, 1), "start", -16)),
    "a seal of a folder outside": described(lambda d: put(d["segments"][0]["seals"], "../../victim", "0" * 16)),
    "a seal of an absolute path": described(lambda d: put(d["segments"][0]["seals"], "/victim", "0" * 16)),
    "a seal of an array that is none": described(
        lambda d: put(d["segments"][0]["seals"], "ab" * 16 + ".kv0", "0" * 16)
    ),
    "a seal less": described(lambda d: d["segments"][0]["seals"].popitem()),
    "a start beyond 64 bits": described(lambda d: put(info(d, 1), "start", 1 << 70)),
    "no tokens": described(lambda d: put(info(d), "tokens", 0)),
    "negative tokens": described(lambda d: put(info(d), "tokens", -64)),
    "more tokens than capacity": described(lambda d: put(info(d), "tokens", 1 << 20)),
    "a huge capacity": described(lambda d: put(info(d), "capacity", 1 << 40)),
    "no capacity": described(lambda d: put(info(d), "capacity", 0)),
    "more tokens in the sequence than in its segments": described(lambda d: put(d["sequence"], "tokens", 1000)),
    "no tokens in the sequence": described(lambda d: put(d["sequence"], "tokens", 0)),
    "negative tokens in the sequence": described(lambda d: put(d["sequence"], "tokens", -5)),
    "a sequence that ends before its last segment": described(lambda d: put(d["sequence"], "tokens", 10)),
    "huge heads": described(lambda d: put(group(d), "kv_heads", 1 << 40)),
    "huge head_dim": described(lambda d: put(group(d), "head_dim", 1 << 40)),
    "no heads": described(lambda d: put(group(d), "kv_heads", 0)),
    "a million layers": described(lambda d: put(group(d), "layers", list(range(1_000_000)))),
    "no layers": described(lambda d: put(group(d), "layers", [])),
    "no groups": described(lambda d: put(info(d)["geometry"], "groups", [])),
    "a huge chunk": described(lambda d: put(info(d)["geometry"], "chunk_tokens", 1 << 40)),
    "an empty chunk": described(lambda d: put(info(d)["geometry"], "chunk_tokens", 0)),
    "an unknown dtype": described(lambda d: put(info(d)["geometry"], "dtype", "object")),
    "an unknown codec": described(lambda d: put(info(d), "codec", {"name": "pickle", "config": {}})),
    "a codec with arguments": described(lambda d: put(info(d), "codec", {"name": "raw", "config": {"x": 1}})),
    "an unknown abstract": described(lambda d: put(info(d), "abstracts", ["os.system"])),
    "an abstract twice": described(lambda d: put(info(d), "abstracts", ["box", "box"])),
    "a cipher": described(lambda d: put(info(d), "cipher", "rot13")),
    "another identity": described(lambda d: put(info(d), "identity", "00" * 32)),
    "weights that are not those of the digest": described(lambda d: put(d["identity"], "weights", "others")),
    "another salt": described(lambda d: put(d["identity"], "salt", "tenant")),
    "other seals": described(lambda d: put(d["segments"][0], "seals", {})),
    "an odd fidelity": described(lambda d: put(info(d), "fidelity", "\x1b[2J")),
    "exact after approximate": described(lambda d: put(info(d), "fidelity", "sparse")),
    "a segment id that is none": described(lambda d: put(info(d), "segment", "zz")),
    "a segment id in capitals": described(lambda d: put(info(d), "segment", info(d)["segment"].upper())),
    "a name that cannot be shown": described(lambda d: put(d["sequence"], "name", "a\nb")),
    "an endless name": described(lambda d: put(d["sequence"], "name", "x" * 100_000)),
    "an endless model": described(lambda d: put(d["sequence"], "model", "x" * (2 << 20))),
}


# -- of a sequence that codecs stored


@pytest.fixture(scope="module", params=["int4", "planes"])
def coded_members(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Members:
    folder = tmp_path_factory.mktemp("export")
    with opened(folder / "source") as db:
        coded.store(db, TOKENS, "n", request.param, geometry=SMALL, segment_tokens=64)
        db.export_sequence("n", folder / "good.zip")
    with zipfile.ZipFile(folder / "good.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def told(change: Callable[[Any], object]) -> Callable[[Members], Members]:
    """The file with another `info` of its second segment, the first that is not stored as it is, in its description and the metadata of
    its arrays alike."""

    def do(members: Members) -> Members:
        found = json.loads(members[DESCRIPTION])
        segment = info(found, 1)["segment"]
        change(info(found, 1))
        changed = {**members, DESCRIPTION: json.dumps(found).encode()}
        for name in [n for n in members if segment in n and n.endswith(".kv0/zarr.json")]:
            metadata = json.loads(members[name])
            change(metadata["attributes"]["kvdb"]["info"])
            changed[name] = json.dumps(metadata).encode()
        return changed

    return do


def with_key(**config: object) -> Callable[[Members], Members]:
    """Keys of another configuration."""
    return told(lambda i: i["codec"]["config"]["groups"][0]["key"]["config"].update(config))


def with_spec(key: str, value: object) -> Callable[[Members], Members]:
    return told(lambda i: put(i, "codec", {"name": "groups", "config": {"groups": [half_pair(key, value)]}}))


def half_pair(key: str, value: object) -> Any:
    return {half: {"name": key, "config": value} for half in ("key", "value")}


CODED: dict[str, Callable[[Members], Members]] = {
    "said to be stored as it is": told(lambda i: put(i, "codec", {"name": "raw", "config": {}})),
    "another codec": with_spec("int8", {}),
    "rows of fewer bits": with_spec("int2", {}),
    "an unknown codec of a group": with_spec("pickle", {}),
    "a codec whose name is a number": with_spec(7, {}),  # type: ignore[arg-type]
    "parameters that are a list": with_spec("int4", []),
    "a parameter that is not known": with_key(x=1),
    "a huge group": with_key(axis="token", group=1 << 40),
    "a group of half the channels": with_key(axis="token", group=4),
    "no group": with_key(axis="token", group=0),
    "a group of less than none": with_key(axis="token", group=-8),
    "a group that does not divide": with_key(axis="token", group=3),
    "an axis that is none": with_key(axis="../../victim"),
    "a huge number of bits": with_key(bits=1 << 70),
    "no bits": with_key(bits=0),
    "another number of bits": with_key(bits=7),
    "bits that are a text": with_key(bits="6"),
    "no codec for a group": told(lambda i: put(i["codec"]["config"], "groups", [])),
    "codecs for groups that are not there": told(lambda i: put(i["codec"]["config"], "groups", i["codec"]["config"]["groups"] * 1_000)),
    "groups that are no list": told(lambda i: put(i["codec"]["config"], "groups", 1 << 62)),
    "a codec that is no object": told(lambda i: put(i["codec"]["config"], "groups", ["int4"])),
    "a codec without values": told(lambda i: i["codec"]["config"]["groups"][0].pop("value")),
    "exact, said of rounded KV": told(lambda i: put(i, "fidelity", "exact")),
    "fewer tokens than rows": told(lambda i: put(i, "tokens", 16)),
    "room for more rows": told(lambda i: put(i, "capacity", i["capacity"] + 1)),
    "a bomb of room": told(lambda i: put(i, "capacity", 1 << 40)),
    "heads of many more channels": told(lambda i: put(i["geometry"]["groups"][0], "head_dim", 1 << 30)),
    "a chunk of many more tokens": told(lambda i: put(i["geometry"], "chunk_tokens", 1 << 30)),
    "another dtype of the same size": told(lambda i: put(i["geometry"], "dtype", "float16")),
    "rows that end early": lambda m: {**m, (n := second(m)): m[n][:-1]},
    "rows that are longer": lambda m: {**m, (n := second(m)): m[n] + b"\0"},
    "no rows": lambda m: {**m, second(m): b""},
    "rows of zeros": lambda m: {**m, (n := second(m)): bytes(len(m[n]))},
    "rows of ones, which are no numbers": lambda m: {**m, (n := second(m)): b"\xff" * 64 + m[n][64:]},
    "rows of the segment after it": lambda m: {**m, second(m): m[second(m, 2)]},
}  # fmt: skip


def second(members: Members, segment: int = 1) -> str:
    """The array of a segment's KV, by default of the first that is not stored as it is."""
    return array(members, f"{info(json.loads(members[DESCRIPTION]), segment)['segment']}.kv0/c.0.0.0.0.0")


@pytest.mark.parametrize("idea", CODED)
def test_hostile_rows_and_codecs_are_refused(tmp_path: Path, coded_members: Members, idea: str) -> None:
    changed = CODED[idea](coded_members)
    assert changed != coded_members
    refuse(tmp_path, write(tmp_path / "x.zip", changed))


def test_what_codecs_stored_is_taken_in(tmp_path: Path, coded_members: Members) -> None:
    """So it is the ideas above that are refused."""
    with opened(tmp_path / "store") as db:
        spans = db.sequence(db.import_sequence(write(tmp_path / "x.zip", coded_members))).spans
        coded.assert_reads_back(db, TOKENS, spans)
        assert db.match(identity(), TOKENS).tokens == 0


def test_every_codec_is_refused_in_place_of_another(tmp_path: Path, coded_members: Members) -> None:
    spec = info(json.loads(coded_members[DESCRIPTION]), 1)["codec"]["config"]["groups"][0]
    for name in CODECS.keys() - {spec["key"]["name"]}:
        refuse(tmp_path, write(tmp_path / "x.zip", with_spec(name, {})(coded_members)))
        (tmp_path / "x.zip").unlink()


# -- of a sequence that is compressed in blocks


@pytest.fixture(scope="module")
def packed_members(tmp_path_factory: pytest.TempPathFactory) -> Members:
    folder = tmp_path_factory.mktemp("export")
    with opened(folder / "source") as db:
        extend(db, TOKENS, name="n", geometry=SMALL, segment_tokens=64)
        db.recode("n", CodecPlan.parse("blosc:tokens=32"))
        db.export_sequence("n", folder / "good.zip")
    with zipfile.ZipFile(folder / "good.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_blocks(blocks: object) -> Callable[[Members], Members]:
    return told(lambda i: put(i["codec"]["config"]["groups"][0], "blocks", blocks))


def first_block(change: Callable[[bytearray], object]) -> Callable[[Members], Members]:
    """The file with a block of its second segment changed, under a checksum that is right."""

    def do(members: Members) -> Members:
        name = second(members)
        data = bytearray(members[name])
        places = struct.unpack_from("<8Q", data, len(data) - 4 - 64)
        offset, size = places[0], places[1]
        block = data[offset : offset + size - 4]
        change(block)
        data[offset : offset + size] = block + struct.pack("<I", google_crc32c.value(bytes(block)))
        return {**members, name: bytes(data)}

    return do


def placed(number: int, value: int) -> Callable[[Members], Members]:
    """The file with another number in a shard index, under a checksum that is right."""

    def do(members: Members) -> Members:
        name = second(members)
        data = bytearray(members[name])
        at = len(data) - 4 - 64
        struct.pack_into("<Q", data, at + 8 * number, value)
        data[-4:] = struct.pack("<I", google_crc32c.value(bytes(data[at:-4])))
        return {**members, name: bytes(data)}

    return do


PACKED: dict[str, Callable[[Members], Members]] = {
    "said to be stored one by one": told(lambda i: i["codec"]["config"]["groups"][0].pop("blocks")),
    "said to be stored as it is": told(lambda i: put(i, "codec", {"name": "raw", "config": {}})),
    "no sizes": told(lambda i: i.pop("packed")),
    "a size less": told(lambda i: put(i, "packed", [])),
    "a size of nothing": told(lambda i: put(i, "packed", [0])),
    "a size of less than nothing": told(lambda i: put(i, "packed", [-1])),
    "a huge size": told(lambda i: put(i, "packed", [1 << 62])),
    "a size beyond 64 bits": told(lambda i: put(i, "packed", [1 << 70])),
    "another size": told(lambda i: put(i, "packed", [i["packed"][0] - 8])),
    "an unknown compressor": with_blocks({"name": "bz2", "config": {}}),
    "a compressor with arguments": with_blocks({"name": "blosc", "config": {"cname": "lz4"}}),
    "longer blocks": with_blocks({"name": "blosc", "config": {"clevel": 1, "tokens": 64}}),
    "huge blocks": with_blocks({"name": "blosc", "config": {"clevel": 1, "tokens": 1 << 40}}),
    "blocks of rounded rows": told(lambda i: i["codec"]["config"]["groups"][0].update(half_pair("int8", {}))),
    "heads of many more channels": told(lambda i: put(i["geometry"]["groups"][0], "head_dim", 1 << 16)),
    "a bomb": first_block(lambda block: block.__setitem__(slice(4, 8), struct.pack("<I", (1 << 31) - 1))),
    "a block that says it is shorter": first_block(lambda block: block.__setitem__(slice(4, 8), struct.pack("<I", 16))),
    "a block that says it is longer than it is": first_block(lambda block: block.__setitem__(slice(12, 16), struct.pack("<I", 1 << 30))),
    "numbers of another size": first_block(lambda block: block.__setitem__(3, 8)),
    "another method": first_block(lambda block: block.__setitem__(2, block[2] & 0x1F)),
    "no method": first_block(lambda block: block.__setitem__(2, block[2] | 0x02)),
    "noise": first_block(lambda block: block.__setitem__(slice(16, None), os.urandom(len(block) - 16))),
    "a block elsewhere": placed(0, (1 << 64) - 2),
    "a block beyond the others": placed(0, 1 << 40),
    "a block without an end": placed(1, (1 << 64) - 1),
    "a block of nothing": placed(1, 0),
    "a block twice": lambda m: placed(0, struct.unpack_from("<8Q", m[second(m)], len(m[second(m)]) - 68)[2])(m),
}  # fmt: skip


@pytest.mark.parametrize("idea", PACKED)
def test_hostile_blocks_are_refused(tmp_path: Path, packed_members: Members, idea: str) -> None:
    changed = PACKED[idea](packed_members)
    assert changed != packed_members
    refuse(tmp_path, write(tmp_path / "x.zip", changed))


def test_blocks_are_taken_in(tmp_path: Path, packed_members: Members) -> None:
    """So it is the ideas above that are refused."""
    with opened(tmp_path / "store") as db:
        assert_reads_back(db, TOKENS, db.sequence(db.import_sequence(write(tmp_path / "x.zip", packed_members))).spans)


def array(members: Members, ending: str) -> str:
    return next(name for name in members if name.endswith(ending))


MEMBERS: dict[str, Callable[[Members], Members]] = {
    "an array too short": lambda m: {**m, (n := array(m, "kv0/c.0.0.0.0.0")): m[n][:-1]},
    "an array too long": lambda m: {**m, (n := array(m, "kv0/c.0.0.0.0.0")): m[n] + b"\0"},
    "an abstract too short": lambda m: {**m, (n := array(m, "box0/c.0.0.0.0.0")): m[n][:-1]},
    "an empty array": lambda m: {**m, array(m, "kv0/c.0.0.0.0.0"): b""},
    "zeros": lambda m: {**m, (n := array(m, "kv0/c.0.0.0.0.0")): bytes(len(m[n]))},
    "metadata of another array": lambda m: {**m, array(m, "kv0/zarr.json"): m[array(m, "box0/zarr.json")]},
    "metadata that is no text": lambda m: {**m, array(m, "kv0/zarr.json"): b'{"attributes": {"kvdb": "\xff"}}'},
    "very deep metadata": lambda m: {**m, array(m, "kv0/zarr.json"): b"[" * 200_000},
    "endless metadata": lambda m: {**m, array(m, "kv0/zarr.json"): b" " * (17 << 20)},
    "nothing but a description": lambda m: {DESCRIPTION: m[DESCRIPTION]},
    "nothing": lambda m: {},
}


def write(path: Path, members: Members, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def refuse(tmp_path: Path, file: Path) -> None:
    """The judge: a typed error; store, its surroundings and the memory of the process stay as they were."""
    with KVDB.open(tmp_path / "store") as db:
        extend(db, token_list(40, 5), name="mine")
        db.own_workspace()
        kept = {n: d for n, d in tree_bytes(tmp_path).items() if not n.startswith("store/catalog/")}
        known = db.sequences()
        tracemalloc.start()
        with pytest.raises((Damaged, InvalidInput, IdentityMismatch, StorageFull)):
            db.import_sequence(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY_BYTES + 16 * file.stat().st_size
        assert {n: d for n, d in tree_bytes(tmp_path).items() if not n.startswith("store/catalog/")} == kept
        assert db.sequences() == known
        assert_healthy(db)
        assert_reads_back(db, token_list(40, 5), db.sequence("mine").spans)


@pytest.mark.parametrize("idea", DESCRIPTIONS)
def test_a_hostile_description_is_refused(tmp_path: Path, members: Members, idea: str) -> None:
    refuse(tmp_path, write(tmp_path / "x.zip", DESCRIPTIONS[idea](members)))


@pytest.mark.parametrize("idea", MEMBERS)
def test_hostile_members_are_refused(tmp_path: Path, members: Members, idea: str) -> None:
    refuse(tmp_path, write(tmp_path / "x.zip", MEMBERS[idea](members)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_is_not_inflated(tmp_path: Path, members: Members, compression: int) -> None:
    bomb = {**members, array(members, "kv0/c.0.0.0.0.0"): bytes(64 << 20)}
    file = write(tmp_path / "x.zip", bomb, compression)
    assert file.stat().st_size < 1 << 20
    refuse(tmp_path, file)


def test_a_size_that_only_the_directory_claims_is_refused(tmp_path: Path, members: Members) -> None:
    """Sizes in the central directory, of description and array alike, say 4 GiB less one."""
    for victim in (DESCRIPTION, array(members, "kv0/c.0.0.0.0.0")):
        file = write(tmp_path / "x.zip", members)
        data = bytearray(file.read_bytes())
        at = data.rindex(victim.encode()) - 46
        assert data[at : at + 4] == b"PK\1\2"
        data[at + 20 : at + 28] = struct.pack("<II", 0xFFFF_FFFE, 0xFFFF_FFFE)
        file.write_bytes(data)
        refuse(tmp_path, file)
        (tmp_path / "x.zip").unlink()


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_of_two_members_with_one_name_none_slips_through(tmp_path: Path, members: Members) -> None:
    name = array(members, "kv0/c.0.0.0.0.0")
    file = write(tmp_path / "x.zip", members)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, members[name][:-64] + bytes(64))
    refuse(tmp_path, file)


def test_members_that_nobody_asked_for_are_left_where_they_are(tmp_path: Path, members: Members) -> None:
    extra = {
        "../../escape": b"x",
        "/tmp/kvdb-escape": b"x",
        "chunks/../../escape": b"x",
        "kvdb.json": b"x",
        "a/" * 300: b"",
    }
    file = write(tmp_path / "x.zip", members | extra)
    with zipfile.ZipFile(file, "a") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    before = {p.name for p in tmp_path.iterdir()}
    with opened(tmp_path / "store") as db:
        assert_reads_back(db, TOKENS, db.sequence(db.import_sequence(file)).spans)
    assert {p.name for p in tmp_path.iterdir()} == before | {"store"}
    assert not Path("/tmp/kvdb-escape").exists()
    assert not any(p.is_symlink() for p in (tmp_path / "store").rglob("*"))


@pytest.mark.parametrize("kind", ["array", "metadata", "description"])
def test_a_member_that_claims_to_be_a_link_is_only_bytes(tmp_path: Path, members: Members, kind: str) -> None:
    victim = {"array": "kv0/c.0.0.0.0.0", "metadata": "kv0/zarr.json", "description": DESCRIPTION}[kind]
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            member = zipfile.ZipInfo(name)
            if name.endswith(victim):
                member.external_attr, data = 0o120777 << 16, b"/etc/passwd"
            archive.writestr(member, data)
    refuse(tmp_path, file)


def test_the_id_of_another_segment_is_no_way_in(tmp_path: Path, members: Members) -> None:
    """A file may not bring other KV under the id of a segment that the store has."""
    with opened(tmp_path / "store") as db:
        mine = extend(db, token_list(64, 8), name="victim").last.info.segment
    with opened(tmp_path / "attacker") as db:
        with pytest.MonkeyPatch.context() as m:
            m.setattr("kvdb.store.new_segment_id", lambda: mine)
            extend(db, token_list(64, 9), name="evil")
        db.export_sequence("evil", tmp_path / "x.zip")
    with opened(tmp_path / "store") as db:
        with pytest.raises(Damaged, match=f"segment {mine} is not the one of that id"):
            db.import_sequence(tmp_path / "x.zip")
        assert_reads_back(db, token_list(64, 8), db.sequence("victim").spans)


@pytest.mark.parametrize("what", ["a folder", "a pipe", "a link", "not a zip", "empty"])
def test_what_is_no_file_of_ours_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.zip"
    match what:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a link":
            path.symlink_to("/dev/zero")
        case "not a zip":
            path.write_bytes(b"PK" + bytes(1000))
        case "empty":
            path.touch()
    with opened(tmp_path / "store") as db, pytest.raises((Damaged, OSError)):
        db.import_sequence(path)


def test_a_huge_sparse_file_is_refused_in_no_time(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.touch()
    os.truncate(path, 1 << 40)
    with opened(tmp_path / "store") as db, pytest.raises(Damaged):
        db.import_sequence(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 24  # KiB


def test_the_judge_sees_an_import_that_trusts(
    tmp_path: Path, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvdb.portable.check_files", lambda *args: iter(()))
    file = write(tmp_path / "x.zip", members)
    flip(file, file.read_bytes().index(members[array(members, "kv0/c.0.0.0.0.0")]) + 5)
    with zipfile.ZipFile(file) as archive, pytest.raises(zipfile.BadZipFile):
        archive.testzip() and archive.read(array(members, "kv0/c.0.0.0.0.0"))
    altered = write(tmp_path / "y.zip", MEMBERS["zeros"](members))
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        refuse(tmp_path, altered)
