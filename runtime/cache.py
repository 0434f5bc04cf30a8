"""The cache handed to `generate`: one sequence per row, stored part by part, with the newest tokens in memory.

A forward pass is one step: `begin_step` checks that its tokens are the ones that come next and decides whether attention
may select; `end_step` takes the tokens over and commits segments that are full. A step that fails half-way leaves layers of
different lengths, so the cache refuses any further step; what was committed before stays in the store.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvdb import forks
from kvdb.codecs import CodecPlan
from kvdb.entries import Span
from kvdb.errors import Damaged, IdentityMismatch, InvalidInput, OutOfMemory, ReadOnly, Unsupported
from kvdb.geometry import Geometry
from kvdb.identity import Identity
from kvdb.reader import Reader
from kvdb.replacement import Importance
from kvdb.runtime.device_cache import DeviceCache
from kvdb.runtime.fetching import Fetching
from kvdb.runtime.history import History
from kvdb.runtime.layers import FullLayer, Recomputed, SlidingLayer, Tail, reads_nothing
from kvdb.runtime.metrics import Metrics
from kvdb.runtime.prefetch import REACH, Prefetch
from kvdb.runtime.selection import DENSE_BELOW, Certified, Estimate, Forced, Plan, Scores, Selector, StopRule
from kvdb.runtime.selection.shares import shares
from kvdb.runtime.staging import Staging
from kvdb.runtime.timeline import Timeline, Trace
from kvdb.segments import Segment, codecs_of
from kvdb.store import KVDB

MASS_EVERY = 16
"""Covered mass is estimated on every so many-th selecting step."""
LOOK_EVERY = 64
"""While what was read is lost again, another way to read is looked for at every so many-th step."""


class Prefix(NamedTuple):
    """A stored prefix of one row: token ids, and where their KV lies."""

    tokens: list[int]
    spans: tuple[Span, ...]
    segments: list[Segment]


class KVDBCache(Cache):
    """Keys and values of one generation over a store. Made by `Attachment.cache` and `Attachment.load`.

    Works with `model.generate(input_ids, past_key_values=cache)` and with plain forward passes while its model is attached.
    Batches are prompts of equal length.
    """

    def __init__(
        self,
        db: KVDB,
        identity: Identity,
        identify: Callable[[], Identity],
        geometry: Geometry,
        windows: dict[int, int],
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        rule: StopRule | None,
        selector: Selector,
        codec: CodecPlan,
        model_label: str,
        stores: bool = True,
        trace: Trace | None = None,
        prefetch: bool | None = None,
        device_tier: DeviceCache | None = None,
    ) -> None:
        """identify: the model's identity as it is now. windows: of layers that have one. rule: None is exact. stores: whether new tokens
        are, where the store can be written to. prefetch: see `Prefetch`."""
        self.db, self.identity, self.geometry, self.dtype = db, identity, geometry, dtype
        self.rule, self.selector, self._identify = rule, selector, identify
        self.metrics, self.timeline, self.prefetch = Metrics(), Timeline(trace), Prefetch(prefetch)
        self.is_probing = False
        self.given: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # see `kvdb.runtime.prediction`; of this step
        self.forced = Forced.of(geometry.chunk_tokens)
        self.writes = stores and not db.readonly
        self.expected_tokens = 0
        self.prefilling = False
        self.take: int | None = None
        self.sampling = False
        self._reader = db.reader()
        self._staging, self._device_tier = Staging.of(dtype, device), device_tier
        policies = (db.options.host_policy, None if device_tier is None else device_tier.policy)
        self._weighs = Importance.name in policies
        self.rows = [
            History(
                db,
                identity,
                geometry,
                self._reader,
                self._staging,
                tuple(selector.abstracts),
                codec,
                model_label,
                self.timeline,
                device_tier,
            )
            for _ in range(batch)
        ]
        self.fetching = Fetching(self.timeline)
        self._let_go = weakref.finalize(self, _let_go, self.rows, self._reader, self.fetching)
        self._losing_steps = 0
        self._active = False
        self._broken: str | None = None
        self._selecting_steps = 0
        self._bytes_before = self._fetched_before = 0
        self._coming: list[list[int]] = []
        super().__init__(
            layers=[
                SlidingLayer(self, layer, windows[layer]) if layer in windows else FullLayer(self, layer)
                for layer in geometry.layers
            ]
        )
        self._full_layers = [layer for layer in self.layers if isinstance(layer, FullLayer)]
        self.metered_layers = {layer.stored.index for layer in (self._full_layers[:1] + self._full_layers[-1:])}
        self._full_indices = tuple(layer.stored.index for layer in self._full_layers)
        self._full_token_bytes = sum(
            2 * layer.stored.group.kv_heads * layer.stored.group.head_dim * dtype.itemsize
            for layer in self._full_layers
        )
        forks.watch(self)

    def after_fork(self) -> None:
        self._broken = "it was made before this process was forked"

    # -- what it holds

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of every row that have been computed."""
        return [row.tokens for row in self.rows]

    def __len__(self) -> int:
        return len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens this layer holds; inside a step, later layers still lack the newest ones."""
        return int(self.layers[layer_idx].get_seq_length())

    @property
    def length(self) -> int:
        """Tokens computed by whole steps."""
        return len(self.rows[0].tokens)

    def stats(self) -> dict[str, Any]:
        """Counters of this cache so far (see Metrics), seconds by stage (`kvdb.runtime.timeline.STAGES`), bytes of KV that were asked for
        and were not in memory, and what the store holds of it, JSON-safe."""
        self.metrics.abstract_bytes_resident = sum(row.resident_bytes for row in self.rows)
        return {
            **self.metrics.as_dict(),
            "kv_bytes_fetched": self._reader.bytes_fetched + self.fetching.fetched,
            "kv_bytes_stored": sum(row.stored_bytes() for row in self.rows),
            "stage_seconds": dict(self.timeline.seconds),
            "prefetch": self.prefetch.stats(),
            "transfers": None if self._staging.transfers is None else self._staging.transfers.stats(),
            "host_tier": None if self.db.host is None else self.db.host.stats(),
            "device_tier": None if self._device_tier is None else self._device_tier.stats(),
        }

    # -- restoring

    def restore(self, prefixes: list[Prefix]) -> None:
        """Take over a stored prefix per row; all of the same length.

        raises  Damaged when a file is missing or short; Unsupported where keys are not what a certificate needs
        """
        with self.timeline.span("restore"):
            self._restore(prefixes)

    def _restore(self, prefixes: list[Prefix]) -> None:
        if isinstance(self.rule, Certified):
            for segment in (segment for prefix in prefixes for segment in prefix.segments):
                expect_exact_keys(CodecPlan.of_groups(segment.info.geometry, codecs_of(segment.info)))
        tokens = len(prefixes[0].tokens)
        for row, prefix in zip(self.rows, prefixes, strict=True):
            row.restore(prefix.spans, prefix.segments, prefix.tokens)
        grid = self.geometry.grid_floor(tokens)
        for layer in self.layers:
            stored = layer.stored
            if tokens > grid and (self.writes or isinstance(layer, FullLayer)):
                started = [row.last_tokens(stored.index, grid, tokens) for row in self.rows]
                stored.tail.append(torch.stack([k for k, _ in started]), torch.stack([v for _, v in started]))
            if isinstance(layer, SlidingLayer) and tokens:
                start = max(0, tokens - layer.sliding_window + 1)
                window = [row.last_tokens(stored.index, start, tokens) for row in self.rows]
                layer.restore_window(torch.stack([k for k, _ in window]), torch.stack([v for _, v in window]), tokens)
        self.metrics.restore_bytes_read = self._reader.bytes_read
        self.metrics.reused_tokens = tokens

    # -- computing a part of it again

    def fetch_from(self, tokens: int) -> None:
        """Have the stored KV that dense attention reads from this position on, which ends a chunk, brought into memory while others compute."""
        start = tokens // self.geometry.chunk_tokens
        runs = [run for layer in self._full_indices for row in self.rows for run in row.sealed_runs(layer, start)]
        once = {(run.segment.info.segment, *run[1:]): run for run in runs}  # rows of a batch may share segments
        if once:
            group = self._full_layers[0].stored.group
            record_bytes = 2 * self.geometry.chunk_tokens * group.head_dim * self.dtype.itemsize
            self.fetching.begin(self.db.reader(), list(once.values()), record_bytes, self.room)

    @property
    def room(self) -> int | None:
        """Bytes that can be brought into memory before they are asked for; None: as the page cache likes."""
        return None if self.db.host is None else self.db.host.budget_bytes

    def take_recomputed(self, other: KVDBCache) -> None:
        """Have dense attention use what another cache, which stores nothing, has computed of the first tokens, instead of what is stored of them.
        Nothing of it is stored; it goes when attention begins to select.

        other  of whole chunks, as many rows; it is of no further use
        """
        for own, each in zip(self._full_layers, other._full_layers, strict=True):
            own.recomputed, each.stored.tail = Recomputed.of(each.stored.tail), Tail()
        self.metrics.recomputed_tokens = other.length

    def drop_recomputed(self) -> None:
        """Have attention read everything from the store again."""
        for layer in self._full_layers:
            layer.recomputed = None

    # -- steps

    def begin_step(self, input_ids: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Check what a forward pass is about to compute.

        raises  InvalidInput or Unsupported before anything has changed
        """
        if self._broken is not None:
            raise InvalidInput(f"KVDB cache: {self._broken}, expected a whole one; make a new cache")
        if input_ids is None or input_ids.dim() != 2:
            raise Unsupported(
                "KVDB cache: no input_ids of shape (batch, tokens), expected them; inputs_embeds cannot be stored"
            )
        batch, queries = input_ids.shape
        if batch != len(self.rows) or queries == 0:
            raise InvalidInput(
                f"KVDB cache: input_ids {tuple(input_ids.shape)}, expected ({len(self.rows)}, tokens > 0)"
            )
        if attention_mask is not None and (attention_mask.dim() != 2 or not bool(attention_mask.all())):
            raise Unsupported(
                "KVDB cache: attention_mask is not all ones, expected prompts of equal length without padding; "
                "batch prompts of one length, or run them one by one"
            )
        length = self.length
        if position_ids is not None:
            expected = torch.arange(length, length + queries, device=position_ids.device)
            if position_ids.shape[-1] != queries or not bool((position_ids == expected).all()):
                at = position_ids.reshape(-1, position_ids.shape[-1])[0]
                raise InvalidInput(
                    f"KVDB cache: positions {int(at[0])}..{int(at[-1])} were passed, but the cache holds {length} tokens, "
                    f"expected {length}..{length + queries - 1}; the prompt must be longer than the cache and begin with "
                    "its tokens"
                )
        self._change_reader()
        self._coming, self.given = input_ids.tolist(), None
        self._active = True
        self._broken = "an earlier forward pass failed half-way"
        self._bytes_before = self._reader.bytes_read
        self._fetched_before = self._reader.bytes_fetched
        self._choose(queries)
        if self.take is not None:
            self.prefetch.begin_step()
        if (transfers := self._staging.transfers) is not None:
            transfers.begin_step(comparable=queries == 1 and not self.prefilling and not self.prefetch.comparing)
        self._stepping = self.timeline.span("step").__enter__()

    def _change_reader(self) -> None:
        """Where pages that were in memory go, a reader that is made now may read another way: see `kvdb.reading`."""
        if not self._reader.loses:
            return
        self._losing_steps += 1
        if self._losing_steps % LOOK_EVERY != 1:
            return
        before, let_go = self._reader, self._let_go
        with ExitStack() as stack:
            try:
                other = self.db.reader()
                stack.callback(other.close)
                if other.name == before.name:
                    return
                for row in self.rows:
                    row.open_in(other)
            except (
                Damaged,
                OSError,
                OutOfMemory,
            ):  # deleted since, say, or out of descriptors: what is open here stays readable
                return
            other.bytes_read, other.bytes_fetched = before.bytes_read, before.bytes_fetched
            self._let_go = weakref.finalize(self, _let_go, self.rows, other, self.fetching)
            stack.pop_all()
        self._reader = other
        for row in self.rows:
            row.reader = other
        let_go.detach()
        before.close()

    def _choose(self, queries: int) -> None:
        """Selection is decided once per step, so that all its layers agree on the fidelity of the new tokens."""
        ct = self.geometry.chunk_tokens
        self.take, self.sampling = None, False
        chunks = self.rows[0].sealed_chunks
        if self.rule is None or self.prefilling or queries != 1 or not self._full_layers or chunks * ct < DENSE_BELOW:
            return
        take = self.rule.look_at(chunks, ct)
        if take >= chunks:
            return
        self.take = take
        self.drop_recomputed()
        self.sampling = self._selecting_steps % MASS_EVERY == 0
        self._selecting_steps += 1
        for row in self.rows:
            row.mark_approximate(self.length, self.rule.fidelity)

    def expect_active(self) -> None:
        """Layers are only updated inside a step.

        raises  Unsupported when the model was run around the attachment
        """
        if not self._active:
            raise Unsupported(
                "KVDB cache: its layers were updated outside a forward pass of the attached model, expected the model given "
                "to attach(); call that model itself, not a part or another one, and stay inside the 'with' block"
            )

    def end_step(self, *, failed: bool) -> None:
        """Take over the step's tokens and commit what is full."""
        self.given = None
        if not self._active:
            return
        self._active = False
        if failed:
            return
        self._stepping.__exit__(None, None, None)
        if self.take is not None:
            self.prefetch.end_step(self._stepping.seconds, self._reader.bytes_fetched - self._fetched_before)
        if self._staging.transfers is not None:
            self._staging.transfers.end_step(self._stepping.seconds)
        for row, ids in zip(self.rows, self._coming, strict=True):
            row.tokens.extend(ids)
        read = self._reader.bytes_read - self._bytes_before
        if self.prefilling or len(self._coming[0]) > 1:
            self.metrics.prefill_bytes_read += read
        else:
            self.metrics.decode_tokens += 1
            self.metrics.decode_bytes_read += read
            ct = self.geometry.chunk_tokens
            self.metrics.decode_bytes_full += sum(
                row.chunk_bytes(self._full_indices) + (self.length - row.sealed_chunks * ct) * self._full_token_bytes
                for row in self.rows
            )
        full = [row for row in self.rows if row.full]
        if full:
            self._check_identity()
        for row in full:
            row.commit()
        self._broken = None

    def _check_identity(self) -> None:
        """Nothing is stored under an identity that is no longer the model's.

        raises  IdentityMismatch when the weights changed since the cache was made
        """
        if different := self._identify().difference(self.identity):
            raise IdentityMismatch(
                f"KVDB cache: the model's {', '.join(different)} changed since the cache was made, expected the same; "
                "make a new cache"
            )

    def note_resident(self) -> None:
        tails = sum(layer.stored.tail.nbytes for layer in self.layers)
        tails += sum(layer.recomputed.nbytes for layer in self._full_layers if layer.recomputed is not None)
        self.metrics.resident(tails, self._staging.nbytes + self._reader.unpacked_bytes)

    def note_mass(self, mass: Tensor) -> None:
        self.metrics.mass_sum += float(mass)
        self.metrics.mass_samples += 1

    # -- reading ahead

    @property
    def reads_ahead(self) -> bool:
        """Whether it wants to know, at this step, what layers are about to ask."""
        selecting = self.take is not None and not isinstance(self.rule, Certified)
        return selecting and self.prefetch.active and not self.is_probing

    def is_full(self, layer: int) -> bool:
        return isinstance(self.layers[layer], FullLayer)

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Layers take nothing and attend to nothing: they raise `Asked`."""
        self.is_probing = True
        try:
            yield
        finally:
            self.is_probing = False

    def expect(self, layer: int, query: Tensor) -> None:
        """Have records on their way that a query like this would choose.

        query  (batch, heads, 1, head_dim), scaled
        """
        assert self.rule is not None
        assert self.take is not None
        kv_heads = self.layers[layer].stored.group.kv_heads
        for row, of_row in zip(self.rows, query.squeeze(2).detach().float(), strict=True):
            q = of_row.unflatten(0, (kv_heads, -1))
            take = min(round(REACH * self.take), row.chunks(layer))
            scores = self.rule.score(self.selector, q, row.resident(layer, self.selector), take)
            nothing = q.new_full(q.shape[:2], -torch.inf)
            plan = self.rule.plan(scores, take, self.forced, nothing, reads_nothing)
            row.expect(layer, plan.chunks, plan.counts)
            self.prefetch.expect(layer, plan)

    def note_choice(self, row: History, layer: int, scores: Scores, chosen: Plan, estimate: Estimate | None) -> None:
        """What a row's query chose in a layer, before it is read."""
        self.prefetch.chosen(layer, chosen, scores.lse.shape[-1])
        if self._weighs:
            row.weigh(layer, chosen.chunks, chosen.counts, shares(scores.lse)[:, :-1].gather(1, chosen.chunks))
        self.metrics.ranges_evaluated += scores.evaluated
        self.metrics.abstract_bytes_read += scores.bytes_read + (0 if estimate is None else estimate.bytes_read)
        if chosen.unread_mass is not None:
            self.metrics.unread_mass_bound = max(self.metrics.unread_mass_bound or 0.0, float(chosen.unread_mass.max()))

    # -- storing

    def seal(self) -> None:
        """Store every token computed so far; the tails keep only the started chunk.

        raises  ReadOnly in mode "r"; IdentityMismatch when the weights changed; StorageFull, PrefixDeleted: then the cache
                is of no further use, since its tails are on their way
        """
        if not self.writes:
            raise ReadOnly(f"{self.db.path}: opened with mode 'r', expected a writable store; open it with 'r+' or 'a'")
        if self._broken is not None:
            raise InvalidInput(f"KVDB cache: {self._broken}, expected a whole one; make a new cache")
        if self.rows[0].stored_tokens == self.length:
            return
        self._check_identity()
        self._broken = "an earlier save failed half-way"
        while (stored := min(row.stored_tokens for row in self.rows)) < self.length:
            for layer in self.layers:
                layer.stored.flush(everything=True)
            for row in self.rows:
                row.commit()
            assert min(row.stored_tokens for row in self.rows) > stored
        self._broken = None

    def salvage(self) -> None:
        """After an interrupted prefill: commit the whole blocks that every layer has written, drop the rest."""
        self._broken = self._broken or "its prefill was interrupted"
        for row in self.rows:
            row.commit()

    def discard(self) -> None:
        """Drop what is in flight; the cache is of no further use."""
        self._broken = self._broken or "it was discarded"
        for row in self.rows:
            row.discard()

    def close(self) -> None:
        """Release threads, maps, files and memory. Closing twice is fine."""
        self._broken = "it is closed"
        self.fetching.stop()
        if self._let_go.detach() is not None:
            for row in self.rows:
                row.close()
            self._reader.close()
        for layer in self.layers:
            layer.stored.tail = Tail()
        self.drop_recomputed()


def expect_exact_keys(codec: CodecPlan) -> None:
    """raises  Unsupported where keys are stored with a lossy codec: abstracts bound the keys they were made of, not what is decoded"""
    if not codec.exact_keys:
        raise Unsupported(
            f"certified: keys are stored as {codec}, expected a codec that keeps them exactly; use a budget, or store them as raw"
        )


def _let_go(rows: list[History], reader: Reader, fetching: Fetching) -> None:
    fetching.let_go()
    for row in rows:
        row.let_go()
    reader.close()
