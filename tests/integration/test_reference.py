"""docs/commands.md says what the help says, of every command and every option."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from kvdb.tools.cli import app
from kvdb.tools.commands.reference import reference

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_the_reference_is_up_to_date() -> None:
    again = "python -m kvdb.tools.commands.reference > docs/commands.md"
    assert (ROOT / "docs/commands.md").read_text() == reference(app), f"write it again: {again}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_stands_there_with_every_option_of_its_help(name: str) -> None:
    """The options are those that the terminal shows, read off its help."""
    shown = CliRunner().invoke(app, [name, "--help"], terminal_width=400, env={"COLUMNS": "400", "TERM": "dumb"}).stdout
    options = set(
        re.findall(
            r"(?<![\w-])--[a-z][a-z-]*", "\n".join(line for line in shown.splitlines() if re.match(r"^│ +\*? *-", line))
        )
    )
    section = reference(app).split(f"\n## kvdb {name}\n", 1)[1].split("\n## ", 1)[0]
    assert options
    assert options - {"--json", "--help"} <= set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", section))
    assert COMMANDS[name].epilog.partition(": ")[2] in section


def test_what_is_changed_shows() -> None:
    other = typer.Typer()

    @other.command(epilog="Example: kvdb one x", rich_help_panel="A panel")
    def one(
        place: Annotated[str, typer.Argument(metavar="PLACE", help="A | B.")],
        deep: Annotated[int, typer.Option(help="How.")] = 3,
    ) -> None:
        """First line.

        More | of
        it.
        """

    @other.command(hidden=True)
    def two() -> None:
        """Not shown."""

    @other.command()
    def three() -> None:
        """Third."""

    told = reference(other)
    assert "| **A panel** | |\n| [`kvdb one`](#kvdb-one) | First line. |" in told
    assert "\n## kvdb one\n\nFirst line.\n\nMore | of it.\n\n    kvdb one PLACE [OPTIONS]\n" in told
    assert r"| `PLACE` | A \| B. [required] |" in told
    assert "[default: 3]" in told
    assert "Example: `kvdb one x`" in told
    assert "two" not in told
    assert told.endswith("\n## kvdb three\n\nThird.\n\n    kvdb three\n")
