"""Rows that were written once decode to the same numbers for ever, and are made again from the numbers they were made of.

A change here is a codec of another name, not other bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from golden.make_codec_rows import FILE, SHAPE, numbers

from kvdb.codecs import CODECS
from kvdb.geometry import STORAGE_DTYPES

KNOWN = json.loads(FILE.read_text())
every_entry = pytest.mark.parametrize("entry", KNOWN, ids=lambda e: f"{e['codec']}-{e['config']}-{e['dtype']}")


@every_entry
def test_old_rows_decode_to_the_numbers_they_always_did(entry: dict[str, Any]) -> None:
    codec = CODECS[entry["codec"]](**entry["config"])
    rows = np.frombuffer(bytes.fromhex("".join(entry["rows"])), np.uint8).reshape(len(entry["rows"]), -1)
    out = np.empty(SHAPE, STORAGE_DTYPES[entry["dtype"]])
    codec.decode(rows, np.arange(len(rows)), 0, out, entry["dtype"])
    assert out.tobytes().hex() == entry["decoded"]


@every_entry
def test_the_same_numbers_make_the_same_rows(entry: dict[str, Any]) -> None:
    codec = CODECS[entry["codec"]](**entry["config"])
    rows = codec.encode(numbers(entry["dtype"]), entry["dtype"])
    assert [row.tobytes().hex() for row in rows] == entry["rows"]


def test_every_codec_has_rows_of_every_dtype() -> None:
    assert {(entry["codec"], entry["dtype"]) for entry in KNOWN} == {(c, d) for c in CODECS for d in STORAGE_DTYPES}
