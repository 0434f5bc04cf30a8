"""What a retention policy is: the order in which unnamed sequences may go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as List
from typing import ClassVar

from kvdb.catalog import Sequence


class Retention(ABC):
    """Contract. Stateless: whatever a policy needs is in the sequences' entries."""

    name: ClassVar[str]

    @abstractmethod
    def order(self, sequences: List[Sequence]) -> list[Sequence]:
        """Evictable sequences, first to go first. Named ones are never among them. Zero case: []."""
