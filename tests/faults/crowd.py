"""A crowd on one store: readers, writers, an evictor and a compactor, each a process, all at once, for some seconds.

Readers judge: what they find is a beginning of what they asked for, what they could open reads back bit for bit however long
that takes, and what they could not open has gone from the catalog since they found it. Nothing waits in the trash here, so
that files vanish between finding and opening.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from faults import plants
from helpers import SMALL, Array, extend, finish, identity, model_kv, python, read_kv, token_list

from kvdb import EXACT, KVDB, Span, files
from kvdb.errors import Damaged, InvalidInput, PrefixDeleted, SequenceNotFound, StorageFull
from kvdb.segments import Segment

PROMPTS: Final = [token_list(160, seed) for seed in range(12)]
KV: Final = [model_kv(SMALL, tokens, 0, len(tokens), salt=EXACT) for tokens in PROMPTS]
TURNS: Final = (40, 90, 160)
READERS, WRITERS = 8, 2
CAP: Final = 3 << 20
"""What the store may occupy: some of the prompts, so that writers evict too."""


class Torn(AssertionError):
    """A reader got what was never stored, or nothing where something is stored."""


def crowd(path: Path, seconds: float, *, plant: str | None = None) -> Counter[str]:
    """What came of it, by kind: reads, misses, "looked again", snapshots, commits, evictions, compactions ... and torn."""
    code = "from faults.crowd import main; main()"
    return Counter(json.loads(finish(python(code, str(path), str(seconds), plant or ""), timeout_s=seconds + 120)))


def main() -> None:
    path, seconds, plant = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] or None
    with _opened(path, size_cap=CAP):
        pass
    processes = multiprocessing.get_context("fork")
    results = processes.SimpleQueue()
    roles = [_read] * READERS + [_write] * WRITERS + [_evict, _compact]
    crew = [
        processes.Process(target=_play, args=(role, number, path, seconds, plant, results))
        for number, role in enumerate(roles)
    ]
    for process in crew:
        process.start()
    seen = sum((Counter(results.get()) for _ in crew), Counter[str]())
    for process in crew:
        process.join()
    print(json.dumps(seen))


def _play(role: Callable[..., None], number: int, path: Path, seconds: float, plant: str | None, results: Any) -> None:
    rng, seen, end = random.Random(number), Counter[str](), time.monotonic() + seconds
    try:
        with _planted(plant), _opened(path, read_mode=("mmap", "pread")[number % 2]) as db:
            while time.monotonic() < end:
                role(db, rng, seen)
    except Torn as error:
        seen[f"torn: {error}"] += 1
    except Exception as error:
        seen[f"untyped: {role.__name__}: {type(error).__name__}: {error}"] += 1
    results.put(dict(seen))


def _opened(path: Path, **options: Any) -> KVDB:
    return KVDB.open(path, verify="never", grace_s=0, **options)  # bytes are compared here, not by digests


# -- roles


def _read(db: KVDB, rng: random.Random, seen: Counter[str]) -> None:
    prompt = rng.randrange(len(PROMPTS))
    if rng.random() < 0.02:
        _hold_snapshot(db, rng)
        seen["snapshots"] += 1
    elif rng.random() < 0.5:
        found, segments = db.find(identity(), PROMPTS[prompt])
        _look(db, rng, seen, prompt, found.spans, segments)
    else:
        with _overtaken(seen, "misses", SequenceNotFound):
            spans = db.sequence(f"n{prompt}").spans
            with _overtaken(seen, "looked again", Damaged, unless=lambda: db.holds(spans)):
                segments = db.segments(spans)
                _look(db, rng, seen, prompt, spans, segments)


def _look(
    db: KVDB, rng: random.Random, seen: Counter[str], prompt: int, spans: tuple[Span, ...], segments: list[Segment]
) -> None:
    reader = db.reader()
    try:
        _pause(rng)
        with _overtaken(seen, "looked again", Damaged, unless=lambda: db.holds(spans)):
            for segment in segments:
                reader.open(segment)
            _pause(rng)
            with _never(Damaged):
                for segment, span in zip(segments, spans, strict=True):
                    _compare(reader, segment, span, KV[prompt])
            seen["reads" if spans else "misses"] += 1
    finally:
        reader.close()


def _compare(reader: Any, segment: Segment, span: Span, kv: dict[int, tuple[Array, Array]]) -> None:
    start, count = segment.info.start, span.stop - span.start
    for layer in SMALL.layers:
        reader.abstract(segment, "box", layer)
        for found, wanted in zip(read_kv(reader, segment, layer, count), kv[layer], strict=True):
            if not np.array_equal(found, wanted[:, start : start + count]):
                raise Torn(f"segment {segment.info.segment}, layer {layer}: KV of other tokens")


def _hold_snapshot(db: KVDB, rng: random.Random) -> None:
    with db.catalog.begin() as txn:
        before = txn.sequences()
        time.sleep(rng.random() / 5)
        if txn.sequences() != before:
            raise Torn("a snapshot changed")


def _write(db: KVDB, rng: random.Random, seen: Counter[str]) -> None:
    prompt, turn = rng.randrange(len(PROMPTS)), rng.choice(TURNS)
    name = f"n{prompt}" if prompt % 3 else None
    with _overtaken(seen, "overtaken writes", PrefixDeleted, Damaged), _overtaken(seen, "no room", StorageFull):
        extend(db, PROMPTS[prompt][:turn], segment_tokens=48, name=name)
        seen["writes"] += 1


def _evict(db: KVDB, rng: random.Random, seen: Counter[str]) -> None:
    time.sleep(rng.random() / 10)
    if rng.random() < 0.5:
        with _overtaken(seen, "nothing to delete", SequenceNotFound, InvalidInput):
            db.delete(f"n{rng.randrange(len(PROMPTS))}")
            seen["deletions"] += 1
    else:
        seen["evictions"] += len(db.evict(rng.choice([0, 1 << 16, 1 << 17]), named=rng.random() < 0.2))


def _compact(db: KVDB, rng: random.Random, seen: Counter[str]) -> None:
    time.sleep(rng.random() / 10)
    with _overtaken(seen, "no room", StorageFull):
        seen["merged segments"] += db.compact()


# -- what may happen, and what may not


def _pause(rng: random.Random) -> None:
    if rng.random() < 0.3:
        time.sleep(rng.random() / 50)


@contextlib.contextmanager
def _overtaken(
    seen: Counter[str], how: str, *errors: type[Exception], unless: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """`errors` in the block are one more of `how`, and Torn where they cannot be explained by what others have done."""
    try:
        yield
    except errors as error:
        if unless():
            raise Torn(f"stored, but: {error}") from error
        seen[how] += 1


def _changed_in_place(patch: pytest.MonkeyPatch) -> None:
    """Files are emptied before they go: who has one open reads zeros."""
    real = files.remove_tree

    def remove_tree(path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):  # the other one was faster
            for file in path.glob("c.*"):
                file.write_bytes(bytes(file.stat().st_size))
        real(path)

    patch.setattr(files, "remove_tree", remove_tree)


@contextlib.contextmanager
def _planted(name: str | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            (plants.PLANTS | {"changed in place": _changed_in_place})[name](patch)
        yield


@contextlib.contextmanager
def _never(error: type[Exception]) -> Iterator[None]:
    try:
        yield
    except error as e:
        raise Torn(f"open, but: {e}") from e
