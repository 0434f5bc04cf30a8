"""The selectors that can be judged, by name and with other parameters: `box`, `sketch:bits=4`, `box:beta=1`."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from kvdb.errors import InvalidInput
from kvdb.runtime.selection import SELECTORS, Selector
from kvdb.tools.evaluate.oracle import Oracle

JUDGED: Final[dict[str, type[Selector]]] = {**SELECTORS, Oracle.name: Oracle}


def parse_selector(text: str) -> Selector:
    """NAME or NAME:FIELD=VALUE,FIELD=VALUE.

    raises  InvalidInput for an unknown name or field, or a value that is no number
    """
    name, _, settings = text.partition(":")
    if name not in JUDGED:
        raise InvalidInput(f"--selector {text}: no selector {name!r}, expected one of {', '.join(JUDGED)}")
    kind: Any = JUDGED[name]
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
