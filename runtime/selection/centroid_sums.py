"""Attention over the unread tokens of clusters: compiled on CPU, in torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdb.runtime.heads import over_heads
from kvdb.runtime.selection.loops import can_compile


def of_unread(
    logits: Tensor, owners: Tensor, sizes: Tensor, chunks: Tensor, counts: Tensor | None, values: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Attention in which every token that is not read has the logit and the value of its cluster.

    logits  (kv_heads, group, clusters) float32
    owners  (kv_heads, records, chunk_tokens) int32: the cluster of each token; -1: none
    sizes   (kv_heads, clusters) int32: tokens of each cluster
    chunks  (kv_heads, n) int64: records that are read, the first `counts` (kv_heads,) of them; None: all
    values  (kv_heads, clusters, head_dim) int8 times scales (kv_heads, clusters) float32
    returns outputs (kv_heads, group, head_dim) and log-sum-exps (kv_heads, group), both float32; 0 and -inf for KV heads of
            which all is read; None where that is so of all
    """
    if can_compile(logits):
        from kvdb.runtime.selection.centroid_kernel import kernel

        heads, group, _ = logits.shape
        most = torch.full((heads,), chunks.shape[1]) if counts is None else counts
        out, lse = logits.new_empty(heads, group, values.shape[2]), logits.new_empty(heads, group)
        arrays = [t.contiguous().numpy() for t in (logits, owners, sizes, chunks, most, values, scales)]
        arrays += out.numpy(), lse.numpy()
        add_up, unread = kernel(), list[bool]()
        over_heads(heads, owners.nbytes + values.nbytes, lambda h: unread.append(add_up(*(each[h] for each in arrays))))
        return (out, lse) if any(unread) else None
    gone = owners.gather(1, chunks[..., None].expand(-1, -1, owners.shape[2]))  # [kv_heads, n, chunk_tokens]
    counted = gone >= 0
    if counts is not None:
        counted &= (torch.arange(chunks.shape[1], device=chunks.device) < counts[:, None])[..., None]
    left = sizes.scatter_add(1, gone.clamp_min(0).flatten(1).long(), -counted.flatten(1).int())
    if not left.any():
        return None
    weights = logits + left.log()[:, None]
    lse = torch.logsumexp(weights, -1)
    weights = torch.exp(weights - lse[..., None]).nan_to_num(0) * scales[:, None]
    return torch.bmm(weights, values.float()), lse
