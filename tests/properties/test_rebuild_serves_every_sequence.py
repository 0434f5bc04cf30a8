"""However a catalog is lost, the one made anew serves every sequence bit for bit; names stay, and what is lost is said."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, TWO_GROUPS, Array, assert_healthy, assert_reads_back, extend, identity
from hypothesis import settings

from kvdb import EXACT, KVDB
from kvdb.errors import KVDBError
from kvdb.repair import repair

STORES = {"dev": 10, "ci": 20, "nightly": 200}[settings.get_current_profile_name()]
IDENTITIES = [identity("w0"), identity("w1", salt="tenant")]
LOSSES = ["gone", "folder gone", "empty", "cut", "noise", "zeros", "meta pages", "flips", "page swap", "only asked for"]
Known = tuple[int, Array, str | None]  # identity, tokens, name


def random_store(path: Path, rng: np.random.Generator) -> list[Known]:
    """A store of branches, names, identities, fidelities; returns what must be served."""
    texts = [rng.integers(0, 3, int(rng.integers(1, 200))).astype("<u4") for _ in range(3)]
    with KVDB.open(path) as db:
        for number in range(int(rng.integers(1, 8))):
            base = texts[rng.integers(len(texts))]
            branch = rng.integers(0, 3, int(rng.integers(0, 80))).astype("<u4")
            tokens = np.concatenate((base[: int(rng.integers(0, len(base) + 1))], branch, base[:1]))
            stored = extend(
                db,
                tokens,
                name=f"name {rng.integers(4)}" if rng.integers(2) else None,
                ident=IDENTITIES[rng.integers(2)],
                fidelity=EXACT if rng.integers(4) else "sparse",
                geometry=TWO_GROUPS if number % 3 == 0 else SMALL,
                segment_tokens=int(rng.choice([16, 48, 1 << 20])),
            )
            match rng.integers(6):
                case 0:
                    db.pin(stored.key)
                case 1:
                    db.compact()
                case 2:
                    db.put_sequence(stored.last, stored.last.info.stop, ttl_s=1e6)
                case 3 if len(db.sequences()) > 1 and not db.sequences()[0].pinned:
                    db.delete(db.sequences()[0].key)
        assert_healthy(db)
        digests = [each.digest().hex() for each in IDENTITIES]
        return [(digests.index(s.identity), db.tokens(s.spans), s.name) for s in db.sequences()]


def lose_the_catalog(path: Path, how: str, rng: np.random.Generator) -> None:
    data = path / "catalog" / "data.mdb"
    page, size = 4096, data.stat().st_size
    bytes_ = bytearray(data.read_bytes())
    used = len(bytes_.rstrip(b"\0"))
    match how:
        case "gone":
            data.unlink()
        case "folder gone":
            shutil.rmtree(data.parent)
        case "empty":
            data.write_bytes(b"")
        case "cut":
            os.truncate(data, int(rng.integers(1, used)))
        case "noise":
            data.write_bytes(rng.bytes(size))
        case "zeros":
            data.write_bytes(bytes(size))
        case "meta pages":
            bytes_[: 2 * page] = rng.bytes(2 * page)
            data.write_bytes(bytes_)
        case "flips":
            for offset in rng.integers(2 * page, used, 64):
                bytes_[offset] ^= 1 << int(rng.integers(8))
            data.write_bytes(bytes_)
        case "page swap":
            a, b = (int(n) * page for n in rng.integers(2, max(3, used // page), 2))
            bytes_[a : a + page], bytes_[b : b + page] = bytes_[b : b + page], bytes_[a : a + page]
            data.write_bytes(bytes_)


def rebuild_and_judge(path: Path, known: list[Known]) -> None:
    report = repair(path, apply=True, rebuild=True)
    assert report.remaining == []
    assert any("statistics are lost" in action and "pins and expiry" in action for action in report.actions)
    with KVDB.open(path) as db:
        assert_healthy(db)
        assert {s.name for s in db.sequences() if s.name} == {name for _, _, name in known if name}
        for ident, tokens, name in known:
            found = db.match(IDENTITIES[ident], tokens, exact=False)
            assert found.tokens == len(tokens)
            assert_reads_back(db, tokens, found.spans)
            if name is not None:
                assert db.sequence(name).tokens == len(tokens)
                assert_reads_back(db, tokens, db.sequence(name).spans)


@pytest.mark.parametrize("seed", range(STORES))
def test_a_rebuilt_catalog_serves_every_sequence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "store"
        known = random_store(path, rng)
        lose_the_catalog(path, LOSSES[seed % len(LOSSES)], rng)
        rebuild_and_judge(path, known)


@pytest.mark.parametrize(
    "bug", ["manifests are not read", "parents are forgotten", "tokens are not those of the files"]
)
def test_the_judge_sees_planted_bugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    known: list[Known] = []
    with KVDB.open(tmp_path / "s") as db:
        tokens = np.arange(100, dtype="<u4")
        extend(db, tokens, name="n", segment_tokens=32, ident=IDENTITIES[0])
        known.append((0, tokens, "n"))
    (tmp_path / "s" / "catalog" / "data.mdb").unlink()
    if bug == "manifests are not read":
        monkeypatch.setattr("kvdb.manifests.read", lambda names: [])
    elif bug == "parents are forgotten":
        monkeypatch.setattr(
            "kvdb.repair._connected", lambda found: {s: f for s, f in found.items() if not f.entry.info.parent}
        )
    else:
        monkeypatch.setattr("kvdb.repair.stored_tokens", lambda chunks, info: np.zeros(info.tokens, "<u4"))
    with pytest.raises((AssertionError, KVDBError)):
        rebuild_and_judge(tmp_path / "s", known)
