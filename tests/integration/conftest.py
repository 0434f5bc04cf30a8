"""A store per test, checked when the test is over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import opened
from tiny_models import one_thread

from kvdb import KVDB


@pytest.fixture
def db(tmp_path: Path) -> Iterator[KVDB]:
    """Closed after the test, and nothing may be wrong in it."""
    with opened(tmp_path / "a.kvdb") as store:
        yield store


@pytest.fixture
def single_thread() -> Iterator[None]:
    """For tiny models."""
    with one_thread():
        yield
