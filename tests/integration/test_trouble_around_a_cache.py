"""What happens to a cache when a save fails, its prefix is deleted, merged or damaged, or its model changes: it goes on right, or
there is an error, never wrong KV."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_healthy, flip, opened, skip_where_refused, tree_bytes
from tiny_models import greedy, prompt, stock, tiny
from torch import Tensor, nn

from kvdb import KVDB, files
from kvdb.calibration import Way
from kvdb.direct import DirectReader
from kvdb.errors import (
    Damaged,
    IdentityMismatch,
    InvalidInput,
    PrefixDeleted,
    SequenceNotFound,
    StorageFull,
    StoreLocked,
)
from kvdb.mapped import MmapReader
from kvdb.reader import Reader
from kvdb.readers import READERS
from kvdb.runtime import attach
from kvdb.runtime.identity import weights_digest
from kvdb.runtime.tiles import attend, merge
from kvdb.segments import Segment, row_bytes

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


# -- the store changes under a live cache


def test_a_prefix_that_is_merged_under_a_cache_is_saved_with_it(tmp_path: Path) -> None:
    model, ids = tiny(), prompt(300)
    with opened(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        for tokens in (100, 200, 300):
            kv.cache(ids[:, :tokens])
        cache = kv.cache(ids)
        assert db.compact() == 2
        out = greedy(model, ids, cache, 8)
        assert torch.equal(out, stock(model, ids, 8))
        kv.save(cache, name="merged")
        again = kv.load("merged")
        assert again.length == 307
        longer = torch.cat((ids, out), 1)
        assert torch.equal(greedy(model, longer, again, 4), stock(model, longer, 4))


@pytest.mark.parametrize("go", ["evict", "delete"])
def test_a_prefix_that_is_gone_is_read_on_but_not_continued_in_the_store(tmp_path: Path, go: str) -> None:
    model, ids = tiny(), prompt(1500)
    with KVDB.open(tmp_path / "s", grace_s=0) as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids), name="prefix")
        cache = kv.load("prefix")
        if go == "delete":
            db.delete("prefix")
        db.evict(0, named=True)
        assert db.info()["segments"] == 0
        assert torch.equal(greedy(model, ids, cache, 8), stock(model, ids, 8))
        with pytest.raises(PrefixDeleted, match="make the cache again"):
            kv.save(cache, name="later")
        assert db.sequences() == []
        assert db.check() == []


class Meddler:
    """Between finding a prefix and opening it, does something to the store: the first `times` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, meddle: Callable[[], object], times: int) -> None:
        self.left = times
        real = Reader.open

        def open_(reader: Reader, segment: Segment) -> None:
            if self.left:
                self.left -= 1
                meddle()
            real(reader, segment)

        monkeypatch.setattr(Reader, "open", open_)


def test_a_prefix_that_goes_while_it_is_opened_is_looked_for_again_until_none_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(), prompt(300)
    with KVDB.open(tmp_path / "s", grace_s=0) as db, attach(model, db, exact=True) as kv:
        for tokens in (100, 200, 300):
            kv.cache(ids[:, :tokens])
        meddler = Meddler(monkeypatch, lambda: db.evict(max(0, db.info()["disk_bytes"] - 1)), 20)  # one more each time
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == 0
        assert meddler.left == 17
        meddler.left = 0
        assert torch.equal(greedy(model, ids, cache, 8), stock(model, ids, 8))
        assert db.check() == []


def test_a_prefix_that_goes_to_the_trash_while_it_is_opened_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(), prompt(300)
    with KVDB.open(tmp_path / "s", grace_s=3600) as db, attach(model, db, exact=True) as kv:
        kv.cache(ids)
        Meddler(monkeypatch, lambda: db.evict(0), 1)
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == 299
        assert db.sequences() == []
        assert torch.equal(greedy(model, ids, cache, 8), stock(model, ids, 8))
        assert db.check() == []


def test_a_sequence_that_is_merged_while_it_is_loaded_is_found_where_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny(), prompt(300)
    with KVDB.open(tmp_path / "s", grace_s=0) as db, attach(model, db, exact=True) as kv:
        for tokens in (100, 200, 300):
            kv.save(kv.cache(ids[:, :tokens]), name="talk")
        Meddler(monkeypatch, db.compact, 1)
        cache = kv.load("talk")
        assert len(db.sequence("talk").spans) == 1
        assert torch.equal(greedy(model, ids, cache, 8), stock(model, ids, 8))
        Meddler(monkeypatch, lambda: (db.delete("talk"), db.evict(0)), 1)
        with pytest.raises(SequenceNotFound):
            kv.load("talk")
        assert db.check() == []


def answer_undisturbed(tmp_path: Path, selector: str, **rule: float) -> Tensor:
    with opened(tmp_path / "undisturbed") as db, attach(tiny(), db, selector=selector, **rule) as kv:  # type: ignore[arg-type]
        return greedy(kv.model, prompt(1500), kv.cache(prompt(1500)), 8)


@pytest.mark.parametrize("wanted", [(), ("box",), ("box", "sketch")])
@pytest.mark.parametrize("when", ["before the first step", "between steps", "while the prefix is opened"])
def test_a_cache_whose_abstracts_are_changed_answers_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: tuple[str, ...], when: str
) -> None:
    model, ids = tiny(), prompt(1500)
    expected = answer_undisturbed(tmp_path, "sketch", budget=0.2)
    with opened(tmp_path / "s") as other, KVDB.open(tmp_path / "s", grace_s=0) as db:
        with attach(model, db, budget=0.2, selector="sketch") as kv:
            cache = kv.cache(ids)  # its segments are stored, and nothing has read their abstracts

            def meddle() -> int:
                changed = other.set_abstracts(None, wanted)
                other.gc()
                return changed

            if when == "while the prefix is opened":
                Meddler(monkeypatch, meddle, 1)
                cache = kv.cache(ids)
                assert cache.metrics.reused_tokens == 1499
                assert {s.info.abstracts for s in db.segments(db.match(kv.identity(), ids[0].numpy()).spans)} == {
                    wanted
                }
            if when == "before the first step":
                assert meddle() > 0
            out = greedy(model, ids, cache, 3)
            if when == "between steps":
                assert meddle() > 0
            longer = torch.cat((ids, out), 1)
            assert torch.equal(torch.cat((out, greedy(model, longer, cache, 5)), 1), expected)
            kv.save(cache, name="answered")
        with attach(model, db, budget=0.2, fidelity="any") as kv:
            assert kv.load("answered").length == 1507


def test_a_damaged_abstract_is_told_and_can_be_made_anew_under_the_cache(tmp_path: Path) -> None:
    model, ids = tiny(), prompt(1500)
    expected = answer_undisturbed(tmp_path, "sketch", budget=0.2)
    with opened(tmp_path / "s") as db, attach(model, db, budget=0.2, selector="sketch") as kv:
        kv.save(kv.cache(ids), name="n")
        segment = db.segments(db.sequence("n").spans)[0].info.segment
        flip(tmp_path / "s" / "chunks" / f"{segment}.sketch0" / "c.0.0.0.0.0", 3)
        with pytest.raises(Damaged, match=r"sequence n: .* sketch abstract, .*'kvdb abstracts' makes it anew"):
            greedy(model, ids, kv.load("n"), 8)
        assert db.set_abstracts("n", ("sketch",)) == 1
        assert torch.equal(greedy(model, ids, kv.load("n"), 8), expected)


def test_a_forgotten_cache_is_collected_without_waiting_for_its_writes(tmp_path: Path) -> None:
    model, ids = tiny(), prompt(1500)
    with opened(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        greedy(model, torch.cat((ids, prompt(1100, seed=1)), 1), cache, 1)  # its segment in flight is not full
        gate, done = threading.Event(), threading.Event()

        def write() -> None:
            gate.wait()
            done.set()

        cache.rows[0]._behind.submit(0, write)
        del cache
        gc.collect()  # in any thread, at any time: waiting here could wait for ever
        assert not done.is_set()
        gate.set()
        assert done.wait(60)


def test_generating_changes_no_file_that_was_there(tmp_path: Path) -> None:
    model, ids = tiny(), prompt(300)
    with opened(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids), name="loaded")
        before = tree_bytes(tmp_path / "s" / "chunks")
        cache = kv.load("loaded")
        out = greedy(model, ids, cache, 8)
        kv.save(cache, name="longer")
        longer = torch.cat((ids, out), 1)
        kv.save(kv.cache(torch.cat((longer, prompt(40, seed=3)), 1)), name="longest")
        after = tree_bytes(tmp_path / "s" / "chunks")
        assert {name: after.get(name) for name in before} == before
        assert len(after) > len(before)
        assert db.tokens(db.sequence("loaded").spans).tolist() == ids[0, :299].tolist()


def test_a_saved_cache_may_be_kept_for_a_time_or_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), prompt(60)
    with opened(tmp_path / "s") as db, attach(model, db) as kv:
        kv.save(kv.cache(ids), name="brief", ttl_s=60)
        kv.save(kv.cache(prompt(60, seed=1)), name="pinned", ttl_s=60)
        db.pin("pinned")
        assert kv.load("brief").length == 59
        start = files.moment()
        monkeypatch.setattr(files, "moment", lambda: start._replace(uptime=start.uptime + 61))
        with pytest.raises(SequenceNotFound, match="expired"):
            kv.load("brief")
        db.evict(0, named=True)
        assert [s.name for s in db.sequences()] == ["pinned"]
        assert kv.load("pinned").length == 59


# -- damage under a live cache


def _damage(path: Path, db: KVDB, name: str, *, layer: int, chunk: int) -> None:
    """Flip a bit of the record of head 1 in the sequence's only segment."""
    (segment,) = db.segments(db.sequence(name).spans)
    info = segment.info
    heads = info.geometry.groups[0].kv_heads
    row = (layer * info.capacity + chunk) * heads + 1
    flip(path / "chunks" / f"{info.segment}.kv0" / "c.0.0.0.0.0", row * row_bytes(info, 0) + 7, bit=6)


@pytest.mark.parametrize("read_mode", ["mmap", "pread"])
@pytest.mark.parametrize(("budget", "chunk"), [(None, 3), (0.1, 0)], ids=["exact", "budget"])
def test_a_damaged_record_ends_a_generation_with_its_address(
    tmp_path: Path, read_mode: str, budget: float | None, chunk: int
) -> None:
    model, ids, other = tiny(), prompt(1500), prompt(60, seed=2)
    with (
        KVDB.open(tmp_path / "s", read_mode=read_mode) as db,
        attach(model, db, exact=budget is None, budget=budget) as kv,
    ):
        kv.save(kv.cache(ids), name="report")
        opened_before = kv.load("report")
        _damage(tmp_path / "s", db, "report", layer=1, chunk=chunk)
        for cache in (opened_before, kv.load("report")):
            with pytest.raises(
                Damaged, match=rf"sequence report: segment \w+, layer 1, chunk {chunk}, head 1, file .*c\.0.*, offset"
            ):
                greedy(model, ids, cache, 4)
            with pytest.raises(InvalidInput, match="failed half-way"):
                kv.save(cache)
        assert torch.equal(greedy(model, other, kv.cache(other), 8), stock(model, other, 8))


@pytest.mark.parametrize("verify", ["always", "first", "never"])
def test_damage_after_a_record_was_read_is_seen_where_every_read_is_verified(tmp_path: Path, verify: str) -> None:
    model, ids = tiny(), prompt(1500)
    with KVDB.open(tmp_path / "s", verify=verify) as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids), name="report")
        assert torch.equal(greedy(model, ids, kv.load("report"), 4), stock(model, ids, 4))
        _damage(tmp_path / "s", db, "report", layer=0, chunk=3)
        if verify == "never":
            greedy(model, ids, kv.load("report"), 4)
        else:  # also what this handle has verified already: the file is not the one it was
            with pytest.raises(Damaged, match=r"sequence report: .* layer 0, chunk 3, head 1"):
                greedy(model, ids, kv.load("report"), 4)
        assert [p.kind for p in db.check()] == ["record"]
    with KVDB.open(tmp_path / "s", verify=verify) as db, attach(model, db, exact=True) as kv:
        cache = kv.load("report")
        if verify == "never":
            greedy(model, ids, cache, 4)
        else:
            with pytest.raises(Damaged, match=r"sequence report: .* layer 0, chunk 3, head 1"):
                greedy(model, ids, cache, 4)


@pytest.mark.parametrize("trouble", ["", "prefix deleted", "no descriptors"])
def test_a_generation_goes_on_by_another_way_when_the_system_takes_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Unless what it has open can be opened no more."""
    skip_where_refused(DirectReader, tmp_path)

    def no_descriptors(reader: Reader, segment: Segment) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    model, ids, changed = tiny(), prompt(1500, batch=2), list[str]()
    with KVDB.open(tmp_path / "s", host_budget="1MiB") as db, attach(model, db, budget=0.2) as kv:
        kv.cache(ids)
        expected = greedy(model, ids, kv.cache(ids), 12)
        cache = kv.cache(ids)
        reader = cache._reader
        with monkeypatch.context() as taken:
            taken.setattr("kvdb.reading.way_to_read", lambda chunks, stored: Way("direct", "because"))
            taken.setattr("kvdb.reading.available_bytes", lambda: -1)
            taken.setattr(MmapReader, "loses", property(lambda self: len(changed) > 4))
            taken.setattr(cache.prefetch, "chosen", lambda *_: changed.append(cache._reader.name))
            if trouble == "no descriptors":
                taken.setattr(DirectReader, "open", no_descriptors)
            if trouble == "prefix deleted":
                db.evict(0)
                for array in (tmp_path / "s" / "trash").iterdir():
                    shutil.rmtree(array)
            out = greedy(model, ids, cache, 12)
        assert torch.equal(out, expected)
        assert changed[:5] == ["mmap"] * 5
        assert {*changed[5 + len(model.model.layers) * 2 :]} == {"mmap" if trouble else "direct"}  # type: ignore[union-attr,arg-type]
        assert (cache._reader is reader) == bool(trouble)
        assert cache.stats()["kv_bytes_read"] == cache.metrics.decode_bytes_read > 0
        assert trouble or not reader._open
        if trouble != "prefix deleted":
            kv.save(cache, name="n")
        assert_healthy(db)


@pytest.mark.parametrize("read_mode", READERS)
def test_damage_in_one_segment_names_the_sequences_that_have_it(tmp_path: Path, read_mode: str) -> None:
    """And no other one whose records were asked for along with it."""
    skip_where_refused(READERS[read_mode], tmp_path)
    model, ids = tiny(), prompt(2200)
    with KVDB.open(tmp_path / "s") as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(ids[:, :1400]), name="beginning")
        kv.save(kv.cache(ids), name="whole")
        last = db.segments(db.sequence("whole").spans)[-1]
    (file,) = (last.folder / f"{last.info.segment}.kv0").rglob("c.*")
    with KVDB.open(tmp_path / "s", "r", read_mode=read_mode) as db, attach(model, db, budget=0.3, fidelity="any") as kv:
        cache = kv.load("whole")
        os.truncate(file, 4096)
        with pytest.raises(Damaged, match=r"^sequence whole: ") as e:
            greedy(model, torch.cat((ids, ids[:, :1]), 1), cache, 3)
        assert e.value.segment == last.info.segment
