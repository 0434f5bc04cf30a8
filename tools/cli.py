"""The `kvdb` command: its parts put together, and the one place where errors become a line and an exit code.

Names and help texts stand in `kvdb.tools.commands`; nothing imported here imports torch.
KVDB_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import errno
import os
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from kvdb import __version__
from kvdb.tools.commands import ask, health, judge, look, machine, move, report, space
from kvdb.tools.output import BAD_INPUT, print_json, report_error

_UsageError: Final[Any] = typer.BadParameter.__mro__[1]  # typer exports only its subclass


class _Commands(TyperGroup):
    """The commands, with errors translated. Usage errors keep typer's own form unless --json asks for JSON."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta["json"] = "--json" in options
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        as_json = ctx.meta["json"]
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except _UsageError as e:
            if not as_json:
                raise
            print_json({"error": {"kind": "usage", "message": e.format_message()}})
            raise typer.Exit(BAD_INPUT) from None
        except (Exception, KeyboardInterrupt) as e:
            if os.environ.get("KVDB_DEBUG") == "1" or (isinstance(e, OSError) and e.errno == errno.EPIPE):
                raise
            raise typer.Exit(report_error(e, as_json=as_json)) from None


app: Final = typer.Typer(
    name="kvdb",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"kvdb {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: 0 fine, 1 a problem was found, 2 usage or bad input, 130 interrupted.")
def _kvdb(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A local database for the KV caches of language models: prefill once, keep on disk, decode from selected chunks.

    Example: `kvdb ask notes.kvdb "What is decided?" --document notes.txt`
    """


# In the order of the help.
for _part in (ask, look, report, health, machine, space, move, judge):
    app.add_typer(_part.app)


def main() -> None:
    # Waiting OpenMP threads that spin starve the others where cores are shared: a busy 2-core machine decoded 1.4 tokens/s
    # with the default and 11 with this. Read when torch is loaded, so it must be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="kvdb")


if __name__ == "__main__":
    main()
