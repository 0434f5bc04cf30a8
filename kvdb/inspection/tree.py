"""The prefix tree as people see it: which sequences share which segments.

A node is a run of segments that are passed through together: no sequence ends between them, and nothing branches off. A conversation of
a thousand turns of which one sequence is left is one node.
"""

from __future__ import annotations

from collections import defaultdict

import msgspec

from kvdb.entries import Sequence
from kvdb.inspection.snapshot import Snapshot


class Node(msgspec.Struct, kw_only=True):
    """start, stop  positions that its segments hold; children may begin before `stop`: on the grid, at the last token they share
    disk_bytes   of its segments' files
    ends         keys of the sequences that end in its last segment
    below        sequences that end in it or after it
    below_bytes  of its files and of all after it
    parent       place of its parent in the list; None: a root
    depth        0 for roots
    children     places in the list
    """

    segments: list[str]
    identity: str
    fidelity: str
    start: int
    stop: int
    disk_bytes: int
    parent: int | None
    depth: int
    ends: list[str] = []
    children: list[int] = []
    below: int = 0
    below_bytes: int = 0


def nodes(snap: Snapshot) -> list[Node]:
    """Every readable segment in exactly one node, parents before children; siblings with the most below first.

    Where a parent cannot be read, what follows it is a root of its own.
    """
    ends: dict[str, list[Sequence]] = defaultdict(list)
    for sequence in snap.sequences:
        if sequence.spans:
            ends[sequence.spans[-1].segment].append(sequence)
    children: dict[str | None, list[str]] = defaultdict(list)
    for segment, entry in snap.segments.items():
        parent = entry.info.parent
        children[parent if parent in snap.segments else None].append(segment)
    found: list[Node] = []
    waiting: list[tuple[str, int | None]] = [(segment, None) for segment in reversed(children[None])]
    while waiting:
        first, parent_place = waiting.pop()
        run = [first]
        while len(children[run[-1]]) == 1 and not ends[run[-1]]:
            run.append(children[run[-1]][0])
        place = len(found)
        found.append(_node(snap, run, parent_place, found, ends[run[-1]]))
        if parent_place is not None:
            found[parent_place].children.append(place)
        waiting += [(segment, place) for segment in reversed(children[run[-1]])]
    for node in reversed(found):
        node.below += len(node.ends)
        node.below_bytes += node.disk_bytes
        if node.parent is not None:
            found[node.parent].below += node.below
            found[node.parent].below_bytes += node.below_bytes
    for node in found:
        node.children.sort(key=lambda place: (-found[place].below, -found[place].below_bytes, place))
    return found


def _node(snap: Snapshot, run: list[str], parent: int | None, before: list[Node], ends: list[Sequence]) -> Node:
    first, last = snap.segments[run[0]].info, snap.segments[run[-1]].info
    return Node(
        segments=run,
        identity=first.identity,
        fidelity=last.fidelity,
        start=first.start,
        stop=last.stop,
        disk_bytes=snap.disk_bytes(run),
        parent=parent,
        depth=0 if parent is None else before[parent].depth + 1,
        ends=[sequence.key for sequence in sorted(ends, key=lambda s: (s.name is None, s.tokens, s.key))],
    )
