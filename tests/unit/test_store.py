"""The store: modes, refusals, sharing, deletion, eviction, and what opening sweeps away."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import (
    SMALL,
    assert_healthy,
    assert_reads_back,
    extend,
    finish,
    identity,
    opened,
    python,
    token_list,
    tree_bytes,
    write_segment,
)

from kvdb import EXACT, KVDB, files
from kvdb.errors import (
    Damaged,
    InvalidInput,
    NewerFormat,
    NotAStore,
    ReadOnly,
    SequenceNotFound,
    StorageFull,
    StoreError,
    StoreLocked,
    StoreNotFound,
)
from kvdb.format import FORMAT_VERSION


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


EMPTY = ["names", "quarantine", "tmp", "trash"]
"""Parts of a store that stand empty in a new one."""


def kv_folders(path: Path) -> set[str]:
    return {p.name.partition(".")[0] for p in (path / "chunks").iterdir() if p.is_dir()}


# -- modes


@pytest.mark.parametrize("mode", ["a", "w", "w-"])
def test_a_creating_mode_makes_an_empty_store(path: Path, mode: str) -> None:
    with opened(path, mode) as db:  # type: ignore[arg-type]
        assert db.sequences() == []
        assert db.info()["segments"] == 0
    assert sorted(p.name for p in path.iterdir()) == ["catalog", "chunks", "kvdb.json", *EMPTY]
    assert [p.name for part in EMPTY for p in (path / part).iterdir()] == []


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_missing_store_is_not_made_up(path: Path, mode: str) -> None:
    with pytest.raises(StoreNotFound, match=str(path)):
        KVDB.open(path, mode)  # type: ignore[arg-type]
    assert not path.exists()


@pytest.mark.parametrize("mode", ["r", "r+", "a"])
def test_an_existing_store_keeps_its_sequences(path: Path, mode: str) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="n")
    with opened(path, mode) as db:  # type: ignore[arg-type]
        assert_reads_back(db, token_list(40), db.sequence("n").spans)


def test_mode_w_minus_never_touches_an_existing_store(path: Path) -> None:
    with opened(path):
        pass
    before = tree_bytes(path)
    with pytest.raises(StoreError, match="expected none"):
        KVDB.open(path, "w-")
    assert tree_bytes(path) == before


def test_mode_w_replaces_a_store(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(40))
        first = db.header.store
    with opened(path, "w") as db:
        assert db.sequences() == []
        assert db.header.store != first


def test_mode_w_refuses_a_store_that_is_open(path: Path) -> None:
    with opened(path) as db:
        key = extend(db, token_list(40)).key
        with pytest.raises(StoreLocked, match="in use"):
            KVDB.open(path, "w")
        assert db.sequence(key).tokens == 40


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mode", "rw"),
        ("mode", ""),
        ("read_mode", "fast"),
        ("verify", "sometimes"),
        ("durability", "none"),
        ("retention", "newest"),
        ("grace_s", -1.0),
        ("lock_timeout_s", float("nan")),
        ("min_free", "lots"),
        ("size_cap", "-1"),
        ("host_budget", "much"),
        ("host_policy", "newest"),
        ("read_deadline_s", -1.0),
    ],
)
def test_an_unknown_option_is_refused(path: Path, option: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=f"{option} is {value!r}"):
        KVDB.open(path, **{option: value})  # type: ignore[arg-type]
    assert not path.exists()


# -- what is no store


@pytest.mark.parametrize("mode", ["r", "r+", "a", "w", "w-"])
def test_a_file_is_no_store_and_stays_what_it_is(path: Path, mode: str) -> None:
    path.write_bytes(b"mine")
    with pytest.raises(NotAStore, match="a file"):
        KVDB.open(path, mode)  # type: ignore[arg-type]
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("mode", ["r", "r+", "a", "w", "w-"])
def test_a_folder_of_other_things_is_no_store_and_stays_what_it_is(path: Path, mode: str) -> None:
    path.mkdir()
    (path / "thesis.tex").write_bytes(b"mine")
    with pytest.raises(NotAStore, match=r"without kvdb\.json"):
        KVDB.open(path, mode)  # type: ignore[arg-type]
    assert tree_bytes(path) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("mode", ["r", "a", "w"])
def test_a_dangling_link_is_no_store(path: Path, mode: str) -> None:
    path.symlink_to(path.parent / "gone")
    with pytest.raises(NotAStore, match="dangling"):
        KVDB.open(path, mode)  # type: ignore[arg-type]
    assert not (path.parent / "gone").exists()


def test_an_empty_folder_becomes_a_store(path: Path) -> None:
    path.mkdir()
    with opened(path) as db:
        assert db.sequences() == []
    assert (path / "kvdb.json").exists()


def test_a_link_to_a_store_is_the_store(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="n")
    link = path.parent / "link"
    link.symlink_to(path)
    with opened(link) as db, opened(path) as same:
        assert db.sequence("n") == same.sequence("n")


@pytest.mark.parametrize("mode", ["r", "r+", "a", "w"])
def test_a_newer_format_is_refused_and_left_untouched(path: Path, mode: str) -> None:
    with opened(path) as db:
        extend(db, token_list(40))
    header = json.loads((path / "kvdb.json").read_text())
    newer = FORMAT_VERSION + 1
    (path / "kvdb.json").write_text(json.dumps({"format": newer, "what": header}))
    before = tree_bytes(path)
    with pytest.raises(NewerFormat, match=f"format {newer}, expected at most {FORMAT_VERSION}"):
        KVDB.open(path, mode)  # type: ignore[arg-type]
    assert tree_bytes(path) == before


@pytest.mark.parametrize("header", [b"", b"{}", b"[]", b'{"format": "0"}', b'{"format": 1}', b"\xff\xfe", b"3"])
@pytest.mark.parametrize("mode", ["a", "w"])
def test_an_unreadable_header_is_damage_and_replaces_nothing(path: Path, header: bytes, mode: str) -> None:
    with opened(path):
        pass
    (path / "kvdb.json").write_bytes(header)
    with pytest.raises(Damaged, match=r"kvdb\.json"):
        KVDB.open(path, mode)  # type: ignore[arg-type]
    assert (path / "kvdb.json").read_bytes() == header


# -- reading only


def test_mode_r_writes_nothing(path: Path) -> None:
    with opened(path) as db:
        stored = extend(db, token_list(40), name="n")
    before = {name: data for name, data in tree_bytes(path).items() if name != "catalog/lock.mdb"}
    with opened(path, "r") as db:
        with pytest.raises(ReadOnly):
            write_segment(db, token_list(10))
        with pytest.raises(ReadOnly):
            db.put_sequence(stored.last, 40)
        with pytest.raises(ReadOnly):
            db.delete("n")
        with pytest.raises(ReadOnly):
            db.evict(0)
        assert_reads_back(db, token_list(40), db.match(identity(), token_list(40)).spans)
    assert {n: d for n, d in tree_bytes(path).items() if n != "catalog/lock.mdb"} == before


# -- names


HOSTILE = [
    "../../escape", "/etc/passwd", ".", "..", "a/b", "a\\b", "CON", "~", "$(id)", "%2e%2e%2f", "x" * 512, "-rf", "*",
    "名前", "e\u0301", "kvdb.json", "' OR 1=1", "{0.__class__}",
]  # fmt: skip
REFUSED = ["", " ", "\0", "a\0b", "a\nb", "\x1b[2J", "\u202eevil", "x" * 513, "\ud800"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_never_becomes_a_path(path: Path, name: str) -> None:
    with opened(path) as db:
        key = extend(db, token_list(20), name=name).key
        assert db.sequence(name).key == key
        folders = {p.name for p in path.rglob("*") if p.is_dir()}
        assert all(
            set(folder) <= set("0123456789abcdef.kvbox-") or folder in ("catalog", "chunks", *EMPTY)
            for folder in folders
        )
        assert [p.name for p in (path / "names").iterdir()] == [f"{key}.json"]
        assert {p.name for p in path.parent.iterdir()} == {"store"}
        db.delete(name)
        assert db.sequences() == []
        with pytest.raises(SequenceNotFound):
            db.sequence(name)


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_a_name_that_cannot_be_shown_is_refused(path: Path, name: str) -> None:
    with opened(path) as db:
        with pytest.raises(InvalidInput, match="name is"):
            extend(db, token_list(20), name=name)
        with pytest.raises(SequenceNotFound):
            db.sequence(name)
        extend(db, token_list(20))


def test_a_missing_sequence_is_named_without_quotes_around_the_message(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(20), name="here")
        with pytest.raises(KeyError) as caught:
            db.sequence("gone")
        assert str(caught.value).startswith(
            "sequence 'gone': not in the store, expected a name or key such as ['here']"
        )


# -- sequences


@pytest.mark.parametrize("tokens", [0, -1, 41])
def test_a_sequence_ends_inside_its_last_segment(path: Path, tokens: int) -> None:
    with opened(path) as db:
        stored = extend(db, token_list(40))
        with pytest.raises(InvalidInput, match=f"{tokens} tokens"):
            db.put_sequence(stored.last, tokens)


def test_a_sequence_may_end_before_its_segment_does(path: Path) -> None:
    with opened(path) as db:
        stored = extend(db, token_list(40))
        key = db.put_sequence(stored.last, 23, name="short")
        assert key != stored.key
        assert_reads_back(db, token_list(40), db.sequence("short").spans)
        assert db.sequence("short").tokens == 23


def test_a_replaced_sequence_is_forgotten_unless_it_has_a_name(path: Path) -> None:
    with opened(path) as db:
        old = extend(db, token_list(40)[:20])
        new = extend(db, token_list(40))
        db.put_sequence(new.last, 40, replaces=old.key)
        assert [s.key for s in db.sequences()] == [new.key]
        named = extend(db, token_list(40)[:20], name="kept")
        db.put_sequence(new.last, 40, replaces=named.key)
        assert {s.key for s in db.sequences()} == {named.key, new.key}


@pytest.mark.parametrize("stop", [64, 100])
def test_an_equal_segment_is_adopted_though_others_hold_the_same_tokens(path: Path, stop: int) -> None:
    """Of its own fidelity, and after the same parent: exact ones, and those of any other fidelity, neither hide it nor stand for it."""
    tokens = token_list(stop)
    with opened(path) as db:
        parent = db.commit(write_segment(db, tokens[:32]), tokens[:32]).segment.info.segment
        segments = [
            db.commit(write_segment(db, tokens, start=start, parent=after, fidelity=fidelity), tokens[start:]).segment
            for _ in range(2)
            for start, after in ((0, None), (32, parent))
            for fidelity in (EXACT, "int8", "int4", "sparse")
        ]
        ids = [segment.info.segment for segment in segments]
        assert ids[:8] == ids[8:]
        assert len(set(ids)) == 8
        assert_healthy(db)


def test_the_fidelity_of_a_sequence_is_that_of_its_last_inexact_segment(path: Path) -> None:
    tokens = token_list(96)
    with opened(path) as db:
        extend(db, tokens[:32])
        extend(db, tokens[:64], fidelity="sparse(0.1)", name="s")
        assert db.sequence("s").fidelity == "sparse(0.1)"
        assert len(db.sequence("s").spans) == 2
        assert db.sequences()[0].fidelity == EXACT


def test_a_match_says_why_it_is_not_longer(path: Path) -> None:
    tokens = token_list(96)
    with opened(path) as db:
        assert db.match(identity(), tokens).reason == "no stored sequence of this identity begins with these tokens"
        extend(db, tokens[:40])
        match = db.match(identity(), tokens)
        assert match.tokens == 40
        assert match.reason == f"no stored sequence has token {tokens[40]} at position 40"
        assert db.match(identity(), tokens[:40]).reason == "all tokens are stored"
        other = db.match(identity("w1"), tokens)
        assert (other.tokens, other.spans) == (0, ())
        assert other.reason == "40 tokens are stored under another identity, which differs in: weights"
        assert "identity begins" in db.match(identity("w1", salt="s"), tokens).reason  # no word to another tenant
        extend(db, tokens[:64], fidelity="sparse")
        assert db.match(identity(), tokens).reason == "64 tokens are stored, but not with fidelity 'exact'"
        assert db.match(identity(), tokens, exact=False).tokens == 64


def test_the_same_tokens_stored_twice_are_adopted(path: Path) -> None:
    tokens = token_list(40)
    with opened(path) as db:
        first, second = write_segment(db, tokens), write_segment(db, tokens)
        one = db.commit(first, tokens).segment
        two = db.commit(second, tokens).segment
        assert one == two
        assert kv_folders(path) == {one.info.segment}


# -- deletion


def test_deleting_keeps_segments_that_others_share(path: Path) -> None:
    tokens, fork = token_list(100), token_list(100)
    fork[60:] += 1
    with opened(path) as db:
        extend(db, tokens, name="a", segment_tokens=32)
        extend(db, fork, name="b", segment_tokens=32)
        shared = {s.segment for s in db.sequence("a").spans} & {s.segment for s in db.sequence("b").spans}
        assert shared
        db.delete("a")
        assert_reads_back(db, fork, db.sequence("b").spans)
        assert kv_folders(path) == {s.segment for s in db.sequence("b").spans}
        assert db.match(identity(), tokens).tokens == 64  # the segment that both pass through stays whole
        assert db.delete("b") > 0
        assert kv_folders(path) == set()
        assert db.match(identity(), tokens).tokens == 0


def test_deleting_what_is_not_there_is_an_error(path: Path) -> None:
    with opened(path) as db, pytest.raises(SequenceNotFound):
        db.delete("gone")


def test_eviction_takes_the_least_recently_used_unnamed_first(path: Path) -> None:
    with opened(path) as db:
        keys = [extend(db, token_list(40, seed), name="kept" if seed == 1 else None).key for seed in range(5)]
        db.touch(db.sequence(keys[0]).spans)
        each = db.info()["disk_bytes"] / 5
        assert [s.key for s in db.evict(10**12)] == []
        assert {s.key for s in db.evict(int(3.5 * each))} == {keys[2], keys[3]}
        assert {s.key for s in db.evict(0)} == {keys[4], keys[0]}
        assert [s.key for s in db.sequences()] == [keys[1]]
        assert_reads_back(db, token_list(40, 1), db.sequence("kept").spans)


@pytest.mark.parametrize("seconds", [-3.2e8, 0.0, 3.2e8])
def test_a_lying_clock_changes_only_the_order_of_eviction(
    path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="before")
    monkeypatch.setattr(files, "now", lambda: seconds)
    with opened(path) as db:
        extend(db, token_list(40, 1))
        extend(db, token_list(40), name="before")
        assert_reads_back(db, token_list(40, 1), db.match(identity(), token_list(40, 1)).spans)
        assert len(db.evict(0)) == 1
        assert db.sequence("before").tokens == 40


def test_a_sequence_that_loses_its_end_goes_on_with_the_rest(path: Path) -> None:
    tokens = token_list(96)
    with opened(path) as db:
        extend(db, tokens, segment_tokens=32)
        each = db.info()["disk_bytes"] // 3
        (cut,) = db.evict(2 * each)
        assert cut.tokens == 96
        assert [s.tokens for s in db.sequences()] == [64]
        assert_reads_back(db, tokens, db.match(identity(), tokens).spans)


def test_what_is_pinned_neither_goes_nor_can_be_deleted(path: Path) -> None:
    with opened(path) as db:
        key = extend(db, token_list(40)).key
        db.pin(key)
        assert db.evict(0, named=True) == []
        with pytest.raises(InvalidInput, match="pinned"):
            db.delete(key)
        db.pin(key, False)
        assert [s.key for s in db.evict(0)] == [key]


def test_a_named_sequence_goes_only_when_asked_for(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="n")
        assert db.evict(0) == []
        assert [s.name for s in db.evict(0, named=True)] == ["n"]
        assert (kv_folders(path), list((path / "names").iterdir())) == (set(), [])


def test_an_expired_sequence_is_gone_for_readers_and_then_for_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as db:
        db.put_sequence(extend(db, token_list(40), name="n").last, 40, name="short-lived", ttl_s=60)
        db.sequence("short-lived")
        real = files.moment
        monkeypatch.setattr(files, "moment", lambda: real()._replace(uptime=real().uptime + 61))
        with pytest.raises(SequenceNotFound, match="expired"):
            db.sequence("short-lived")
        db.gc()
        assert [s.name for s in db.sequences()] == ["n"]


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan")])
def test_a_time_to_live_is_above_zero(path: Path, ttl_s: float) -> None:
    with opened(path) as db, pytest.raises(InvalidInput, match="ttl_s"):
        db.put_sequence(extend(db, token_list(40)).last, 40, ttl_s=ttl_s)


# -- the cap


def test_the_cap_holds_after_every_write_and_for_every_handle(path: Path) -> None:
    cap = 1 << 20
    with opened(path) as db:
        db.set_size_cap(cap)
    with opened(path) as db:
        assert db.info()["size_cap"] == cap
        for seed in range(40):
            extend(db, token_list(160, seed))
            assert files.tree_bytes(path) - files.disk_bytes(path) <= cap
        assert 1 < len(db.sequences()) < 40
        assert db.match(identity(), token_list(160, 39)).tokens == 160
        db.set_size_cap("unlimited")
        assert db.info()["size_cap"] is None


def test_what_the_cap_cannot_hold_is_storage_full_and_takes_nothing_named(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="kept")
        db.set_size_cap(db.info()["used_bytes"] + 4096)
        with pytest.raises(StorageFull, match="size_cap"):
            extend(db, token_list(16_000, 1))
        assert_reads_back(db, token_list(40), db.sequence("kept").spans)


# -- sweeping


def test_arrays_that_no_entry_names_are_swept(path: Path) -> None:
    with opened(path) as db:
        kept = extend(db, token_list(40)).last.info.segment
    orphan = path / "chunks" / ("ef" * 16 + ".kv0")
    orphan.mkdir()
    (orphan / "c.0.0.0.0.0").write_bytes(b"x")
    with KVDB.open(path, "r") as db:
        assert [(p.loc, p.kind) for p in db.check()] == [(f"array {orphan.name}", "orphan")]
        assert orphan.exists()
    with opened(path):
        assert kv_folders(path) == {kept}
    assert (path / "chunks" / "zarr.json").exists()


WRITER = """
import sys, time
from helpers import *
with KVDB.open(sys.argv[1]) as db:
    writer = write_segment(db, token_list(40))
    print("ready", flush=True)
    sys.stdin.readline()
    db.put_sequence(db.commit(writer, token_list(40)).segment, 40)
    print("done", flush=True)
"""


def test_the_workspace_of_a_live_process_is_not_swept(path: Path) -> None:
    writer = python(WRITER, str(path))
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    with opened(path) as db:
        assert len(list((path / "tmp").iterdir())) == 1
        assert db.sequences() == []
        assert finish(writer) == "done\n"
        assert_reads_back(db, token_list(40), db.match(identity(), token_list(40)).spans)


def test_the_workspace_of_a_killed_process_is_swept(path: Path) -> None:
    writer = python(WRITER, str(path))
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    writer.kill()
    writer.communicate()
    assert len(list((path / "tmp").iterdir())) == 1
    with opened(path) as db:
        assert list((path / "tmp").iterdir()) == []
        assert db.sequences() == []


@pytest.mark.parametrize("left", ["folder", "file"])
def test_what_died_before_it_was_locked_is_swept(path: Path, left: str) -> None:
    with opened(path):
        pass
    if left == "folder":
        (path / "tmp" / "123-abc").mkdir()
    else:
        (path / "tmp" / "header-abc").write_bytes(b"{")
    with opened(path):
        assert list((path / "tmp").iterdir()) == []


@pytest.mark.parametrize("made", range(7))
def test_a_store_whose_creation_was_cut_short_is_created(path: Path, made: int) -> None:
    path.mkdir()
    for part in ("catalog", "chunks", "names", "quarantine", "tmp", "trash")[:made]:
        (path / part).mkdir()
    if made == 6:
        (path / "tmp" / "header-abc").write_bytes(b"{")
    with opened(path) as db:
        extend(db, token_list(20))
    assert os.listdir(path / "tmp") == []


def test_closing_removes_the_own_workspace(path: Path) -> None:
    with KVDB.open(path) as db:
        write_segment(db, token_list(40))
        assert len(os.listdir(path / "tmp")) == 1
    assert os.listdir(path / "tmp") == []


def test_info_counts_what_is_there(path: Path) -> None:
    with opened(path) as db:
        extend(db, token_list(40), name="n", spare=8)
        info = db.info()
        assert (info["sequences"], info["segments"], info["tokens"], info["identities"]) == (1, 1, 40, 1)
        assert info["kv_bytes"] == 40 * SMALL.token_bytes
        assert json.loads(json.dumps(info)) == info
        assert_healthy(db)
