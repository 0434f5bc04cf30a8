"""A reader who may not write LMDB's table of readers: no page changes under it while somebody writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_healthy, extend, token_list

from kvdb import KVDB

NOBODY = 65534
READING = """
import os, sys, time
from kvdb import KVDB
from kvdb.inspection.snapshot import snapshot

os.setgroups([])
os.setresgid({nobody}, {nobody}, {nobody})
os.setresuid({nobody}, {nobody}, {nobody})
looks, sequences, end = 0, 0, time.monotonic() + 4
with KVDB.open({store!r}, "r") as db:
    while time.monotonic() < end:
        found = snapshot(db)
        assert not found.problems, found.problems
        looks, sequences = looks + 1, max(sequences, len(found.sequences))
assert looks > 10 and sequences > 2, (looks, sequences)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not write")
@pytest.mark.parametrize("durability", ["relaxed", "commit"])
def test_a_writer_changes_nothing_under_a_reader_without_a_place_in_the_table(scratch: Path, durability: str) -> None:
    store = scratch / "s"
    with KVDB.open(store, durability=durability) as db:
        kept = [extend(db, token_list(40, seed=i)).key for i in range(10)]
        subprocess.run(["chmod", "-R", "a+rX", scratch], check=True)
        script = READING.format(store=str(store), nobody=NOBODY)
        reader = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        writes = 0
        while reader.poll() is None:
            kept.append(extend(db, token_list(40, seed=100 + writes)).key)
            db.delete(kept.pop(0))
            writes += 1
        _, said = reader.communicate()
        assert (reader.returncode, said) == (0, "")
        assert writes > 10
        assert_healthy(db)
