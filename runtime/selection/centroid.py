"""Selection by sketches, and an estimate of what is not read, by clusters of keys: RetroInfer's estimation zone.

Records are chosen as `sketch` chooses them. The tokens that stay unread enter attention too, a cluster at a time: the mean key
and the mean value of the cluster, with the weight of those of its tokens that are unread. By Jensen's inequality a cluster rarely
weighs more than in truth, where all of its tokens are unread never.
source: RetroInfer, arXiv 2505.02922 (some clusters are read, the next ones estimated; here what is read are records).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvdb.abstracts.centroid import NOBODY, unpack
from kvdb.runtime.selection.base import Array, Estimate, Resident, Scores
from kvdb.runtime.selection.centroid_sums import of_unread
from kvdb.runtime.selection.sketch import Sketches, SketchSelector
from kvdb.runtime.selection.sketch_scores import of_boxes

if TYPE_CHECKING:
    from kvdb.runtime.selection.rules import Plan


class Clusters(NamedTuple):
    """Clusters in memory, as many as records.

    keys, values              (kv_heads, chunks, head_dim) int8: mean = scale * these
    key_scales, value_scales  (kv_heads, chunks) float32
    owners                    (kv_heads, chunks, chunk_tokens) int32: the cluster of each token; -1: none
    sizes                     (kv_heads, chunks) int32: tokens of each cluster
    """

    keys: Tensor
    key_scales: Tensor
    values: Tensor
    value_scales: Tensor
    owners: Tensor
    sizes: Tensor


_SKETCHES = len(Sketches._fields)


@dataclass(frozen=True, slots=True)
class CentroidSelector(SketchSelector):
    """As `SketchSelector`, whose settings it has."""

    name: ClassVar[str] = "centroid"

    @property
    def abstracts(self) -> dict[str, int | None]:
        return {"sketch": 1 + self.bits, "centroid": None}

    def prepare(self, stored: Mapping[str, Array], chunk_tokens: int, head_dim: int) -> Resident:
        """`Sketches`, then `Clusters`, in one tuple."""
        found = unpack(stored["centroid"][0], head_dim)
        keys, key_scales, values, value_scales, members = (part.swapaxes(0, 1).copy(order="C") for part in found)
        heads, chunks, _ = members.shape
        tokens = chunks * chunk_tokens
        owners = np.full((heads, tokens), -1, np.int32)
        places = members + chunk_tokens * np.arange(chunks)[:, None]
        there = (members != NOBODY) & (places >= 0) & (places < tokens)
        head, cluster, _ = np.nonzero(there)
        owners[head, places[there]] = cluster
        clusters = (
            keys,
            key_scales,
            values,
            value_scales,
            owners.reshape(heads, chunks, chunk_tokens),
            _sizes(owners, chunks),
        )
        return *SketchSelector.prepare(self, stored, chunk_tokens, head_dim), *(
            torch.from_numpy(part) for part in clusters
        )

    def join(self, parts: list[Resident]) -> Resident:
        clusters = [Clusters(*part[_SKETCHES:]) for part in parts]
        firsts = np.cumsum([0, *(each.keys.shape[1] for each in clusters[:-1])])
        moved = [
            each._replace(owners=torch.where(each.owners < 0, each.owners, each.owners + int(first)))
            for each, first in zip(clusters, firsts, strict=True)
        ]
        joined = SketchSelector.join(self, [part[:_SKETCHES] for part in parts])
        return *joined, *(torch.cat(same, 1) for same in zip(*moved, strict=True))

    def score(self, q: Tensor, resident: Resident, take: int, *, ceilings: bool = False) -> Scores:
        return SketchSelector.score(self, q, resident[:_SKETCHES], take, ceilings=ceilings)

    def estimate(self, q: Tensor, resident: Resident, scores: Scores, plan: Plan) -> Estimate | None:
        kept = Clusters(*resident[_SKETCHES:])
        logits = of_boxes(q, kept.keys, kept.key_scales)
        found = of_unread(logits, kept.owners, kept.sizes, plan.chunks, plan.counts, kept.values, kept.value_scales)
        return None if found is None else Estimate(*found, sum(part.nbytes for part in kept[:4]))


def _sizes(owners: Array, chunks: int) -> Array:
    """Tokens of each cluster, (kv_heads, chunks) int32."""
    return np.stack([np.bincount(row[row >= 0], minlength=chunks) for row in owners]).astype(np.int32)
