"""What `import kvdb` promises: the names exist, are documented, and do what the package's first lines say."""

from __future__ import annotations

import inspect
import logging

import pytest

import kvdb

FUNCTIONS = [
    (f"{name}.{attribute}", value)
    for name in kvdb.__all__
    if inspect.isclass(getattr(kvdb, name))
    for attribute, value in vars(getattr(kvdb, name)).items()
    if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, (classmethod, property)))
]


def test_no_public_name_is_listed_twice() -> None:
    assert len(kvdb.__all__) == len(set(kvdb.__all__))


@pytest.mark.parametrize("name", kvdb.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(kvdb, name)
    if inspect.isclass(value):
        assert value.__doc__
        assert inspect.getdoc(value)


@pytest.mark.parametrize("method", sorted(m for m in vars(kvdb.KVDB) if not m.startswith("_")))
def test_every_method_of_a_store_is_documented(method: str) -> None:
    value = inspect.getattr_static(kvdb.KVDB, method)
    assert inspect.getdoc(value)


def test_every_public_function_is_annotated() -> None:
    for name, value in FUNCTIONS:
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        assert "return" in function.__annotations__, name


def test_the_version_is_three_numbers() -> None:
    assert [part.isdigit() for part in kvdb.__version__.split(".")] == [True] * 3


def test_the_library_configures_no_logging_but_a_null_handler() -> None:
    assert [type(h) for h in logging.getLogger("kvdb").handlers] == [logging.NullHandler]
