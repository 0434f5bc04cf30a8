"""Abstracts by name. To add one: its file, and its line in the table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from kvdb.abstracts.base import Abstract, Array
from kvdb.abstracts.box import Box
from kvdb.abstracts.centroid import Centroid
from kvdb.abstracts.mean import Mean
from kvdb.abstracts.sketch import Sketch
from kvdb.geometry import as_float32

ABSTRACTS: Final[dict[str, Abstract]] = {abstract.name: abstract for abstract in (Box(), Sketch(), Mean(), Centroid())}


def build_all(names: Iterable[str], keys: Array, values: Array, tokens: int, dtype: str) -> dict[str, Array]:
    """Some abstracts of the same records, each as `Abstract.build` makes it. Values are converted only where one needs them.

    keys, values  (kv_heads, chunks, chunk_tokens, head_dim) in the storage dtype of the KV dtype
    """
    kinds = [ABSTRACTS[name] for name in names]
    exact_keys = as_float32(keys, dtype)
    exact_values = as_float32(values, dtype) if any(kind.of_values for kind in kinds) else None
    return {kind.name: kind.build(exact_keys, tokens, dtype, exact_values) for kind in kinds}


__all__ = ["ABSTRACTS", "Abstract", "Box", "Centroid", "Mean", "Sketch", "build_all"]
