"""attach(): join a transformers model to a store for the length of a `with` block.

    with attach(model, db, budget=0.1) as kv:
        cache = kv.cache(input_ids)
        model.generate(input_ids, past_key_values=cache)
        kv.save(cache, name="report")

Inside the block the model's attention implementation is "kvdb", forward passes are watched by two hooks, and
`prepare_inputs_for_generation` compares the whole prompt with what the cache holds: `generate` would otherwise silently
accept a cache of another prompt. At the end everything is put back.
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kvdb.available import available_bytes
from kvdb.codecs import RAW, CodecPlan
from kvdb.entries import Found, Sequence, Span
from kvdb.errors import Damaged, IdentityMismatch, InvalidInput, ReadOnly, Unsupported
from kvdb.geometry import STORAGE_DTYPES, Geometry, LayerGroup
from kvdb.identity import EXACT, Identity, joined_fidelity
from kvdb.prefix import Tokens
from kvdb.runtime.attention import IMPLEMENTATION, full_attention_is_causal, register
from kvdb.runtime.cache import KVDBCache, Prefix, expect_exact_keys
from kvdb.runtime.costs import Choice, Costs, Prospect
from kvdb.runtime.device_cache import DeviceCache, device_bytes, shapes_of
from kvdb.runtime.identity import dtype_name, model_identity, text_config
from kvdb.runtime.prediction import watch
from kvdb.runtime.prefill import PrefillProgress, prefill
from kvdb.runtime.selection import DEFAULT_SELECTOR, SELECTORS, Budget, Certified, Mass, Selector, StopRule, Threshold
from kvdb.runtime.timeline import Trace
from kvdb.segments import Segment, codecs_of
from kvdb.store import KVDB, Match

_MEMORY_SHARE: Final = 4
"""Of a stored prefix no more is computed while the rest is read than takes one in so many bytes of what memory is free."""
_SAME_ALWAYS: Final = ("default", "linear", "llama3", "yarn", "proportional")
"""RoPE types whose rotation of a position does not depend on how long the text gets."""


def attach(
    model: nn.Module,
    db: KVDB,
    *,
    budget: float | int | None = None,
    threshold: float | None = None,
    mass: float | None = None,
    certified: float | None = None,
    exact: bool = False,
    fidelity: str = EXACT,
    selector: str | Selector = DEFAULT_SELECTOR,
    codec: str | CodecPlan = RAW,
    trace: str | os.PathLike[str] | None = None,
    prefetch: bool | None = None,
    recompute: bool | None = None,
    device_budget: int | str | None = None,
    device_policy: str = "lru",
) -> Attachment:
    """Join a causal language model of transformers to a store. A context manager.

    budget    share of stored tokens each KV head may attend to while decoding (float), or their number (int);
              default min(10 %, 2 048 tokens); sinks and recent window included, the newest, unstored tokens not
    threshold instead of a budget: read every record whose share of attention mass, as estimated, is at least this
    mass      instead of a budget: read records until this share of attention mass, as estimated, is attended to (top-p)
    certified instead of a budget: read until at most this share of every head's softmax mass is proven to be unread
    exact     attend to everything
    selector  by name or, for other settings, a member itself: see `kvdb.runtime.selection`
    fidelity  "exact" reuses only KV that dense attention computed and nothing lossy stored, but for `codec`; "any" all there is
    codec     what new KV is stored with, such as "int4", "planes:bits=6+int8" or "small": see `kvdb.codecs`. KV that dense attention
              computed and this very codec stored is reused like exact KV
    trace     a file, written at the end of the 'with' block: each stage of each step and layer as a time line, in Chrome's trace format
    prefetch  read ahead what the next layer is likely to choose: always, never, or (None) where that is measured to be faster
    recompute compute a stored prefix again instead of reading it: always, never, or (None) all of it or its first tokens, while the rest is read, as is
              estimated to take the least time; all of it only where a writable store without a size cap can take it
    device_budget  most that selected records kept on a GPU may take, "4GiB" say, for each cache; a quarter of what is free when not given
    device_policy  which of them go first: "lru", "lfu" or "importance"
    raises    InvalidInput for options; Unsupported for models whose KV this version would get wrong
    """
    given = {"budget": budget, "threshold": threshold, "mass": mass, "certified": certified, "exact": exact or None}
    if len(chosen := [f"{name}={value!r}" for name, value in given.items() if value is not None]) > 1:
        raise InvalidInput(f"attach: {' and '.join(chosen)}, expected one of them")
    if fidelity not in (EXACT, "any"):
        raise InvalidInput(f"attach: fidelity is {fidelity!r}, expected {EXACT!r} or 'any'")
    if isinstance(selector, str) and selector in SELECTORS:
        selector = SELECTORS[selector]()
    if not isinstance(selector, Selector):
        raise InvalidInput(f"attach: selector is {selector!r}, expected one of {sorted(SELECTORS)}, or a member itself")
    rule: StopRule | None = None
    if threshold is not None:
        rule = Threshold.of(threshold)
    elif mass is not None:
        rule = Mass.of(mass)
    elif certified is not None:
        rule = Certified.of(certified)
    elif not exact:
        rule = Budget.of(budget)
    if rule is not None:
        rule.check(selector)
    plan = CodecPlan.parse(codec) if isinstance(codec, str) else codec
    if not isinstance(plan, CodecPlan):
        raise InvalidInput(f"attach: codec is {codec!r}, expected a name such as 'int4', or a CodecPlan")
    if isinstance(rule, Certified):
        expect_exact_keys(plan)
    if trace is not None and not Path(trace).absolute().parent.is_dir():
        raise InvalidInput(
            f"attach: trace is {os.fspath(trace)!r}, in a folder that does not exist, expected an existing one"
        )
    traced = None if trace is None else Path(trace).absolute()
    return Attachment(
        model,
        db,
        rule=rule,
        fidelity=fidelity,
        selector=selector,
        codec=plan,
        trace=traced,
        prefetch=prefetch,
        recompute=recompute,
        device_bytes=device_bytes(_device(model), device_budget, device_policy),
        device_policy=device_policy,
    )


class Attachment:
    """A model joined to a store; made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        db: KVDB,
        *,
        rule: StopRule | None,
        fidelity: str,
        selector: Selector,
        codec: CodecPlan = RAW,
        trace: Path | None = None,
        prefetch: bool | None = None,
        recompute: bool | None = None,
        device_bytes: int | None = None,
        device_policy: str = "lru",
    ) -> None:
        self._device_bytes, self._device_policy = device_bytes, device_policy
        self._costs = Costs(recompute)
        self._prefetch, self._predicts = prefetch, False
        self._trace, self._traced = trace, None if trace is None else Trace()
        self.model, self.db, self.rule, self.fidelity, self.selector = model, db, rule, fidelity, selector
        self.codec = codec
        self.config = text_config(model)
        self.windows = _windows(self.config)
        self.geometry = _geometry(model, self.config, db)
        codec.grouped(self.geometry)  # refuses what does not fit
        if not codec.by_record:
            raise Unsupported(
                f"attach: codec is {codec}, which is for whole blocks of what is stored, expected one for single records; store KV as raw, "
                "then 'kvdb compact --codec'"
            )
        self._stack: ExitStack | None = None
        self._caches: weakref.WeakSet[KVDBCache] = weakref.WeakSet()

    # -- the with block

    def __enter__(self) -> Self:
        model: Any = self.model
        if model.config._attn_implementation == IMPLEMENTATION:
            raise InvalidInput(
                "attach: the model is attached already, expected a free one; leave the other 'with' block"
            )
        self.identity()
        register()
        with ExitStack() as stack:
            previous = model.config._attn_implementation
            stack.callback(model.set_attn_implementation, previous)
            model.set_attn_implementation(IMPLEMENTATION)
            before = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            stack.callback(before.remove)
            after = model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True)
            stack.callback(after.remove)
            stack.callback(full_attention_is_causal, False)
            watching = watch(self.model, len(self.geometry.layers)) if self._prefetch is not False else None
            if watching is not None:
                stack.enter_context(watching)
            self._predicts = watching is not None
            name = "prepare_inputs_for_generation"
            own = vars(model).get(name)  # somebody else's, put on the instance as ours will be
            stack.callback(*((setattr, model, name, own) if own is not None else (delattr, model, name)))
            setattr(model, name, self._checking_prompts(getattr(model, name)))
            stack.callback(self._close_caches)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        if self._trace is not None and self._traced is not None:
            self._traced.write(self._trace)

    def _close_caches(self) -> None:
        for cache in list(self._caches):
            self._drop(cache)

    # -- what users call

    def identity(self) -> Identity:
        """Identity of the model's KV as it is now. Weights were read at entry, and are again when a change is seen."""
        return model_identity(self.model, kv_dtype=_dtype(self.model), salt=self.db.salt, fresh=self._stack is None)

    def match(self, input_ids: Tensor) -> Match:
        """Longest stored prefix of a prompt, and why it is not longer. Reads no KV.

        input_ids  (tokens,) or (1, tokens)
        """
        rows = _rows(input_ids)
        if len(rows) != 1:
            raise InvalidInput(f"match: {len(rows)} prompts, expected one; ask for each")
        return self.db.match(self.identity(), rows[0], exact=self.fidelity == EXACT, accepted=self._accepted)

    def cache(self, input_ids: Tensor, *, progress: Callable[[PrefillProgress], None] | None = None) -> KVDBCache:
        """A cache for this prompt: reuses the longest stored prefix, prefills and stores the rest but the last token.

        input_ids  (batch, tokens) or (tokens,): prompts of equal length, no padding; the last token is left for
                   `generate`, which must compute it anyway
        raises     InvalidInput for an empty prompt or one longer than the model's context; Damaged when a stored prefix
                   cannot be read; StorageFull (segments that were full before, 16 384 tokens each, stay stored)
        On KeyboardInterrupt the blocks that are whole stay stored.
        """
        self._entered()
        rows = _rows(input_ids)
        length = len(rows[0])
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise InvalidInput(f"cache: prompt of {length} tokens, expected at most {limit}, the model's context")
        started = time.perf_counter()
        identity = self.identity()
        cache = self._restored(identity, [row[: length - 1] for row in rows])
        cache.metrics.prompt_tokens = length
        cache.metrics.restore_seconds = time.perf_counter() - started
        try:
            started = time.perf_counter()
            tokens = torch.as_tensor(np.stack([row[: length - 1] for row in rows]).astype(np.int64))
            prefill(self.model, cache, tokens.to(_device(self.model)), progress=progress)
            if cache.writes:
                cache.seal()
            cache.metrics.prefill_seconds = time.perf_counter() - started
            self._learn(cache)
        except KeyboardInterrupt:
            try:
                cache.salvage()
            finally:
                self._drop(cache)
            raise
        except BaseException:
            cache.discard()
            self._drop(cache)
            raise
        return cache

    def load(self, name: str) -> KVDBCache:
        """The cache of a saved sequence, to be continued with a prompt that begins with its tokens.

        raises  SequenceNotFound; IdentityMismatch naming the fields that differ; Damaged
        """
        self._entered()
        started = time.perf_counter()
        identity = self.identity()
        while True:
            sequence = self._loadable(name, identity)
            cache, segments = self._new(identity, 1), list[Segment]()
            try:
                tokens, segments = self.db.tokens(sequence.spans).tolist(), self.db.segments(sequence.spans)
                cache.restore([Prefix(tokens, sequence.spans, segments)])
                break
            except BaseException as e:
                self._drop(cache)
                if not (isinstance(e, Damaged) and self._changed(sequence.spans, segments)):
                    raise
        cache.metrics.prompt_tokens = sequence.tokens
        cache.metrics.restore_seconds = time.perf_counter() - started
        if not self.db.readonly:
            self.db.touch(sequence.spans)
        return cache

    def _loadable(self, name: str, identity: Identity) -> Sequence:
        """raises  as `load`"""
        sequence = self.db.sequence(name)
        stored = self.db.identity(sequence.identity)
        if different := identity.difference(stored):
            raise IdentityMismatch(
                f"sequence {name!r}: stored under another identity ({', '.join(different)} differ), expected the attached "
                "model's; its KV cannot be reused, prefill it again"
            )
        if self.fidelity == EXACT and sequence.fidelity not in self._accepted:
            raise InvalidInput(
                f"sequence {name!r}: its fidelity is {sequence.fidelity!r}, expected {' or '.join(map(repr, self._accepted))}; attach with "
                "fidelity='any', or with the codec it is stored with"
            )
        return sequence

    def save(self, cache: KVDBCache, name: str | None = None, *, ttl_s: float | None = None) -> list[str]:
        """Store what the cache computed since; only new tokens are written (and the chunk they start in).

        name     keeps the sequence from eviction and makes it loadable; rows of a batch become "name#0", "name#1", ...
        ttl_s    seconds after which it goes, named or not; None: never by age
        returns  keys of the sequences
        raises   ReadOnly; InvalidInput for an empty cache; IdentityMismatch when the weights changed since it was made
        """
        if self.db.readonly:
            raise ReadOnly(f"{self.db.path}: opened with mode 'r', expected a writable store; open it with 'r+' or 'a'")
        if cache.length == 0:
            raise InvalidInput("save: the cache holds 0 tokens, expected at least one; generate something first")
        cache.seal()
        names = [name if name is None or len(cache.rows) == 1 else f"{name}#{i}" for i in range(len(cache.rows))]
        return [
            key
            for row, each in zip(cache.rows, names, strict=True)
            if (key := row.record(each, ttl_s=ttl_s)) is not None
        ]

    # -- inside

    def _entered(self) -> None:
        if self._stack is None:
            raise InvalidInput(
                "attach: used outside its 'with' block, expected inside; write 'with attach(...) as kv:'"
            )

    def _restored(self, identity: Identity, rows: list[Tokens]) -> KVDBCache:
        """A cache that holds the longest prefix that is stored for every row."""
        while True:
            exact = self.fidelity == EXACT
            found = [self.db.find(identity, row, exact=exact, accepted=self._accepted) for row in rows]
            shared = min(each.tokens for each, _ in found)
            prefixes = [_cut(each, segments, row, shared) for (each, segments), row in zip(found, rows, strict=True)]
            cache = self._new(identity, len(rows))
            try:
                cache.restore(prefixes)
                choice = self._costs.choose(self._prospect(cache, prefixes, len(rows[0])))
                if 0 < choice.tokens < shared:
                    choice = self._split(cache, rows, choice)
            except BaseException as e:
                self._drop(cache)
                if isinstance(e, Damaged) and any(self._changed(p.spans, p.segments) for p in prefixes):
                    continue
                raise
            if shared and choice.tokens == shared:
                self._drop(cache)
                cache = self._new(identity, len(rows))
            elif not self.db.readonly:
                for prefix in prefixes:
                    self.db.touch(prefix.spans)
            cache.metrics.reuse = choice.why
            return cache

    def _prospect(self, cache: KVDBCache, prefixes: list[Prefix], wanted: int) -> Prospect:
        """What a stored prefix that a cache has taken over may cost before the first token is out: see `kvdb.runtime.costs`."""
        tokens, ct = len(prefixes[0].tokens), self.geometry.chunk_tokens
        chunks, at_once = tokens // ct, tokens
        if tokens == wanted and self.rule is not None and chunks:
            at_once = self.rule.look_at(chunks, ct) * ct
        starts = np.arange(1 + (self._most_split(prefixes) // ct if at_once == tokens else 0))
        absent = np.sum([row.absent_bytes(starts) for row in cache.rows], 0)
        full = 1 - len(self.windows) / len(self.geometry.layers)  # of layers with windows only these are read
        bytes_read = full * np.minimum(absent, at_once * self.geometry.token_bytes * len(cache.rows))
        return Prospect(tokens, len(cache.rows), bytes_read, ct, self.db.grows_freely, cache.room)

    def _most_split(self, prefixes: list[Prefix]) -> int:
        """How many tokens may be computed while others are read: what dense attention computed is not mixed with anything else, and stays in memory."""
        infos = [segment.info for prefix in prefixes for segment in prefix.segments]
        plain = (codec.stored_as_is and codec.blocks is None for info in infos for codec in codecs_of(info))
        if any(info.fidelity != EXACT for info in infos) or not all(plain):
            return 0
        device = _device(self.model)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
        room = free // _MEMORY_SHARE // (self.geometry.token_bytes * len(prefixes))
        return max(0, min(len(prefixes[0].tokens) - 1, room))

    def _split(self, cache: KVDBCache, rows: list[Tokens], choice: Choice) -> Choice:
        """Compute the first tokens of a stored prefix while the rest is brought into memory. Where there is no room for that, all of it is loaded."""
        other, tokens = self._new(cache.identity, len(rows), scratch=True), choice.tokens
        try:
            with cache.timeline.span("recompute") as span:
                cache.fetch_from(tokens)
                ids = torch.as_tensor(np.stack([row[:tokens] for row in rows]).astype(np.int64))
                prefill(self.model, other, ids.to(_device(self.model)), progress=None)
            self._costs.computing.note(tokens * len(rows), span.seconds)
            cache.take_recomputed(other)
            return choice
        except (OSError, MemoryError, torch.OutOfMemoryError) as e:
            cache.fetching.stop()
            cache.drop_recomputed()
            return Choice(0, f"{choice.why}; that failed: {e}")
        finally:
            self._drop(other)

    def _learn(self, cache: KVDBCache) -> None:
        """What a prefill took, reading and computing apart."""
        metrics, seconds, fetched = cache.metrics, cache.timeline.seconds, cache.stats()["kv_bytes_fetched"]
        if metrics.recomputed_tokens:
            self._costs.reading.note(cache.fetching.fetched, cache.fetching.seconds)
        elif 2 * fetched > metrics.prefill_bytes_read:
            self._costs.reading.note(fetched, seconds["read"])
        computing = metrics.prefill_seconds - seconds["read"] - seconds["wait"] - seconds["commit"]
        self._costs.computing.note(metrics.prefill_tokens * len(cache.rows), computing)

    @property
    def _accepted(self) -> tuple[str, ...]:
        """Fidelities of KV that is reused where exact KV is asked for."""
        return (EXACT,) if self.codec.lossless else (EXACT, joined_fidelity(EXACT, str(self.codec)))

    def _changed(self, spans: tuple[Span, ...], segments: list[Segment]) -> bool:
        """Whether any of what was found was deleted, merged or given other abstracts before it was open: look again. Each time
        something has happened, so that looking comes to an end."""
        return not (self.db.holds(spans) and self.db.agrees(segments))

    def _new(self, identity: Identity, batch: int, *, scratch: bool = False) -> KVDBCache:
        """scratch: for what is computed densely and not stored."""
        tier = None
        if self._device_bytes and not scratch:
            shapes, dtype, device = shapes_of(self.geometry), _dtype(self.model), _device(self.model)
            tier = DeviceCache(self._device_bytes, shapes, dtype, device, self._device_policy)
        cache = KVDBCache(
            self.db,
            identity,
            self.identity,
            self.geometry,
            self.windows,
            batch=batch,
            dtype=_dtype(self.model),
            device=_device(self.model),
            rule=None if scratch else self.rule,
            selector=self.selector,
            codec=self.codec,
            stores=not scratch,
            model_label=str(getattr(self.config, "_name_or_path", "") or self.config.model_type),
            trace=self._traced,
            prefetch=self._prefetch,
            device_tier=tier,
        )
        if self._prefetch is not False and not self._predicts:
            cache.prefetch.give_up("the model's decoder layers are not found")
        self._caches.add(cache)
        return cache

    def _drop(self, cache: KVDBCache) -> None:
        self._caches.discard(cache)
        cache.close()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        full_attention_is_causal(False)
        if not isinstance(cache, KVDBCache):
            return
        if module.training:
            raise InvalidInput(
                "forward: the model is in training mode, expected model.eval(); dropout would be stored in its KV"
            )
        if cache not in self._caches:
            raise InvalidInput("forward: the KVDB cache belongs to another attachment, expected one of this one")
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        cache.begin_step(input_ids, kwargs.get("position_ids"), kwargs.get("attention_mask"))
        full_attention_is_causal(True)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        full_attention_is_causal(False)
        if isinstance(cache, KVDBCache):
            cache.end_step(failed=output is None)

    def _checking_prompts(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def checked(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if isinstance(cache, KVDBCache):
                _check_prompt(cache, input_ids)
            return prepare(input_ids, *args, **kwargs)

        return checked


def _check_prompt(cache: KVDBCache, input_ids: Tensor) -> None:
    """`generate` feeds what it believes to be new: the whole prompt must be longer than the cache and begin with it."""
    length = cache.length
    if input_ids.shape[0] != len(cache.rows):
        raise InvalidInput(
            f"generate: {input_ids.shape[0]} sequences for a cache of {len(cache.rows)}, expected as many; beams and several "
            "return sequences are not supported yet"
        )
    if input_ids.shape[1] <= length:
        raise InvalidInput(
            f"generate: prompt of {input_ids.shape[1]} tokens for a cache of {length}, expected a longer one; the last prompt "
            "token is always computed again: make the cache with kv.cache(input_ids)"
        )
    for row, tokens in enumerate(cache.tokens):
        given = input_ids[row, :length].cpu().numpy()
        different = np.flatnonzero(given != np.asarray(tokens))
        if len(different):
            at = int(different[0])
            raise InvalidInput(
                f"generate: token {int(given[at])} at position {at} of row {row}, but the cache holds {tokens[at]} there; "
                "expected the prompt the cache was made for: make one with kv.cache(input_ids)"
            )


def _rows(input_ids: Tensor) -> list[Tokens]:
    """Prompts as uint32 arrays.

    raises  InvalidInput for a wrong shape, an empty prompt or impossible ids
    """
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] == 0 or ids.is_floating_point():
        raise InvalidInput(
            f"input_ids: shape {tuple(ids.shape)}, {ids.dtype}; expected (batch, tokens) or (tokens,) of integers, not empty"
        )
    if int(ids.min()) < 0 or int(ids.max()) > 0xFFFF_FFFF:
        raise InvalidInput(f"input_ids: ids {int(ids.min())}..{int(ids.max())}, expected 0..{0xFFFF_FFFF}")
    return list(ids.cpu().numpy().astype("<u4"))


def _cut(found: Found, segments: list[Segment], row: Tokens, tokens: int) -> Prefix:
    """The first `tokens` tokens of what was found for `row`."""
    spans, position = [], 0
    for span in found.spans:
        length = min(span.stop - span.start, tokens - position)
        if length > 0:
            spans.append(Span(segment=span.segment, start=span.start, stop=span.start + length))
            position += length
    return Prefix(row[:tokens].tolist(), tuple(spans), segments[: len(spans)])


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _windows(config: Any) -> dict[int, int]:
    """Sliding window of each layer that has one.

    raises  Unsupported for layers that are neither full nor sliding-window attention
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise Unsupported(
            f"attach: layers of type {', '.join(sorted(kinds))}, expected full or sliding-window attention only; recurrent, "
            "linear and chunked layers are not supported yet"
        )
    windows: dict[int, int] = {}
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicSlidingWindowLayer:
            windows[index] = int(layer.sliding_window)
        elif type(layer) is not DynamicLayer:
            raise Unsupported(
                f"attach: layer {index} keeps a {type(layer).__name__}, expected full or sliding-window attention; "
                "this model is not supported yet"
            )
    return windows


def _geometry(model: nn.Module, config: Any, db: KVDB) -> Geometry:
    """KV geometry from the config; layers check what they get against it.

    raises  Unsupported for mathematics this version would get wrong
    """
    name = config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise Unsupported(f"attach: {name} is an encoder-decoder model, expected a decoder-only one")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise Unsupported(f"attach: {name} uses latent attention (kv_lora_rank), expected plain keys and values")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise Unsupported(f"attach: {name} softcaps attention logits, expected plain softmax attention")
    if not getattr(config, "is_causal", True):
        raise Unsupported(f"attach: {name} is not causal, expected a causal language model")
    for kind in _rope_types(config):
        if kind not in _SAME_ALWAYS:
            raise Unsupported(
                f"attach: {name} uses RoPE of type {kind!r}, whose keys depend on the final length, expected one of {_SAME_ALWAYS}"
            )
    dtype = dtype_name(_dtype(model))
    if dtype not in STORAGE_DTYPES:
        raise Unsupported(f"attach: {name} computes in {dtype}, expected one of {sorted(STORAGE_DTYPES)}")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers = tuple(range(len(DynamicCache(config=config).layers)))
    group = LayerGroup(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    return Geometry(dtype=dtype, chunk_tokens=db.header.chunk_tokens, groups=(group,))


def _rope_types(config: Any) -> set[str]:
    """RoPE types anywhere in the config: one for all layers, or one per layer type."""
    found: set[str] = set()
    for field in ("rope_parameters", "rope_scaling"):
        value = getattr(config, field, None)
        for entry in [value, *value.values()] if isinstance(value, dict) else []:
            if isinstance(entry, dict) and (kind := entry.get("rope_type") or entry.get("type")):
                found.add(kind)
    return found
