"""Two processes write one store at once: both succeed, whether their tokens are the same or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import assert_reads_back, finish, identity, opened, python, token_list

WRITER = """
import sys
from helpers import *
path, seeds = sys.argv[1], [int(s) for s in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.readline()
with KVDB.open(path) as db:
    for seed in seeds:
        extend(db, token_list(100, seed), segment_tokens=48, name=f"n{seed}")
        assert_reads_back(db, token_list(100, seed), db.sequence(f"n{seed}").spans)
"""


@pytest.mark.parametrize("same", [True, False], ids=["same tokens", "other tokens"])
@pytest.mark.parametrize("exists", [True, False], ids=["existing store", "store made by both"])
def test_two_processes_write_at_once(tmp_path: Path, same: bool, exists: bool) -> None:
    path = tmp_path / "s"
    if exists:
        with opened(path):
            pass
    theirs = range(10) if same else range(10, 20)
    writers = [python(WRITER, str(path), *map(str, seeds)) for seeds in (range(10), theirs)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        finish(writer)
    with opened(path) as db:
        for seed in {*range(10), *theirs}:
            tokens = token_list(100, seed)
            assert db.match(identity(), tokens).tokens == 100
            assert_reads_back(db, tokens, db.sequence(f"n{seed}").spans)
        assert list((path / "tmp").iterdir()) == []


def test_a_reader_of_another_process_sees_each_commit_whole(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with opened(path):
        pass
    writer = python(WRITER, str(path), *map(str, range(10)))
    assert writer.stdin is not None
    writer.stdin.write("\n")
    writer.stdin.flush()
    with opened(path, "r") as db:
        while writer.poll() is None:
            for sequence in db.sequences():
                if sequence.name is None:  # what the writer has committed of its next one
                    continue
                tokens = token_list(100, int(sequence.name[1:]))
                assert_reads_back(db, tokens, sequence.spans)
        finish(writer)
        assert len(db.sequences()) == 10
