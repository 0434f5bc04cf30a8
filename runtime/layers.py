"""Cache layers for transformers: where a layer's newest tokens wait, and how its attention reads the stored ones.

transformers calls `update(k, v)` and then its attention function with whatever `update` returned. Full-attention layers
return an opaque `Handle`: only KVDB's attention function can use it, every other one fails loudly instead of computing
with something else. Sliding-window layers stay what they are in transformers and only keep what must be stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvdb.errors import Unsupported
from kvdb.runtime.gather import Gather, Lent
from kvdb.runtime.history import FLUSH_TOKENS, History
from kvdb.runtime.selection import Certified, Plan, covered_mass
from kvdb.runtime.selection.loops import can_compile
from kvdb.runtime.tiles import Partial, attend, attend_one, merge

if TYPE_CHECKING:
    from kvdb.runtime.cache import KVDBCache

TILE_TOKENS = 1024
"""Dense attention reads stored chunks in runs of this many tokens."""
_FIRST_CAPACITY = 64


class Tail:
    """Newest tokens of one layer, in memory: (batch, kv_heads, tokens, head_dim), K and V."""

    def __init__(self) -> None:
        self.length = 0
        self._k = self._v = torch.empty(0)

    @property
    def k(self) -> Tensor:
        return self._k[:, :, : self.length]

    @property
    def v(self) -> Tensor:
        return self._v[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        return self._k.nbytes + self._v.nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        stop = self.length + k.shape[2]
        if self.length == 0 and k.shape[2] >= FLUSH_TOKENS:
            self._k, self._v = k, v  # a whole block, on its way to disk: no copy
        else:
            if self._k.dim() != 4 or stop > self._k.shape[2]:
                shape = (*k.shape[:2], max(stop, 2 * self.length, _FIRST_CAPACITY), k.shape[3])
                old_k, old_v = self.k if self.length else None, self.v if self.length else None
                with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
                    self._k, self._v = k.new_empty(shape), v.new_empty(shape)
                if old_k is not None and old_v is not None:
                    self._k[:, :, : self.length] = old_k
                    self._v[:, :, : self.length] = old_v
            self._k[:, :, self.length : stop] = k
            self._v[:, :, self.length : stop] = v
        self.length = stop

    def drop(self, tokens: int) -> None:
        """Forget the oldest tokens. Tensors handed out before stay intact: what remains moves to new memory."""
        k, v = self.k[:, :, tokens:].clone(), self.v[:, :, tokens:].clone()
        self._k = self._v = torch.empty(0)
        self.length = 0
        if k.shape[2]:
            self.append(k, v)


class Recomputed(NamedTuple):
    """The first tokens of one layer, whole chunks of them, computed again though they are stored: (batch, kv_heads, tokens, head_dim), K and V."""

    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, tail: Tail) -> Recomputed:
        """Of all that a tail holds, without what it reserved for more."""
        return cls(tail.k.clone(), tail.v.clone())

    @property
    def tokens(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class Handle:
    """Stands for all keys (or values) of a layer. Whatever touches it, except KVDB's attention, gets an error."""

    __slots__ = ("_layer",)

    def __init__(self, layer: FullLayer) -> None:
        object.__setattr__(self, "_layer", layer)

    def layer(self) -> FullLayer:
        found: FullLayer = object.__getattribute__(self, "_layer")
        return found

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise Unsupported(
            f"attention: {what} was used on keys or values that live in a KVDB store, expected KVDB's attention function; "
            "generate inside 'with attach(model, db)', and with a model that hands keys and values to it untouched"
        )

    def __getattr__(self, name: str) -> Any:
        self._refuse(f"attribute {name!r}")

    def __getitem__(self, key: object) -> Any:
        self._refuse("indexing")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls._refuse(f"torch function {getattr(func, '__name__', func)!r}")


class Asked(Exception):
    """Ends a probe of a layer (`kvdb.runtime.prediction`): the query it would have asked, scaled, (batch, heads, queries, head_dim)."""

    def __init__(self, query: Tensor) -> None:
        self.query = query


class _Stored:
    """What both kinds of layers share: a tail, and the way from it to the histories."""

    def __init__(self, cache: KVDBCache, index: int) -> None:
        self.cache, self.index = cache, index
        self.tail = Tail()
        self.group = cache.geometry.groups[cache.geometry.locate(index)[0]]

    def accept(self, k: Tensor, v: Tensor) -> None:
        """Check and keep new tokens.

        raises  Unsupported when a layer's keys and values are not what the config promised
        """
        batch, heads, _, dim = k.shape
        expected = (len(self.cache.rows), self.group.kv_heads, self.group.head_dim)
        if (batch, heads, dim) != expected or v.shape != k.shape or k.dtype != self.cache.dtype:
            raise Unsupported(
                f"layer {self.index}: keys {tuple(k.shape)} {k.dtype}, values {tuple(v.shape)}, expected "
                f"(batch, kv_heads, tokens, head_dim) = ({expected[0]}, {expected[1]}, *, {expected[2]}) {self.cache.dtype} "
                "twice; layers whose keys and values differ in shape are not supported yet"
            )
        self.tail.append(k.detach(), v.detach())

    def flush(self, *, everything: bool = False) -> bool:
        """Move tail tokens to the histories: whole chunks once there are enough, or everything.

        returns  True when nothing is left to move
        """
        tokens = self.tail.length if everything else self.cache.geometry.grid_floor(self.tail.length)
        if tokens < (1 if everything else FLUSH_TOKENS):
            return True
        n = min(row.room(self.index, tokens, self.cache.expected_tokens) for row in self.cache.rows)
        if n:
            for row, k, v in zip(self.cache.rows, self.tail.k, self.tail.v, strict=True):
                row.append(self.index, k[:, :n], v[:, :n])
            self.tail.drop(self.cache.geometry.grid_floor(n) if everything and n == tokens else n)
        return n == tokens


class _FixedShape:
    """Refuses what would reorder, repeat or shorten stored sequences."""

    is_croppable = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            self._refuse("crop (assisted or prompt-lookup decoding)")

    def reset(self) -> None:
        self._refuse("reset")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._refuse("reorder_cache (beam search)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            self._refuse("batch_repeat_interleave (beam search or num_return_sequences)")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse("batch_select_indices (contrastive search)")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise Unsupported(
            f"KVDB cache: {what} was asked for, expected plain greedy or sampled generation of one sequence per prompt; "
            "use a cache of transformers for it"
        )


class FullLayer(_FixedShape, DynamicLayer):
    """A full-attention layer whose keys and values live in a store.

    recomputed  what dense attention uses instead of what is stored of the first tokens; None: nothing
    """

    def __init__(self, cache: KVDBCache, index: int) -> None:
        super().__init__()
        self.stored = _Stored(cache, index)
        self.is_initialized = True
        self.recomputed: Recomputed | None = None
        self._handle = Handle(self)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.stored.cache.expect_active()
        if not self.stored.cache.is_probing:
            self.stored.accept(key_states, value_states)
        return self._handle, self._handle

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        stored = self.stored
        return stored.cache.rows[0].chunks(stored.index) * stored.cache.geometry.chunk_tokens + stored.tail.length

    def get_max_length(self) -> int:
        return -1

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Attention of the newest tokens' queries over everything up to themselves.

        query    (batch, heads, queries, head_dim), the queries of the tokens `update` just took
        returns  (batch, heads, queries, head_dim)
        """
        stored, cache = self.stored, self.stored.cache
        if cache.is_probing:
            raise Asked(query * scale)
        batch, heads, queries, dim = query.shape
        kv_heads = stored.group.kv_heads
        q = query.reshape(batch, kv_heads, heads // kv_heads, queries, dim)
        out = [self._attend_row(row, b, q[b], scale) for b, row in enumerate(cache.rows)]
        if stored.index in cache.metered_layers:
            cache.note_resident()
        if cache.writes:
            stored.flush()
        whole = out[0] if batch == 1 else torch.stack(out)
        return whole.view(batch, heads, queries, dim)

    def _attend_row(self, row: History, b: int, q: Tensor, scale: float) -> Tensor:
        cache, tail = self.stored.cache, self.stored.tail
        k, v = tail.k[b], tail.v[b]
        if cache.take is not None:
            return self._attend_selected(row, q, k, v, scale, cache.take)
        before, index, span = tail.length - q.shape[2], self.stored.index, cache.timeline.span
        with span("tail", index):
            parts = [attend(q, k[:, before:], v[:, before:], scale=scale, causal=q.shape[2] > 1)]
            if before:
                parts.append(attend(q, k[:, :before], v[:, :before], scale=scale))
            whole = merge(parts)
        for tile_k, tile_v in self._tiles(row, b):
            with span("attend", index):
                whole = merge([whole, attend(q, tile_k, tile_v, scale=scale)])
        return whole.out.to(q.dtype)

    def _tiles(self, row: History, b: int) -> Iterator[tuple[Tensor, Tensor]]:
        """K and V of everything before the tail, each (kv_heads, tokens, head_dim) and valid until the next one."""
        first, ct, index = 0, self.stored.cache.geometry.chunk_tokens, self.stored.index
        if self.recomputed is not None:
            k, v = self.recomputed
            yield from zip(k[b].split(TILE_TOKENS, 1), v[b].split(TILE_TOKENS, 1), strict=True)
            first = self.recomputed.tokens // ct
        chunks, step = row.chunks(index), TILE_TOKENS // ct
        for start in range(first, chunks, step):
            yield row.read(index, start, min(start + step, chunks))

    def _attend_selected(
        self, row: History, q: Tensor, tail_k: Tensor, tail_v: Tensor, scale: float, take: int
    ) -> Tensor:
        cache, index = self.stored.cache, self.stored.index
        assert cache.rule is not None
        query = q.squeeze(2) * scale
        exact_query = query.detach().float()
        # No gradients pass here: keys and values are cut off from them when they are stored.
        if can_compile(q) and not isinstance(cache.rule, Certified):
            return self._gather(row, exact_query, tail_k, tail_v, take).to(q.dtype)
        parts: list[tuple[Tensor, Tensor]] = []

        def read(chunks: Tensor) -> Tensor:
            k, v = row.select(index, chunks)
            parts.append((k.clone(), v.clone()))  # what is read next takes their place
            return _record_lse(exact_query, k, cache.geometry.chunk_tokens)

        tail_lse = torch.logsumexp(torch.bmm(exact_query, tail_k.float().transpose(1, 2)), -1)
        resident, span = row.resident(index, cache.selector), cache.timeline.span
        with span("score", index):
            scores = cache.rule.score(cache.selector, exact_query, resident, take)
            chosen = cache.rule.plan(scores, take, cache.forced, tail_lse, read)
        with span("estimate", index):
            estimate = cache.selector.estimate(exact_query, resident, scores, chosen)
        cache.note_choice(row, index, scores, chosen, estimate)
        beside = None if estimate is None else Partial(estimate.out[:, :, None], estimate.lse[..., None])
        if chosen.counts is not None:
            return self._attend_each(row, query, chosen, tail_k, tail_v, beside)
        if not parts:
            k, v = row.select(index, chosen.chunks)
            parts.append((k, v))
            if cache.sampling:
                lse = _record_lse(exact_query, k, cache.geometry.chunk_tokens)
                cache.note_mass(covered_mass(scores, chosen, lse, tail_lse))
        with span("attend", index):
            return attend_one(query, [*parts, (tail_k, tail_v)], beside)

    def _gather(self, row: History, query: Tensor, tail_k: Tensor, tail_v: Tensor, take: int) -> Tensor:
        """The same where loops can be compiled: stored records are attended to where they lie."""
        cache, index = self.stored.cache, self.stored.index
        assert cache.rule is not None
        span, running = cache.timeline.span, Gather(query, cache.geometry.dtype)
        with span("tail", index):
            running.add(Lent.of_tail(tail_k, tail_v))
            tail_lse = running.lse
        resident = row.resident(index, cache.selector)
        with span("score", index):
            scores = cache.rule.score(cache.selector, query, resident, take)
            chosen = cache.rule.plan(scores, take, cache.forced, tail_lse, reads_nothing)
        lent = row.lend(index, chosen.chunks, chosen.counts)
        first = next(lent, None)  # what is missing is on its way, while the rest of all this is computed
        with span("estimate", index):
            estimate = cache.selector.estimate(query, resident, scores, chosen)
        cache.note_choice(row, index, scores, chosen, estimate)
        measured = np.empty((*chosen.chunks.shape, query.shape[1]), np.float32) if cache.sampling else None
        for part, places in chain(() if first is None else (first,), lent):
            with span("attend", index):
                if measured is None:
                    running.add(part)
                else:
                    measured[places] = running.add_measured(part)
        if measured is not None and chosen.counts is None:
            lse = torch.from_numpy(measured).movedim(-1, 1)
            cache.note_mass(covered_mass(scores, chosen, lse, tail_lse))
        if estimate is None:
            return running.finish()
        return running.finish(estimate.out, estimate.lse)

    def _attend_each(
        self, row: History, query: Tensor, chosen: Plan, tail_k: Tensor, tail_v: Tensor, beside: Partial | None
    ) -> Tensor:
        """As many records for each KV head as its plan says: (kv_heads, group, head_dim)."""
        assert chosen.counts is not None
        read = row.select_each(self.stored.index, chosen.chunks, chosen.counts)
        out = []
        with self.stored.cache.timeline.span("attend", self.stored.index):
            for head, (k, v) in enumerate(read):
                this = slice(head, head + 1)
                parts = [(k[None], v[None]), (tail_k[this], tail_v[this])]
                of_head = None if beside is None else Partial(beside.out[this], beside.lse[this])
                out.append(attend_one(query[this], parts, of_head))
            return torch.cat(out)

    def offload(self) -> None:
        """Nothing to do: stored KV is on disk already."""

    def prefetch(self) -> None:
        """Nothing to do: attention reads what it needs."""


class SlidingLayer(_FixedShape, DynamicSlidingWindowLayer):
    """A sliding-window layer: transformers' own while generating; every token is also stored, for later reuse."""

    keys: Any
    values: Any

    def __init__(self, cache: KVDBCache, index: int, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.stored = _Stored(cache, index)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache = self.stored.cache
        cache.expect_active()
        if cache.writes:
            self.stored.accept(key_states.contiguous(), value_states.contiguous())
            self.stored.flush()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = self.keys.clone(), self.values.clone()  # a view would keep the whole block alive
        return keys, values

    def restore_window(self, keys: Tensor, values: Tensor, total_tokens: int) -> None:
        """Take the last tokens before position `total_tokens` as this layer's window: (batch, kv_heads, tokens, dim)."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.cumulative_length = total_tokens


def reads_nothing(chunks: Tensor) -> NoReturn:
    """For rules that choose by scores alone."""
    raise AssertionError("this rule reads nothing while it chooses")


def _record_lse(q: Tensor, k: Tensor, chunk_tokens: int) -> Tensor:
    """q (kv_heads, group, head_dim) scaled, k (kv_heads, n * chunk_tokens, head_dim) -> (kv_heads, group, n)."""
    logits = torch.bmm(q, k.float().transpose(1, 2))
    return torch.logsumexp(logits.unflatten(-1, (-1, chunk_tokens)), -1)
