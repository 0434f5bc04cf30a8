"""Every supported architecture answers in exact mode as it does with transformers' own cache, fresh and reloaded.

Models are tiny and random, prompts about 1 500 tokens: longer than a prefill block (1 024), so that stored chunks, the tail
and windows (200 tokens) all take part. Half-precision models agree to within the rounding of their dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import opened, read_kv
from tiny_models import ARCHITECTURES, greedy, prompt, stock, tiny
from torch import Tensor, nn
from transformers import DynamicCache

from kvdb import KVDB
from kvdb.geometry import as_float32
from kvdb.runtime import attach
from kvdb.runtime.prefill import BLOCK_TOKENS

pytestmark = pytest.mark.usefixtures("single_thread")
TOKENS = 1500


@pytest.mark.parametrize(
    ("architecture", "read_mode"), [(a, "mmap") for a in ARCHITECTURES] + [("llama", "pread"), ("gemma3", "pread")]
)
def test_exact_output_equals_the_stock_run_fresh_and_reloaded(
    tmp_path: Path, architecture: str, read_mode: str
) -> None:
    model, ids = tiny(architecture), prompt(TOKENS)
    expected = stock(model, ids, 16)
    assert len(expected.unique()) > 2  # a model that always says the same would prove nothing
    path = tmp_path / "a.kvdb"
    with opened(path, read_mode=read_mode) as db, attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        assert cache.metrics.prefill_tokens == TOKENS - 1
        assert torch.equal(greedy(model, ids, cache, 16), expected)
    with opened(path, read_mode=read_mode) as db, attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == TOKENS - 1
        assert cache.metrics.prefill_tokens == 0
        assert cache.metrics.restore_bytes_read > 0
        assert torch.equal(greedy(model, ids, cache, 16), expected)
        kv.save(cache, name="answered")
        longer = torch.cat((ids, expected, prompt(33, seed=1)), 1)
        again = kv.cache(longer)
        assert again.metrics.reused_tokens == TOKENS + 15
        assert torch.equal(greedy(model, longer, again, 4), stock(model, longer, 4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_that_ends_inside_a_chunk_is_continued_exactly(db: KVDB, architecture: str) -> None:
    """Sliding layers must find their window before any position, in the middle of what is stored."""
    model, ids = tiny(architecture), prompt(TOKENS)
    with attach(model, db, exact=True) as kv:
        kv.cache(ids)
        for shared in (1333, 1025, 203, 150, 7):
            other = torch.cat((ids[:, :shared], (ids[:, shared : shared + 1] + 1) % 128, prompt(9, seed=2)), 1)
            cache = kv.cache(other)
            assert cache.metrics.reused_tokens == shared
            assert torch.equal(greedy(model, other, cache, 4), stock(model, other, 4))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_budget_reads_less_and_leaves_the_sliding_layers_alone(db: KVDB, architecture: str) -> None:
    model, ids = tiny(architecture), prompt(TOKENS)
    with attach(model, db, budget=0.2) as kv:
        cache = kv.cache(ids)
        answer = greedy(model, ids, cache, 16)
        assert answer.shape == (1, 16)
        assert 0 < cache.stats()["kv_bytes_read_share"] <= 0.2
        assert 0.0 < cache.stats()["mass_covered_estimate"] <= 1.0


def blockwise(model: nn.Module, ids: Tensor) -> tuple[DynamicCache, Tensor]:
    """The stock cache after the same blocks that KVDB prefills in, and the logits after the last token."""
    cache = DynamicCache(config=model.config)
    last = ids.shape[1] - 1
    with torch.no_grad():
        for start in range(0, last, BLOCK_TOKENS):
            model(input_ids=ids[:, start : min(start + BLOCK_TOKENS, last)], past_key_values=cache)
        return cache, model(input_ids=ids[:, last:], past_key_values=cache).logits[0, -1].float()


def stored_kv(db: KVDB, layer: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys and values of the store's only sequence, in float32."""
    (sequence,) = db.sequences()
    reader, parts = db.reader(), []
    for segment, span in zip(db.segments(sequence.spans), sequence.spans, strict=True):
        kv = read_kv(reader, segment, layer, span.stop - span.start)
        parts.append([as_float32(np.ascontiguousarray(each), segment.info.geometry.dtype) for each in kv])
    reader.close()
    keys, values = (np.concatenate([part[i] for part in parts], 1) for i in (0, 1))
    return keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_agrees_to_its_rounding_and_stores_what_the_stock_cache_holds(
    db: KVDB, dtype: torch.dtype
) -> None:
    """In layer 0 keys and values do not depend on attention: they are equal bit for bit, in every dtype.

    Later layers see attention that was merged from tiles. Its rounding is not bounded by hand but measured: a model of the same
    weights in float64 is the truth, and KVDB's error against it may be at most three times the stock model's (two more roundings
    per merged tile than the one that the stock kernel makes at the end).
    """
    wide = {"initializer_range": 0.1}  # 0.3 makes this network amplify one rounding a thousandfold
    model, ids = tiny(dtype=dtype, **wide), prompt(TOKENS, seed=3)
    truth = tiny(dtype=dtype, **wide).double()
    with attach(model, db, exact=True) as kv, torch.no_grad():
        cache = kv.cache(ids)
        found = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1].double()
        cache.seal()
    dense, dense_logits = blockwise(model, ids)
    right, right_logits = blockwise(truth, ids)
    for layer in range(2):
        keys, values = stored_kv(db, layer)
        for stored, stock_kv, exact_kv in (
            (keys, dense.layers[layer].keys, right.layers[layer].keys),
            (values, dense.layers[layer].values, right.layers[layer].values),
        ):
            stock_kv, exact_kv = stock_kv[0, :, :-1].float().numpy(), exact_kv[0, :, :-1].numpy()
            if layer == 0:
                assert np.array_equal(stored[:, : TOKENS - 1], stock_kv)
            assert np.abs(stored[:, : TOKENS - 1] - exact_kv).max() <= 3 * np.abs(stock_kv - exact_kv).max()
    assert (found - right_logits.double()).abs().max() <= 3 * (dense_logits - right_logits.double()).abs().max()


def test_keys_and_values_of_every_layer_are_the_stock_ones_bit_for_bit_in_the_first_block(db: KVDB) -> None:
    """Up to one block both sides call the same kernel on the same numbers."""
    model, ids = tiny(), prompt(900, seed=4)
    with attach(model, db, exact=True) as kv:
        kv.cache(ids)
    dense, _ = blockwise(model, ids)
    for layer in range(2):
        keys, values = stored_kv(db, layer)
        assert np.array_equal(keys, dense.layers[layer].keys[0, :, :-1].numpy())
        assert np.array_equal(values, dense.layers[layer].values[0, :, :-1].numpy())
