"""Entries as values: a frame is bound to its key, totals to what is there, keys and roots to what they stand for."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
import xxhash
from helpers import SMALL, identity
from hypothesis import given
from hypothesis import strategies as st

from kvdb import entries
from kvdb.entries import SegmentEntry, Sequence, Span, Totals, Use
from kvdb.errors import Damaged, InvalidInput
from kvdb.format import CodecSpec, SegmentInfo

KEYS = st.binary(min_size=1, max_size=32)
SEGMENTS = ["0a" * 16, "0b" * 16, "0c" * 16]


def info_of(segment: str, parent: str | None, start: int, tokens: int) -> SegmentInfo:
    return SegmentInfo(
        segment=segment,
        identity=identity().digest().hex(),
        fidelity="exact",
        parent=parent,
        start=start,
        tokens=tokens,
        capacity=SMALL.chunks(tokens),
        geometry=SMALL,
        codec=CodecSpec(name="raw"),
        abstracts=(),
        created=0.0,
    )


PATH = [
    info_of(SEGMENTS[0], None, 0, 40),
    info_of(SEGMENTS[1], SEGMENTS[0], 32, 64),
    info_of(SEGMENTS[2], SEGMENTS[1], 96, 5),
]
SPANS = entries.spans_of(PATH, 101)


def sealed(info: SegmentInfo, seal: str = "00") -> SegmentEntry:
    info = msgspec.structs.replace(info, abstracts=("box",))
    return SegmentEntry(info=info, seals={f"{info.segment}.kv0": seal, f"{info.segment}.box0": "11"}, disk_bytes=1)


@given(KEYS, st.binary(max_size=200))
def test_unframing_inverts_framing(key: bytes, value: bytes) -> None:
    entry = entries.framed(key, value)
    assert entries.unframed("t", key, entry) == value
    assert entries.unframed("t", key, memoryview(entry)) == value
    assert entry == struct.pack("<Q", xxhash.xxh3_64_intdigest(value, xxhash.xxh3_64_intdigest(key))) + value


@given(KEYS, st.binary(max_size=50), st.data())
def test_every_flipped_bit_of_an_entry_is_damage(key: bytes, value: bytes, data: st.DataObject) -> None:
    entry = bytearray(entries.framed(key, value))
    bit = data.draw(st.integers(0, 8 * len(entry) - 1))
    entry[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Damaged, match=f"table t, entry {key.hex()}"):
        entries.unframed("t", key, bytes(entry))


@given(KEYS, KEYS, st.binary(max_size=50))
def test_an_entry_does_not_verify_under_another_key(one: bytes, other: bytes, value: bytes) -> None:
    if one != other:
        with pytest.raises(Damaged):
            entries.unframed("t", other, entries.framed(one, value))


def test_an_entry_has_a_greatest_length_and_a_least() -> None:
    most = bytes(entries.ENTRY_BYTES - 8)
    assert entries.unframed("t", b"k", entries.framed(b"k", most)) == most
    with pytest.raises(InvalidInput, match="expected at most"):
        entries.framed(b"k", most + b"x")
    for length in (0, 7, entries.ENTRY_BYTES + 1):
        with pytest.raises(Damaged, match=f"{length} bytes"):
            entries.unframed("t", b"k", bytes(length))


@given(st.lists(st.binary(min_size=8, max_size=8)), st.randoms(use_true_random=False))
def test_totals_depend_on_what_is_there_and_not_on_how_it_came(frames: list[bytes], random: Any) -> None:
    totals = Totals()
    for frame in frames:
        totals = totals.adding(frame)
    assert totals == Totals(count=len(frames), root=sum(struct.unpack("<Q", f)[0] for f in frames) % 2**64)
    random.shuffle(frames)
    for frame in frames:
        totals = totals.removing(frame)
    assert totals == Totals()


@pytest.mark.parametrize("value", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"last_used": "then", "hits": 1})])
def test_a_value_of_another_shape_is_damage(value: bytes) -> None:
    with pytest.raises(Damaged, match="expected a Use"):
        entries.decode("uses", b"k", value, Use)


def test_a_value_of_a_later_version_may_have_more_fields() -> None:
    value = msgspec.msgpack.encode({"last_used": 1.0, "hits": 2, "mood": "fine"})
    assert entries.decode("uses", b"k", value, Use) == Use(last_used=1.0, hits=2)


@given(st.integers(0, 101))
def test_spans_hold_the_first_tokens_of_a_path_end_to_end(tokens: int) -> None:
    position = 0
    for span, info in zip(entries.spans_of(PATH, tokens), PATH, strict=False):
        assert (span.segment, span.start, info.start) == (info.segment, 0, position)
        position += span.stop
    assert position == tokens


def test_spans_leave_out_what_a_child_has_branched_from() -> None:
    assert [(span.start, span.stop) for span in SPANS] == [(0, 32), (0, 64), (0, 5)]
    assert entries.spans_of(PATH, 0) == ()


def test_a_sequence_key_depends_on_identity_spans_and_name() -> None:
    other = Span(segment=SEGMENTS[2], start=0, stop=4)
    given_keys = [
        entries.sequence_key("ab", SPANS, None),
        entries.sequence_key("ac", SPANS, None),
        entries.sequence_key("ab", SPANS[:2], None),
        entries.sequence_key("ab", (*SPANS[:2], other), None),
        entries.sequence_key("ab", SPANS, "n"),
        entries.sequence_key("ab", SPANS, "m"),
        entries.sequence_key("ab", SPANS, ""),
    ]
    assert len(set(given_keys)) == len(given_keys)


def test_a_root_depends_on_every_seal_and_on_their_arrays() -> None:
    found = [sealed(info) for info in PATH]
    roots = {entries.spans_root(SPANS, found)}
    for i, info in enumerate(PATH):
        roots.add(entries.spans_root(SPANS, [*found[:i], sealed(info, "01"), *found[i + 1 :]]))
    swapped = msgspec.structs.replace(found[0], seals=dict(zip(found[0].seals, ["11", "00"], strict=True)))
    roots.add(entries.spans_root(SPANS, [swapped, *found[1:]]))
    assert len(roots) == 5


def test_a_root_does_not_depend_on_the_order_of_seals() -> None:
    found = [sealed(info) for info in PATH]
    turned = [msgspec.structs.replace(e, seals=dict(reversed(e.seals.items()))) for e in found]
    assert entries.spans_root(SPANS, turned) == entries.spans_root(SPANS, found)


@given(st.text(max_size=60), st.text(max_size=60))
def test_names_are_addressed_by_16_bytes_equal_only_for_equal_names(one: str, other: str) -> None:
    assert len(entries.name_key(one)) == 16
    assert (entries.name_key(one) == entries.name_key(other)) == (one == other)


@pytest.mark.parametrize(
    ("pinned", "name", "protected"), [(False, None, False), (True, None, True), (False, "n", True), (True, "n", True)]
)
def test_a_sequence_is_protected_by_a_pin_or_a_name(pinned: bool, name: str | None, protected: bool) -> None:
    sequence = Sequence(
        key="k", name=name, identity="i", tokens=1, fidelity="exact", spans=(), created=0, model="", pinned=pinned
    )
    assert sequence.protected is protected
