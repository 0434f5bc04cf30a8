"""What happens to a cache when a save fails, its prefix is deleted, or its model changes: an error, never wrong KV."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from helpers import opened
from tiny_models import greedy, prompt, stock, tiny
from torch import Tensor, nn

from kvdb import KVDB
from kvdb.errors import Damaged, IdentityMismatch, InvalidInput, PrefixDeleted, StorageFull, StoreLocked
from kvdb.runtime import attach
from kvdb.runtime.identity import weights_digest
from kvdb.runtime.tiles import attend, merge

pytestmark = pytest.mark.usefixtures("single_thread")


def test_after_a_failed_save_the_cache_refuses_and_nothing_wrong_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(), prompt(100)
    with opened(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        out = greedy(model, ids, cache, 12)
        with monkeypatch.context() as full:

            def no_room(fd: int, path: Path) -> None:
                raise StorageFull(errno.ENOSPC, "no room")

            full.setattr("kvdb.files.fsync", no_room)
            with pytest.raises(StorageFull):
                kv.save(cache, name="later")
        with pytest.raises(InvalidInput, match="an earlier save failed half-way"):
            kv.save(cache, name="later")
        longer = torch.cat((ids, out[:, :11], prompt(30, seed=5)), 1)
        again = kv.cache(longer)
        assert again.metrics.reused_tokens == 99
        assert torch.equal(greedy(model, longer, again, 4), stock(model, longer, 4))


def test_a_cache_outlives_the_deletion_of_its_prefix_but_cannot_be_saved(tmp_path: Path) -> None:
    model, ids = tiny(), prompt(1500)
    with opened(tmp_path / "s") as db, attach(model, db, budget=0.1) as kv:
        kv.cache(ids)
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == 1499
        assert len(db.evict(0)) == 1
        out = greedy(model, ids, cache, 8)  # abstracts and records are open: selection still works
        assert out.shape[1] >= 8
        with pytest.raises(PrefixDeleted, match="deleted or evicted"):
            kv.save(cache, name="gone")


def test_a_store_that_lost_its_catalog_keeps_its_chunks(tmp_path: Path) -> None:
    model = tiny()
    with opened(tmp_path / "s") as db, attach(model, db) as kv:
        kv.cache(prompt(40))
    before = sorted(p.name for p in (tmp_path / "s" / "chunks").iterdir())
    shutil.rmtree(tmp_path / "s" / "catalog")
    for mode in ("r", "a", "r+"):
        with pytest.raises(Damaged, match=r"no data\.mdb"):
            KVDB.open(tmp_path / "s", mode)  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "s" / "chunks").iterdir()) == before


def test_a_store_in_use_is_not_replaced(tmp_path: Path) -> None:
    with opened(tmp_path / "s"), pytest.raises(StoreLocked):
        KVDB.open(tmp_path / "s", "w")
    with KVDB.open(tmp_path / "s", "w") as db:
        assert db.sequences() == []


def test_weights_that_change_while_generating_end_it_before_anything_is_stored(tmp_path: Path) -> None:
    model, ids = tiny(), prompt(40)
    with opened(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        weight = model.model.layers[0].self_attn.k_proj.weight  # type: ignore[union-attr,index]
        weight.data += 0.5  # type: ignore[union-attr,operator]
        with pytest.raises(IdentityMismatch, match="weights"):
            greedy(model, ids, cache, 1100)
        assert [s.tokens for s in db.sequences()] == [39]


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    model = tiny().train()
    with (
        opened(tmp_path / "s") as db,
        attach(model, db) as kv,
        pytest.raises(InvalidInput, match="training mode"),
    ):
        kv.cache(prompt(40))


def test_switching_an_adapter_is_another_identity() -> None:
    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.scaling, self.enabled = inner, 2.0, True

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (self.scaling if self.enabled else 1.0)

    model = tiny()
    attention = model.model.layers[0].self_attn  # type: ignore[union-attr,index]
    attention.k_proj = Adapter(attention.k_proj)  # type: ignore[union-attr,arg-type]
    on = weights_digest(model)
    attention.k_proj.enabled = False  # type: ignore[union-attr]
    off = weights_digest(model)
    attention.k_proj.scaling = 3.0  # type: ignore[union-attr]
    assert len({on, off, weights_digest(model)}) == 3


def test_many_tiles_of_half_precision_do_not_add_up_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    k = torch.zeros(1, 400 * 16, 8, dtype=torch.bfloat16)
    v = torch.randint(0, 2, k.shape, generator=g).to(torch.bfloat16) * 2 - 1
    whole = attend(q, k[:, :16], v[:, :16], scale=1.0)
    for start in range(16, k.shape[1], 16):
        whole = merge([whole, attend(q, k[:, start : start + 16], v[:, start : start + 16], scale=1.0)])
    # Each tile's own mean is rounded once to bfloat16 (2^-9 relative), and errors average out; merging adds float32 rounding.
    assert (whole.out.float() - v.float().mean(1)).abs().max() <= 2**-9
