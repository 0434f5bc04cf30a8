"""`kvdb ls`, `info`, `show`, `tree`, `du`, `explain` and `diff`: what is in a store. None of them changes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from kvdb.tools import diff as diff_module
from kvdb.tools import explain as explain_module
from kvdb.tools import inspect
from kvdb.tools import room as room_module
from kvdb.tools import show as show_module
from kvdb.tools import tree as tree_module
from kvdb.tools.commands.arguments import LOOK, Json, OneSequence, Store

app: Final = typer.Typer()
_TOKENIZER: Final = "A folder, a tokenizer.json, or a model as 'kvdb ask --model' takes it."


@app.command(epilog="Example: kvdb ls notes.kvdb", rich_help_panel=LOOK)
def ls(store: Store, as_json: Json = False) -> None:
    """List the sequences of a store, oldest first."""
    raise typer.Exit(inspect.list_sequences(store, as_json=as_json))


@app.command(epilog="Example: kvdb info notes.kvdb --json", rich_help_panel=LOOK)
def info(store: Store, as_json: Json = False) -> None:
    """Show what a store holds and the room it takes."""
    raise typer.Exit(inspect.show_info(store, as_json=as_json))


@app.command(epilog="Example: kvdb show notes.kvdb report --layer 3 --chunk 17", rich_help_panel=LOOK)
def show(
    store: Store,
    sequence: OneSequence,
    text: Annotated[
        bool, typer.Option("--text", help="Also its text, by the tokenizer that --tokenizer names.")
    ] = False,
    tokenizer: Annotated[str | None, typer.Option(metavar="TOKENIZER", help=_TOKENIZER, show_default=False)] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="With --chunk: look into one layer.", show_default=False)
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="With --layer: the records of its N-th 16 tokens.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show one sequence: what it takes, what stores it, what keeps it, its segments; or one chunk of it.

    Of a chunk: tokens, where its records lie, their digests, and what keys and values are like, by KV head.
    """
    raise typer.Exit(
        show_module.show(store, sequence, text=text, tokenizer=tokenizer, layer=layer, chunk=chunk, as_json=as_json)
    )


@app.command(epilog="Example: kvdb tree notes.kvdb --depth 2", rich_help_panel=LOOK)
def tree(
    store: Store,
    depth: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Show so many levels.", show_default="all")
    ] = None,
    width: Annotated[
        int, typer.Option(min=1, metavar="N", help="Branches shown of each node; the rest is counted.")
    ] = 20,
    as_json: Json = False,
) -> None:
    """Draw the prefix tree: which sequences share which segments.

    Each node is a run of segments with the positions they hold; '<-' names the sequences that end there.
    """
    raise typer.Exit(tree_module.show_tree(store, depth=depth, width=width, as_json=as_json))


@app.command(epilog="Example: kvdb du notes.kvdb --cap 10GB", rich_help_panel=LOOK)
def du(
    store: Store,
    cap: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Also say what 'kvdb cap STORE SIZE' would let go, such as 10GB.", show_default=False
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=0, metavar="N", help="Sequences shown, the largest first.")] = 10,
    as_json: Json = False,
) -> None:
    """Measure where a store's bytes are, and say what gc, compact or a cap would free.

    By kind, model, codec, layer and sequence. Only looks: nothing goes.
    """
    raise typer.Exit(room_module.show_room(store, cap=cap, top=top, as_json=as_json))


@app.command(epilog="Example: kvdb explain notes.kvdb --prompt prompt.txt --model smollm2", rich_help_panel=LOOK)
def explain(
    store: Store,
    prompt: Annotated[
        str, typer.Option(metavar="FILE", help="UTF-8 text of the prompt, or - for stdin.", show_default=False)
    ],
    question: Annotated[
        str | None,
        typer.Option(
            metavar="QUESTION",
            help="The prompt is what 'kvdb ask' makes of FILE as the document and this question.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model that asks, as for 'kvdb ask'.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENIZER",
            help=f"{_TOKENIZER} Without --model only token ids are compared.",
            show_default="the model's",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="In which the model computes; 'kvdb ask': float32."),
    ] = "float32",
    salt: Annotated[str, typer.Option(metavar="SALT", help="The tenant that asks.", show_default="none")] = "",
    codec: Annotated[str, typer.Option(metavar="CODEC", help="As 'kvdb ask --codec'.")] = "raw",
    weights: Annotated[
        bool,
        typer.Option(
            "--weights/--no-weights", help="Read the model's weights where all else agrees, or take them for equal."
        ),
    ] = True,
    as_json: Json = False,
) -> None:
    """Say why a prompt is, or is not, found: what matches, where it breaks, and what does not count and why."""
    raise typer.Exit(
        explain_module.show_explanation(
            store,
            prompt=prompt,
            question=question,
            model=model,
            tokenizer=tokenizer,
            dtype=dtype,
            salt=salt,
            codec=codec,
            weights=weights,
            as_json=as_json,
        )
    )


@app.command(epilog="Example: kvdb diff notes.kvdb report report-int4", rich_help_panel=LOOK)
def diff(
    store: Store,
    first: Annotated[
        str | None, typer.Argument(metavar="[SEQUENCE]", help="Default: compare whole stores.", show_default=False)
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(metavar="[SEQUENCE]", help="Of --other, if given. Default: as the first.", show_default=False),
    ] = None,
    other: Annotated[
        Path | None, typer.Option(metavar="STORE", help="Another store to compare with.", show_default=False)
    ] = None,
    worst: Annotated[int, typer.Option(min=0, metavar="N", help="Chunks shown that are farthest apart.")] = 5,
    as_json: Json = False,
) -> None:
    """Compare the KV of two sequences over the tokens they have in common, or two whole stores.

    Two sequences of a store: 'kvdb diff A.kvdb ONE TWO'; of two stores: 'kvdb diff A.kvdb ONE TWO --other B.kvdb'; whole
    stores: 'kvdb diff A.kvdb --other B.kvdb'.
    """
    raise typer.Exit(diff_module.show_difference(store, first, second, other=other, worst=worst, as_json=as_json))
