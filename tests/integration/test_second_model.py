"""A second real model: gemma-3-270m. Hybrid: 15 sliding-window layers (512 tokens) and 3 full ones, one KV head, head_dim 256.

It shows plumbing and reuse: the window of every sliding layer must be found again in the store.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import opened
from tiny_models import greedy, stock
from torch import Tensor

from kvdb.runtime import attach
from kvdb.tools.documents import reference_document
from kvdb.tools.models import LoadedModel

pytestmark = pytest.mark.real_model
TOKENS, NEW_TOKENS = 1300, 16


@pytest.fixture(scope="module")
def ids(gemma3_270m: LoadedModel) -> Tensor:
    text = reference_document(gemma3_270m.tokenizer, TOKENS)
    found: Tensor = gemma3_270m.tokenizer(text, return_tensors="pt").input_ids
    return found


@pytest.fixture(scope="module")
def store(gemma3_270m: LoadedModel, ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document, prefilled once."""
    path = tmp_path_factory.mktemp("gemma") / "a.kvdb"
    with opened(path) as db, attach(gemma3_270m.model, db, exact=True) as kv:
        assert kv.cache(ids).metrics.prefill_tokens == ids.shape[1] - 1
    return path


def test_exact_output_equals_the_stock_run_and_the_windows_are_restored(
    gemma3_270m: LoadedModel, ids: Tensor, store: Path
) -> None:
    model = gemma3_270m.model
    with opened(store) as db, attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == ids.shape[1] - 1
        assert cache.metrics.prefill_tokens == 0
        window = 511 * 2 * 256 * 4  # tokens before the next one, K and V, head_dim, float32
        assert cache.metrics.restore_bytes_read >= 15 * window
        assert torch.equal(greedy(model, ids, cache, NEW_TOKENS), stock(model, ids, NEW_TOKENS))


def test_a_prefix_that_ends_anywhere_is_continued_as_the_stock_run_does(
    gemma3_270m: LoadedModel, ids: Tensor, store: Path
) -> None:
    """Inside a chunk, beyond and within the first window."""
    model = gemma3_270m.model
    with opened(store) as db, attach(model, db, exact=True) as kv:
        for shared in (1101, 333):
            other = torch.cat((ids[:, :shared], ids[:, 100:140]), 1)
            cache = kv.cache(other)
            assert shared <= cache.metrics.reused_tokens < shared + 3
            assert torch.equal(greedy(model, other, cache, 8), stock(model, other, 8))


def test_a_budget_reads_a_part_of_the_full_layers(gemma3_270m: LoadedModel, ids: Tensor, store: Path) -> None:
    model = gemma3_270m.model
    with opened(store) as db, attach(model, db, budget=0.2) as kv:
        cache = kv.cache(ids)
        assert greedy(model, ids, cache, NEW_TOKENS).shape == (1, NEW_TOKENS)
        stats = cache.stats()
        assert 0 < stats["kv_bytes_read_share"] <= 0.2
        assert 0.0 < stats["mass_covered_estimate"] <= 1.0
