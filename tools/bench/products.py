"""What a layer of Llama-3.1-8B computes for one token beside attention, without what is small: its seven matrix products, in bfloat16.

One set of weights, 416 MiB, stands for those of every layer: far more than caches hold, so each layer brings them from memory again, as
its own ones would be. Their values do not matter to how long that takes.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

HIDDEN: Final = 4096
BETWEEN: Final = 14_336
KV: Final = 1024


class Products:
    """Before attention, then after it."""

    def __init__(self) -> None:
        self._q, self._o = _weights(HIDDEN, HIDDEN), _weights(HIDDEN, HIDDEN)
        self._k, self._v = _weights(KV, HIDDEN), _weights(KV, HIDDEN)
        self._gate, self._up = _weights(BETWEEN, HIDDEN), _weights(BETWEEN, HIDDEN)
        self._down = _weights(HIDDEN, BETWEEN)
        self._hidden = torch.ones(1, HIDDEN, dtype=torch.bfloat16)

    def before(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return linear(self._hidden, self._q), linear(self._hidden, self._k), linear(self._hidden, self._v)

    def after(self) -> Tensor:
        """The output projection and the feed-forward network."""
        hidden = linear(self._hidden, self._o)
        return linear(silu(linear(hidden, self._gate)) * linear(hidden, self._up), self._down)


def _weights(rows: int, columns: int) -> Tensor:
    return torch.full((rows, columns), columns**-1.0, dtype=torch.bfloat16)
