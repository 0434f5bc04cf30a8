"""A store per test, checked when the test is over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import opened
from shown import here, make_store, make_trace, unchanged
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


@pytest.fixture(scope="session")
def shown_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "a.kvdb"
    make_store(path)
    return path


@pytest.fixture(scope="session")
def shown_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "t.json"
    make_trace(path)
    return path


@pytest.fixture(scope="session")
def shown_page(shown_store: Path, shown_trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of both. Nothing in the store has changed by it."""
    path, before = tmp_path_factory.mktemp("shown") / "report.html", unchanged(shown_store)
    code, out, err = here("report", shown_store, "-o", path, "--trace", shown_trace)
    assert (code, err) == (0, "")
    assert out.startswith(f"{path}: 72 sequences, 0 problems, ")
    assert unchanged(shown_store) == before
    return path
