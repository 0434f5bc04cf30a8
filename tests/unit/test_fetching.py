"""Records come into memory on another thread, in order, in pieces, and nobody depends on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, extend, opened, read_kv, takes_direct, token_list
from hypothesis import given
from hypothesis import strategies as st

from kvdb import KVDB
from kvdb.errors import Damaged
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.runtime.fetching import Fetching, Run, _pieces
from kvdb.runtime.timeline import Timeline
from kvdb.segments import Segment

RECORD = 2 * 16 * 8 * 2
"""Bytes: K and V, tokens, head_dim, bfloat16."""
LONG_S = 30


@pytest.fixture(params=READERS)
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVDB]:
    if request.param == "direct" and not takes_direct(tmp_path):
        pytest.skip(f"{tmp_path} is on a file system without O_DIRECT, expected one with it; see --basetemp")
    with opened(tmp_path / "s", read_mode=request.param) as store:
        yield store


@pytest.fixture
def segment(db: KVDB) -> Segment:
    return extend(db, token_list(16 * 40)).last


def finish(fetching: Fetching) -> None:
    assert fetching._thread is not None
    fetching._thread.join(LONG_S)
    assert not fetching._thread.is_alive()


def begun(segment: Segment, reader: Reader, runs: list[tuple[int, int, int]], room: int | None = None) -> Fetching:
    fetching = Fetching(Timeline())
    fetching.begin(reader, [Run(segment, *run) for run in runs], RECORD, room)
    return fetching


class Log:
    """What a reader was asked to lend: (layer, first record, records)."""

    def __init__(self, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lent: list[tuple[int, int, int]] = []
        self.closed = False
        real, close = reader.lend, reader.close

        def lend(layer: int, wanted: Any) -> Any:
            ((_, records),) = wanted
            self.lent.append((layer, int(records[0]), len(records)))
            return real(layer, wanted)

        def closing() -> None:
            self.closed = True
            close()

        monkeypatch.setattr(reader, "lend", lend)
        monkeypatch.setattr(reader, "close", closing)


def test_all_of_it_comes_in_order_in_pieces(db: KVDB, segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvdb.runtime.fetching._PIECE_BYTES", 32 * RECORD)
    reader = db.reader()
    log = Log(reader, monkeypatch)
    fetching = begun(segment, reader, [(2, 8, 80), (0, 0, 10)])
    finish(fetching)
    assert log.lent == [(2, 8, 32), (2, 40, 32), (2, 72, 8), (0, 0, 10)]
    assert log.closed
    assert fetching.seconds > 0
    if db.host is not None:
        assert fetching.fetched == 82 * RECORD
        other = db.reader()
        read_kv(other, segment, 0, 16 * 5)
        assert other.bytes_fetched == 0  # it is there
        other.close()


def test_no_more_comes_than_there_is_room_for(db: KVDB, segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = db.reader()
    log = Log(reader, monkeypatch)
    finish(begun(segment, reader, [(0, 0, 40), (2, 0, 80)], room=50 * RECORD + 1))
    assert log.lent == [(0, 0, 40), (2, 0, 10)]


@pytest.mark.parametrize("room", [0, None])
def test_nothing_to_do_is_done_at_once(
    db: KVDB, segment: Segment, room: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = db.reader()
    log = Log(reader, monkeypatch)
    finish(begun(segment, reader, [] if room is None else [(0, 0, 40)], room))
    assert (log.lent, log.closed) == ([], True)


def test_it_stops_after_the_piece_it_is_at(db: KVDB, segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvdb.runtime.fetching._PIECE_BYTES", RECORD)
    reader, gate, reached = db.reader(), threading.Event(), threading.Event()
    log, lend = Log(reader, monkeypatch), reader.lend

    def slow(*args: Any) -> Any:
        reached.set()
        gate.wait(LONG_S)
        return lend(*args)

    monkeypatch.setattr(reader, "lend", slow)
    fetching = begun(segment, reader, [(0, 0, 80)])
    assert reached.wait(LONG_S)
    fetching.let_go()  # waits for nothing
    threading.Timer(0.05, gate.set).start()
    fetching.stop()
    fetching.stop()
    assert (len(log.lent), log.closed) == (1, True)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvdb-fetch"]


def test_it_can_be_used_again(db: KVDB, segment: Segment) -> None:
    fetching = begun(segment, db.reader(), [(0, 0, 80)])
    fetching.stop()
    fetching.begin(db.reader(), [Run(segment, 2, 0, 80)], RECORD, None)
    finish(fetching)


def test_what_fails_is_left_to_who_reads(db: KVDB, segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = db.reader()
    log = Log(reader, monkeypatch)

    def fail(*_: object) -> Any:
        raise Damaged("a record: not what it was, expected it")

    monkeypatch.setattr(reader, "_check", fail)
    fetching = begun(segment, reader, [(0, 0, 80)])
    finish(fetching)  # a thread that raised would be a warning, and so an error of this test
    assert (log.closed, fetching.fetched) == (True, 0)


@given(
    runs=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), max_size=5),
    most=st.integers(1, 20),
    room=st.none() | st.integers(0, 200),
)
def test_pieces_are_the_runs_up_to_the_room(runs: list[tuple[int, int]], most: int, room: int | None) -> None:
    nothing: Any = None
    made = list(_pieces([Run(nothing, at, start, start + n) for at, (start, n) in enumerate(runs)], most, room))
    each = [(piece.layer, record) for piece in made for record in range(piece.start, piece.stop)]
    assert each == [(at, record) for at, (start, n) in enumerate(runs) for record in range(start, start + n)][:room]
    assert all(0 < piece.stop - piece.start <= most for piece in made)


def test_records_are_as_large_as_was_said(segment: Segment) -> None:
    assert SMALL.groups[0].head_dim == 8
    assert RECORD * SMALL.groups[0].kv_heads * len(SMALL.layers) == 16 * SMALL.token_bytes
