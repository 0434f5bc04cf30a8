"""Exact softmax attention over parts of the keys, merged by log-sum-exp.

`attend` gives one part's output and log-sum-exp; merging parts in any split equals attention over all keys at once, up
to float rounding. This is what lets attention read its keys in fixed tiles from disk.
source: online softmax, FlashAttention, arXiv 2205.14135; MicroAttention merge, arXiv 2401.02669.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys.

    out  (kv_heads, group, queries, head_dim), softmax over these keys only; float32 once merged
    lse  (kv_heads, group, queries) float32, log of the sum of exp(score) over these keys
    """

    out: Tensor
    lse: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False) -> Partial:
    """Attention of grouped queries over one part.

    q       (kv_heads, group, queries, head_dim): `group` query heads share a KV head
    k, v    (kv_heads, tokens, head_dim), tokens > 0
    causal  query i sees keys 0..i; requires queries == tokens
    """
    heads, group, queries, dim = q.shape
    if q.device.type != "cpu":
        return _attend_plain(q, k, v, scale=scale, causal=causal)
    if causal:  # the kernel's causal mask counts rows, so every query head needs its own keys
        rows = q.reshape(1, heads * group, queries, dim)
        k = k[:, None].expand(heads, group, -1, dim).reshape(1, heads * group, -1, dim)
        v = v[:, None].expand(heads, group, -1, dim).reshape(1, heads * group, -1, dim)
    else:
        rows = q.reshape(1, heads, group * queries, dim)
        k, v = k[None], v[None]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, k, v, 0.0, causal, scale=scale)
    return Partial(out.reshape(q.shape), lse.reshape(heads, group, queries))


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> Partial:
    """The same in plain matrix products, float32 softmax: for devices whose kernels return no log-sum-exp."""
    scores = torch.einsum("hgqd,hkd->hgqk", q, k).float() * scale
    if causal:
        n = q.shape[2]
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool, device=q.device).tril(), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    out = torch.einsum("hgqk,hkd->hgqd", torch.exp(scores - lse[..., None]).to(v.dtype), v)
    return Partial(out, lse)


def attend_one(q: Tensor, parts: list[tuple[Tensor, Tensor]], beside: Partial | None = None) -> Tensor:
    """Attention of one query per head over several parts at once: fewer, larger operations than `attend` and `merge`.

    q        (kv_heads, group, head_dim), already scaled
    parts    pairs k, v, each (kv_heads, tokens, head_dim), tokens > 0
    beside   attention over other keys, whose queries are 1; an lse of -inf counts for nothing
    returns  (kv_heads, group, head_dim)
    """
    if q.dtype != torch.float32 and q.device.type == "cpu":  # half-precision products are 1.5-3.6x slower on CPU
        exact = [attend(q[:, :, None], k, v, scale=1.0) for k, v in parts]
        return merge(exact if beside is None else [*exact, beside]).out[:, :, 0].to(q.dtype)
    scores = torch.cat([torch.bmm(q, k.transpose(1, 2)) for k, _ in parts], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    shares = weights.split([k.shape[1] for k, _ in parts], -1)
    out = torch.bmm(shares[0], parts[0][1])
    for share, (_, v) in zip(shares[1:], parts[1:], strict=True):
        out = torch.baddbmm(out, share, v)
    if beside is None:
        return out
    lse = torch.logsumexp(scores.float(), -1)
    return merge([Partial(out[:, :, None], lse[..., None]), beside]).out[:, :, 0].to(q.dtype)


def merge(parts: list[Partial]) -> Partial:
    """Attention over the union of disjoint parts, in float32: rounding at every merge would add up over many tiles.

    A single part is returned as it is.
    """
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        a, b = parts
        share = torch.sigmoid(a.lse - b.lse)[..., None]  # weight of `a`
        return Partial(torch.lerp(b.out.float(), a.out.float(), share), torch.logaddexp(a.lse, b.lse))
    all_lse = torch.stack([part.lse for part in parts])  # [parts, heads, group, queries]
    lse = torch.logsumexp(all_lse, 0)
    weights = torch.softmax(all_lse, 0)[..., None]  # sums to 1; exp(all_lse - lse) is off by |lse| roundings
    out = (torch.stack([part.out for part in parts]).float() * weights).sum(0)
    return Partial(out, lse)
