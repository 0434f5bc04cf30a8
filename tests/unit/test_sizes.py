"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvdb.errors import InvalidInput
from kvdb.sizes import parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("7B", 7),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("50GB", 50 * 10**9),
        ("50 gb", 50 * 10**9),
        (" 2.5 GiB ", 5 * 2**29),
        ("0.1MB", 100_000),
        ("1.5B", 1),
        ("3PiB", 3 * 2**50),
    ],
)
def test_a_size_is_a_number_and_a_decimal_or_binary_unit(text: int | str, expected: int) -> None:
    assert parse_bytes("here", text) == expected


@pytest.mark.parametrize(
    "size",
    [
        "",
        "GB",
        "-1",
        -1,
        "1e9",
        "1 G B",
        "1XB",
        "½GB",
        "0x10",
        "1,000",
        "inf",
        "nan",
        1.5,
        True,
        None,
        "9" * 400,
        2**63,
    ],
    ids=lambda size: str(size)[:12],
)
def test_anything_else_is_refused_and_shown(size: object) -> None:
    with pytest.raises(InvalidInput, match=r"here is .*expected bytes such as"):
        parse_bytes("here", size)  # type: ignore[arg-type]


@given(st.integers(0, 2**63 - 1))
def test_a_plain_number_stays_what_it_is_as_a_number_and_as_text(size: int) -> None:
    assert parse_bytes("here", size) == parse_bytes("here", str(size)) == size
