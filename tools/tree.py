"""`kvdb tree`: the prefix tree, which sequences share which segments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.text import Text
from rich.tree import Tree

from kvdb.entries import Sequence
from kvdb.inspection.snapshot import Snapshot, snapshot
from kvdb.inspection.tree import Node, nodes
from kvdb.tools.inspect import KEY_SHOWN, model_label, open_store
from kvdb.tools.output import PROBLEM, print_json, print_problems, problems_json, stdout_console, visible
from kvdb.tools.sizes import bytes_text, count_text

_ENDS: Final = 4
"""Sequences named at a node."""
_MOST: Final = 1000
"""Nodes shown in all: beyond that a tree is no picture any more."""


def show_tree(store: Path, *, depth: int | None, width: int, as_json: bool) -> int:
    """Nodes down to `depth`, at most `width` children of each; the rest is counted. With JSON all of them."""
    with open_store(store, "r") as db:
        snap = snapshot(db)
    found = nodes(snap)
    code = PROBLEM if snap.problems else 0
    if as_json:
        said = {"problems": problems_json(snap.problems)} if snap.problems else {}
        shown = [node for node in found if depth is None or node.depth < depth]
        print_json({"store": str(store), "nodes": [_as_json(node) for node in shown], **said})
        return code
    console = stdout_console()
    if not found:
        console.print(Text(f"{visible(str(store))} has no sequences"), soft_wrap=True)
    picture = _Picture(snap, found, depth, width)
    for tree in picture.trees():
        console.print(tree)
    print_problems(snap.problems)
    return code


def _as_json(node: Node) -> dict[str, Any]:
    """As it is; children are told by their parents' places."""
    fields: dict[str, Any] = msgspec.to_builtins(node)
    del fields["children"]
    return fields


class _Picture:
    """A tree for each identity, those with the most sequences first."""

    def __init__(self, snap: Snapshot, found: list[Node], depth: int | None, width: int) -> None:
        self._snap, self._nodes, self._depth, self._width = snap, found, depth, width
        self._sequences = {sequence.key: sequence for sequence in snap.sequences}
        self._left = _MOST

    def trees(self) -> Iterator[Tree]:
        roots: dict[str, list[int]] = {}
        for place, node in enumerate(self._nodes):
            if node.parent is None:
                roots.setdefault(node.identity, []).append(place)
        for identity, places in sorted(roots.items(), key=lambda item: -sum(self._nodes[p].below for p in item[1])):
            tree = Tree(self._heading(identity, places))
            self._grow([(tree, sorted(places, key=lambda p: (-self._nodes[p].below, -self._nodes[p].below_bytes, p)))])
            yield tree

    def _heading(self, identity: str, places: list[int]) -> Text:
        below = [self._nodes[place] for place in places]
        model = next((s.model for s in reversed(self._snap.sequences) if s.identity == identity), "")
        known = self._snap.identities.get(identity)
        return Text.assemble(
            (visible(model_label(model)) or "-", "bold"),
            f" {visible(known.dtype) if known else ''}, identity {identity[:KEY_SHOWN]}: ",
            f"{count_text(sum(n.below for n in below), 'sequence')}, {bytes_text(sum(n.below_bytes for n in below))}",
        )

    def _grow(self, waiting: list[tuple[Tree, list[int]]]) -> None:
        """Not by recursion: a conversation may have more turns than Python has frames."""
        while waiting:
            tree, places = waiting.pop()
            deep = bool(places) and self._depth is not None and self._nodes[places[0]].depth >= self._depth
            shown = 0 if deep else min(len(places), self._width, max(0, self._left))
            self._left -= shown
            grown = [(tree.add(self._label(place)), self._nodes[place].children) for place in places[:shown]]
            if shown < len(places):
                tree.add(self._folded(places[shown:]))
            waiting += reversed(grown)

    def _label(self, place: int) -> Text:
        node = self._nodes[place]
        several = f" in {count_text(len(node.segments), 'segment')}" if len(node.segments) > 1 else ""
        label = Text.assemble(
            (f"{node.start:,}-{node.stop - 1:,}", "cyan"),
            f"  {count_text(node.stop - node.start, 'token')}{several}, {bytes_text(node.disk_bytes)}",
            (f", {visible(node.fidelity)}" if node.fidelity != "exact" else "", "yellow"),
        )
        if node.ends:
            ends = [_named(self._sequences[key]) for key in node.ends[:_ENDS]]
            more = f" and {len(node.ends) - _ENDS:,} more" if len(node.ends) > _ENDS else ""
            label.append(f"  <- {', '.join(ends)}{more}", style="green")
        return label

    def _folded(self, places: list[int]) -> Text:
        folded = [self._nodes[place] for place in places]
        sequences = count_text(sum(node.below for node in folded), "sequence")
        return Text(
            f"... {len(folded):,} more: {sequences}, {bytes_text(sum(n.below_bytes for n in folded))}",
            style="dim",
        )


def _named(sequence: Sequence) -> str:
    return f"{visible(sequence.name or sequence.key[:KEY_SHOWN])} ({sequence.tokens:,})"
