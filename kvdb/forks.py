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


_INHERITED: Final[weakref.WeakSet[Inherited]] = weakref.WeakSet()


def watch(inherited: Inherited) -> None:
    """Have its `after_fork` called in every child that Python forks from now on, as long as it lives."""
    _INHERITED.add(inherited)


def _forked() -> None:
    for inherited in list(_INHERITED):
        inherited.after_fork()


os.register_at_fork(after_in_child=_forked)
