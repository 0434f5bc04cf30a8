"""Every harness keeps a tally, printed at the end of the run: the raw counts that documents quote."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.children import Nursery, nursery
from faults.tally import Tally

_TALLIES: list[Tally] = []


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    _TALLIES.append(Tally(request.node.nodeid.partition("tests/")[2] or request.node.nodeid))
    return _TALLIES[-1]


@pytest.fixture(scope="module")
def nurse() -> Iterator[Nursery]:
    with nursery() as server:
        yield server


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: for harnesses to which fsync does not matter."""
    folder = Path(tempfile.mkdtemp(prefix="kvdb-faults-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield folder
    shutil.rmtree(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _TALLIES:
        terminalreporter.section("faults: points tried and what came of them")
        for tally in _TALLIES:
            terminalreporter.write_line(tally.report())
