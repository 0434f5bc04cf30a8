"""A second reader, written from FORMAT.md alone: struct, json, numpy, hashes and LMDB; the engine only writes.

Where this file and the document differ, one of them is wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import google_crc32c
import lmdb
import msgspec
import numpy as np
import pytest
import xxhash
from helpers import TWO_GROUPS, Array, extend, identity, model_kv, opened, token_list, write_segment
from numcodecs import blosc

import kvdb
from kvdb import KVDB
from kvdb.codecs import CodecPlan
from kvdb.format import FORMAT_VERSION

TOKENS = token_list(150)
FORK = np.concatenate((TOKENS[:100], token_list(40, 9)))
OTHER = identity("w1", salt="tenant")
TABLES = ("meta", "identities", "segments", "tokens", "tree", "sequences", "names", "uses", "moved", "unsynced")
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
DOCUMENT = (Path(kvdb.__file__).parent / "FORMAT.md").read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a fork inside a segment, three segments in a row, spare slots, a merged pair, abstracts that went and came
    back, a name, a pin, an expiry and a segment that was never forced to disk."""
    path = tmp_path_factory.mktemp("document") / "s"
    with opened(path) as db:
        db.set_size_cap("1GB")
        extend(db, TOKENS, name="long", geometry=TWO_GROUPS, segment_tokens=64, spare=2)
        key = extend(db, FORK, geometry=TWO_GROUPS, fidelity="sparse").key
        db.pin(key)
        db.touch(db.sequence(key).spans)
        other = token_list(40, 3)
        extend(db, other[:16], ident=OTHER, geometry=TWO_GROUPS)
        mortal = extend(db, other, ident=OTHER, geometry=TWO_GROUPS)
        db.put_sequence(mortal.last, 40, name="mortal", ttl_s=1e6)
        assert db.compact("mortal") == 1
        assert db.set_abstracts("long", ("sketch",)) == db.set_abstracts("long", ("box",)) == 3
        db.export_sequence("long", path.parent / "long.zip")
    with KVDB.open(path, durability="relaxed") as db:
        extend(db, token_list(10, 4), geometry=TWO_GROUPS)
        shutil.copytree(path, path.with_name("copy"), ignore=shutil.ignore_patterns("tmp"))
    return path.with_name("copy")


def xxh3(data: bytes, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(data, seed=seed)


def entries(root: Path, table: str) -> list[tuple[bytes, bytes, int]]:
    """(key, value, digest) of every entry, in LMDB's order."""
    env = lmdb.open(str(root / "catalog"), max_dbs=len(TABLES), readonly=True, lock=False)
    try:
        with env.begin(db=env.open_db(table.encode(), dupsort=table == "tree", create=False)) as txn:
            found = list(txn.cursor())
    finally:
        env.close()
    if table == "tree":  # the digest comes last there
        found = [(key, entry[-8:] + entry[:-8]) for key, entry in found]
    for key, entry in found:
        assert struct.unpack("<Q", entry[:8])[0] == xxh3(entry[8:], seed=xxh3(key))
    return [(key, entry[8:], struct.unpack("<Q", entry[:8])[0]) for key, entry in found]


def table(root: Path, name: str) -> dict[str, Any]:
    return {key.hex(): msgspec.msgpack.decode(value) for key, value, _ in entries(root, name)}


def meta(root: Path) -> dict[str, Any]:
    return {bytes.fromhex(key).decode(): value for key, value in table(root, "meta").items()}


def infos(root: Path) -> dict[str, dict[str, Any]]:
    return {segment: entry["info"] for segment, entry in table(root, "segments").items()}


def path_of(root: Path, segment: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Ancestors and the segment, and the token ids of the whole path."""
    segments, tokens = infos(root), table(root, "tokens")
    chain = [segments[segment]]
    while chain[0]["parent"] is not None:
        chain.insert(0, segments[chain[0]["parent"]])
    path: list[int] = []
    for info in chain:
        del path[info["start"] :]
        path += np.frombuffer(tokens[info["segment"]], "<u4").tolist()
    return chain, path


def read_shard(root: Path, info: dict[str, Any], group: int) -> tuple[Array, list[int]]:
    """[layer, head, kv, token, dim] and token ids, every digest checked."""
    folder = root / "chunks" / f"{info['segment']}.kv{group}"
    g, ct = info["geometry"]["groups"][group], info["geometry"]["chunk_tokens"]
    dtype = np.dtype(DTYPES[info["geometry"]["dtype"]])
    layers, heads, dim = len(g["layers"]), g["kv_heads"], g["head_dim"]
    capacity, tokens = info["capacity"], info["tokens"]
    assert info["codec"] == {"name": "raw", "config": {}}
    row = 2 * ct * dim * dtype.itemsize
    rows = layers * capacity * heads
    data = (folder / "c.0.0.0.0.0").read_bytes()
    digests_at = (rows * row + 7) // 8 * 8
    tokens_at = digests_at + 8 * rows
    index_at = tokens_at + (4 * tokens if group == 0 else 0)
    assert len(data) == index_at + 16 * layers * capacity + 4
    index = data[index_at:-4]
    assert struct.unpack("<I", data[-4:])[0] == google_crc32c.value(index)
    digests = struct.unpack(f"<{rows}Q", data[digests_at:tokens_at])
    sections = json.loads((folder / "zarr.json").read_text())["attributes"]["kvdb"]["sections"]
    assert sections["digests"] == [digests_at, 8 * rows, f"{xxh3(data[digests_at:tokens_at]):016x}"]
    ids = list(struct.unpack(f"<{tokens}I", data[tokens_at:index_at])) if group == 0 else []
    if group == 0:
        assert sections["tokens"] == [tokens_at, 4 * tokens, f"{xxh3(data[tokens_at:index_at]):016x}"]
    seed = xxh3(info["segment"].encode())
    out = np.zeros((layers, heads, 2, -(-tokens // ct) * ct, dim), dtype)
    for slot in range(layers * capacity):
        layer, chunk = divmod(slot, capacity)
        offset, size = struct.unpack_from("<QQ", index, 16 * slot)
        if chunk >= -(-tokens // ct):
            assert offset == size == 2**64 - 1
            assert digests[slot * heads : (slot + 1) * heads] == (0,) * heads
            continue
        assert (offset, size) == (slot * heads * row, heads * row)
        for head in range(heads):
            number = slot * heads + head
            record = data[number * row : (number + 1) * row]
            assert digests[number] == xxh3(record, seed=(seed + number) % 2**64)
            values = np.frombuffer(record, dtype).reshape(2, ct, dim)
            out[layer, head, :, chunk * ct : (chunk + 1) * ct] = values
    assert not out[:, :, :, tokens:].any()
    return out[:, :, :, :tokens], ids


def read_blocks(root: Path, info: dict[str, Any], group: int) -> Array:
    """[layer, head, kv, token, dim], every checksum and digest checked."""
    folder = root / "chunks" / f"{info['segment']}.kv{group}"
    g, ct, capacity = info["geometry"]["groups"][group], info["geometry"]["chunk_tokens"], info["capacity"]
    dtype, codec = np.dtype(DTYPES[info["geometry"]["dtype"]]), info["codec"]["config"]["groups"][group]
    assert (codec["key"]["name"], codec["value"]["name"], codec["blocks"]["name"]) == ("raw", "raw", "blosc")
    layers, heads, dim, tokens = len(g["layers"]), g["kv_heads"], g["head_dim"], info["tokens"]
    b = max(1, min(codec["blocks"]["config"]["tokens"] // ct, capacity))
    per_layer, rows, payload = -(-capacity // b), layers * capacity * heads, info["packed"][group]
    data = (folder / "c.0.0.0.0.0").read_bytes()
    digests_at = (payload + 7) // 8 * 8
    index_at = digests_at + 8 * rows + (4 * tokens if group == 0 else 0)
    assert len(data) == index_at + 16 * layers * per_layer + 4
    assert struct.unpack("<I", data[-4:])[0] == google_crc32c.value(data[index_at:-4])
    digests = struct.unpack_from(f"<{rows}Q", data, digests_at)
    seed, used, out = xxh3(info["segment"].encode()), 0, np.zeros((layers, heads, 2, per_layer * b * ct, dim), dtype)
    for layer in range(layers):
        for block in range(per_layer):
            offset, size = struct.unpack_from("<QQ", data, index_at + 16 * (layer * per_layer + block))
            if block * b * ct >= tokens:
                assert offset == size == 2**64 - 1
                continue
            stored, used = data[offset : offset + size], used + size
            assert struct.unpack("<I", stored[-4:])[0] == google_crc32c.value(stored[:-4])
            numbers = np.frombuffer(blosc.decompress(stored[:-4]), dtype).reshape(heads, 2, b * ct, dim)
            out[layer, :, :, block * b * ct : (block + 1) * b * ct] = numbers
        for record in range(-(-tokens // ct) * heads):
            chunk, head = divmod(record, heads)
            number = layer * capacity * heads + record
            row = out[layer, head, :, chunk * ct : (chunk + 1) * ct].tobytes()
            assert digests[number] == xxh3(row, seed=(seed + number) % 2**64)
    assert used == payload
    assert not out[:, :, :, tokens:].any()
    return out[:, :, :, :tokens]


def test_blocks_are_read_from_the_document_alone(tmp_path: Path) -> None:
    plan = CodecPlan.parse("blosc:tokens=40;3=blosc")
    with opened(tmp_path / "s") as db:
        writer = write_segment(db, TOKENS[:70], geometry=TWO_GROUPS, spare=2, codec=plan)
        db.commit(writer, TOKENS[:70])
    (info,) = infos(tmp_path / "s").values()
    expected = model_kv(TWO_GROUPS, TOKENS, 0, 70, salt="exact")
    assert [len(g["layers"]) for g in info["geometry"]["groups"]] == [1, 1, 1]
    for group, g in enumerate(info["geometry"]["groups"]):
        found = read_blocks(tmp_path / "s", info, group)
        for layer, own in zip(g["layers"], found, strict=True):
            assert np.array_equal(own[:, 0], expected[layer][0])
            assert np.array_equal(own[:, 1], expected[layer][1])


def test_the_header_is_as_documented(root: Path) -> None:
    header = json.loads((root / "kvdb.json").read_text())
    assert set(header) == set(re.findall(r"`(format|store|created|chunk_tokens|codec)`", DOCUMENT))
    assert header["format"] == FORMAT_VERSION == 1
    assert f"version {FORMAT_VERSION}" in DOCUMENT.splitlines()[0]


def test_the_folders_are_those_of_the_document(root: Path) -> None:
    (drawing,) = re.findall(r"```\nSTORE/.*?```", DOCUMENT, re.DOTALL)
    drawn = re.findall(r"^  ([a-z.]+)/? ", drawing, re.MULTILINE)
    assert sorted(drawn) == sorted({p.name for p in root.iterdir()} | {"tmp"})
    in_catalog = re.findall(r"[a-z]+\.(?:mdb|lock)|ballast|relaxed", drawing)
    assert sorted(in_catalog) == sorted(p.name for p in (root / "catalog").iterdir())


def test_the_catalog_has_the_documented_databases_with_the_documented_totals(root: Path) -> None:
    rows = re.findall(r"^\| `([a-z]+)` \| .* \| .* \|$", DOCUMENT.partition("### Store time")[0], re.MULTILINE)
    assert set(TABLES) <= set(rows)
    env = lmdb.open(str(root / "catalog"), max_dbs=len(TABLES), readonly=True, lock=False)
    with env.begin() as txn:
        assert sorted(name.decode() for name, _ in txn.cursor()) == sorted(TABLES)
    env.close()
    facts = meta(root)
    for name in set(TABLES) - {"meta"}:
        digests = [digest for _, _, digest in entries(root, name)]
        assert digests, name
        assert facts[f"totals:{name}"] == {"count": len(digests), "root": sum(digests) % 2**64}


def test_the_facts_about_the_store_are_as_documented(root: Path) -> None:
    facts, segments = meta(root), table(root, "segments")
    arrays = [p for p in (root / "chunks").iterdir() if p.is_dir()]
    counters = facts["counters"]
    assert counters["arrays"] == len(arrays) == sum(len(entry["seals"]) for entry in segments.values())
    assert counters["segment_bytes"] == sum(entry["disk_bytes"] for entry in segments.values())
    assert facts["limits"] == {"size_cap": 10**9}
    assert facts["next expiry"] == min(s["expires"] for s in table(root, "sequences").values() if s["expires"])
    assert set(facts["clock"]) == {"time", "wall", "boot", "uptime"}
    for name in (*counters, *facts["clock"], *facts["limits"]):
        assert f"`{name}`" in DOCUMENT


def test_the_kv_read_by_the_document_is_the_kv_written(root: Path) -> None:
    read = 0
    for segment, info in infos(root).items():
        path = path_of(root, segment)[1]
        stop = info["start"] + info["tokens"]
        kv = model_kv(TWO_GROUPS, np.array(path, "<u4"), info["start"], stop, salt=info["fidelity"])
        for group, g in enumerate(info["geometry"]["groups"]):
            found, ids = read_shard(root, info, group)
            assert group or ids == path[info["start"] :]
            for row, layer in enumerate(g["layers"]):
                for plane in (0, 1):
                    assert found[row, :, plane].tobytes() == np.ascontiguousarray(kv[layer][plane]).tobytes()
                    read += 1
    assert read == 6 * 3 * 2


def test_seals_bind_the_digests_of_each_array_to_the_catalog(root: Path) -> None:
    for segment, entry in table(root, "segments").items():
        expected = {}
        for group in range(2):
            for kind in ("kv", "box"):
                name = f"{segment}.{kind}{group}"
                attributes = json.loads((root / "chunks" / name / "zarr.json").read_text())["attributes"]["kvdb"]
                if kind == "kv":
                    expected[name] = attributes["sections"]["digests"][2]
                else:
                    expected[name] = f"{xxh3('|'.join(attributes['layer_xxh3']).encode()):016x}"
        assert entry["seals"] == expected


def test_the_box_read_by_the_document_is_that_of_the_keys(root: Path) -> None:
    for info in infos(root).values():
        assert info["abstracts"] == ["box"]
        for group, g in enumerate(info["geometry"]["groups"]):
            folder = root / "chunks" / f"{info['segment']}.box{group}"
            shape = (len(g["layers"]), info["capacity"], g["kv_heads"], 2, g["head_dim"])
            data = (folder / "c.0.0.0.0.0").read_bytes()
            boxes = np.frombuffer(data, "<f2").reshape(shape)
            attributes = json.loads((folder / "zarr.json").read_text())["attributes"]["kvdb"]
            assert attributes["layer_xxh3"] == [f"{xxh3(layer.tobytes()):016x}" for layer in boxes]
            keys = read_shard(root, info, group)[0][:, :, 0]
            for chunk in range(info["capacity"]):
                part = keys[:, :, chunk * 16 : chunk * 16 + 16]
                if part.shape[2] == 0:
                    assert not boxes[:, chunk].any()
                else:
                    assert np.array_equal(boxes[:, chunk, :, 0], part.min(axis=2))
                    assert np.array_equal(boxes[:, chunk, :, 1], part.max(axis=2))


def test_the_sketch_read_by_the_document_holds_the_keys(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = write_segment(db, TOKENS[:50], geometry=TWO_GROUPS, spare=2, abstracts=("sketch",))
        db.put_sequence(db.commit(writer, TOKENS[:50]).segment, 50)
    ((segment, entry),) = table(tmp_path / "s", "segments").items()
    info, ct = entry["info"], 16
    for group, g in enumerate(info["geometry"]["groups"]):
        dim, heads, slots = g["head_dim"], g["kv_heads"], info["capacity"]
        row_bytes = max(2 * dim + 4, -(-ct // 8) * dim)
        folder = tmp_path / "s" / "chunks" / f"{segment}.sketch{group}"
        data = (folder / "c.0.0.0.0.0").read_bytes()
        assert len(data) == len(g["layers"]) * 5 * slots * heads * row_bytes
        plane_bytes = slots * heads * row_bytes
        digests = [f"{xxh3(data[at : at + plane_bytes]):016x}" for at in range(0, len(data), plane_bytes)]
        attributes = json.loads((folder / "zarr.json").read_text())["attributes"]["kvdb"]
        assert attributes["layer_xxh3"] == digests
        assert entry["seals"][f"{segment}.sketch{group}"] == f"{xxh3('|'.join(digests).encode()):016x}"
        keys = read_shard(tmp_path / "s", info, group)[0][:, :, 0].astype(np.float64)  # [layer, head, token, dim]
        for layer, chunk, head in np.ndindex(len(g["layers"]), slots, heads):
            at = [(((layer * 5 + p) * slots + chunk) * heads + head) * row_bytes for p in range(5)]
            rows = [data[offset : offset + row_bytes] for offset in at]
            own = keys[layer, head, chunk * ct : chunk * ct + ct]
            if not len(own):
                assert not any(map(any, rows))
                continue
            lo, hi = np.frombuffer(rows[0][: 2 * dim], "i1").astype(np.float64).reshape(2, dim)
            scale = struct.unpack("<f", rows[0][2 * dim : 2 * dim + 4])[0]
            assert not any(rows[0][2 * dim + 4 :])
            assert rows[0][2 * dim] == 0  # the last eight bits of the scale
            assert (lo * scale <= own).all()
            assert (own <= hi * scale).all()
            u = np.zeros((ct, dim))
            for token, d in np.ndindex(ct, dim):
                bits = [rows[1 + i][token // 8 * dim + d] >> token % 8 & 1 for i in range(4)]
                u[token, d] = 8 * bits[0] + 4 * bits[1] + 2 * bits[2] + bits[3]
            assert not u[len(own) :].any()
            width = (hi - lo) * scale
            assert (lo * scale + width * (u[: len(own)] / 16 - 2**-20) <= own).all()
            assert (own <= lo * scale + width * ((u[: len(own)] + 1) / 16 + 2**-20)).all()


def test_the_means_read_by_the_document_are_those_of_keys(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = write_segment(db, TOKENS[:50], geometry=TWO_GROUPS, spare=2, abstracts=("mean",))
        db.put_sequence(db.commit(writer, TOKENS[:50]).segment, 50)
    ((segment, entry),) = table(tmp_path / "s", "segments").items()
    info = entry["info"]
    for group, g in enumerate(info["geometry"]["groups"]):
        slots = info["capacity"]
        data = (tmp_path / "s" / "chunks" / f"{segment}.mean{group}" / "c.0.0.0.0.0").read_bytes()
        found = np.frombuffer(data, "<f2").reshape(len(g["layers"]), slots, g["kv_heads"], g["head_dim"])
        keys = read_shard(tmp_path / "s", info, group)[0].astype(np.float64)[:, :, 0]  # [layer, head, token, dim]
        for chunk in range(slots):
            own = keys[:, :, chunk * 16 : chunk * 16 + 16]
            if not own.shape[2]:
                assert not found[:, chunk].any()
                continue
            exact = own.mean(
                2
            )  # of multiples of 1/16 below 8: exact in float64, and the nearest float16 is one rounding away
            half_a_step = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64) / 2
            assert (np.abs(found[:, chunk] - exact) <= half_a_step * (1 + 1e-3)).all()


def test_the_clusters_read_by_the_document_hold_every_token_once_and_have_its_means(tmp_path: Path) -> None:
    with opened(tmp_path / "s") as db:
        writer = write_segment(db, TOKENS[:50], geometry=TWO_GROUPS, spare=2, abstracts=("centroid",))
        db.put_sequence(db.commit(writer, TOKENS[:50]).segment, 50)
    ((segment, entry),) = table(tmp_path / "s", "segments").items()
    info = entry["info"]
    for group, g in enumerate(info["geometry"]["groups"]):
        layers, slots, heads, dim = len(g["layers"]), info["capacity"], g["kv_heads"], g["head_dim"]
        data = (tmp_path / "s" / "chunks" / f"{segment}.centroid{group}" / "c.0.0.0.0.0").read_bytes()
        size = 2 * dim + 8 + 2 * 16
        assert len(data) == layers * slots * heads * size
        kv = read_shard(tmp_path / "s", info, group)[0].astype(np.float64)  # [layer, head, kv, token, dim]
        for layer, head in np.ndindex(layers, heads):
            seen = []
            for slot in range(slots):
                row = data[((layer * slots + slot) * heads + head) * size :][:size]
                means = np.frombuffer(row[: 2 * dim], "i1").astype(np.float64).reshape(2, dim)
                scales = struct.unpack("<2f", row[2 * dim : 2 * dim + 8])
                members = [m + 16 * slot for m in struct.unpack("<16h", row[2 * dim + 8 :]) if m != -32768]
                if slot * 16 >= 50:
                    assert not any(row)
                    continue
                seen += members
                for kind in (0, 1):
                    exact = kv[layer, head, kind, members].mean(0)
                    assert np.abs(means[kind] * scales[kind] - exact).max() <= np.abs(exact).max() * (0.5 / 127 + 1e-5)
            assert sorted(seen) == list(range(50))


def test_identities_are_addressed_by_the_documented_digest(root: Path) -> None:
    for key, fields in table(root, "identities").items():
        tags = [(tag, fields[tag]) for tag in ("weights", "dtype", "salt", "semantics")]
        tags += [(f"config.{name}", fields["config"][name]) for name in sorted(fields["config"])]
        parts = [part.encode() for pair in tags for part in pair]
        framed = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
        assert hashlib.sha256(b"kvdb identity 1\0" + framed).hexdigest() == key
    assert set(table(root, "identities")) == {identity().digest().hex(), OTHER.digest().hex()}


def first_byte(fidelity: str) -> int:
    return 1 if fidelity == "exact" else 2 + xxhash.xxh3_64_intdigest(fidelity.encode()) % 254


def test_the_tree_lists_every_segment_under_the_documented_keys(root: Path) -> None:
    expected = set()
    for segment, info in infos(root).items():
        path = path_of(root, segment)[1]
        key = hashlib.blake2b(b"kvdb prefix 1\0" + bytes.fromhex(info["identity"]), digest_size=16).digest()
        first = bytes([first_byte(info["fidelity"])])
        for k in range((len(path) - 1) // 64 + 1):
            if k:
                block = struct.pack("<64I", *path[64 * (k - 1) : 64 * k])
                key = hashlib.blake2b(key + block, digest_size=16).digest()
            if k >= info["start"] // 64:
                held = path[64 * k : 64 * k + 64]
                padded = struct.pack(">64I", *held, *[2**32 - 1] * (64 - len(held)))
                expected.add((key, first + padded + bytes.fromhex(segment)))
    found = [(key, value) for key, value, _ in entries(root, "tree")]
    assert {len(value) for _, value in found} == {273}
    assert found == sorted(expected)


def agreement(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def lookup(root: Path, ident: str, tokens: list[int], accepted: list[str] | None) -> int:
    """Length of the longest stored prefix, by the document's search."""

    def counts(value: bytes) -> bool:
        segment: str | None = value[257:273].hex()
        while segment is not None:
            if accepted is not None and fidelities[segment]["fidelity"] not in accepted:
                return False
            segment = fidelities[segment]["parent"]
        return True

    fidelities, listed = infos(root), dict[bytes, list[bytes]]()
    for node, value, _ in entries(root, "tree"):
        if counts(value):
            listed.setdefault(node, []).append(value)
    key = hashlib.blake2b(b"kvdb prefix 1\0" + bytes.fromhex(ident), digest_size=16).digest()
    last, k = None, 0
    while key in listed:
        last = (key, k)
        if 64 * (k + 1) > len(tokens):
            break
        key = hashlib.blake2b(key + struct.pack("<64I", *tokens[64 * k : 64 * k + 64]), digest_size=16).digest()
        k += 1
    if last is None:
        return 0
    node, k = last
    block = tokens[64 * k : 64 * k + 64]
    firsts = {v[0] for v in listed[node]} if accepted is None else {0, *map(first_byte, accepted)}
    near: list[tuple[int, bytes]] = []
    for first in firsts:
        wanted = bytes([first]) + struct.pack(">64I", *block, *[2**32 - 1] * (64 - len(block)))
        place = sum(value < wanted for value in listed[node])
        near += [
            (agreement(list(struct.unpack(">64I", value[1:257])), block), value)
            for value in listed[node][max(0, place - 1) : place + 1]
            if value[0] == first
        ]
    return agreement(path_of(root, max(near)[1][257:273].hex())[1], tokens)


@pytest.mark.parametrize("accepted", [["exact"], ["exact", "sparse"], ["exact", "other"], None], ids=str)
def test_the_lookup_of_the_document_finds_what_the_engine_finds(root: Path, accepted: list[str] | None) -> None:
    lists = [TOKENS, FORK, TOKENS[:64], TOKENS[:70], TOKENS[:1], token_list(40, 3), token_list(9, 8)]
    lists += [np.concatenate((t[:n], token_list(70, 7))) for t in (TOKENS, FORK) for n in (0, 5, 64, 90, 130, 140)]
    wanted = [agreement(path_of(root, segment)[1], TOKENS.tolist()) for segment in infos(root)]
    assert lookup(root, identity().digest().hex(), TOKENS.tolist(), accepted) == max(wanted) == 150
    asked = [(ident, tokens) for ident in (identity(), OTHER) for tokens in lists]
    found = [lookup(root, ident.digest().hex(), tokens.tolist(), accepted) for ident, tokens in asked]
    with KVDB.open(root, "r") as db:
        options = {"exact": accepted is not None, "accepted": accepted or ()}
        assert found == [db.match(ident, tokens, **options).tokens for ident, tokens in asked]


def test_sequences_are_spans_from_position_zero(root: Path) -> None:
    segments, seals = infos(root), {s: entry["seals"] for s, entry in table(root, "segments").items()}
    sequences = table(root, "sequences")
    for key, sequence in sequences.items():
        h, root_hash = xxhash.xxh3_128(sequence["identity"].encode()), xxhash.xxh3_128()
        position = 0
        for span in sequence["spans"]:
            h.update(f"|{span['segment']}:{span['start']}:{span['stop']}".encode())
            root_hash.update(f"|{span['segment']}:{span['start']}:{span['stop']}".encode())
            for array, seal in sorted(seals[span["segment"]].items()):
                root_hash.update(f"|{array}={seal}".encode())
            assert segments[span["segment"]]["start"] + span["start"] == position
            position += span["stop"] - span["start"]
        if sequence["name"] is not None:
            h.update(b"|" + sequence["name"].encode())
        assert key == sequence["key"] == h.hexdigest()
        assert sequence["root"] == root_hash.hexdigest()
        assert position == sequence["tokens"]
    facts = {(s["tokens"], s["name"], s["pinned"], s["expires"] is None) for s in sequences.values()}
    assert facts == {
        (10, None, False, True),
        (16, None, False, True),
        (40, None, False, True),
        (40, "mortal", False, False),
        (140, None, True, True),
        (150, "long", False, True),
    }
    assert len(sequences) == len(facts)
    names = {s["name"]: s["key"] for s in sequences.values() if s["name"]}
    assert table(root, "names") == {xxhash.xxh3_128_hexdigest(name.encode()): key for name, key in names.items()}


def test_a_manifest_repeats_the_entry_of_each_named_sequence(root: Path) -> None:
    named = {f"{key}.json": entry for key, entry in table(root, "sequences").items() if entry["name"] is not None}
    assert len(named) == 2
    assert {p.name: json.loads(p.read_text()) for p in (root / "names").iterdir()} == named


def test_uses_forwarding_addresses_and_what_is_not_yet_on_disk_are_as_documented(root: Path) -> None:
    segments, uses = infos(root), table(root, "uses")
    assert set(uses) == set(segments)
    assert all(set(use) == {"last_used", "hits"} for use in uses.values())
    assert {use["hits"] for use in uses.values()} == {0, 1}
    moved = table(root, "moved")
    assert set(moved.values()) == {
        s["spans"][-1]["segment"] for s in table(root, "sequences").values() if s["tokens"] == 40
    }
    assert not set(moved) & set(segments)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert table(root, "unsynced") == {segment: boot for segment, info in segments.items() if info["tokens"] == 10}


def test_an_export_is_a_stored_zip_of_the_documented_members(root: Path) -> None:
    with zipfile.ZipFile(root.parent / "long.zip") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}
        described = json.loads(archive.read("kvdb-sequence.json"))
        (sequence,) = [s for s in table(root, "sequences").values() if s["name"] == "long"]
        assert set(described) == {"export", "sequence", "identity", "segments"}
        assert described["export"] == 1
        assert [s["info"]["segment"] for s in described["segments"]] == [s["segment"] for s in sequence["spans"]]
        stored = table(root, "segments")
        assert described["segments"] == [stored[span["segment"]] for span in sequence["spans"]]
        assert described["identity"] == table(root, "identities")[sequence["identity"]]
        for entry in described["segments"]:
            for array in entry["seals"]:
                for name in ("zarr.json", "c.0.0.0.0.0"):
                    assert archive.read(f"{array}/{name}") == (root / "chunks" / array / name).read_bytes()
        assert len(archive.namelist()) == 2 + 2 * 4 * 3


@pytest.mark.parametrize("name", ["segments", "sequences", "identities", "uses"])
def test_every_stored_field_is_in_the_document(root: Path, name: str) -> None:
    for value in table(root, name).values():
        value = value | value.get("info", {}) | value.get("info", {}).get("geometry", {})
        assert [field for field in value if f"`{field}`" not in DOCUMENT] == []


def test_attributes_repeat_what_the_catalog_says(root: Path) -> None:
    identities = table(root, "identities")
    for info in infos(root).values():
        for group in range(2):
            data = (root / "chunks" / f"{info['segment']}.kv{group}" / "zarr.json").read_bytes()
            attributes = json.loads(data)["attributes"]["kvdb"]
            assert set(attributes) == {"format", "info", "identity", "group", "sections"}
            assert attributes["info"] == {field: value for field, value in info.items() if field != "abstracts"}
            assert attributes["identity"] == identities[info["identity"]]
            assert (attributes["format"], attributes["group"]) == (0, group)
