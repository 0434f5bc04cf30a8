"""The job: every configuration on every text, then every needle; each text is prefilled once.

A configuration is a codec, a selector and a rule. Dense attention, which all are compared with, and the abstracts that selectors
choose by have the exact KV; what is attended to is what the codec gives back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import xxhash

from kvdb.codecs import RAW, CodecPlan
from kvdb.errors import InvalidInput
from kvdb.geometry import CHUNK_TOKENS, Geometry, LayerGroup
from kvdb.runtime.identity import dtype_name, text_config
from kvdb.runtime.selection import DENSE_BELOW, Selector, StopRule
from kvdb.tools.evaluate.forward import Cost, Outcome, Selecting, forward
from kvdb.tools.evaluate.greedy import Feed, agreeing, greedy
from kvdb.tools.evaluate.journal import Journal, Judged
from kvdb.tools.evaluate.measure import distance
from kvdb.tools.evaluate.needles import ANSWER_TOKENS, DEPTHS, Needle, needle
from kvdb.tools.evaluate.past import Past
from kvdb.tools.evaluate.report import Answered, LayerCost, Quality, Report, Row
from kvdb.tools.evaluate.texts import text_ids
from kvdb.tools.models import LoadedModel

GREEDY_TOKENS = 32


class Configuration(NamedTuple):
    """codec, selector: labels."""

    codec: str
    selector: str
    rule: StopRule

    def __str__(self) -> str:
        return f"{self.codec} {self.selector} {self.rule.fidelity}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to judge.

    raises     InvalidInput for lengths of which nobody selects, and chunks that are no small part of them; Unsupported for rules
               that a selector cannot serve
    tokens     lengths of texts; the last `positions` tokens of each are predicted, those before them are selected from
    codecs     of what is stored, by label
    selectors  by label
    texts      names in `TEXTS`, or files
    needles    per depth and length
    """

    tokens: list[int]
    positions: int
    selectors: dict[str, Selector]
    rules: list[StopRule]
    texts: list[str]
    needles: int
    seed: int
    chunk_tokens: int = CHUNK_TOKENS
    codecs: dict[str, CodecPlan] = field(default_factory=lambda: {"raw": RAW})

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_tokens <= DENSE_BELOW // 2:
            raise InvalidInput(f"--chunk-tokens {self.chunk_tokens}: expected 1 to {DENSE_BELOW // 2}")
        for tokens in self.tokens:
            if tokens - self.positions < DENSE_BELOW:
                raise InvalidInput(
                    f"--tokens {tokens}, --positions {self.positions}: {tokens - self.positions} tokens to select from, expected at "
                    f"least {DENSE_BELOW}; shorter histories are attended to densely"
                )
        for rule in self.rules:
            for selector in self.selectors.values():
                rule.check(selector)

    def check(self, model: Any) -> None:
        """raises  InvalidInput for lengths that the model cannot take, and codecs that do not fit its KV"""
        config = text_config(model)
        context = getattr(config, "max_position_embeddings", None)
        for tokens in self.tokens:
            if context is not None and tokens > context:
                raise InvalidInput(f"--tokens {tokens}: expected at most {context}, the model's context")
        heads = config.num_attention_heads
        group = LayerGroup(
            layers=tuple(range(config.num_hidden_layers)),
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )
        geometry = Geometry(dtype=dtype_name(model.dtype), chunk_tokens=self.chunk_tokens, groups=(group,))
        for codec in self.codecs.values():
            codec.grouped(geometry)  # refuses what does not fit

    @property
    def configurations(self) -> list[Configuration]:
        return [Configuration(*each) for each in product(self.codecs, self.selectors, self.rules)]

    @property
    def steps(self) -> int:
        """How often `judge` reports progress."""
        return len(self.tokens) * (len(self.texts) + self.needles * len(DEPTHS)) * (1 + len(self.configurations))

    def described(self, model: str) -> dict[str, Any]:
        """What the figures of a text depend on beside the text, JSON-safe."""
        return {
            "model": model, "positions": self.positions, "chunk_tokens": self.chunk_tokens,
            "codecs": {label: str(codec) for label, codec in self.codecs.items()},
            "selectors": {label: repr(selector) for label, selector in self.selectors.items()},
            "rules": [rule.fidelity for rule in self.rules],
        }  # fmt: skip


Progress = Callable[[str], None]


def judge(loaded: LoadedModel, trial: Trial, progress: Progress, journal: Journal | None = None) -> Report:
    """Deterministic: the same trial, model and packages give the same report, up to float rounding of the machine.

    progress  called with a line of text before each step
    journal   what it has is not judged again, and what is judged is added to it
    raises    InvalidInput for texts that are too short; Unsupported for models
    """
    trial.check(loaded.model)
    found: dict[int, list[Judged]] = {tokens: [] for tokens in trial.tokens}
    for tokens in trial.tokens:
        for of, run in _tasks(loaded, trial, tokens, progress):
            judged = None if journal is None else journal.get(of)
            if judged is None:
                judged = run(of)
                if journal is not None:
                    journal.add(judged)
            else:
                for _ in range(1 + len(trial.configurations)):
                    progress("judged before")
            found[tokens].append(judged)
    return Report(
        model=loaded.name,
        seed=trial.seed,
        positions=trial.positions,
        chunk_tokens=trial.chunk_tokens,
        greedy_tokens=min(GREEDY_TOKENS, trial.positions),
        needles_asked=trial.needles * len(DEPTHS),
        rows=[
            Row(
                tokens=tokens,
                codec=of.codec,
                selector=of.selector,
                rule=of.rule.fidelity,
                texts=[judged.texts[str(of)] for judged in found[tokens] if str(of) in judged.texts],
                needles=[judged.needles[str(of)] for judged in found[tokens] if str(of) in judged.needles],
            )
            for tokens, of in product(trial.tokens, trial.configurations)
        ],
    )


def _tasks(
    loaded: LoadedModel, trial: Trial, tokens: int, progress: Progress
) -> Iterator[tuple[str, Callable[[str], Judged]]]:
    """Texts, then needles, of one length: what each is, and its judge."""
    for name in trial.texts:
        ids = text_ids(loaded.tokenizer, name, tokens + 1, seed=trial.seed)
        yield (
            f"{name}, {tokens} tokens, {_digest(ids)}",
            partial(_judge_text, loaded, trial, tokens, name, ids, progress),
        )
    for seed in range(trial.seed, trial.seed + trial.needles):
        for depth in DEPTHS:
            asked = needle(loaded.tokenizer, trial.texts[seed % len(trial.texts)], tokens, depth, seed=seed)
            of = f"needle at {depth} of {asked.text}, {tokens} tokens, {_digest(asked.ids)}"
            yield of, partial(_judge_needle, loaded, trial, tokens, asked, progress)


def _digest(ids: list[int]) -> str:
    return xxhash.xxh3_128_hexdigest(np.asarray(ids, np.int64).tobytes())


def _configured(trial: Trial, past: Past) -> Iterator[tuple[Configuration, Past, Selecting]]:
    """Every configuration: what its codec gives back of an exact past, and how is selected from it."""
    resident = {label: past.resident(selector) for label, selector in trial.selectors.items()}
    for name, codec in trial.codecs.items():
        stored = past.through(codec)
        for label, rule in product(trial.selectors, trial.rules):
            selecting = Selecting(trial.selectors[label], resident[label], rule)
            yield Configuration(name, label, rule), stored, selecting


def _judge_text(
    loaded: LoadedModel, trial: Trial, tokens: int, name: str, ids: list[int], progress: Progress, of: str
) -> Judged:
    model, where, texts = loaded.model, f"{name}, {tokens:,} tokens", dict[str, Quality]()
    progress(f"{where}: dense")
    start = tokens - trial.positions
    past, fed, targets = Past.of(model, ids[:start], trial.chunk_tokens), ids[start:-1], ids[start + 1 :]
    dense = forward(model, past, fed, None).logits
    said = _dense_greedy(model, past, ids[start], min(GREEDY_TOKENS, trial.positions))
    for configuration, stored, selecting in _configured(trial, past):
        progress(f"{where}: {configuration}")
        outcome = forward(model, stored, fed, selecting)
        along = forward(model, stored, [ids[start], *said[:-1]], selecting).logits
        away = distance(dense, outcome.logits, targets)
        texts[str(configuration)] = Quality(
            text=name,
            kl=away.kl,
            top1=away.top1,
            perplexity_ratio=away.perplexity,
            same_greedy=agreeing(said, along.argmax(-1).tolist()),
            token_bytes=stored.token_bytes,
            token_share=stored.token_bytes / past.token_bytes,
            abstract_bytes_resident=sum(tensor.nbytes for parts in selecting.resident.values() for tensor in parts),
            **_costs(stored, outcome, len(fed)),
        )
    return Judged(of=of, texts=texts)


def _costs(past: Past, outcome: Outcome, positions: int) -> dict[str, Any]:
    """Per position, of all selecting layers together and of each."""
    records, costs = past.records, outcome.costs

    def mean(of: Callable[[Cost], float]) -> float:
        return sum(of(cost) for cost in costs.values()) / positions

    kv_bytes = mean(lambda c: c.kv_bytes)
    return {
        "mass": mean(lambda c: c.mass) / len(costs),
        "mass_estimated": sum(cost.estimate / cost.estimates for cost in costs.values()) / len(costs),
        "kv_share": kv_bytes / sum(map(past.stored_bytes, costs)),
        "kv_bytes": kv_bytes,
        "abstract_bytes": mean(lambda c: c.abstract_bytes),
        "evaluated": mean(lambda c: c.evaluated),
        "layers": [
            LayerCost(layer=layer, mass=cost.mass / positions, kv_share=cost.records / positions / records[layer])
            for layer, cost in costs.items()
        ],
    }


def _judge_needle(loaded: LoadedModel, trial: Trial, tokens: int, asked: Needle, progress: Progress, of: str) -> Judged:
    needles = dict[str, Answered]()
    model, where = loaded.model, f"needle at {asked.depth:.0%} of {asked.text}, {tokens:,} tokens"
    progress(f"{where}: dense")
    past, last = Past.of(model, asked.ids[:-1], trial.chunk_tokens), asked.ids[-1]
    said = _dense_greedy(model, past, last, ANSWER_TOKENS)
    if asked.key not in str(loaded.tokenizer.decode(said)):
        for _ in trial.configurations:
            progress(f"{where}: dense attention does not find it")
        return Judged(of=of)
    for configuration, stored, selecting in _configured(trial, past):
        progress(f"{where}: {configuration}")
        answer = greedy(_feed(model, stored, selecting), last, ANSWER_TOKENS, said)
        text = str(loaded.tokenizer.decode(answer))
        needles[str(configuration)] = Answered(text=asked.text, depth=asked.depth, answer=text, found=asked.key in text)
    return Judged(of=of, needles=needles)


def _feed(model: Any, past: Past, selecting: Selecting) -> Feed:
    return lambda ids: forward(model, past, ids, selecting).logits


def _dense_greedy(model: Any, past: Past, first: int, tokens: int) -> list[int]:
    """What dense attention says after `first`, a token at a time."""
    cache, said = past.begun(), [first]
    for _ in range(tokens):
        logits = forward(model, past, said[-1:], None, cache).logits
        said.append(int(logits[-1].argmax()))
    return said[1:]
