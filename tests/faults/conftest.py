"""Every harness keeps a tally; what it says is printed at the end of the run (tests/conftest.py)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.children import Nursery, nursery
from faults.tally import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    kept = Tally(request.node.nodeid.partition("tests/")[2] or request.node.nodeid)
    yield kept
    request.node.user_properties.append(("tally", kept.report()))


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
