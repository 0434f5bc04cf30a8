"""What `kvdb report` and `kvdb plot` do: look, draw, write one file. Never into the store."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from kvdb import files
from kvdb.entries import Sequence
from kvdb.errors import InvalidInput
from kvdb.inspection import traces
from kvdb.inspection.maps import COLUMNS, key_maps
from kvdb.inspection.stores import store_around
from kvdb.inspection.survey import survey
from kvdb.store import KVDB
from kvdb.tools.inspect import open_store
from kvdb.tools.output import PROBLEM, Interrupted, print_json, stderr_console, stdout_console, visible
from kvdb.tools.progress import counting_bar
from kvdb.tools.report import page, pictures
from kvdb.tools.report.content import Content, Mapped, gather, longest
from kvdb.tools.report.drawing import alone
from kvdb.tools.sizes import bytes_text, count_text

OF_SURVEY: Final = {
    "tree": pictures.tree,
    "bytes": pictures.layer_bytes,
    "hits": pictures.hits,
    "ages": pictures.ages,
}
OF_MAPS: Final = {"norms": page.norms, "widths": page.widths}
OF_TRACE: Final = ("skew", "stages")
PICTURES: Final = (*OF_SURVEY, *OF_MAPS, *OF_TRACE)


def report(store: Path, output: Path | None, *, sequences: list[str], trace: Path | None, as_json: bool) -> int:
    """Write the page, or print what it is made of; 1 if anything is damaged."""
    if output is None and not as_json:
        raise InvalidInput("-o: missing, expected a file for the page, such as report.html")
    _check_output(store, output, trace)
    summary = None if trace is None else traces.summarise(traces.load(trace), COLUMNS)
    with _read(store) as db, _interruptible(output), counting_bar(stderr_console()) as told:
        content = gather(db, wanted=sequences or None, trace=summary, told=told)
    found = _problems(content)
    if output is not None:
        _write(output, page.page(content))
    if as_json:
        made = {} if output is None else {"file": str(output), "bytes": output.stat().st_size}
        print_json({"store": str(store), **made, **_jsonable(content)})
    elif output is not None:
        _told(output, f"{count_text(len(content.survey.sequences), 'sequence')}, {count_text(found, 'problem')}")
    return PROBLEM if found else 0


def plot(store: Path, what: str, output: Path, *, sequence: str | None, trace: Path | None, as_json: bool) -> int:
    """Write one picture; 1 if anything that was looked at for it is damaged."""
    if what not in PICTURES:
        raise InvalidInput(f"{what}: no such picture, expected one of {', '.join(PICTURES)}")
    if sequence is not None and what not in OF_MAPS:
        raise InvalidInput(f"--sequence {sequence}: {what} is of the whole store, expected one of {', '.join(OF_MAPS)}")
    if (trace is not None) != (what in OF_TRACE):
        raise InvalidInput(
            f"{what}: {'without' if trace is None else 'with'} --trace FILE, expected one exactly for {' and '.join(OF_TRACE)}"
        )
    _check_output(store, output, trace)
    with _read(store) as db, _interruptible(output), counting_bar(stderr_console()) as told:
        svg, data, found = _drawn(db, what, sequence, trace, told)
    _write(output, alone(svg))
    if as_json:
        print_json({"store": str(store), "file": str(output), "bytes": output.stat().st_size, "picture": what, **data})
    else:
        _told(output, f"{what}, {count_text(found, 'problem')}")
    return PROBLEM if found else 0


def _drawn(db: KVDB, what: str, sequence: str | None, trace: Path | None, told: Any) -> tuple[str, dict[str, Any], int]:
    """(SVG, what it shows as JSON, problems)"""
    if trace is not None:
        summary = traces.summarise(traces.load(trace), COLUMNS)
        if what == "stages":
            return pictures.stages(summary), {"stages": msgspec.to_builtins(summary.stages)}, 0
        if summary.reads is None:
            raise InvalidInput(
                f"{trace}: no step in which a layer reads, expected one; trace a question about a stored document"
            )
        return page.skew(summary.reads), msgspec.to_builtins(summary.reads), 0
    if what in OF_MAPS:
        found = _one(db, sequence)
        mapped = Mapped(key=found.key, name=found.name, maps=key_maps(db, found))
        return (
            OF_MAPS[what](mapped),
            {"sequence": found.key, **msgspec.to_builtins(mapped.maps)},
            len(mapped.maps.problems),
        )
    surveyed = survey(db, lambda done, total: told("segments", done, total))
    return OF_SURVEY[what](surveyed), msgspec.to_builtins(surveyed), len(surveyed.problems)


def _one(db: KVDB, sequence: str | None) -> Sequence:
    """The sequence that is named, or the longest."""
    if sequence is not None:
        return db.sequence(sequence)
    found = longest(db, 1)
    if not found:
        raise InvalidInput(f"{db.path}: no sequence is stored, expected one to map")
    return found[0]


@contextlib.contextmanager
def _read(store: Path) -> Iterator[KVDB]:
    """Reads are few and scattered: there is nothing to find out about the fastest way."""
    with open_store(store, "r", read_mode="pread") as db:
        yield db


@contextlib.contextmanager
def _interruptible(output: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("nothing was printed" if output is None else f"{output} was not written") from None


def _check_output(store: Path, output: Path | None, trace: Path | None) -> None:
    """raises  InvalidInput for a place where no file may go: in any store, or over what is read or has a second name"""
    if output is None:
        return
    if not output.absolute().parent.is_dir():
        raise InvalidInput(f"{output}: no folder {output.absolute().parent}, expected an existing one")
    if output.is_dir():
        raise InvalidInput(f"{output}: a folder, expected a file")
    place = output.resolve()
    around = store.resolve() if place.is_relative_to(store.resolve()) else store_around(place)
    if around is not None:
        raise InvalidInput(
            f"{output}: inside the store {around}, expected a file elsewhere; nothing is written into a store"
        )
    if output.is_file() and (names := output.stat().st_nlink) > 1:
        raise InvalidInput(
            f"{output}: a file with {names} names, one of which may be a store's, expected one; remove it, or choose another"
        )
    if trace is not None and trace.exists() and output.exists() and output.samefile(trace):
        raise InvalidInput(f"{output}: the file that --trace reads, expected another; choose another path")


def _write(output: Path, text: str) -> None:
    """All or nothing where a file is to be; what is no file, such as a pipe, is written to as it is."""
    with files.translated(output):
        if output.exists() and not output.is_file():
            output.write_text(text, encoding="utf-8", errors="replace")
            return
        place = output.resolve()
        unfinished = place.with_name(f".{secrets.token_hex(8)}.new")
        try:
            with unfinished.open("x", encoding="utf-8", errors="replace") as stream:
                stream.write(text)
            if place.exists():
                shutil.copymode(place, unfinished)
            unfinished.replace(place)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def _problems(content: Content) -> int:
    return len(content.survey.problems) + sum(len(mapped.maps.problems) for mapped in content.mapped)


def _jsonable(content: Content) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(content)
    made["problems"] = made["survey"].pop("problems")
    return made


def _told(output: Path, what: str) -> None:
    said = f"{visible(str(output))}: {what}, {bytes_text(output.stat().st_size)}"
    stdout_console().print(said, soft_wrap=True, markup=False)
