"""docs/commands.md, from the help of every command:

python -m kvdb.tools.commands.reference > docs/commands.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import typer

_HEAD: Final = """# Commands

Made from the help of every command by `python -m kvdb.tools.commands.reference > docs/commands.md`; a test says when it is out of date.

Every command takes `--json`, which prints one JSON object on stdout, errors included, and `--help`. Results go to stdout, everything else to
stderr. Exit codes: 0 fine, 1 a problem was found, 2 usage or bad input, 130 interrupted. `KVDB_DEBUG=1` shows tracebacks.
"""
_FIRST: Final = "Ask and look"
"""The commands that stand in no panel of the help."""
_TYPE: Final = re.compile(r" <[^<>]*>$")
"""What typer says of an argument after its name, such as <path>."""
_EVERYWHERE: Final = ("--json", "--help", "-h")


def reference(app: typer.Typer) -> str:
    """Markdown: a table of all commands, by panel, then each with its arguments and options."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    panels: dict[str, list[str]] = {}
    for name, command in commands.items():
        if not command.hidden:
            panels.setdefault(_panel(command), []).append(name)
    ordered = [name for names in panels.values() for name in names]
    table = [
        line for panel, names in panels.items() for line in _contents(panel, {name: commands[name] for name in names})
    ]
    return (
        "\n".join(
            [
                _HEAD,
                "| | |",
                "|---|---|",
                *table,
                *(line for name in ordered for line in _section(name, commands[name])),
            ]
        )
        + "\n"
    )


def _panel(command: Any) -> str:
    panel = getattr(command, "rich_help_panel", None)
    return panel if isinstance(panel, str) else _FIRST


def _contents(panel: str, commands: dict[str, Any]) -> Iterator[str]:
    yield f"| **{panel}** | |"
    for name, command in commands.items():
        yield f"| [`kvdb {name}`](#kvdb-{name}) | {_cell(_paragraphs(command)[0])} |"


def _section(name: str, command: Any) -> Iterator[str]:
    yield from ("", f"## kvdb {name}")
    for paragraph in _paragraphs(command):
        yield from ("", paragraph)
    arguments, options = _told(command, "argument"), _told(command, "option")
    usage = [*(label for label, _ in arguments), *(["[OPTIONS]"] if options else [])]
    yield from ("", f"    kvdb {name} {' '.join(usage)}".rstrip())
    if arguments or options:
        yield from (
            "",
            "| | |",
            "|---|---|",
            *(f"| `{_cell(label)}` | {_cell(text)} |" for label, text in (*arguments, *options)),
        )
    if command.epilog:
        label, colon, example = command.epilog.partition(": ")
        yield from ("", f"{label}: `{example}`" if colon else command.epilog)


def _paragraphs(command: Any) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n")]


def _told(command: Any, kind: str) -> list[tuple[str, str]]:
    """(label, help) of arguments or options, as a plain help page has them: defaults at the end, in brackets."""
    context = typer.Context(command)
    shown = [
        param for param in command.params if param.param_type_name == kind and not set(param.opts) & set(_EVERYWHERE)
    ]
    records = [record for param in shown if not param.hidden and (record := param.get_help_record(context)) is not None]
    return [(_TYPE.sub("", label) if kind == "argument" else label, " ".join(text.split())) for label, text in records]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    from kvdb.tools.cli import app

    print(reference(app), end="")
