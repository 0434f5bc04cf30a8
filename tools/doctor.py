"""`kvdb doctor`: what a store runs on, and what to change. Facts and advice are the engine's; here they are only laid out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.table import Table
from rich.text import Text

from kvdb.advice import Finding, advise
from kvdb.errors import InvalidInput
from kvdb.surroundings import look_around
from kvdb.tools.inspect import advised
from kvdb.tools.output import PROBLEM, print_json, stdout_console, visible, working
from kvdb.tools.sizes import bytes_text, count_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvdb.machine import Machine, Tried
    from kvdb.place import Place
    from kvdb.surroundings import Surroundings

_STYLES = {"unsafe": "bold red", "slow": "yellow", "note": "dim"}


def doctor(store: Path | None, *, probe: bool, as_json: bool) -> int:
    """Look around; 1 if something makes the store unsafe or unusable."""
    if probe and store is None:
        raise InvalidInput("--probe: no STORE, expected one; the file is written beside it")
    with working("looking around, and asking torch", interrupted="nothing was changed"):
        if store is None:
            found = look_around()
        else:
            with advised(store):
                found = look_around(store, probe=probe)
        from kvdb.runtime.accelerator import accelerator

        found = msgspec.structs.replace(found, accelerator=accelerator())
    findings = advise(found)
    unsafe = any(finding.level == "unsafe" for finding in findings)
    if as_json:
        print_json({**msgspec.to_builtins(found), "findings": msgspec.to_builtins(findings)})
        return PROBLEM if unsafe else 0
    console = stdout_console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in _lines(found):
        grid.add_row(label, Text(visible(value)))
    console.print(grid)
    console.print()
    for finding in findings:
        console.print(_sentence(finding), soft_wrap=True)
    console.print(_verdict(findings))
    return PROBLEM if unsafe else 0


def _lines(found: Surroundings) -> Iterator[tuple[str, str]]:
    if found.place is not None:
        yield from _place_lines(found.place)
    if found.fsync is not None:
        cost = found.fsync
        yield "fsync", f"{cost.median_ms:.2f} ms, worst {cost.worst_ms:.2f} ms of {cost.times}, in {cost.folder}"
    if found.reading is not None:
        yield "read_mode auto", f"{found.reading.mode}: {found.reading.why}"
    elif found.place is not None and not found.broken:
        yield "store", "none here yet"
    yield from _machine_lines(found.machine)
    if found.accelerator is not None:
        has = found.accelerator
        gpu = f"{has.device}, {bytes_text(has.memory_bytes or 0)}" if has.cuda else "none"
        yield "GPU", f"{gpu}; torch is built for {has.build} and computes with {count_text(has.threads, 'thread')}"


def _place_lines(place: Place) -> Iterator[tuple[str, str]]:
    kind = f"{place.file_system or 'unknown'}{', a network file system' if place.network else ''}"
    inodes = "" if place.free_files is None else f", room for {place.free_files:,} files"
    access = "mounted read-only" if place.read_only else "may be written to" if place.writable else "may only be read"
    direct = f"yes, at multiples of {place.direct_align} B" if place.direct_align else _tried(place.direct)
    yield "folder", f"{place.path}, {access}"
    yield "file system", f"{kind} ({','.join(place.mount_options)})"
    yield "free", f"{bytes_text(place.free_bytes)}{inodes}"
    yield "locks", _tried(place.locks)
    yield "maps of files", _tried(place.maps)
    yield "direct reads", direct


def _machine_lines(machine: Machine) -> Iterator[tuple[str, str]]:
    limits = [
        f"{name} {'unlimited' if limit is None else text(limit)}"
        for name, limit, text in (
            ("open files", machine.open_files, str),
            ("locked memory", machine.locked_bytes, bytes_text),
            ("address space", machine.address_space_bytes, bytes_text),
        )
    ]
    groups = [
        f"{bytes_text(limit)} in control groups of version {version}"
        for version, limit in ((2, machine.group_limit_bytes), (1, machine.first_version_limit_bytes))
        if limit is not None
    ]
    memory = f"{bytes_text(machine.available_bytes)} available of {bytes_text(machine.memory_bytes)}"
    yield "system", f"{machine.system} {machine.kernel}, {machine.architecture}, Python {machine.python}"
    yield "cores", f"{machine.cores}, of which {machine.usable_cores} for this process"
    yield "memory", "; ".join([memory, *(groups or ["no limit of control groups"])])
    yield (
        "pages",
        f"{bytes_text(machine.page_bytes)}, huge ones: {machine.huge_pages or 'unknown'}, overcommit {machine.overcommit}",
    )
    yield "limits", ", ".join(limits)
    yield "io_uring", _tried(machine.io_uring)
    yield "reads in flight", f"by {machine.in_flight}"
    yield "versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in machine.versions.items())
    yield "compiled loops", f"kept in {machine.numba_cache}" if machine.numba_cache else "not kept"


def _tried(tried: Tried) -> str:
    if tried.works is None:
        return f"not tried: {tried.told}"
    return "yes" if tried.works else f"no: {tried.told}"


def _sentence(finding: Finding) -> Text:
    do = f"; {visible(finding.do)}" if finding.do else ""
    return Text.assemble(
        (f"{finding.level}: ", _STYLES[finding.level]), f"{finding.about}: {visible(finding.what)}{do}"
    )


def _verdict(findings: list[Finding]) -> Text:
    counted = {level: sum(finding.level == level for finding in findings) for level in ("unsafe", "slow")}
    if counted["unsafe"]:
        return Text(f"{count_text(counted['unsafe'], 'thing')} to change before a store is used here", style="red")
    if counted["slow"]:
        return Text(f"safe; {count_text(counted['slow'], 'thing')} could be faster", style="yellow")
    return Text.assemble(("ok: ", "bold green"), "nothing to change")
