"""What an abstract is: the small summary of a record from which its importance to a query is estimated unread.

Abstracts are computed from exact keys while a segment is written, and stored beside it as an array of their own
(layer, chunk, head, part, dim). How a query is scored against one is the business of `kvdb.runtime.selection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Abstract(ABC):
    """Contract. One instance per kind; stateless."""

    name: ClassVar[str]
    parts: ClassVar[int]
    """Rows of head_dim values per record, in the KV dtype."""

    @abstractmethod
    def build(self, keys: Array, tokens: int) -> Array:
        """Summarise keys.

        keys     (kv_heads, chunks, chunk_tokens, head_dim) float32, after RoPE; only the first `tokens` tokens count,
                 the rest of the last chunk is padding
        returns  (chunks, kv_heads, parts, head_dim) float32, every value representable in the KV dtype
        """
