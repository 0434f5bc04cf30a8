"""The tree of errors: typed, stable kinds, messages as they were written."""

from __future__ import annotations

import inspect

import pytest

from kvdb import errors
from kvdb.errors import KVDBError, Problem

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, KVDBError)]
BUILTINS = {
    "InvalidInput": ValueError,
    "NotFinite": ValueError,
    "Unsupported": ValueError,
    "StoreNotFound": FileNotFoundError,
    "StoreLocked": TimeoutError,
    "OutOfMemory": MemoryError,
    "StorageFull": OSError,
    "Stalled": TimeoutError,
    "SequenceNotFound": KeyError,
}


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_a_message_is_printed_as_it_was_written(error: type[KVDBError]) -> None:
    message = "layer 3: is 'a', expected \"b\""
    assert str(error(message)) == message


@pytest.mark.parametrize("error", CLASSES, ids=lambda c: c.__name__)
def test_every_error_is_in_the_tree_of_the_docstring(error: type[KVDBError]) -> None:
    assert errors.__doc__ is not None
    assert error.__name__ in errors.__doc__


@pytest.mark.parametrize("name", BUILTINS)
def test_an_error_is_caught_by_the_builtin_it_resembles(name: str) -> None:
    assert issubclass(getattr(errors, name), BUILTINS[name])


def test_kinds_are_unique_and_stable() -> None:
    assert {c.__name__: c.kind for c in CLASSES} == {
        "KVDBError": "error",
        "InvalidInput": "invalid-input",
        "NotFinite": "not-finite",
        "Unsupported": "unsupported",
        "StoreError": "store",
        "StoreNotFound": "store-not-found",
        "NotAStore": "not-a-store",
        "NewerFormat": "newer-format",
        "OlderFormat": "older-format",
        "PrefixDeleted": "prefix-deleted",
        "ReadOnly": "read-only",
        "StoreLocked": "locked",
        "OutOfMemory": "out-of-memory",
        "StorageFull": "storage-full",
        "Stalled": "stalled",
        "Damaged": "damaged",
        "SequenceNotFound": "sequence-not-found",
        "IdentityMismatch": "identity-mismatch",
    }


def test_a_problem_says_where_first() -> None:
    assert str(Problem("layer 3", "record", "is 1, expected 2")) == "layer 3: is 1, expected 2"
