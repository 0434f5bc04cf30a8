"""Digests that address KV never change: a store of today must be found by every later version (R10).

The literals were written down once. A change here is a new format, not a new literal.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from helpers import finish, python

from kvdb import Identity, Span
from kvdb.entries import SegmentEntry, framed, name_key, sequence_key, spans_root
from kvdb.format import CodecSpec, SegmentInfo, abstract_seal, record_digests
from kvdb.geometry import Geometry, LayerGroup
from kvdb.prefix import block_keys, first_bytes, listing

PLAIN = Identity(weights="w", config={}, dtype="bfloat16")
FULL = Identity(
    weights="5f" * 32, config={"rope_theta": "10000.0", "a": "ü"}, dtype="float16", salt="tenant", semantics="other/2"
)
TOKENS = np.arange(130, dtype="<u4") * 300
SEGMENT = "0123456789abcdef" * 2
SPANS = (Span(segment=SEGMENT, start=0, stop=100), Span(segment="f" * 32, start=0, stop=30))


def entry(segment: str) -> SegmentEntry:
    geometry = Geometry(dtype="float16", chunk_tokens=16, groups=(LayerGroup(layers=(0,), kv_heads=1, head_dim=4),))
    info = SegmentInfo(
        segment=segment,
        identity=PLAIN.digest().hex(),
        fidelity="exact",
        parent=None,
        start=0,
        tokens=100,
        capacity=7,
        geometry=geometry,
        codec=CodecSpec(name="raw"),
        abstracts=("box",),
        created=0.0,
    )
    return SegmentEntry(info=info, seals={f"{segment}.kv0": "0" * 16, f"{segment}.box0": "1" * 16}, disk_bytes=0)


def vectors() -> dict[str, Any]:
    """Everything that addresses or binds KV, of fixed inputs, as hex."""
    rows = np.arange(64, dtype=np.uint8).reshape(2, 32)
    return {
        "identity": PLAIN.digest().hex(),
        "identity of all fields": FULL.digest().hex(),
        "block keys": [key.hex() for key in block_keys(PLAIN.digest(), TOKENS)],
        "sequence key": sequence_key(PLAIN.digest().hex(), SPANS, None),
        "sequence key with a name": sequence_key(PLAIN.digest().hex(), SPANS, "名前"),
        "name key": name_key("名前").hex(),
        "root": spans_root(SPANS, [entry(SEGMENT), entry("f" * 32)]),
        "record digests": [f"{digest:016x}" for digest in record_digests(SEGMENT, 5, rows).tolist()],
        "seal of an abstract": abstract_seal(["00", "11"]),
        "frame": framed(b"key", b"value").hex(),
        "listing": listing(1, TOKENS[128:130])[:16].hex(),
        "first bytes": [list(first_bytes(fidelity)) for fidelity in ("exact", "int4", "budget=0.1 int8")],
    }


GOLDEN: dict[str, Any] = {
    "identity": "55d888b8bfae971ba23055a29e7062532d27b403533159a254be10eea1403e5c",
    "identity of all fields": "0a627363f61993604cb814ddd5f4154e9db5b607e0a2fbe512e64ea46b1f2f7b",
    "block keys": [
        "5d8ea6936ec17c7ec977c6401a96e502",
        "6a022f7d62440e0c489c03aeec822143",
        "181ecb1b39e789b78b3320c02b52f9e3",
    ],
    "sequence key": "5c689a1232f1732618eb1b353b445a33",
    "sequence key with a name": "d543742619502dcd4fcf1cb64da0f730",
    "name key": "946d66427984600e3a2d420c16b8f7ef",
    "root": "0486b00415ab9d747aa83939b4a9e63c",
    "record digests": ["b12ceda8ec63d1cb", "f555ae21b5eb7973"],
    "seal of an abstract": "3ddda173232692c7",
    "frame": "8e11112e79cf9fb176616c7565",
    "listing": "01000096000000972cffffffffffffff",
    "first bytes": [[1], [200, 0], [117, 0]],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_digest_is_what_it_was(name: str) -> None:
    assert vectors()[name] == GOLDEN[name]


def test_every_vector_is_written_down() -> None:
    assert vectors().keys() == GOLDEN.keys()


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_digests_are_the_same_in_another_process(seed: str) -> None:
    code = "import json; from golden.test_golden_vectors import vectors; print(json.dumps(vectors()))"
    assert json.loads(finish(python(code, PYTHONHASHSEED=seed))) == GOLDEN


@pytest.mark.parametrize(
    "change",
    [{"weights": "x"}, {"config": {"a": "b"}}, {"dtype": "float16"}, {"salt": "s"}, {"semantics": "kv-after-rope/2"}],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_an_identity_changes_every_key_of_its_kv(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "weights": "w",
        "config": {},
        "dtype": "bfloat16",
        "salt": "",
        "semantics": PLAIN.semantics,
    }
    other = Identity(**(fields | change))
    assert Identity(**fields) == PLAIN
    assert not {*block_keys(other.digest(), TOKENS)} & {*block_keys(PLAIN.digest(), TOKENS)}
    assert sequence_key(other.digest().hex(), SPANS, None) != GOLDEN["sequence key"]
