"""What a retention policy is: the order in which stored KV may go when room is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple


class Leaf(NamedTuple):
    """A segment that nothing continues and nothing protects: what may go next.

    last_used      store time, seconds
    hits           times it was reused
    start, tokens  the positions it holds
    """

    segment: str
    last_used: float
    hits: int
    start: int
    tokens: int
    disk_bytes: int


class Retention(ABC):
    """Contract. Stateless; modifies nothing. The engine asks leaf by leaf, so a shared parent goes only after its children."""

    name: ClassVar[str]

    @abstractmethod
    def rank(self, leaf: Leaf) -> tuple[float, ...]:
        """Where a leaf stands: the lowest goes first. Always the same length; ties are broken by segment id."""
