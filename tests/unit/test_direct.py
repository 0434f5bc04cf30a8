"""The direct reader: what is its own, beside the contract of all readers (tests/contracts/test_every_reader.py)."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    TWO_GROUPS,
    Array,
    assert_healthy,
    assert_reads_back,
    extend,
    flip,
    model_kv,
    read_kv,
    skip_where_refused,
    token_list,
    write_segment,
)
from hypothesis import given
from hypothesis import strategies as st

from kvdb import KVDB, files
from kvdb.codecs import CodecPlan
from kvdb.direct import DirectReader
from kvdb.errors import Damaged, InvalidInput, OutOfMemory, Stalled, Unsupported
from kvdb.format import SHARD_KEY, kv_array
from kvdb.host import HostTier
from kvdb.mapped import MmapReader
from kvdb.reader import Wanted
from kvdb.requests import Ticket
from kvdb.segments import Segment

TOKENS = token_list(200)
ROW = TWO_GROUPS.record_bytes(0)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[KVDB]:
    skip_where_refused(DirectReader, tmp_path)
    with KVDB.open(tmp_path / "s", read_mode="direct", host_budget="1MiB") as found:
        yield found
        assert_healthy(found)


@pytest.fixture
def segment(db: KVDB) -> Segment:
    return extend(db, TOKENS, geometry=TWO_GROUPS, spare=2).last


@pytest.fixture
def reader(db: KVDB) -> Iterator[DirectReader]:
    found = db.reader()
    assert isinstance(found, DirectReader)
    yield found
    found.close()


def shard(segment: Segment, group: int = 0) -> Path:
    return segment.folder / kv_array(segment.info.segment, group) / SHARD_KEY


def records_of(segment: Segment, layer: int, records: Array) -> Array:
    """What they must be, (n, 2 * chunk_tokens * head_dim); of whole chunks."""
    kv = np.array(model_kv(segment.info.geometry, TOKENS, 0, 200, salt="exact")[layer])
    heads = kv.shape[1]
    return np.array([kv[:, r % heads, r // heads * 16 : r // heads * 16 + 16] for r in records.tolist()]).reshape(
        len(records), -1
    )


def take(reader: DirectReader, way: str, segment: Segment, layer: int, records: Array) -> None:
    """Read records in one of the ways there are."""
    if way == "read":
        reader.read(segment, layer, records, np.empty((2, len(records), 16, 80), "<f2"))
    elif way == "lend":
        list(reader.lend(layer, [Wanted(segment, records)]))
    else:
        reader.rows(segment, layer, records)


def test_parts_are_what_is_in_memory_and_then_what_comes(segment: Segment, db: KVDB, reader: DirectReader) -> None:
    list(reader.lend(3, [Wanted(segment, np.array([4, 8]))]))
    assert db.host is not None
    before = db.host.stats()
    records = np.array([8, 30, 4, 30, 5])
    first, second = reader.lend(3, [Wanted(segment, records)])
    assert first.of.tolist() == [0, 2]
    assert second.of.tolist() == [1, 3, 4]
    for part in (first, second):
        expected = records_of(segment, 3, records[part.of])
        assert np.array_equal(part.stored[part.which].view(expected.dtype), expected)
        assert not part.stored.flags.writeable
    after = db.host.stats()
    assert (after["hits"], after["misses"]) == (before["hits"] + 2, before["misses"] + 3)  # type: ignore[operator]
    assert reader.bytes_read == 7 * ROW
    assert reader.bytes_fetched >= 4 * ROW


def test_what_is_missing_of_all_segments_is_asked_for_in_one_batch(
    db: KVDB, reader: DirectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And told apart by segment where one of them is damaged."""
    extend(db, TOKENS, geometry=TWO_GROUPS, segment_tokens=64, name="cut")
    segments = db.segments(db.sequence("cut").spans)
    assert len(segments) == 4
    assert db.host is not None
    reader.read(segments[1], 3, np.array([2, 5]), np.empty((2, 2, 16, 80), "<f2"))
    requests, sent = db.host._sending(), list[Ticket]()
    real = requests.send
    monkeypatch.setattr(requests, "send", lambda ticket: (sent.append(ticket), real(ticket)))
    wanted = [Wanted(segment, np.array([5, 2, 7, 5])) for segment in segments[:3]]
    there, came = reader.lend(3, wanted)
    assert there.of.tolist() == [4, 5, 7]
    assert came.of.tolist() == [0, 1, 2, 3, 6, 8, 9, 10, 11]
    (ticket,) = sent
    assert len({*ticket.fds.tolist()}) == 3
    for part in (there, came):
        for i, number in zip(part.which.tolist(), part.of.tolist(), strict=True):
            alone = reader.rows(segments[number // 4], 3, wanted[0].records[[number % 4]])
            assert part.stored[i].tobytes() == alone.tobytes()
    flip(shard(segments[2]), 3 * ROW + 5)
    with pytest.raises(Damaged, match=f"segment {segments[2].info.segment}, layer 0, chunk 0, head 3") as e:
        list(reader.lend(0, [Wanted(segment, np.arange(5)) for segment in segments[:3]]))
    assert e.value.segment == segments[2].info.segment
    flip(shard(segments[2]), 3 * ROW + 5)


@given(data=st.data())
def test_lent_records_stay_what_they_are_while_others_come_and_go(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """In a budget for some of them, with every slot that becomes free overwritten, and the next layer on its way."""
    folder = tmp_path_factory.mktemp("lent")
    skip_where_refused(DirectReader, folder)
    with KVDB.open(
        folder / "s", read_mode="direct", host_budget=data.draw(st.sampled_from([0, 100_000, 300_000]))
    ) as db:
        segment = extend(db, TOKENS, geometry=TWO_GROUPS).last
        assert db.host is not None
        readers = [db.reader(), db.reader()]
        for _ in range(4):
            layer, one = data.draw(st.sampled_from([0, 3])), data.draw(st.sampled_from(readers))
            records = np.array(data.draw(st.lists(st.integers(0, 59), min_size=1, max_size=20)), np.int64)
            seen = 0
            for stored, which, of in one.lend(layer, [Wanted(segment, records)]):
                seen += len(of)
                one.expect(3, [Wanted(segment, np.arange(30))])
                expected = records_of(segment, layer, records[of])
                for _ in range(2):
                    assert np.array_equal(stored[which].view(expected.dtype), expected)
                    (other,) = (r for r in readers if r is not one)
                    other.read(segment, 0, np.arange(40), np.empty((2, 40, 16, 80), "<f2"))
                    for pool in db.host._pools.values():
                        pool.view[pool.table._free[: pool.table.free]] = 0xEE
            assert seen == len(records)
        for one in readers:
            one.close()
        assert_healthy(db)


def test_what_is_expected_is_not_read_again(segment: Segment, reader: DirectReader) -> None:
    records = np.arange(0, 40, 3)
    reader.expect(3, [Wanted(segment, records)])
    fetched = reader.bytes_fetched
    assert fetched >= len(records) * ROW
    reader.read(segment, 3, records, np.empty((2, len(records), 16, 80), "<f2"))
    assert reader.bytes_fetched == fetched
    reader.expect(3, [Wanted(segment, records[:0])])
    with pytest.raises(InvalidInput, match="records"):
        reader.expect(3, [Wanted(segment, np.array([-1]))])


def test_segments_of_different_codecs_are_expected_at_once(db: KVDB, segment: Segment, reader: DirectReader) -> None:
    writer = write_segment(db, TOKENS, geometry=TWO_GROUPS, fidelity="int4", codec=CodecPlan.parse("int4"))
    coded = db.commit(writer, TOKENS).segment
    records = np.array([9, 4, 30])
    for first, then in ((segment, coded), (coded, segment)):
        reader.expect(3, [Wanted(first, records), Wanted(then, records)])
        fetched = reader.bytes_fetched
        alone = MmapReader()
        for each in (first, then):
            assert np.array_equal(reader.rows(each, 3, records), alone.rows(each, 3, records))
        alone.close()
        assert reader.bytes_fetched == fetched
        records = records + 3


@pytest.mark.parametrize("trouble", [OSError(errno.EIO, "I/O error"), OutOfMemory("no memory")])
def test_what_fails_while_it_is_expected_shows_when_it_is_read(
    segment: Segment, reader: DirectReader, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    def lease(*given: Any, **named: Any) -> Any:
        raise trouble

    monkeypatch.setattr(HostTier, "lease", lease)
    reader.expect(3, [Wanted(segment, np.arange(4))])
    with pytest.raises(type(trouble)):
        reader.read(segment, 3, np.arange(4), np.empty((2, 4, 16, 80), "<f2"))


def test_readers_of_a_handle_share_one_tier_and_others_have_their_own(segment: Segment, db: KVDB) -> None:
    one, other, alone = db.reader(), db.reader(), DirectReader()
    read_kv(one, segment, 0, 200)
    read_kv(other, segment, 0, 200)
    read_kv(alone, segment, 0, 200)
    assert (one.bytes_fetched > 0, other.bytes_fetched, alone.bytes_fetched) == (True, 0, one.bytes_fetched)
    for reader in (one, other, alone):
        reader.close()


def test_a_record_that_is_damaged_does_not_stay(segment: Segment, reader: DirectReader) -> None:
    at = 3 * ROW + 5  # layer 0 is the first of its group
    flip(shard(segment), at)
    records, out = np.array([2, 3]), np.empty((2, 2, 16, 80), "<f2")
    for way in ("read", "lend", "rows"):
        for _ in range(2):
            with pytest.raises(Damaged, match=r"layer 0, chunk 0, head 3, file .*: xxh3 is"):
                take(reader, way, segment, 0, records)
    data = bytearray(shard(segment).read_bytes())
    data[at] ^= 1
    with open(shard(segment), "r+b") as file:  # mended where it lies
        file.write(data)
    reader.read(segment, 0, records, out)
    assert np.array_equal(out.swapaxes(0, 1).reshape(2, -1), records_of(segment, 0, records))


def test_always_looks_at_what_is_in_memory_too(segment: Segment, db: KVDB) -> None:
    tier = HostTier(1 << 20)
    always, first = (DirectReader(verify, tier=tier) for verify in ("always", "first"))
    for reader in (always, first):
        reader.read(segment, 0, np.array([7]), np.empty((2, 1, 16, 80), "<f2"))
    (pool,) = tier._pools.values()
    pool.view[:] ^= 1
    first.read(segment, 0, np.array([7]), np.empty((2, 1, 16, 80), "<f2"))
    with pytest.raises(Damaged, match="chunk 1, head 2"):
        always.read(segment, 0, np.array([7]), np.empty((2, 1, 16, 80), "<f2"))
    first.read(segment, 0, np.array([7]), out := np.empty((2, 1, 16, 80), "<f2"))  # from the file, anew
    assert np.array_equal(out.reshape(1, -1), records_of(segment, 0, np.array([7])))
    for reader in (always, first):
        reader.close()
    tier.close()


def test_what_is_being_written_is_read_through_the_page_cache(db: KVDB, reader: DirectReader) -> None:
    writer = write_segment(db, TOKENS, geometry=TWO_GROUPS)
    assert np.array_equal(
        read_kv(reader, writer.segment, 3, 200)[0], model_kv(TWO_GROUPS, TOKENS, 0, 200, salt="exact")[3][0]
    )
    assert db.host is not None
    assert db.host.stats()["misses"] == 0
    (part,) = reader.lend(0, [Wanted(writer.segment, np.array([3, 1]))])
    expected = records_of(writer.segment, 0, np.array([3, 1]))
    assert np.array_equal(part.stored[part.which].view(expected.dtype), expected)
    reader.expect(0, [Wanted(writer.segment, np.array([3, 1]))])
    db.commit(writer, TOKENS)


def test_coded_records_are_decoded_and_not_lent(db: KVDB, reader: DirectReader) -> None:
    writer = write_segment(db, TOKENS, geometry=TWO_GROUPS, fidelity="int4", codec=CodecPlan.parse("int4"))
    segment = db.commit(writer, TOKENS).segment
    with pytest.raises(InvalidInput, match="coded, expected records as they are"):
        next(reader.lend(3, [Wanted(segment, np.array([1]))]))
    plain = np.empty((2, 60, 16, 80), "<f2")
    with KVDB.open(db.path, "r") as by_map:
        by_map.reader().read(segment, 3, np.arange(60), plain)
    found = np.empty_like(plain)
    reader.read(segment, 3, np.arange(60), found)
    assert np.array_equal(found, plain)


@pytest.mark.parametrize("way", ["read", "lend", "expect"])
def test_a_device_that_does_not_answer_is_stalled_and_other_records_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Reads of layer 3 go to a pipe that nobody writes to."""
    skip_where_refused(DirectReader, tmp_path)
    with KVDB.open(tmp_path / "s", read_mode="direct", host_budget="1MiB", read_deadline_s=0.1) as db:
        segment = extend(db, TOKENS, geometry=TWO_GROUPS).last
        reader = db.reader()
        assert isinstance(reader, DirectReader)
        reader.open(segment)
        out, into = os.pipe()
        ((array, file),) = [(a, f) for a, f in reader._direct.items() if 3 in a.info.geometry.groups[a.group].layers]
        file.fd = out
        if way == "expect":
            reader.expect(3, [Wanted(segment, np.array([5]))])
        for _ in range(2):
            with pytest.raises(Stalled, match="try again"):
                take(reader, "lend" if way == "expect" else way, segment, 3, np.array([5]))
        file.fd = array.fd
        for layer in (0, 1):
            found = read_kv(reader, segment, layer, 200)
            assert np.array_equal(found[0], model_kv(TWO_GROUPS, TOKENS, 0, 200, salt="exact")[layer][0])
        row = np.array(model_kv(TWO_GROUPS, TOKENS, 0, 200, salt="exact")[3])[:, 0, 16:32].tobytes()
        os.write(into, row)  # record 5 at last
        assert np.array_equal(reader.rows(segment, 3, np.array([5]))[0].tobytes(), row)
        reader.close()
        os.close(into)
        os.close(out)


def test_many_threads_read_one_store(db: KVDB, segment: Segment) -> None:
    expected, wrong = {n: np.array(kv) for n, kv in model_kv(TWO_GROUPS, TOKENS, 0, 200, salt="exact").items()}, []

    def work(seed: int) -> None:
        rng, reader = np.random.default_rng(seed), db.reader()
        try:
            for _ in range(20):
                layer = (0, 1, 3)[rng.integers(3)]
                if not np.array_equal(np.array(read_kv(reader, segment, layer, 200)), expected[layer]):
                    wrong.append(layer)
        except BaseException as e:
            wrong.append(e)
        reader.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    skip_where_refused(DirectReader, tmp_path)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with KVDB.open(tmp_path / "s", read_mode="direct", host_budget="1MiB") as db:
            segment = extend(db, TOKENS, geometry=TWO_GROUPS).last
            reader = db.reader()
            reader.expect(0, [Wanted(segment, np.arange(50))])  # type: ignore[attr-defined]
            reader.close()  # while it may be in flight
            assert_reads_back(db, TOKENS, db.match(segment_identity(db), TOKENS).spans)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def segment_identity(db: KVDB) -> Any:
    with db.catalog.begin() as txn:
        (found,) = txn.identities().values()
    return found


def test_a_file_system_without_direct_reads_is_refused() -> None:
    path = Path("/proc/version")
    fd = files.open_read(path)
    with pytest.raises(Unsupported, match=rf"{path}: .*O_DIRECT.*use read_mode 'mmap'"):
        files.make_direct(fd, path)
    files.close(fd)


def test_options_of_the_tier_are_taken_and_belong_to_direct_reads(tmp_path: Path) -> None:
    for read_mode in ("mmap", "pread"):
        with pytest.raises(InvalidInput, match=rf"host_budget is 1024 with read_mode '{read_mode}', expected 'direct'"):
            KVDB.open(tmp_path / "s", read_mode=read_mode, host_budget="1KiB")
    with KVDB.open(tmp_path / "s") as db:
        assert db.host is None
    with KVDB.open(tmp_path / "s", read_mode="direct") as db:
        assert db.host is not None
        assert db.host.budget_bytes > 64 << 20
        assert db.host.used_bytes == 0
    with KVDB.open(tmp_path / "s", read_mode="direct", host_budget="3MiB", host_policy="lfu", read_deadline_s=2) as db:
        assert db.host is not None
        assert (db.host.budget_bytes, db.host.policy) == (3 << 20, "lfu")
        reader = db.reader()
        assert isinstance(reader, DirectReader)
        assert reader._deadline_s == 2
