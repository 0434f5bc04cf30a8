"""Fork, spawn and forkserver with a store open: parent and child go on, each with its own, and neither harms the other.

Every family lives in an interpreter of its own: nothing of the test run is forked.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from helpers import assert_reads_back, finish, identity, opened, python, token_list

BEGIN = """
import os, signal, sys, threading, time
from helpers import *
from kvdb.errors import InvalidInput, StoreError
path = Path(sys.argv[1])

def fork(act):
    pid = os.fork()
    if pid == 0:
        try:
            code = act()
        except SystemExit:  # of a child of this child
            raise
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
        sys.exit(code if type(code) is int else 0)  # as most children end: whatever still exists is taken down
    return pid

def joined(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def save(db, seed, tokens=100):
    extend(db, token_list(tokens, seed), segment_tokens=48, name=f"n{seed}")
    assert_reads_back(db, token_list(tokens, seed), db.sequence(f"n{seed}").spans)
"""


def family(path: Path, code: str) -> str:
    return finish(python(BEGIN + code, str(path)))


def assert_holds(path: Path, *seeds: int) -> None:
    with opened(path) as db:
        assert sorted(s.name or "" for s in db.sequences()) == sorted(f"n{seed}" for seed in seeds)
        for seed in seeds:
            tokens = token_list(100, seed)
            assert db.match(identity(), tokens).tokens == 100
            assert_reads_back(db, tokens, db.sequence(f"n{seed}").spans)
        assert list((path / "tmp").iterdir()) == []


def test_parent_and_child_go_on_with_one_handle(tmp_path: Path) -> None:
    said = family(
        tmp_path / "s",
        """
with KVDB.open(path) as db:
    save(db, 0)
    writer = write_segment(db, token_list(100, 1))  # the parent is in the middle of a segment
    def child():
        assert_reads_back(db, token_list(100), db.sequence("n0").spans)
        for seed in range(2, 8):
            save(db, seed)
        assert db.check() == []
        db.close()
    pid = fork(child)
    for seed in range(8, 14):
        save(db, seed)
    print(joined(pid))
    committed = db.commit(writer, token_list(100, 1))
    db.put_sequence(committed.segment, 100, name="n1", replaces=committed.sequence)
""",
    )
    assert said == "0\n"
    assert_holds(tmp_path / "s", *range(14))


def test_a_child_that_never_uses_the_handle_takes_nothing_away(tmp_path: Path) -> None:
    said = family(
        tmp_path / "s",
        """
with KVDB.open(path) as db:
    save(db, 0)
    writer = write_segment(db, token_list(100, 1))
    for act in (lambda: None, db.close, db.sequences):
        print(joined(fork(act)))
    committed = db.commit(writer, token_list(100, 1))
    db.put_sequence(committed.segment, 100, name="n1", replaces=committed.sequence)
""",
    )
    assert said == "0\n0\n0\n"
    assert_holds(tmp_path / "s", 0, 1)


def test_a_child_of_a_child_and_its_threads_use_the_handle(tmp_path: Path) -> None:
    said = family(
        tmp_path / "s",
        """
with KVDB.open(path) as db:
    save(db, 0)
    def grandchild():
        threads = [threading.Thread(target=save, args=(db, seed)) for seed in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(db.sequences()) == 7
        db.close()
    print(joined(fork(lambda: joined(fork(grandchild)))))
""",
    )
    assert said == "0\n"
    assert_holds(tmp_path / "s", *range(7))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_opens_the_store_by_itself(tmp_path: Path, method: str) -> None:
    said = family(
        tmp_path / "s",
        f"""
import multiprocessing
child = '''
from helpers import *
with KVDB.open({str(tmp_path / "s")!r}) as db:
    assert_reads_back(db, token_list(100), db.sequence("n0").spans)
    extend(db, token_list(100, 1), name="n1")
    assert db.check() == []
'''
if __name__ == "__main__":
    with KVDB.open(path) as db:
        save(db, 0)
        process = multiprocessing.get_context({method!r}).Process(target=exec, args=(child, {{}}))
        process.start()
        save(db, 2)
        process.join()
        print(process.exitcode)
        save(db, 3)
""",
    )
    assert said == "0\n"
    assert_holds(tmp_path / "s", 0, 1, 2, 3)


@pytest.mark.parametrize("write", [False, True], ids=["reading", "writing"])
def test_a_fork_waits_for_transactions_of_other_threads(tmp_path: Path, write: bool) -> None:
    said = family(
        tmp_path / "s",
        f"""
with KVDB.open(path) as db:
    save(db, 0)
    inside = threading.Event()
    def transact():
        with db.catalog.begin(write={write}) as txn:
            inside.set()
            time.sleep(0.3)
            print([s.name for s in txn.sequences()], flush=True)
    thread = threading.Thread(target=transact)
    thread.start()
    inside.wait()
    pid = fork(lambda: save(db, 1))
    save(db, 2)
    print(joined(pid))
    thread.join()
""",
    )
    assert said == "['n0']\n0\n"
    assert_holds(tmp_path / "s", 0, 1, 2)


def test_a_child_forked_inside_a_transaction_is_told_and_the_snapshot_stays(tmp_path: Path) -> None:
    said = family(
        tmp_path / "s",
        """
import kvdb.environment
kvdb.environment._TIMEOUT_S = 0.1
with KVDB.open(path) as db:
    save(db, 0)
    with db.catalog.begin() as txn:
        print(joined(fork(db.sequences)))
        other = python("import sys; from helpers import *\\nwith KVDB.open(sys.argv[1]) as db:\\n"
                       "  for seed in range(1, 20): extend(db, token_list(100, seed), name=f'n{seed}')", str(path))
        finish(other)
        print([s.name for s in txn.sequences()])
    print(len(db.sequences()))
""",
    )
    told, *rest = said.splitlines()
    assert "StoreError" in told
    assert "forked inside a transaction" in told
    assert rest == ["1", "['n0']", "20"]
    assert_holds(tmp_path / "s", *range(20))


HOLD_THE_LOCK = """
with KVDB.open(path, lock_timeout_s=1) as db:
    save(db, 0)
    inside, done = threading.Event(), threading.Event()
    def hold():
        with db.catalog.locked():
            inside.set()
            done.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    reading, writing = os.pipe()
    def child():
        print(os.getpid(), flush=True)
        os.read(reading, 1)  # lives until its parent says so
    pid = fork(child)
"""


def test_a_child_does_not_keep_its_parents_lock(tmp_path: Path) -> None:
    said = family(
        tmp_path / "s",
        HOLD_THE_LOCK
        + """
    done.set()
    thread.join()
    save(db, 1)
    os.write(writing, b".")
    print(joined(pid))
""",
    )
    assert said.splitlines()[1:] == ["0"]
    assert_holds(tmp_path / "s", 0, 1)


def test_nor_when_the_parent_is_killed_holding_it(tmp_path: Path) -> None:
    process = python(BEGIN + HOLD_THE_LOCK + "    done.wait()\n", str(tmp_path / "s"))
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        assert_holds(tmp_path / "s", 0)
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_child_refuses_its_parents_cache_and_makes_its_own(tmp_path: Path) -> None:
    said = family(
        tmp_path / "s",
        """
import torch
from tiny_models import greedy, prompt, stock, tiny
from kvdb.runtime import attach
torch.set_num_threads(1)
model, ids, other = tiny(), prompt(1500), prompt(60, seed=1)
expected, others = stock(model, ids, 8), stock(model, other, 8)
with KVDB.open(path) as db, attach(model, db, exact=True) as kv:
    cache = kv.cache(ids)
    grown = greedy(model, ids, cache, 4)
    whole = torch.cat((ids, grown), 1)
    gate = threading.Event()
    cache.rows[0]._behind.submit(0, gate.wait)  # a write is under way, and is never done in the child
    def child():
        for act in (lambda: greedy(model, whole, cache, 4), lambda: kv.save(cache), lambda: cache.rows[0].read(0, 0, 1)):
            try:
                act()
            except InvalidInput as error:
                print("before this process was forked" in str(error), flush=True)
        assert torch.equal(greedy(model, other, kv.cache(other), 8), others)
        cache.close()
    pid = fork(child)
    print(joined(pid), flush=True)
    gate.set()
    assert torch.equal(torch.cat((grown, greedy(model, whole, cache, 4)), 1), expected)
    kv.save(cache, "kept")
    assert db.match(kv.identity(), torch.cat((ids, expected), 1)[0, :1507].numpy().astype("<u4")).tokens == 1507
""",
    )
    assert said == "True\nTrue\nTrue\n0\n"
    with opened(tmp_path / "s") as db:
        assert [s.name for s in db.sequences() if s.name] == ["kept"]
        assert list((tmp_path / "s" / "tmp").iterdir()) == []
