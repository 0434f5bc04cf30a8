"""A second reader, written from FORMAT.md alone: struct, json, numpy, hashes and LMDB; the engine only writes.

Where this file and the document differ, one of them is wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import lmdb
import msgspec
import numpy as np
import pytest
import xxhash
from helpers import TWO_GROUPS, Array, extend, identity, model_kv, opened, token_list

import kvdb
from kvdb.format import FORMAT_VERSION

TOKENS = token_list(150)
FORK = np.concatenate((TOKENS[:100], token_list(40, 9)))
DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
DOCUMENT = (Path(kvdb.__file__).parent / "FORMAT.md").read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a fork inside a segment, three segments in a row, spare slots and a name."""
    path = tmp_path_factory.mktemp("document") / "s"
    with opened(path) as db:
        extend(db, TOKENS, name="long", geometry=TWO_GROUPS, segment_tokens=64, spare=2)
        extend(db, FORK, geometry=TWO_GROUPS, fidelity="sparse")
    return path


def xxh3(data: bytes, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(data, seed=seed)


def entries(root: Path, table: str) -> list[tuple[bytes, bytes]]:
    env = lmdb.open(str(root / "catalog"), max_dbs=6, readonly=True)
    try:
        with env.begin(db=env.open_db(table.encode(), dupsort=table == "tree", create=False)) as txn:
            found = list(txn.cursor())
    finally:
        env.close()
    for key, entry in found:
        assert struct.unpack("<Q", entry[:8])[0] == xxh3(entry[8:], seed=xxh3(key))
    return [(key, entry[8:]) for key, entry in found]


def table(root: Path, name: str) -> dict[str, Any]:
    return {key.hex(): msgspec.msgpack.decode(value) for key, value in entries(root, name)}


def path_of(root: Path, segment: str) -> tuple[list[dict[str, Any]], list[int]]:
    """Ancestors and the segment, and the token ids of the whole path."""
    segments, tokens = table(root, "segments"), table(root, "tokens")
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


def test_the_header_is_as_documented(root: Path) -> None:
    header = json.loads((root / "kvdb.json").read_text())
    assert set(header) == set(re.findall(r"`(format|store|created|chunk_tokens|codec)`", DOCUMENT))
    assert header["format"] == FORMAT_VERSION == 0
    assert f"version {FORMAT_VERSION}" in DOCUMENT.splitlines()[0]


def test_the_kv_read_by_the_document_is_the_kv_written(root: Path) -> None:
    read = 0
    for segment, info in table(root, "segments").items():
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
    assert read == 4 * 3 * 2


def test_the_box_read_by_the_document_is_that_of_the_keys(root: Path) -> None:
    for info in table(root, "segments").values():
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


def test_identities_are_addressed_by_the_documented_digest(root: Path) -> None:
    for key, fields in table(root, "identities").items():
        tags = [(tag, fields[tag]) for tag in ("weights", "dtype", "salt", "semantics")]
        tags += [(f"config.{name}", fields["config"][name]) for name in sorted(fields["config"])]
        parts = [part.encode() for pair in tags for part in pair]
        framed = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
        assert hashlib.sha256(b"kvdb identity 1\0" + framed).hexdigest() == key
    assert set(table(root, "identities")) == {identity().digest().hex()}


def test_the_tree_lists_every_segment_under_the_documented_keys(root: Path) -> None:
    expected = set()
    for segment, info in table(root, "segments").items():
        path = path_of(root, segment)[1]
        key = hashlib.blake2b(b"kvdb prefix 1\0" + bytes.fromhex(info["identity"]), digest_size=16).digest()
        exact = b"\1" if info["fidelity"] == "exact" else b"\0"
        for k in range((len(path) - 1) // 64 + 1):
            if k:
                block = struct.pack("<64I", *path[64 * (k - 1) : 64 * k])
                key = hashlib.blake2b(key + block, digest_size=16).digest()
            if k >= info["start"] // 64:
                expected.add((key, exact + bytes.fromhex(segment)))
    assert set(entries(root, "tree")) == expected


def test_sequences_are_spans_from_position_zero(root: Path) -> None:
    segments = table(root, "segments")
    sequences = table(root, "sequences")
    for key, sequence in sequences.items():
        h = xxhash.xxh3_128(sequence["identity"].encode())
        position = 0
        for span in sequence["spans"]:
            h.update(f"|{span['segment']}:{span['start']}:{span['stop']}".encode())
            assert segments[span["segment"]]["start"] + span["start"] == position
            position += span["stop"] - span["start"]
        if sequence["name"] is not None:
            h.update(b"|" + sequence["name"].encode())
        assert key == sequence["key"] == h.hexdigest()
        assert position == sequence["tokens"]
    assert sorted(s["tokens"] for s in sequences.values()) == [140, 150]
    assert list(table(root, "names")) == [xxhash.xxh3_128_hexdigest(b"long")]


@pytest.mark.parametrize("name", ["segments", "sequences", "identities"])
def test_every_stored_field_is_in_the_document(root: Path, name: str) -> None:
    for value in table(root, name).values():
        assert [field for field in value if f"`{field}`" not in DOCUMENT] == []


def test_attributes_repeat_what_the_catalog_says(root: Path) -> None:
    identities = table(root, "identities")
    for info in table(root, "segments").values():
        for group in range(2):
            data = (root / "chunks" / f"{info['segment']}.kv{group}" / "zarr.json").read_bytes()
            attributes = json.loads(data)["attributes"]["kvdb"]
            assert set(attributes) == {"format", "info", "identity", "group", "sections"}
            assert attributes["info"] == info
            assert attributes["identity"] == identities[info["identity"]]
            assert (attributes["format"], attributes["group"]) == (0, group)
