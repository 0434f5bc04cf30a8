"""The structure of an LMDB data file, checked before LMDB follows it: its pages carry no checksum, and a damaged one can
end the process with an assertion or a wild read inside LMDB.

Pure functions over bytes. Every page that the newest meta page leads to is visited once, a level of all trees at a time.
Facts checked: page numbers, flags and depths; nodes lie end to end inside their page; values, overflow runs and pages of
duplicates lie inside the file; counts are those of the tables' records; no page is used twice, or used and free. What keys
and values say is not looked at: entries have digests of their own.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

import numpy as np

from kvdb.errors import Damaged

META_BYTES: Final = 160
_NO_PAGE: Final = (1 << 64) - 1
_BRANCH, _LEAF, _OVERFLOW, _DIRTY, _SUBPAGE = 1, 2, 4, 0x10, 0x40  # flags of pages
_BIG, _TABLE, _DUPLICATES = 1, 2, 4  # flags of nodes
_PAGE_HEADER, _NODE_HEADER, _RECORD = 16, 8, 48  # bytes
_INTEGER_KEYS, _DUPSORT = 0x08, 0x04  # flags of tables
_FREE, _MAIN, _PLAIN, _SORTED, _INNER, _UNKNOWN = range(6)
"""Kinds of trees: free pages, the table of tables, a table, one with duplicates, the duplicates of one key."""

Array = np.ndarray[Any, np.dtype[Any]]

_NODE_FLAGS: Final[Array] = np.zeros((5, 8), bool)
"""Which flags a leaf's nodes may have, by kind of tree."""
for _kind, _allowed in (
    (_FREE, (0, _BIG)),
    (_MAIN, (_TABLE,)),
    (_PLAIN, (0, _BIG)),
    (_SORTED, (0, _DUPLICATES, _DUPLICATES | _TABLE)),
    (_INNER, (0,)),
):
    _NODE_FLAGS[_kind, list(_allowed)] = True


class _Tree(NamedTuple):
    """A tree's record: where it begins and what it says it has."""

    kind: int
    depth: int
    entries: int
    root: int


class _Nodes(NamedTuple):
    """Nodes of several pages, all of one length: the page's index in the request, the node's place and its fields."""

    page: Array
    at: Array
    flags: Array
    key_bytes: Array
    value_bytes: Array
    child: Array


def transaction_id(meta: bytes) -> int:
    found: int = struct.unpack_from("<Q", meta, 144)[0]
    return found


def used_bytes(meta: bytes, page_size: int) -> int:
    """Bytes of the file up to its last page in use."""
    last: int = struct.unpack_from("<Q", meta, 136)[0]
    return (last + 1) * page_size


def check_pages(data: Any, page_size: int, meta: bytes, where: str) -> None:
    """`data` is the file up to its last page, as far as it goes; `meta` the beginning of the meta page to start from.

    raises  Damaged
    """
    _Walk(data, page_size, where).walk(meta)


class _Walk:
    def __init__(self, data: Any, page_size: int, where: str) -> None:
        self.page_size, self.where = page_size, where
        self.bytes: Array = np.frombuffer(data, np.uint8)
        self.words: Array = np.frombuffer(data, "<u2")
        self.longs: Array = np.frombuffer(data, "<u8")
        self.count = len(self.words) * 2 // page_size
        self.taken = np.zeros(self.count, bool)
        self.taken[:2] = True

    def expect(self, good: Any, what: str, at: Any = None) -> None:
        """Everything in `good` is true; `at` are the places it is about."""
        if not np.all(good):
            place = "" if at is None else f", offset {int(np.broadcast_to(at, np.shape(good))[~good][0])}"
            raise Damaged(f"{self.where}{place}: {what}; run 'kvdb repair --rebuild'")

    def long(self, at: Array) -> Array:
        """u64 at any places: a key of odd length puts its value at one."""
        found: Array = self.bytes[at[:, None] + np.arange(8)].view("<u8")[:, 0]
        return found

    def walk(self, meta: bytes) -> None:
        self.trees: list[_Tree] = []
        self._add(_record(meta, 40, _FREE))
        self._add(_record(meta, 88, _MAIN))
        self.free: list[Array] = []
        seen = np.zeros(len(self.trees), np.int64)  # entries of each tree
        pages, trees, levels = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        begun = 0
        while len(pages) or begun < len(self.trees):
            fresh = [(t.root, number, t.depth) for number, t in enumerate(self.trees[begun:], begun) if t.depth]
            begun = len(self.trees)
            roots = np.array(fresh, np.int64).reshape(-1, 3)
            pages, trees, levels = (
                np.concatenate((old, new)) for old, new in zip((pages, trees, levels), roots.T, strict=True)
            )
            leaf, nodes = self._visit(pages, levels)
            of = trees[nodes.page]
            branch = ~leaf[nodes.page]
            children = nodes.child[branch], of[branch], levels[nodes.page][branch] - 1
            entries = self._leaves(_Nodes(*(field[~branch] for field in nodes)), of[~branch])
            np.add.at(seen, of[~branch], entries)
            seen = np.concatenate((seen, np.zeros(len(self.trees) - len(seen), np.int64)))
            pages, trees, levels = children
        said = np.array([tree.entries for tree in self.trees], np.uint64)
        self.expect(seen.astype(np.uint64) == said, "more or fewer entries than its tables say, expected as many")
        last = used_bytes(meta, self.page_size) // self.page_size
        for free in self.free:  # the last ones may have been given back before they were ever written
            self.expect((free >= 2) & (free < last), "a free page beyond the last, expected none")
            self._take(free[free < self.count])

    def _add(self, tree: _Tree) -> None:
        self.expect(tree.kind != _UNKNOWN, "flags of another kind of table, expected a catalog's")
        if tree.depth == 0:
            self.expect(tree.root == _NO_PAGE, "an empty table with pages, expected none")
        else:
            self.expect(2 <= tree.root < self.count, "a table that begins beyond the file, expected it inside")
        self.trees.append(tree)

    def _take(self, pages: Array) -> None:
        self.expect((pages >= 2) & (pages < self.count), "a page number beyond the file, expected one inside")
        self.expect(~self.taken[pages], "a page that is used twice, expected once")
        self.taken[pages] = True
        self.expect(len(np.unique(pages)) == len(pages), "a page that is used twice, expected once")

    def _visit(self, pages: Array, levels: Array) -> tuple[Array, _Nodes]:
        """Whether each page is a leaf, and the nodes of all."""
        self._take(pages)
        at = pages * self.page_size
        leaf = levels == 1
        self.expect(self.longs[at >> 3] == pages, "another page's number, expected its own", at)
        flags = self.words[(at >> 1) + 5]
        self.expect(flags == np.where(leaf, _LEAF, _BRANCH), "flags of another kind of page", at)
        nodes = self._nodes(at, np.full(len(at), self.page_size), leaf)
        self.expect(np.bincount(nodes.page, minlength=len(at)) >= 2 - leaf, "too few nodes", at)
        return leaf, nodes

    def _nodes(self, at: Array, size: Array, leaf: Array) -> _Nodes:
        """Nodes of the pages at `at`, of `size` bytes each."""
        lower, upper = (self.words[(at >> 1) + i].astype(np.int64) for i in (6, 7))
        self.expect(
            (lower >= _PAGE_HEADER) & (lower <= upper) & (upper <= size) & (lower % 2 == 0) & (upper % 2 == 0),
            "bounds outside the page, expected them inside",
            at,
        )
        counts = (lower - _PAGE_HEADER) // 2
        page = np.repeat(np.arange(len(at)), counts)
        number = np.arange(len(page)) - np.repeat(np.cumsum(counts) - counts, counts)
        offset = self.words[(at[page] + _PAGE_HEADER >> 1) + number].astype(np.int64)
        self.expect(
            (offset % 2 == 0) & (offset >= upper[page]) & (offset + _NODE_HEADER <= size[page]),
            "a node outside its page, expected it inside",
            at[page],
        )
        place = at[page] + offset
        low, high, flags, key_bytes = (self.words[(place >> 1) + i].astype(np.int64) for i in range(4))
        value_bytes = np.where(leaf[page], low | high << 16, 0)
        kept = np.where((flags & _BIG != 0) & leaf[page], 8, value_bytes)
        length = _NODE_HEADER + key_bytes + kept
        length += length % 2
        base = page << 32  # nodes lie end to end: each begins where another ends
        begins = np.sort(np.concatenate((base + offset, (np.arange(len(at)) << 32) + size)))
        ends = np.sort(np.concatenate((base + offset + length, (np.arange(len(at)) << 32) + upper)))
        self.expect(begins == ends, "nodes overlap or leave a gap, expected them end to end")
        return _Nodes(page, place, flags, key_bytes, value_bytes, low | high << 16 | flags << 32)

    def _leaves(self, nodes: _Nodes, tree: Array) -> Array:
        """How many entries each leaf node stands for; tables and duplicates in them become trees."""
        kind = np.array([t.kind for t in self.trees])[tree]
        value = nodes.at + _NODE_HEADER + nodes.key_bytes
        self.expect((nodes.flags < 8) & _NODE_FLAGS[kind, nodes.flags & 7], "flags of another kind of node", nodes.at)
        self.expect((kind != _INNER) | (nodes.value_bytes == 0), "a duplicate with a value, expected none", nodes.at)
        entries = np.ones(len(kind), np.int64)
        big = np.flatnonzero(nodes.flags == _BIG)
        if len(big):
            self._overflow(value[big], nodes.value_bytes[big])
        self._free(nodes, kind == _FREE, value)
        for i in np.flatnonzero(nodes.flags & _TABLE).tolist():
            entries[i] = self._table(int(value[i]), int(nodes.value_bytes[i]), int(kind[i]))
        inline = np.flatnonzero(nodes.flags == _DUPLICATES)
        if len(inline):
            entries[inline] = self._subpages(value[inline], nodes.value_bytes[inline])
        return entries

    def _overflow(self, value: Array, value_bytes: Array) -> None:
        """Runs of pages that hold one long value each; one that was longer once may have pages to spare."""
        first = self.long(value)
        self.expect((first >= 2) & (first < self.count), "an overflow page beyond the file, expected one inside", value)
        first = first.astype(np.int64)
        at = first * self.page_size
        self.expect(self.longs[at >> 3] == first, "another page's number, expected its own", at)
        self.expect(self.words[(at >> 1) + 5] == _OVERFLOW, "flags of another kind of page", at)
        pages = self.words[(at >> 1) + 6].astype(np.int64) | self.words[(at >> 1) + 7].astype(np.int64) << 16
        self.expect(pages * self.page_size >= value_bytes + _PAGE_HEADER, "an overflow run too short for its value", at)
        self.expect(first + pages <= self.count, "an overflow run beyond the file, expected it inside", at)
        self._take(np.repeat(first, pages) + np.arange(pages.sum()) - np.repeat(np.cumsum(pages) - pages, pages))

    def _free(self, nodes: _Nodes, mine: Array, value: Array) -> None:
        """Lists of free pages: a count, then page numbers."""
        for i in np.flatnonzero(mine).tolist():
            at, size = int(value[i]), int(nodes.value_bytes[i])
            if nodes.flags[i] == _BIG:
                at = int(self.long(value[i : i + 1])[0]) * self.page_size + _PAGE_HEADER
            self.expect(nodes.key_bytes[i] == 8 and size % 8 == 0 and size >= 8, "no list of free pages, expected one")
            found = self.long(at + 8 * np.arange(size // 8))
            self.expect(found[0] < len(found), "a list of free pages of another length")
            pages = found[1 : int(found[0]) + 1].astype(np.int64)
            self.expect(pages[:-1] > pages[1:], "free pages in disorder, expected them descending")
            self.free.append(pages)

    def _table(self, at: int, size: int, kind: int) -> int:
        """Take note of a table's record; returns the entries it stands for in the tree it is in."""
        self.expect(size == _RECORD, "no record of a table, expected one")
        tree = _record(self.bytes[at : at + _RECORD].data, 0, _PLAIN if kind == _MAIN else _INNER)
        self._add(tree)
        return 1 if kind == _MAIN else tree.entries

    def _subpages(self, at: Array, size: Array) -> Array:
        """Duplicates that fit into their leaf: a small page as value; returns how many each has."""
        self.expect((size >= _PAGE_HEADER) & (at % 2 == 0), "no page of duplicates, expected one", at)
        flags = self.words[(at >> 1) + 5] & ~np.uint16(_DIRTY)
        self.expect(flags == _LEAF | _SUBPAGE, "flags of another kind of page", at)
        nodes = self._nodes(at, size, np.ones(len(at), bool))
        self.expect((nodes.flags == 0) & (nodes.value_bytes == 0), "a duplicate with a value, expected none", nodes.at)
        counts = np.bincount(nodes.page, minlength=len(at))
        self.expect(counts >= 1, "too few nodes", at)
        return counts


def _record(data: Any, at: int, kind: int) -> _Tree:
    """A tree's record; of an unknown kind when its flags are not those of such a tree."""
    flags, depth, entries, root = struct.unpack_from("<4xHH24xQQ", data, at)
    if kind == _PLAIN and flags == _DUPSORT:
        kind = _SORTED
    elif flags != (_INTEGER_KEYS if kind == _FREE else 0):
        kind = _UNKNOWN
    return _Tree(kind, depth, entries, root)
