"""`kvdb rm`, `pin`, `evict`, `cap`, `gc`, `compact`, `abstracts`, `repair`, `export`, `import`: what changes a store, or moves what
is in it.

What a command frees is free when it returns: commands wait for no grace period. (`compact` and `abstracts` are the exceptions:
they may run beside readers, so what they replaced goes with a later write or `gc`.) Ctrl-C leaves a whole store.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path

from rich.text import Text

from kvdb import files
from kvdb.codecs import CodecPlan
from kvdb.entries import Sequence
from kvdb.errors import InvalidInput, SequenceNotFound
from kvdb.repair import repair as run_repair
from kvdb.repair import taken_out
from kvdb.sizes import parse_bytes
from kvdb.store import KVDB, UNLIMITED
from kvdb.tools.inspect import KEY_SHOWN, advised, kv_bytes, open_store, used_text
from kvdb.tools.output import PROBLEM, print_json, print_problems, problems_json, stdout_console, visible, working
from kvdb.tools.sizes import bytes_text, count_text

_AS_FAR = "a sequence that was done stays so, any other is what it was; the same command goes on from there"


def remove(store: Path, name_or_key: str, *, as_json: bool) -> int:
    """Forget one sequence; KV that others share stays."""
    with open_store(store, "r+", grace_s=0) as db:
        sequence = db.sequence(name_or_key)
        if sequence.pinned:
            label = _label(sequence)
            raise InvalidInput(f"sequence {label}: pinned, expected one that may go; run 'kvdb unpin {store} {label}'")
        freed = db.delete(sequence.key)
    rest = "" if freed else "; other sequences share all of its KV"
    return _done(
        {"store": str(store), "removed": sequence.key, "name": sequence.name, "freed_bytes": freed},
        f"removed {_label(sequence)} ({count_text(sequence.tokens, 'token')}), {bytes_text(freed)} freed{rest}",
        as_json=as_json,
    )


def pin(store: Path, name_or_key: str, *, pinned: bool, as_json: bool) -> int:
    with open_store(store, "r+") as db:
        sequence = db.sequence(name_or_key)
        db.pin(sequence.key, pinned)
    done = "pinned: neither eviction, expiry nor rm takes it" if pinned else "not pinned any more"
    return _done(
        {"store": str(store), "sequence": sequence.key, "name": sequence.name, "pinned": pinned},
        f"{_label(sequence)} is {done}",
        as_json=as_json,
    )


def evict(store: Path, *, to: str | None, named: bool, as_json: bool) -> int:
    """Exits 1 when a size was asked for and what must stay takes more."""
    target = 0 if to is None else parse_bytes("--to", to)
    with open_store(store, "r+", grace_s=0) as db:
        before = db.info()["disk_bytes"]
        lost = db.evict(target, named=named)
        left = db.info()["disk_bytes"]
    missed = to is not None and left > target
    why = f", more than {bytes_text(target)}: the rest is {'' if named else 'named or '}pinned" if missed else ""
    return _done(
        {"store": str(store), "lost_kv": [s.key for s in lost], "freed_bytes": before - left, "disk_bytes": left},
        f"{count_text(len(lost), 'sequence')} lost KV, {bytes_text(before - left)} freed, {bytes_text(left)} left{why}",
        as_json=as_json,
        code=PROBLEM if missed else 0,
    )


def cap(store: Path, size: str | None, *, as_json: bool) -> int:
    """Set the size cap, or show it; exits 1 when what must stay takes more."""
    wanted = size if size in (None, UNLIMITED) else parse_bytes("SIZE", size)
    with open_store(store, "r" if wanted is None else "r+", grace_s=0) as db:
        if wanted is not None:
            db.set_size_cap(wanted)
        info = db.info()
    used, size_cap = info["used_bytes"], info["size_cap"]
    over = size_cap is not None and used > size_cap
    why = "; what is left is named, pinned or the store's own: remove sequences or raise the cap" if over else ""
    return _done(
        {"store": str(store), "size_cap": size_cap, "used_bytes": used},
        f"used {used_text(used, size_cap)}{why}",
        as_json=as_json,
        code=PROBLEM if over else 0,
    )


def gc(store: Path, *, as_json: bool) -> int:
    before = files.tree_bytes(store)  # opening a store already removes what has waited long enough
    with open_store(store, "r+", grace_s=0) as db:
        db.gc()
    freed = max(0, before - files.tree_bytes(store))
    return _done({"store": str(store), "freed_bytes": freed}, f"{bytes_text(freed)} freed", as_json=as_json)


def compact(store: Path, name_or_key: str | None, *, codec: str | None, as_json: bool) -> int:
    plan = None if codec is None else CodecPlan.parse(codec)
    with open_store(store, "r+") as db:
        if plan is not None:
            return _recode(db, store, name_or_key, plan, as_json=as_json)
        before = db.info()
        what = f"merging segments of {store}: {count_text(before['segments'], 'segment')}, {bytes_text(before['disk_bytes'])}"
        with working(what, interrupted="what was merged so far stays; the same command goes on from there"):
            saved = db.compact(name_or_key)
        after = db.info()
    copied = after["bytes_compacted"] - before["bytes_compacted"]
    return _done(
        {"store": str(store), "segments_saved": saved, "segments": after["segments"], "copied_bytes": copied},
        f"{count_text(before['segments'], 'segment')} before, {after['segments']:,} now; {bytes_text(copied)} copied",
        as_json=as_json,
    )


def _recode(db: KVDB, store: Path, name_or_key: str | None, codec: CodecPlan, *, as_json: bool) -> int:
    """Store a sequence, or all, with another codec."""
    before = db.info()["disk_bytes"]
    wanted = [s.key for s in db.sequences()] if name_or_key is None else [db.sequence(name_or_key).key]
    written = 0
    with working(f"storing {count_text(len(wanted), 'sequence')} of {store} as {codec}", interrupted=_AS_FAR):
        for key in wanted:
            with contextlib.suppress(SequenceNotFound):  # a beginning that went with the sequence that continued it
                written += db.recode(key, codec)
    after = db.info()["disk_bytes"]
    return _done(
        {
            "store": str(store),
            "codec": str(codec),
            "segments_written": written,
            "disk_bytes_before": before,
            "disk_bytes": after,
        },
        f"{count_text(written, 'segment')} written as {codec}; {bytes_text(before)} before, {bytes_text(after)} now",
        as_json=as_json,
    )


def set_abstracts(store: Path, name_or_key: str | None, wanted: list[str], *, as_json: bool) -> int:
    """Give every segment of a sequence, or of all, exactly these abstracts."""
    with open_store(store, "r+") as db:
        key = None if name_or_key is None else db.sequence(name_or_key).key
        before = db.info()
        what = f"making abstracts in {store}: {count_text(before['segments'], 'segment')}, {bytes_text(before['disk_bytes'])}"
        with working(what, interrupted=_AS_FAR):
            changed = db.set_abstracts(key, wanted)
        written = db.info()["bytes_written"] - before["bytes_written"]
    return _done(
        {
            "store": str(store),
            "sequence": key,
            "abstracts": sorted(set(wanted)),
            "segments_changed": changed,
            "written_bytes": written,
        },
        f"{count_text(changed, 'segment')} changed, {bytes_text(written)} written",
        as_json=as_json,
    )


def repair(store: Path, *, apply: bool, rebuild: bool, as_json: bool) -> int:
    """Exits 1 when a dry run found problems, or when some remain."""
    left = "repair it again with the same command" if apply else "nothing was changed"
    what = f"{'repairing' if apply else 'checking'} {store}"
    with advised(store), working(what, interrupted=f"repair did not end; {left}"):
        report = run_repair(store, apply=apply, rebuild=rebuild)
    unsolved = report.remaining if report.remaining is not None else report.problems
    if as_json:
        print_json({
            "store": str(store),
            "applied": report.applied,
            "problems": problems_json(report.problems),
            "actions": report.actions,
            "remaining": None if report.remaining is None else problems_json(report.remaining),
        })  # fmt: skip
        return PROBLEM if unsolved else 0
    console = stdout_console()
    print_problems(report.problems)
    for action in report.actions:
        console.print(
            Text.assemble(("done: " if apply else "would: ", "bold"), visible(" ".join(action.split()))), soft_wrap=True
        )
    if report.remaining:
        console.print(Text("still there:", style="red"))
        print_problems(report.remaining)
    found = count_text(len(report.problems), "problem")
    if unsolved:
        again = f"kvdb repair {store} --apply{' --rebuild' if rebuild else ''}"
        rest = (
            f"{count_text(len(unsolved), 'problem')} left; try --rebuild, or mend it by hand"
            if apply
            else f"nothing was changed; mend it with: {visible(again)}"
        )
        console.print(Text(f"{found} found, {rest}", style="red"), soft_wrap=True)
        return PROBLEM
    kept = f"; what was taken out lies in {taken_out(store)}" if apply and report.actions else ""
    console.print(Text.assemble(("ok: ", "bold green"), f"{found} found, none left{visible(kept)}"), soft_wrap=True)
    return 0


def export_sequence(store: Path, name_or_key: str, target: Path, *, as_json: bool) -> int:
    if os.path.lexists(target):
        raise InvalidInput(f"{target}: exists, expected a new file; choose another name")
    if not target.absolute().parent.is_dir():
        raise InvalidInput(f"{target}: no folder {target.absolute().parent}, expected an existing one")
    with open_store(store, "r") as db:
        sequence = db.sequence(name_or_key)
        what = f"exporting {_label(sequence)} to {target}: {bytes_text(kv_bytes(db, sequence) or 0)}"
        with working(what, interrupted=f"{target} was not written"):
            written = db.export_sequence(sequence.key, target)
    return _done(
        {"store": str(store), "sequence": sequence.key, "file": str(target), "bytes": written},
        f"{_label(sequence)} ({count_text(sequence.tokens, 'token')}) is in {visible(str(target))}, {bytes_text(written)}; "
        "it is as sensitive as the prompt it was made from",
        as_json=as_json,
    )


def import_sequence(store: Path, source: Path, *, name: str | None, as_json: bool) -> int:
    if not zipfile.is_zipfile(source):
        raise InvalidInput(f"{source}: no zip file, expected one that 'kvdb export' wrote")
    what = f"importing {source}: {bytes_text(source.stat().st_size)}"
    with KVDB.open(store) as db, working(what, interrupted="nothing was imported"):
        sequence = db.sequence(db.import_sequence(source, name=name))
    return _done(
        {"store": str(store), "sequence": sequence.key, "name": sequence.name, "tokens": sequence.tokens},
        f"{_label(sequence)} ({count_text(sequence.tokens, 'token')}) is in {visible(str(store))}",
        as_json=as_json,
    )


def _label(sequence: Sequence) -> str:
    return visible(sequence.name or sequence.key[:KEY_SHOWN])


def _done(described: dict[str, object], line: str, *, as_json: bool, code: int = 0) -> int:
    """Tell what was done, as JSON or as one line; returns the exit code."""
    if as_json:
        print_json(described)
    else:
        stdout_console().print(Text(line, style="red" if code else ""), soft_wrap=True)
    return code
