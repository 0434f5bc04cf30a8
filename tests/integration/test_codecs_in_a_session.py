"""KV that a codec stored, inside real sessions: it is reused under that codec, never where exact KV is asked for, and says what it is.

Models are tiny, random and sharpened (see `tiny_models`), with histories of some 1 500 tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_healthy, opened, read_kv
from tiny_models import greedy, prompt, tiny
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvdb import KVDB
from kvdb.codecs import RAW, CodecPlan
from kvdb.errors import InvalidInput, NotFinite, Unsupported
from kvdb.runtime import attach
from kvdb.segments import codec_of

pytestmark = pytest.mark.usefixtures("single_thread")
TOKENS = 1500
CODECS = ["int8", "int4", "int2", "planes", "planes:bits=8+int8", "raw+int8", "int4;0=raw"]


def logits(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Of one step, in float64."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1].double()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("codec", ["int8", "int4;0=raw", "planes:bits=6+int8"])
@pytest.mark.parametrize("rule", [{"exact": True}, {"budget": 0.2}, {"mass": 0.9}], ids=lambda rule: next(iter(rule)))
def test_what_a_codec_stored_is_reused_and_gives_the_same_answer(
    tmp_path: Path, architecture: str, codec: str, rule: dict[str, Any]
) -> None:
    """A started chunk, and the windows of sliding layers, are exact until they are read back."""
    model, ids, found = tiny(architecture), prompt(TOKENS // 16 * 16 + 1), []
    for _ in range(3):
        with opened(tmp_path / "s") as db, attach(model, db, codec=codec, **rule) as kv:
            cache = kv.cache(ids)
            found.append((cache.metrics.reused_tokens, logits(model, cache, ids)))
            assert kv.match(ids[:, :-1]).reason == "all tokens are stored"
            assert_healthy(db)
    assert [reused for reused, _ in found] == [0, TOKENS // 16 * 16, TOKENS // 16 * 16]
    if architecture != "gemma3":
        assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[1][1], found[2][1])


@pytest.mark.parametrize("codec", CODECS)
def test_keys_and_values_lie_as_near_as_the_codec_says(tmp_path: Path, codec: str) -> None:
    """Of the first layer: what is before it is the same whatever is stored."""
    model, ids, plan = tiny("llama"), prompt(TOKENS), CodecPlan.parse(codec)
    with torch.no_grad():
        dense = model(input_ids=ids[:, :-1], past_key_values=DynamicCache(config=model.config)).past_key_values.layers[
            0
        ]
    with opened(tmp_path / "s") as db, attach(model, db, codec=codec, exact=True) as kv:
        kv.save(kv.cache(ids), name="n")
        reader, first = db.reader(), 0
        for segment in db.segments(db.sequence("n").spans):
            info = segment.info
            g = info.geometry.groups[info.geometry.locate(0)[0]]
            rows = reader.rows(segment, 0, np.arange(info.chunks * g.kv_heads))
            codecs = codec_of(info, info.geometry.locate(0)[0])
            assert codecs == (plan if info.tokens >= 16 and info.start else RAW).of(0)
            k, v = read_kv(reader, segment, 0, info.tokens)
            split = codecs.key.half_bytes(16, g.head_dim, info.geometry.dtype)
            for found, exact, half, part in (
                (k, dense.keys, codecs.key, rows[:, :split]),
                (v, dense.values, codecs.value, rows[:, split:]),
            ):
                bound = half.bound(part, 16, g.head_dim).reshape(info.chunks, g.kv_heads, 16, g.head_dim).swapaxes(0, 1)
                bound = bound.reshape(g.kv_heads, -1, g.head_dim)[:, : info.tokens]
                wanted = exact[0, :, first : first + info.tokens].numpy()
                assert (np.abs(found - wanted) <= bound * (1 + 1e-5) + 2e-5 * np.abs(wanted)).all()
                assert (bound.max() == 0) == half.lossless
            first += info.tokens
        reader.close()
        assert first == TOKENS - 1


def test_lossy_kv_is_never_served_where_exact_kv_is_asked_for(db: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with attach(model, db, codec="int4", exact=True) as kv:
        kv.save(kv.cache(ids), name="n")
    assert db.sequence("n").fidelity == "int4"
    for other in ("raw", "int8", "planes"):
        with attach(model, db, codec=other) as kv:
            match = kv.match(ids)
            assert (match.tokens, "not with fidelity 'exact'" in match.reason) == (0, True)
            with pytest.raises(InvalidInput, match="its fidelity is 'int4', expected 'exact'"):
                kv.load("n")
    with attach(model, db, fidelity="any") as kv:
        assert kv.match(ids).tokens == TOKENS - 1
        assert kv.load("n").length == TOKENS - 1


def test_exact_kv_serves_every_codec_and_what_follows_is_stored_with_it(db: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with attach(model, db, exact=True) as kv:
        kv.cache(ids[:, :1201])
    with attach(model, db, codec="int8", exact=True) as kv:
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == 1200
        kv.save(cache, name="n")
    assert [s.info.fidelity for s in db.segments(db.sequence("n").spans)] == ["exact", "int8", "int8"]
    with attach(model, db, exact=True) as kv:
        assert kv.match(ids).tokens == 1200


@pytest.mark.parametrize("others", [("int8",), ("int8", "int2", "planes")], ids=len)
def test_the_same_prompt_under_other_codecs_hides_nothing(db: KVDB, others: tuple[str, ...]) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    for codec in others:
        with attach(model, db, codec=codec, exact=True) as kv:
            kv.save(kv.cache(ids), name=codec)
    reused = []
    for _ in range(2):
        with attach(model, db, codec="int4", exact=True) as kv:
            cache = kv.cache(ids[:, :1201])
            reused.append(cache.metrics.reused_tokens)
            kv.save(cache, name="int4")
            match = kv.match(ids)
            assert match.tokens == 1200
            assert match.reason == f"{TOKENS - 1} tokens are stored, but not with fidelity 'exact' or 'int4'"
    assert reused == [0, 1200]
    assert db.info()["segments"] == 3 * len(others) + 2  # first chunk, whole ones, and a started one


def test_what_was_computed_under_a_budget_says_so_beside_its_codec(db: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with attach(model, db, codec="int8", budget=0.2) as kv:
        cache = kv.cache(ids)
        greedy(model, ids, cache, 40)
        kv.save(cache, name="n")
    assert [s.info.fidelity for s in db.segments(db.sequence("n").spans)] == 2 * ["int8"] + 2 * ["budget=0.2 int8"]
    with attach(model, db, codec="int8") as kv:
        longer = torch.tensor([cache.tokens[0]])
        assert kv.match(longer).tokens == TOKENS - 1
        with pytest.raises(InvalidInput, match=r"its fidelity is 'budget=0\.2 int8', expected 'exact' or 'int8'"):
            kv.load("n")


def test_a_certificate_needs_exact_keys(db: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with pytest.raises(
        Unsupported, match="certified: keys are stored as int4, expected a codec that keeps them exactly"
    ):
        attach(model, db, codec="int4", certified=0.1)
    with attach(model, db, codec="int4", exact=True) as kv:
        kv.cache(ids)
    with attach(model, db, fidelity="any", certified=0.1) as kv, pytest.raises(Unsupported, match="certified: keys"):
        kv.cache(ids)
    with attach(model, db, codec="raw+int8", certified=0.2) as kv:
        assert logits(model, kv.cache(ids), ids).isfinite().all()


@pytest.mark.parametrize(
    ("codec", "error", "message"),
    [
        ("zip", Unsupported, "'zip', expected one of"),
        ("int4;99=raw", InvalidInput, r"layers \[99\], expected some of"),
        ("int4;0", InvalidInput, "'0', expected LAYER=CODEC"),
        ("int4;0=raw;0=int8", InvalidInput, "layer 0 twice"),
        ("int4;5-2=raw", InvalidInput, "'5-2=raw', expected LAYER=CODEC or FIRST-LAST=CODEC"),
        (f"int4;{'9' * 5000}=raw", InvalidInput, "expected LAYER=CODEC"),
        ("int4:group=7", InvalidInput, "7"),
        ("int4:bits=3", Unsupported, "bits"),
        ("blosc", Unsupported, "codec is blosc, which is for whole blocks"),
        ("int4;1=blosc", Unsupported, "then 'kvdb compact --codec'"),
        (4, InvalidInput, "codec is 4, expected a name"),
    ],
)
def test_codecs_that_cannot_be_are_refused(db: KVDB, codec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(tiny("llama"), db, codec=codec)


@pytest.mark.parametrize("rule", [{"exact": True}, {"budget": 0.2}], ids=lambda rule: next(iter(rule)))
@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
def test_compressed_blocks_serve_what_they_were_made_of(tmp_path: Path, rule: dict[str, Any], read_mode: str) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with opened(tmp_path / "s", read_mode=read_mode) as db, attach(model, db, **rule) as kv:
        cache = kv.cache(ids)
        kv.save(cache, name="n")
        expected = greedy(model, ids, cache)
        db.recode("n", CodecPlan.parse("blosc:tokens=256"))
        assert kv.match(ids).tokens == TOKENS - 1
        assert torch.equal(greedy(model, ids, kv.load("n")), expected)


def test_numbers_that_a_codec_cannot_keep_are_named_and_nothing_is_lost(db: KVDB) -> None:
    model, ids = tiny("llama"), prompt(TOKENS)
    with attach(model, db, codec="int8", exact=True) as kv:
        kv.save(kv.cache(ids[:, :1100]), name="before")
        weight = model.model.layers[1].self_attn.v_proj.weight
        kept = weight.data.clone()
        try:
            weight.data[0, 0] = float("inf")
            with pytest.raises(NotFinite, match="inf"):
                kv.save(kv.cache(ids), name="after")
        finally:
            weight.data.copy_(kept)
    assert [s.name for s in db.sequences() if s.name] == ["before"]
    with attach(model, db, codec="int8", exact=True) as kv:
        assert kv.match(ids).tokens == 1099
    assert_healthy(db)


def test_what_is_read_is_a_share_of_what_is_stored(db: KVDB) -> None:
    """By rows of the codec, whatever they hold."""
    model, ids, shares = tiny("llama"), prompt(TOKENS), {}
    for codec in ("int4", "raw"):  # exact KV would serve both
        with attach(model, db, codec=codec, budget=0.2) as kv:
            cache = kv.cache(ids)
            logits(model, cache, ids)
            shares[codec] = cache.stats()["kv_bytes_read_share"]
    # The first chunk, as it is and always read, weighs more among coded ones. Coded bytes of raw ones would be .04.
    assert 0 < shares["raw"] <= 0.2
    assert shares["raw"] < shares["int4"] < 0.25
