"""The judge's parts, against NumPy and dumb loops.

Distances are those of NumPy in float64; greedy decoding by drafts says what a token at a time says, whatever the draft; texts
have the length that was asked for; a needle is where it should be; what was found can be read back from JSON and seen in the plot.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import byte_tokenizer

from kvdb.errors import InvalidInput
from kvdb.runtime.selection import BoxSelector, CentroidSelector, SketchSelector
from kvdb.tools.evaluate.greedy import agreeing, greedy
from kvdb.tools.evaluate.measure import distance
from kvdb.tools.evaluate.needles import ANSWER_TOKENS, DEPTHS, needle
from kvdb.tools.evaluate.oracle import JUDGED, KEYS, Oracle
from kvdb.tools.evaluate.plot import svg
from kvdb.tools.evaluate.report import Answered, LayerCost, Quality, Report, Row
from kvdb.tools.evaluate.texts import TEXTS, text_ids
from kvdb.tools.selectors import parse_selector

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


# -- distances


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted: np.ndarray[Any, Any] = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@given(st.integers(1, 6), st.integers(2, 30), st.floats(0.1, 5.0), seeds)
def test_distances_are_those_of_numpy(positions: int, words: int, width: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    dense, other = (width * torch.randn(positions, words, generator=g) for _ in range(2))
    targets = torch.randint(words, (positions,), generator=g).tolist()
    found = distance(dense, other, targets)
    p, q = log_softmax(dense.double().numpy()), log_softmax(other.double().numpy())
    every = np.arange(positions)
    slack = 64 * float(np.finfo(np.float32).eps) * (1 + float(np.abs(p).max()) + float(np.abs(q).max()))
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=slack)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    ratio = np.exp(-q[every, targets].mean()) / np.exp(-p[every, targets].mean())
    assert math.log(found.perplexity) == pytest.approx(math.log(ratio), abs=slack)


def test_nothing_is_nearer_than_itself() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert distance(logits, logits, [0, 1, 2, 3]) == (0.0, 1.0, 1.0)


# -- greedy decoding by drafts


class Speaker:
    """Says a word that depends on all before it; counts how often it is asked."""

    def __init__(self, seed: int, words: int) -> None:
        self.seed, self.words, self.passes = seed, words, 0

    def next(self, ids: list[int]) -> int:
        return hash((self.seed, *ids)) % self.words

    def feed(self, ids: list[int]) -> torch.Tensor:
        self.passes += 1
        said = torch.tensor([self.next(ids[: i + 1]) for i in range(len(ids))])
        return torch.nn.functional.one_hot(said, self.words).float()


@given(seeds, st.integers(1, 5), st.integers(1, 9), st.lists(st.integers(0, 4), max_size=12))
def test_a_draft_changes_nothing_but_how_often_is_asked(seed: int, words: int, tokens: int, draft: list[int]) -> None:
    speaker = Speaker(seed, words)
    expected = [0]
    for _ in range(tokens):
        expected.append(speaker.next(expected))
    assert greedy(speaker.feed, 0, tokens, draft) == expected[1:]
    assert speaker.passes <= tokens
    right = Speaker(seed, words)
    assert greedy(right.feed, 0, tokens, expected[1:]) == expected[1:]
    assert right.passes == 1


def test_agreement_ends_at_the_first_difference() -> None:
    assert agreeing([1, 2, 3], [1, 2, 3]) == 3
    assert agreeing([1, 2, 3], [1, 9, 3]) == 1
    assert agreeing([1, 2, 3], [9, 2, 3]) == 0


# -- the oracle


def test_the_oracle_knows_the_true_log_sum_exp() -> None:
    g = torch.Generator().manual_seed(1)
    keys = torch.randn(5, 2, 4, 8, generator=g)  # [chunks, kv_heads, chunk_tokens, head_dim]
    q = torch.randn(2, 3, 8, generator=g)
    resident = Oracle().prepare({KEYS: keys.numpy()}, 4, 8)
    found = Oracle().score(q, resident, 1, ceilings=True)
    logits = np.einsum("hgd,chtd->hgct", q.double().numpy(), keys.double().numpy())
    assert np.allclose(found.lse.numpy(), np.log(np.exp(logits).sum(-1)), rtol=0, atol=1e-5)
    assert found.ceiling is found.lse
    assert found.bytes_read == keys.nbytes


# -- selectors by name


def test_a_selector_is_named_with_its_settings() -> None:
    assert parse_selector("box") == BoxSelector()
    assert parse_selector("box:beta=1") == BoxSelector(beta=1.0)
    assert parse_selector("sketch:bits=4,margin=inf") == SketchSelector(bits=4, margin=math.inf)
    assert parse_selector("centroid:bits=2") == CentroidSelector(bits=2)
    assert {parse_selector(name, JUDGED).name for name in JUDGED} == set(JUDGED)


WRONG = [
    "bag",
    "box:gamma=1",
    "box:beta=many",
    "sketch:bits=2.5",
    "oracle:beta=1",
    "mean:beta=1",
    "centroid:bits=5",
    "",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_unknown_selector_or_setting_is_refused_with_what_there_is(wrong: str) -> None:
    with pytest.raises(InvalidInput, match="expected"):
        parse_selector(wrong, JUDGED)


def test_only_the_judge_has_the_oracle() -> None:
    with pytest.raises(InvalidInput, match="no selector 'oracle', expected one of centroid, sketch, box, mean"):
        parse_selector("oracle")


# -- texts


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_has_the_length_that_was_asked_for_and_a_seed_moves_it(tokenizer: Any, name: str) -> None:
    found = text_ids(tokenizer, name, 3000, seed=1)
    assert len(found) == 3000
    assert found == text_ids(tokenizer, name, 3000, seed=1)
    assert found != text_ids(tokenizer, name, 3000, seed=2)
    assert len(str(tokenizer.decode(found)).split()) > 300


def test_the_users_own_text_is_read_from_its_beginning_and_control_tokens_are_characters(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "own.txt"
    file.write_text("It was <|end|> a dark night.\n\nAnd then it was not.\n")
    found = text_ids(tokenizer, str(file), 30, seed=7)
    assert str(tokenizer.decode(found)) == "It was <|end|> a dark night.\n\n"
    with pytest.raises(InvalidInput, match=r"52 tokens, expected at least 53"):
        text_ids(tokenizer, str(file), 53)


# -- needles


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_needle_lies_at_its_depth_and_leaves_room_for_the_answer(tokenizer: Any, depth: float) -> None:
    found = needle(tokenizer, "reference", 4000, depth, seed=3)
    assert 3900 <= len(found.ids) + ANSWER_TOKENS <= 4000
    prompt = str(tokenizer.decode(found.ids))
    sentence = f"The pass key is {found.key}. Remember it."
    assert prompt.count(sentence) == 1
    assert abs(prompt.index(sentence) / len(prompt) - depth) < 0.08
    assert prompt.endswith("The pass key is")
    assert needle(tokenizer, "reference", 4000, depth, seed=3) == found
    assert needle(tokenizer, "reference", 4000, depth, seed=4).key != found.key


def test_a_needle_without_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidInput, match="expected room"):
        needle(tokenizer, "reference", 100, 0.5, seed=0)


# -- the report


def quality(text: str, kl: float) -> Quality:
    layers = [LayerCost(layer=0, mass=0.5, kv_share=0.1)]
    return Quality(
        text=text, kl=kl, top1=0.9, perplexity_ratio=1.1, same_greedy=3, mass=0.8, mass_estimated=0.7, token_bytes=40.0,
        token_share=0.25, kv_share=0.1, kv_bytes=1000.0, abstract_bytes=500.0, abstract_bytes_resident=700, evaluated=30.0, layers=layers,
    )  # fmt: skip


def report(*codecs: str) -> Report:
    answers = [Answered(text="code", depth=0.5, answer=" 12345.", found=found) for found in (True, True, False)]
    rows = [
        Row(
            tokens=tokens,
            codec=codec,
            selector=name,
            rule=rule,
            texts=[quality("code", kl), quality("prose", 3 * kl)],
            needles=answers,
        )
        for tokens in (2000, 4000)
        for codec in codecs or ("raw",)
        for name in ("a<b", "oracle")
        for rule, kl in (("budget=0.1", 0.02), ("budget=1", 0.0))
    ]
    return Report(model="m", seed=0, positions=8, chunk_tokens=16, greedy_tokens=8, needles_asked=5, rows=rows)


def test_a_row_says_mean_and_spread_over_texts_and_needles_found() -> None:
    row = report().rows[0]
    assert row.mean(lambda text: text.kl) == pytest.approx(0.04)
    assert row.spread(lambda text: text.kl) == pytest.approx(math.sqrt(2) * 0.02)
    assert row.found == 2
    assert row.bytes_read == 1500.0
    single = Row(tokens=1, codec="raw", selector="a", rule="r", texts=row.texts[:1], needles=[])
    assert single.spread(lambda text: text.kl) == 0.0


def test_a_report_is_read_back_from_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(report()), type=Report) == report()


def test_a_plot_is_well_formed_and_shows_every_point_that_has_a_place() -> None:
    root = ElementTree.fromstring(svg(report()))
    of = "{http://www.w3.org/2000/svg}"
    texts = [element.text or "" for element in root.iter(f"{of}text")]
    assert {"a<b", "oracle"} <= set(texts)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    dots = list(root.iter(f"{of}circle"))
    # Per length and selector one KL (the other is 0, which a logarithm cannot show) and two needle shares; and the legend.
    assert len(dots) == 2 * 2 * (1 + 2) + 2
    for dot in dots:
        assert 0 <= float(dot.attrib["cx"]) <= width
        assert 0 <= float(dot.attrib["cy"]) <= height


def test_a_plot_of_several_codecs_says_which() -> None:
    root = ElementTree.fromstring(svg(report("raw", "int4")))
    of = "{http://www.w3.org/2000/svg}"
    texts = [element.text or "" for element in root.iter(f"{of}text")]
    assert texts[-4:] == ["raw a<b", "raw oracle", "int4 a<b", "int4 oracle"]
    assert len(list(root.iter(f"{of}circle"))) == 2 * 4 * (1 + 2) + 4
