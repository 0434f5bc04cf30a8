"""What a replacement policy is: which of the rows in memory are worth keeping when others need their slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Uses(NamedTuple):
    """What is known of the rows in memory, each an array of (n,).

    used_at  int64: the time of the last use. A use of a row takes one unit of time
    times    float64: how often it was used since it came in, 1 or more
    weight   float64: what callers have said it is worth, summed up (shares of attention mass, say); 0: nothing was said
    """

    used_at: Array
    times: Array
    weight: Array


class Replacement(ABC):
    """Contract. Stateless; modifies nothing; looks at what it is given and at nothing else."""

    name: ClassVar[str]

    @abstractmethod
    def scores(self, uses: Uses, now: int, half_life: float) -> Array:
        """What each row is worth: the lowest go first. Never lower for a row that was used later, all else being equal.

        now        not before any `used_at`
        half_life  in units of time, above 0: where uses of long ago count for less, they count for half after so long
        returns    (n,) float64, finite
        """
