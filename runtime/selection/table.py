"""Selectors by name: our own, and what other packages add.

A package adds one by an entry point, `[project.entry-points."kvdb.selectors"]` in its pyproject.toml, from a name to a subclass of
`Selector`. It is loaded when it is asked for, so that a broken package harms nobody who does not use it. Our names cannot be
taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, cast

from kvdb.errors import Unsupported
from kvdb.runtime.selection.base import Selector

GROUP: Final = "kvdb.selectors"


class SelectorTable(Mapping[str, type[Selector]]):
    """own: the members that are no entry points."""

    def __init__(self, own: Iterable[type[Selector]]) -> None:
        self.own: Final = {kind.name: kind for kind in own}

    def __getitem__(self, name: str) -> type[Selector]:
        """raises  KeyError for a name that nobody has; Unsupported for a package that does not keep the contract"""
        if name in self.own:
            return self.own[name]
        found = tuple(entry_points(group=GROUP, name=name))
        if not found:
            raise KeyError(name)
        return _loaded(found)

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in set(self)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.own, *sorted(entry_points(group=GROUP).names)]))

    def __len__(self) -> int:
        return len(list(iter(self)))


def _loaded(found: tuple[EntryPoint, ...]) -> type[Selector]:
    packages = ", ".join(f"{each.dist.name if each.dist else '?'} ({each.value})" for each in found)
    where = f"selector {found[0].name!r} of {packages}"
    if len(found) > 1:
        raise Unsupported(f"{where}: {len(found)} packages give that name, expected one; uninstall the others")
    try:
        kind: Any = found[0].load()
    except Exception as e:
        raise Unsupported(
            f"{where}: cannot be loaded ({type(e).__name__}: {e}); repair or uninstall the package"
        ) from e
    fits = isinstance(kind, type) and issubclass(kind, Selector) and dataclasses.is_dataclass(kind)
    if not fits:
        raise Unsupported(
            f"{where}: is {kind!r}, expected a dataclass that is a subclass of Selector; tell its authors"
        )
    if kind.name != found[0].name:
        raise Unsupported(
            f"{where}: calls itself {kind.name!r}, expected the name of its entry point; tell its authors"
        )
    return cast(type[Selector], kind)
