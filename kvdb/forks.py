"""After a fork: what a child makes anew before anything else runs in it.

Locks, which threads of the parent may hold for ever here, and whatever is the parent's alone.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, Protocol


class Inherited(Protocol):
    def after_fork(self) -> None:
        """Called in the child, which has one thread. Waits for nothing and changes nothing that the parent sees."""


class _Watch:
    """What is watched. The interpreter is told at the first one, not when this module is imported."""

    def __init__(self) -> None:
        self._inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()
        self._told = False

    def add(self, inherited: Inherited) -> None:
        if not self._told:
            self._told = True
            os.register_at_fork(after_in_child=self._forked)
        self._inherited.add(inherited)

    def _forked(self) -> None:
        for inherited in list(self._inherited):
            inherited.after_fork()


_WATCH: Final = _Watch()


def watch(inherited: Inherited) -> None:
    """Have its `after_fork` called in every child that Python forks from now on, as long as it lives."""
    _WATCH.add(inherited)
