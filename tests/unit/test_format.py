"""Bytes as pure functions: what is built parses back, layouts have no overlap, digests are bound to their place."""

from __future__ import annotations

import json
import struct
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import pytest
from helpers import SMALL, identity
from hypothesis import given
from hypothesis import strategies as st
from strategies import geometries, seeds

from kvdb import format
from kvdb.abstracts import ABSTRACTS
from kvdb.codecs import RAW
from kvdb.errors import Damaged, InvalidInput
from kvdb.format import CodecSpec, SegmentInfo
from kvdb.geometry import Geometry

ABSENT = (2**64 - 1, 2**64 - 1)


def info_of(geometry: Geometry, tokens: int = 20, capacity: int = 3) -> SegmentInfo:
    return SegmentInfo(
        segment="ab" * 16,
        identity=identity().digest().hex(),
        fidelity="exact",
        parent=None,
        start=0,
        tokens=tokens,
        capacity=capacity,
        geometry=geometry,
        codec=CodecSpec(name="raw"),
        abstracts=("box",),
        created=0.0,
    )


@given(geometries(), st.integers(1, 9), st.data())
def test_parsing_inverts_building_an_index(geometry: Geometry, capacity: int, data: st.DataObject) -> None:
    chunks = data.draw(st.integers(0, capacity))
    for group, g in enumerate(geometry.groups):
        row = geometry.record_bytes(group)
        index = format.shard_index(geometry, group, capacity, chunks, row)
        body, crc = index[:-4], struct.unpack("<I", index[-4:])[0]
        assert google_crc32c.value(body) == crc
        entries = list(struct.iter_unpack("<QQ", body))
        assert len(entries) == len(g.layers) * capacity
        for place, entry in enumerate(entries):
            slot = g.kv_heads * row
            assert entry == ((place * slot, slot) if place % capacity < chunks else ABSENT)


@given(geometries(chunk_tokens=None), st.integers(1, 50), st.data())
def test_the_sections_of_a_shard_follow_each_other(geometry: Geometry, capacity: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, capacity * geometry.chunk_tokens))
    for group, g in enumerate(geometry.groups):
        place = format.shard_layout(geometry, group, capacity, tokens, geometry.record_bytes(group))
        records = len(g.layers) * capacity * g.kv_heads
        assert place.payload_bytes == records * geometry.record_bytes(group)
        assert place.payload_bytes <= place.digests_offset < place.payload_bytes + 8
        assert place.digests_offset % 8 == 0
        assert place.tokens_offset == place.digests_offset + 8 * records
        assert place.index_offset == place.tokens_offset + (4 * tokens if group == 0 else 0)
        assert place.file_bytes == place.index_offset + 16 * len(g.layers) * capacity + 4


@pytest.mark.parametrize("name", ABSTRACTS)
@given(geometry=geometries(chunk_tokens=None), capacity=st.integers(1, 50))
def test_an_abstracts_file_is_its_layers_and_a_layer_its_planes(name: str, geometry: Geometry, capacity: int) -> None:
    for group, g in enumerate(geometry.groups):
        abstract = ABSTRACTS[name]
        place = format.abstract_layout(geometry, group, capacity, abstract)
        assert place.plane_bytes == capacity * g.kv_heads * place.row_bytes > 0
        assert place.layer_bytes == abstract.planes * place.plane_bytes
        assert place.file_bytes == len(g.layers) * place.layer_bytes


def test_a_digest_is_bound_to_its_place() -> None:
    rows = np.zeros((3, 32), np.uint8)
    digests = format.record_digests("ab" * 16, 0, rows)
    assert len(set(digests.tolist())) == 3
    assert format.record_digests("ab" * 16, 1, rows[:2]).tolist() == digests[1:].tolist()
    assert not set(format.record_digests("cd" * 16, 0, rows).tolist()) & set(digests.tolist())


@given(seeds(), st.integers(0, 8 * 32 - 1))
def test_every_flipped_bit_changes_the_digest(seed: int, bit: int) -> None:
    row = np.random.default_rng(seed).integers(0, 256, (1, 32), np.uint8)
    flipped = row.copy()
    flipped[0, bit // 8] ^= 1 << bit % 8
    assert format.record_digests("ab" * 16, 7, row) != format.record_digests("ab" * 16, 7, flipped)


@given(geometries())
def test_parsing_inverts_building_metadata(geometry: Geometry) -> None:
    info = info_of(geometry)
    for group in range(len(geometry.groups)):
        data = format.kv_metadata(info, identity(), group, RAW.usual, {"digests": (0, 8, "00")})
        found = format.parse_kv_metadata(data, "here")
        assert (found.info, found.identity, found.group, found.format) == (info, identity(), group, 0)
        assert list(found.sections) == ["digests"]
        abstract = format.abstract_metadata(info, group, ABSTRACTS["box"], ["00", "11"])
        assert format.abstract_digests(abstract, "here") == ["00", "11"]


@pytest.mark.parametrize(
    "change",
    [
        {"segment": "AB" * 16},
        {"segment": "../" + "a" * 29},
        {"parent": "x"},
        {"identity": "ab"},
        {"start": 8, "parent": "cd" * 16},
        {"start": 16},
        {"parent": "cd" * 16},
        {"tokens": 0},
        {"tokens": 49},
        {"capacity": 0},
        {"capacity": 1025},
        {"abstracts": ("../box",)},
    ],
    ids=str,
)
def test_a_description_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="expected"):
        msgspec.structs.replace(info_of(SMALL), **change)


def test_a_cipher_is_only_written_where_there_is_one() -> None:
    plain, encrypted = info_of(SMALL), msgspec.structs.replace(info_of(SMALL), cipher="aes")
    assert "cipher" not in msgspec.to_builtins(plain)
    assert msgspec.to_builtins(encrypted)["cipher"] == "aes"


METADATA = format.kv_metadata(info_of(SMALL), identity(), 0, RAW.usual, {"digests": (0, 8, "00")})


@given(st.integers(0, len(METADATA) - 1), st.integers(0, 7))
def test_flipped_metadata_is_parsed_or_refused_never_worse(offset: int, bit: int) -> None:
    data = bytearray(METADATA)
    data[offset] ^= 1 << bit
    try:
        found = format.parse_kv_metadata(bytes(data), "here")
    except Damaged as error:
        assert str(error).startswith("here: ")  # noqa: PT017  either outcome is right
    else:
        assert isinstance(found, format.KVAttributes)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"null", b'{"attributes": 1}', b'{"attributes": {"kvdb": 3}}', b"\xff" * 9]
)
def test_foreign_metadata_is_damage(data: bytes) -> None:
    with pytest.raises(Damaged, match="here"):
        format.parse_kv_metadata(data, "here")
    with pytest.raises(Damaged, match="here"):
        format.abstract_digests(data, "here")


def test_metadata_is_json_with_kvdb_under_one_attribute() -> None:
    metadata = json.loads(METADATA)
    assert list(metadata["attributes"]) == ["kvdb"]
    assert metadata["attributes"]["kvdb"]["info"] == json.loads(msgspec.json.encode(info_of(SMALL)))
    assert json.loads(format.group_metadata())["node_type"] == "group"
