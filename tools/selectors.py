"""Selectors on the command line, by name and with other settings: `box`, `sketch:bits=4`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvdb.errors import InvalidInput
from kvdb.runtime.selection import SELECTORS, Selector


def parse_selector(text: str, table: Mapping[str, type[Selector]] = SELECTORS) -> Selector:
    """NAME or NAME:FIELD=VALUE,FIELD=VALUE.

    raises  InvalidInput for a name that is not in the table, an unknown field, or a value that it cannot have; Unsupported for a
            selector of another package that cannot be loaded
    """
    name, _, settings = text.partition(":")
    if name not in table:
        raise InvalidInput(f"--selector {text}: no selector {name!r}, expected one of {', '.join(table)}")
    kind: Any = table[name]
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}
    changes: dict[str, float | int] = {}
    for setting in filter(None, settings.split(",")):
        field, _, value = setting.partition("=")
        if field not in defaults:
            known = f"one of {', '.join(defaults)}" if defaults else "none"
            raise InvalidInput(f"--selector {text}: {name} has no {field!r}, expected {known}")
        try:
            changes[field] = type(defaults[field])(value)
        except ValueError:
            raise InvalidInput(
                f"--selector {text}: {field} is {value!r}, expected a number such as {defaults[field]}"
            ) from None
    selector: Selector = kind(**changes)
    return selector
