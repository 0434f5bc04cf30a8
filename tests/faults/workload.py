"""The life of a store as a script, and the judge of what a crash left of it.

A life is a list of steps. Each has an effect on a store and a model: from what the store held, what it may hold after each
commit inside the step, and in the end. A step's acknowledgement is one line in a file that the fault
cannot reach. The judge folds the acknowledgements over the models and opens the store: it must hold exactly one of the
states that are left, every bit of it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from faults import coded
from helpers import Array, extend, identity, token_list

from kvdb import EXACT, KVDB, Geometry, LayerGroup
from kvdb.codecs import CodecPlan
from kvdb.errors import KVDBError, SequenceNotFound
from kvdb.identity import joined_fidelity
from kvdb.repair import repair

GEOMETRY = Geometry(
    dtype="float16",
    chunk_tokens=16,
    groups=(LayerGroup(layers=(0, 2), kv_heads=2, head_dim=8), LayerGroup(layers=(1,), kv_heads=1, head_dim=5)),
)
"""Two groups, one of a width no codec likes: a segment of four arrays."""
SEGMENT_TOKENS = 48
AS_IS = "raw"


class Held(NamedTuple):
    """A sequence that a store holds.

    fidelity  says what its KV is
    codec     stores its KV, but for the first chunk and a started one
    """

    name: str | None
    tokens: bytes
    fidelity: str = EXACT
    codec: str = AS_IS


State = frozenset[Held]
"""Every sequence that a store holds."""
EMPTY: State = frozenset()
REBUILD = "rebuild"


class Violation(AssertionError):
    """A promise that was not kept. `kind` is lost, torn, resurrected, unusable or untyped."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Step(NamedTuple):
    """`passes` gives the states a step may be interrupted in, `ends` those it may end in: by default the last it passes.

    shows  whether it shows in a store that it is done; raises Violation where it is half done
    """

    label: str
    act: Callable[[Life], object]
    passes: Callable[[State], list[State]]
    ends: Callable[[State], list[State]] | None = None
    shows: Callable[[KVDB], bool] | None = None


class Life:
    """A store that lives through `script`. A failed step is written down with its error, and life goes on.

    acknowledge  takes "done LABEL" or "failed LABEL: ERROR" as soon as it is so
    options      of KVDB.open
    """

    def __init__(self, path: Path, acknowledge: Callable[[str], object], **options: Any) -> None:
        self.path, self._told, self._options = path, acknowledge, options
        self.acks: list[str] = []
        self._db: KVDB | None = None

    def _acknowledge(self, line: str) -> None:
        self._told(line)
        self.acks.append(line)

    @property
    def db(self) -> KVDB:
        """The open store: opened, and where there is none created, when it is needed."""
        if self._db is None:
            self._db = KVDB.open(self.path, **self._options)
        return self._db

    def close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def live(self, script: Iterable[Step]) -> None:
        for step in script:
            try:
                step.act(self)
            except (KVDBError, OSError) as error:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                self._acknowledge(
                    f"failed {step.label}: {said}{'' if _tells_where(error) else ' (nobody knows where)'}"
                )
            except Exception as error:
                self._acknowledge(f"failed {step.label}: untyped {type(error).__name__}: {error}")
            else:
                self._acknowledge(f"done {step.label}")

    def look(self, script: tuple[Step, ...]) -> None:
        """What this process finds in the store after its own errors. Raises Violation."""
        for ack in self.acks[next((i for i, a in enumerate(self.acks) if a.startswith("failed")), -1) + 1 :]:
            if ack.startswith("failed") and "SequenceNotFound" not in ack:
                raise Violation("unusable", f"a call that did not fail itself: {ack}")
        _look(self.db, possible(self.acks, script))
        _look_for_what_shows(self.db, self.acks, script)
        self.close()


def _tells_where(error: Exception) -> bool:
    return isinstance(error, KVDBError) or getattr(error, "filename", None) is not None


class _Inline(Executor):
    """A pool of no threads: what is submitted is done at once."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, act: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(act(*arguments, **options))
        except Exception as error:
            done.set_exception(error)
        return done


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Within it the engine draws the same names and works in one thread: every life makes the same calls in the same order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvdb.files.ThreadPoolExecutor", _Inline)
        patch.setattr(os, "urandom", random.Random(0).randbytes)
        yield


# -- steps


def store(label: str, tokens: Array, *, name: str | None = None) -> Step:
    """Commit what is missing of a sequence, segment by segment, and record it, with a name or without."""

    def passes(before: State) -> list[State]:
        wanted, states, now = tokens.tobytes(), [before], before
        held = matched(before, tokens)
        recorded: Held | None = None
        at = len(tokens) if held == len(tokens) else GEOMETRY.grid_floor(held)
        while at < len(tokens):
            at = min(at + SEGMENT_TOKENS, len(tokens))
            now = now - {recorded} | {recorded := Held(None, tokens[:at].tobytes())}
            states.append(now)
        if name is not None:
            now = now - {recorded}
        moved = {held for held in now if held.name == name is not None and held.tokens != wanted}
        states.append(now - moved | {held._replace(name=None) for held in moved} | {Held(name, wanted)})
        return states

    return Step(
        f"store {label}",
        lambda life: extend(life.db, tokens, name=name, geometry=GEOMETRY, segment_tokens=SEGMENT_TOKENS),
        passes,
    )


def store_coded(name: str, tokens: Array, codec: str) -> Step:
    """Commit a sequence that shares nothing, with a lossy codec, and name it."""

    def passes(before: State) -> list[State]:
        ends = coded.stops(GEOMETRY, len(tokens), SEGMENT_TOKENS)
        begun = [Held(None, tokens[:at].tobytes(), codec, _codec_of_beginning(at, codec)) for at in ends]
        return [before, *(before | {held} for held in begun), before | {begun[-1]._replace(name=name)}]

    how: Any = {"geometry": GEOMETRY, "segment_tokens": SEGMENT_TOKENS}
    return Step(f"store {name}", lambda life: coded.store(life.db, tokens, name, codec, **how), passes)


def recode(name: str, codec: str) -> Step:
    """Store a sequence with another codec. Until that is done it is what it was, and beside it may be a beginning of what it becomes."""
    plan = CodecPlan.parse(codec)

    def passes(before: State) -> list[State]:
        old = next((held for held in before if held.name == name and held.codec != codec), None)
        if old is None:
            return [before]
        new = old._replace(
            fidelity=old.fidelity if plan.lossless else joined_fidelity(old.fidelity, codec), codec=codec
        )
        ids = np.frombuffer(old.tokens, "<u4")
        begun = [
            Held(None, ids[:at].tobytes(), new.fidelity, _codec_of_beginning(at, codec))
            for at in sorted({*range(GEOMETRY.chunk_tokens, len(ids), GEOMETRY.chunk_tokens), len(ids)})
        ]
        return [before, *(before | {held} for held in begun), before - {old} | {new}]

    return Step(f"recode {name} as {codec}", lambda life: life.db.recode(name, plan), passes)


def _codec_of_beginning(tokens: int, codec: str) -> str:
    return codec if tokens > GEOMETRY.chunk_tokens else AS_IS


def delete(name: str) -> Step:
    return Step(f"delete {name}", lambda life: life.db.delete(name), lambda s: [s, _without(s, {name})])


def evict() -> Step:
    """Evict all that may be evicted, one transaction each: which and in what order is not judged here, but for this: an
    unnamed sequence stays only if it is the beginning of a named one, which would keep its bytes anyway."""

    def passes(before: State) -> list[State]:
        unnamed = [held for held in before if held.name is None]
        subsets = itertools.chain.from_iterable(itertools.combinations(unnamed, n) for n in range(len(unnamed) + 1))
        return [before - set(gone) for gone in subsets]

    def ends(before: State) -> list[State]:
        named = [held for held in before if held.name is not None]
        return [
            after
            for after in passes(before)
            if all(any(_begins(held, other) for other in named) for held in after if held.name is None)
        ]

    return Step("evict", lambda life: life.db.evict(0), passes, ends)


def reopen() -> Step:
    def act(life: Life) -> None:
        life.close()
        assert life.db

    return Step("reopen", act, lambda s: [s])


def compact(name: str) -> Step:
    return Step(f"compact {name}", lambda life: life.db.compact(name), lambda s: [s])


def abstracts(name: str, *wanted: str) -> Step:
    """Give a sequence other abstracts: all its segments have the new ones, or all the old ones."""

    def shows(db: KVDB) -> bool:
        found = {segment.info.abstracts for segment in db.segments(db.sequence(name).spans)}
        _expect(len(found) == 1, "torn", f"segments of {name} have abstracts {found}")
        return found == {wanted}

    return Step(f"abstracts {name}", lambda life: life.db.set_abstracts(name, wanted), lambda s: [s], shows=shows)


def pin(name: str) -> Step:
    return Step(f"pin {name}", lambda life: life.db.pin(name), lambda s: [s])


def rebuild() -> Step:
    """Make the catalog anew. Who is interrupted in it repairs again: so does the judge."""

    def act(life: Life) -> None:
        life.close()
        assert repair(life.path, apply=True, rebuild=True).remaining == []

    return Step(REBUILD, act, lambda s: [s])


def _without(state: State, names: set[str]) -> State:
    return frozenset(held for held in state if held.name not in names)


def _begins(held: Held, other: Held) -> bool:
    return other.tokens.startswith(held.tokens) and other.fidelity == held.fidelity


def _branch(tokens: Array, at: int, count: int, seed: int) -> Array:
    return np.concatenate((tokens[:at], token_list(count - at, seed)))


TRUNK = token_list(100, 1)
BRANCH = _branch(TRUNK, 60, 90, 2)
TURN = _branch(BRANCH, 90, 130, 3)
DRAFT, SECOND = token_list(40, 4), token_list(33, 5)
LAST, NEXT = token_list(50, 6), token_list(20, 7)
CODED = token_list(32, 8)
EVERYTHING = (TRUNK, BRANCH, TURN, DRAFT, SECOND, LAST, NEXT, CODED)

CREATE = Step("create", reopen().act, lambda s: [s])
CLOSE = Step("close", Life.close, lambda s: [s])
LIFE = (
    CREATE,
    store("trunk", TRUNK, name="trunk"),
    store("branch", BRANCH),
    store("turn", TURN, name="chat"),
    compact("chat"),
    abstracts("chat", "sketch"),
    pin("chat"),
    recode("chat", "int4"),
    store("draft", DRAFT, name="draft"),
    store("second draft", SECOND, name="draft"),
    store_coded("coded", CODED, "planes"),
    delete("trunk"),
    evict(),
    reopen(),
    recode("coded", AS_IS),
    store("last", LAST, name="last"),
    delete("draft"),
    CLOSE,
)
REPAIRED = (
    CREATE,
    store("trunk", TRUNK, name="trunk"),
    store("branch", BRANCH),
    abstracts("trunk", "box", "sketch"),
    store_coded("coded", CODED, "planes"),
    rebuild(),
    store("last", LAST),
    CLOSE,
)
VISIT = (store("visit", NEXT, name="visit"), CLOSE)
SCRIPTS = {"life": LIFE, "repaired": REPAIRED, "visit": VISIT}


# -- the judge


def matched(state: State, tokens: Array) -> int:
    """Tokens that `tokens` shares with the sequence of exact KV that shares most."""
    longest = 0
    for held in state:
        if held.fidelity != EXACT:
            continue
        other = np.frombuffer(held.tokens, "<u4")
        size = min(len(other), len(tokens))
        differ = np.flatnonzero(other[:size] != tokens[:size])
        longest = max(longest, int(differ[0]) if len(differ) else size)
    return longest


def possible(acks: list[str], script: tuple[Step, ...] = LIFE) -> set[State]:
    """Every state the store may be in: a step that is done is done, one that failed or was in flight may have got anywhere."""
    states = {EMPTY}
    for step, ack in itertools.zip_longest(script, acks):
        if step is None or (ack is not None and step.label not in ack):
            raise ValueError(f"{ack!r} does not follow from the script")
        if ack is not None and ack.startswith("done"):
            states = {
                after for state in states for after in (step.ends(state) if step.ends else step.passes(state)[-1:])
            }
        else:
            states = {after for state in states for after in (state, *step.passes(state))}
        if ack is None:
            break
    return states


def judge(path: Path, acks: list[str], script: tuple[Step, ...] = LIFE, **options: Any) -> None:
    """Everything acknowledged is there, nothing deleted is, nothing is left over, and the store works.

    raises  Violation
    """
    for ack in acks:
        if "untyped" in ack or "nobody knows where" in ack:
            raise Violation("untyped", ack)
    allowed = possible(acks, script)
    try:
        if len(acks) < len(script) and script[len(acks)].label == REBUILD:
            repair(path, apply=True)
        with KVDB.open(path, **options) as db:
            _look(db, allowed)
            _look_for_what_shows(db, acks, script)
            _expect([p.name for p in (path / "tmp").iterdir()] == [], "torn", "tmp/ was not swept")
            extend(db, NEXT, name="next", geometry=GEOMETRY)
            _look(db, {state | {Held("next", NEXT.tobytes())} for state in allowed})
    except (KVDBError, OSError) as error:
        raise Violation("unusable", f"{type(error).__name__}: {error}") from error


def held_by(db: KVDB) -> State:
    """What a store holds. Raises Violation where a sequence is stored in part with one codec, in part with another."""
    try:
        return frozenset(
            Held(s.name, db.tokens(s.spans).tobytes(), s.fidelity, coded.codec_of(db, s.spans)) for s in db.sequences()
        )
    except AssertionError as error:
        raise Violation("torn", str(error)) from error


def _look(db: KVDB, allowed: set[State]) -> None:
    problems = [str(problem) for problem in db.check()]
    _expect(problems == [], "torn", "; ".join(problems))
    found = held_by(db)
    if found not in allowed:
        nearest = min(allowed, key=lambda state: len(state ^ found))
        missing, extra = (
            [held._replace(tokens=len(held.tokens) // 4) for held in d] for d in (nearest - found, found - nearest)
        )
        raise Violation("lost" if missing else "resurrected", f"{missing} missing, {extra} not expected")
    for sequence in db.sequences():
        reads_back(db, db.tokens(sequence.spans), sequence.spans)
    for tokens in EVERYTHING:
        match = db.match(identity(), tokens)
        _expect(match.tokens >= matched(found, tokens), "lost", f"only {match.tokens} tokens of a prefix are found")
        served = {segment.info.fidelity for segment in db.segments(match.spans)}
        _expect(served <= {EXACT}, "torn", f"where exact KV was asked for, {served} is served")
        reads_back(db, tokens, match.spans)


def _look_for_what_shows(db: KVDB, acks: list[str], script: tuple[Step, ...]) -> None:
    for step, ack in zip(script, [*acks, "in flight"], strict=False):
        if step.shows is not None:
            with contextlib.suppress(SequenceNotFound):  # it is not in every state: `_look` has judged that
                _expect(step.shows(db) or not ack.startswith("done"), "lost", f"{step.label}: done, and does not show")


def reads_back(db: KVDB, tokens: Array, spans: Any) -> None:
    """Raises Violation where KV is not, to the bit, what it was when it was stored, and what codecs have made of it since."""
    try:
        coded.assert_reads_back(db, tokens, spans)
    except AssertionError as error:
        raise Violation("torn", f"other bytes than were written: {error}") from error


def _expect(kept: bool, kind: str, message: str) -> None:
    if not kept:
        raise Violation(kind, message)


def ack_file(path: Path) -> Callable[[str], None]:
    """Acknowledgements as lines of a file; what was written survives the writer."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    return lambda line: (os.write(fd, line.encode() + b"\n"), None)[1]


def acks_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
