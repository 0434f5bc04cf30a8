"""`kvdb eval` and `bench`: what KVDB costs in quality, and in time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from kvdb.geometry import CHUNK_TOKENS
from kvdb.tools.bench import RESULTS_FOLDER
from kvdb.tools.commands.arguments import JUDGE, Json, Model, Stats, Threads
from kvdb.tools.evaluate.command import evaluate

app: Final = typer.Typer()


@app.command(
    "eval", epilog="Example: kvdb eval --selector box --selector sketch:bits=4 --plot eval.svg", rich_help_panel=JUDGE
)
def eval_(
    model: Model = "smollm2",
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Length of each text; may be repeated.", show_default="4000"),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a stored record.")] = CHUNK_TOKENS,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEYS[:SETTING=VALUE,...][+VALUES][;LAYERS=...]",
            help="How stored KV is encoded: raw, int8, int4, int2, planes, as in planes:bits=6+int8, balanced, small; other layers "
            "otherwise, as in int4;0-1=int8; may be repeated. With --budget 1.0, what a codec alone costs.",
            show_default="raw",
        ),
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:SETTING=VALUE,...]",
            help="centroid, sketch, box, mean, oracle or another package's, with settings as in box:beta=1; may be repeated.",
            show_default="all of ours",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE|TOKENS", help="As 'kvdb ask --budget'; may be repeated.", show_default="0.05, 0.1, 0.2"
        ),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Read every record that is estimated to have this share of attention."),
    ] = None,
    mass: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Read until this share of attention is estimated to be covered."),
    ] = None,
    certified: Annotated[
        list[float] | None,
        typer.Option(metavar="SHARE", help="Read until at most this share of attention is proven to be unread."),
    ] = None,
    positions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens at the end of each text that are predicted.")
    ] = 256,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="prose, reference, code, or a UTF-8 file of your own; may be repeated.",
            show_default="the first three",
        ),
    ] = None,
    needles: Annotated[int, typer.Option(min=0, metavar="N", help="Pass keys hidden at each of five depths.")] = 1,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Decides where texts begin, and the keys.")] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Also show every layer.")] = False,
    threads: Threads = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw quality against bytes read to this SVG file.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Then show ratios to this older result of --stats or 'kvdb bench eval'.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep what is judged there, text by text, and go on from it after an interruption.",
            show_default=False,
        ),
    ] = None,
    stats: Stats = None,
    as_json: Json = False,
) -> None:
    """Measure what selection and codecs cost in quality, per byte, against dense attention over exact KV.

    On real text and a real model: KL, top-1 agreement, perplexity, greedy tokens until the first other one, pass keys found, and
    the attention mass that was read. *oracle* ranks by the exact keys: no selector can be expected to do better.
    """
    evaluate(
        model=model,
        tokens=tokens,
        chunk_tokens=chunk_tokens,
        codecs=codec,
        selectors=selector,
        budgets=budget,
        thresholds=threshold,
        masses=mass,
        certified=certified,
        positions=positions,
        texts=text,
        needles=needles,
        seed=seed,
        layers=layers,
        threads=threads,
        stats=stats,
        plot=plot,
        compare_with=compare,
        keep=keep,
        as_json=as_json,
    )


@app.command(epilog="Example: kvdb bench gather append --compare old/", rich_help_panel=JUDGE)
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME ...]", help="Which, see --list. Default: all.", show_default=False),
    ] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List them: what each measures, how long, what it needs.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where results go, a JSON file each.")
    ] = Path(RESULTS_FOLDER),
    again: Annotated[
        bool, typer.Option("--again", help="Also what is finished, by this code on this machine.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER", help="Then show ratios to older results of the same names.", show_default=False
        ),
    ] = None,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="With --compare: run nothing, compare what is there.")
    ] = False,
    each: Annotated[bool, typer.Option("--each", help="With --compare: every figure of every row.")] = False,
    as_json: Json = False,
) -> None:
    """Run benchmarks, one after the other, each beside its baseline in the same run.

    What is finished is not run again, and what was interrupted goes on. Exits 1 if one fails.
    """
    from kvdb.tools.bench import command

    if listed:
        raise typer.Exit(command.list_benches(names or [], results=output, as_json=as_json))
    raise typer.Exit(
        command.bench(
            names or [], results=output, again=again, run=not no_run, compare_with=compare, each=each, as_json=as_json
        )
    )
