"""Filling a store with known KV, and asking whether it still holds it.

`model_kv` stands in for a language model: KV at a position is a fixed function of every token up to it, so any test can
say what a stored prefix must read back as, from the tokens alone. `extend` is the smallest honest user of the engine:
match, write what is missing, commit, name. `assert_healthy` is the teardown of every test that has a store.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvdb
from kvdb import EXACT, KVDB, Geometry, Identity, LayerGroup, Span, files
from kvdb.abstracts import ABSTRACTS
from kvdb.abstracts.centroid import NOBODY, unpack
from kvdb.codecs import RAW, CodecPlan
from kvdb.errors import Unsupported
from kvdb.geometry import as_float32, div_ceil, from_float32
from kvdb.options import Mode
from kvdb.reader import Reader
from kvdb.segments import Segment, SegmentWriter

Array = np.ndarray[Any, np.dtype[Any]]

SMALL = Geometry(dtype="bfloat16", chunk_tokens=16, groups=(LayerGroup(layers=(0, 2), kv_heads=2, head_dim=8),))
"""Two layers, two heads: as cheap as a segment gets and still has more than one of everything."""

TWO_GROUPS = Geometry(
    dtype="float16",
    chunk_tokens=16,
    groups=(
        LayerGroup(layers=(0, 3), kv_heads=5, head_dim=80),
        LayerGroup(layers=(1,), kv_heads=1, head_dim=24),
    ),
)


def identity(weights: str = "w0", **changes: Any) -> Identity:
    fields: dict[str, Any] = {"weights": weights, "config": {"rope_theta": "10000.0"}, "dtype": "bfloat16"}
    return Identity(**(fields | changes))


def token_list(count: int, seed: int = 0) -> Array:
    """`count` token ids of a 50 000 word vocabulary."""
    return np.random.default_rng(seed).integers(0, 50_000, count).astype("<u4")


def model_kv(
    geometry: Geometry, tokens: Array, start: int, stop: int, *, salt: str = ""
) -> dict[int, tuple[Array, Array]]:
    """{layer: (keys, values)}, each (kv_heads, stop - start, head_dim), of positions [start, stop).

    Every value is a multiple of 1/16 below 8 in magnitude: exact in float32, float16 and bfloat16 alike.
    """
    mask = (1 << 64) - 1
    state = sum((i + 1) * b for i, b in enumerate(salt.encode())) & mask
    chain = []
    for token in tokens[:stop].tolist():
        state = ((state ^ token) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & mask
        chain.append(state)
    states = np.array(chain[start:], np.uint64)
    found = {}
    for group in geometry.groups:
        for layer in group.layers:
            shape = (2, group.kv_heads, 1, group.head_dim)
            count = 2 * group.kv_heads * group.head_dim
            salts = (np.arange(count, dtype=np.uint64) + np.uint64(layer * 1_000_003)).reshape(shape)
            mixed = (states[:, None] ^ salts * np.uint64(0xBF58476D1CE4E5B9)) * np.uint64(0x94D049BB133111EB)
            small = ((mixed >> np.uint64(40)) % np.uint64(255)).astype(np.float32) / 16 - 8
            keys, values = from_float32(small, geometry.dtype)
            found[layer] = (keys, values)
    return found


def write_segment(
    db: KVDB,
    tokens: Array,
    *,
    start: int = 0,
    parent: str | None = None,
    geometry: Geometry = SMALL,
    ident: Identity | None = None,
    fidelity: str = EXACT,
    spare: int = 0,
    abstracts: tuple[str, ...] = ("box",),
    codec: CodecPlan = RAW,
    append_tokens: int | None = None,
) -> SegmentWriter:
    """A writer that holds KV of tokens[start:], not yet sealed. `spare`: chunk slots reserved and never used."""
    writer = db.writer(
        identity=ident or identity(),
        fidelity=fidelity,
        geometry=geometry,
        parent=parent,
        start=start,
        capacity=geometry.chunks(len(tokens) - start) + spare,
        abstracts=abstracts,
        codec=codec,
    )
    kv = model_kv(geometry, tokens, start, len(tokens), salt=fidelity)
    step = append_tokens or len(tokens)
    assert step % geometry.chunk_tokens == 0 or step >= len(tokens)
    for layer, (keys, values) in kv.items():
        for at in range(0, len(tokens) - start, step):
            writer.append(layer, keys[:, at : at + step], values[:, at : at + step])
    return writer


class Stored(NamedTuple):
    """What `extend` did: the sequence's key, its last segment, and whether anything was written."""

    key: str
    last: Segment
    written: bool


def extend(
    db: KVDB,
    tokens: Array,
    *,
    name: str | None = None,
    geometry: Geometry = SMALL,
    ident: Identity | None = None,
    fidelity: str = EXACT,
    segment_tokens: int = 1 << 30,
    spare: int = 0,
    abstracts: tuple[str, ...] = ("box",),
) -> Stored:
    """Store a sequence, reusing whatever prefix is there, in segments of at most `segment_tokens`."""
    ident = ident or identity()
    match = db.match(ident, tokens, exact=fidelity == EXACT)
    start, parent, written = 0, None, False
    last: Segment | None = None
    recorded: str | None = None
    if match.tokens == len(tokens):
        start, last = match.tokens, db.segments(match.spans)[-1]
    elif match.tokens:
        start = geometry.grid_floor(match.tokens)
        for segment in db.segments(match.spans):
            if segment.info.start < start:
                parent, last = segment.info.segment, segment
    while start < len(tokens):
        stop = min(len(tokens), start + segment_tokens)
        writer = write_segment(
            db,
            tokens[:stop],
            start=start,
            parent=parent,
            geometry=geometry,
            ident=ident,
            fidelity=fidelity,
            spare=spare,
            abstracts=abstracts,
        )
        last, recorded = db.commit(writer, tokens[start:stop], model="a test", replaces=recorded)
        start, parent, written = stop, last.info.segment, True
    assert last is not None
    key = db.put_sequence(last, len(tokens), name=name, model="a test", replaces=recorded)
    return Stored(key, last, written)


def read_kv(reader: Reader, segment: Segment, layer: int, tokens: int) -> tuple[Array, Array]:
    """Keys and values of a segment's first `tokens` tokens, (kv_heads, tokens, head_dim), through a reader."""
    geometry = segment.info.geometry
    group = geometry.groups[geometry.locate(layer)[0]]
    chunks, ct = div_ceil(tokens, geometry.chunk_tokens), geometry.chunk_tokens
    out = np.empty((2, chunks * group.kv_heads, ct, group.head_dim), geometry.storage_dtype)
    reader.read(segment, layer, np.arange(chunks * group.kv_heads), out)
    by_head = out.reshape(2, chunks, group.kv_heads, ct, group.head_dim).swapaxes(1, 2)
    keys, values = by_head.reshape(2, group.kv_heads, chunks * ct, group.head_dim)[:, :, :tokens]
    return keys, values


def assert_abstracts_follow(reader: Reader, segment: Segment) -> None:
    """Every stored abstract of a segment is what its `build` makes of the stored keys and values, all at once."""
    info, geometry = segment.info, segment.info.geometry
    for layer in geometry.layers if info.abstracts else ():
        exact = as_float32(np.stack(read_kv(reader, segment, layer, info.tokens)), geometry.dtype)
        _, heads, tokens, dim = exact.shape
        padded = np.zeros((2, heads, info.chunks * geometry.chunk_tokens, dim), np.float32)
        padded[:, :, :tokens] = exact
        keys, values = padded.reshape(2, heads, info.chunks, geometry.chunk_tokens, dim)
        for name in info.abstracts:
            found = reader.stored_abstract(segment, name, layer)
            if ABSTRACTS[name].of_blocks:
                assert_clusters_follow(found[0], exact)
            else:
                assert np.array_equal(found, ABSTRACTS[name].build(keys, tokens, geometry.dtype, values))


def assert_clusters_follow(rows: Array, exact: Array) -> None:
    """Every cluster, of which no member is missing, has the means of its members; and every token is in one, unless a merge cut it off.

    rows   of `centroid`, (chunks, kv_heads, row_bytes)
    exact  keys, then values, (2, kv_heads, tokens, head_dim) float32
    """
    _, heads, tokens, dim = exact.shape
    clusters, named = unpack(rows, dim), np.zeros((heads, tokens), bool)
    for chunk, head in np.ndindex(rows.shape[:2]):
        members = clusters.members[chunk, head]
        places = members[members != NOBODY].astype(np.int64) + chunk * len(members)
        inside = places[(places >= 0) & (places < tokens)]
        named[head, inside] = True
        if len(inside) < len(places) or not len(places):
            continue
        for vectors, mean, scale in zip(exact[:, head], clusters[::2], clusters[1::2], strict=False):
            true = vectors[inside].astype(np.float64).mean(0)
            off = np.abs(mean[chunk, head] * np.float64(scale[chunk, head]) - true).max()
            assert off <= np.abs(true).max() * (0.5 / 127 + 1e-5)
    assert named.mean() > 0.5 or tokens <= 16  # clusters of a single chunk may lie in what was beside it


def assert_reads_back(db: KVDB, tokens: Array, spans: tuple[Span, ...]) -> None:
    """Spans hold exactly the KV that `model_kv` gives for `tokens`, bit for bit, whatever the read mode, and its abstracts."""
    reader = db.reader()
    try:
        position = 0
        assert np.array_equal(db.tokens(spans), tokens[: sum(s.stop - s.start for s in spans)])
        for segment, span in zip(db.segments(spans), spans, strict=True):
            info, count = segment.info, span.stop - span.start
            assert (info.start, span.start) == (position, 0)
            position += count
            expected = model_kv(info.geometry, tokens, info.start, info.start + count, salt=info.fidelity)
            for layer in info.geometry.layers:
                for found, wanted in zip(read_kv(reader, segment, layer, count), expected[layer], strict=True):
                    assert np.array_equal(found.view(np.uint8), np.ascontiguousarray(wanted).view(np.uint8))
            assert_abstracts_follow(reader, segment)
    finally:
        reader.close()


@contextlib.contextmanager
def opened(path: Path, mode: Mode = "a", *, read_mode: str = "mmap") -> Iterator[KVDB]:
    """A store that is checked before it is closed."""
    with KVDB.open(path, mode, read_mode=read_mode) as db:
        yield db
        assert_healthy(db)


def assert_healthy(db: KVDB) -> None:
    """Teardown of every test: nothing is wrong anywhere in the store."""
    assert [str(problem) for problem in db.check()] == []


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Every file under `root`, to show that nothing changed."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(bytes(data))


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Another process that can import kvdb and these helpers; its stdout and stderr are pipes."""
    here = Path(__file__).parent
    root = Path(kvdb.__file__).parents[1]
    path = os.pathsep.join([str(here), str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> str:
    """stdout of a process that must end well."""
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, err
    return out


def takes_direct(folder: Path) -> bool:
    """Whether files in a folder can be read past the page cache; in memory (tmpfs) none can."""
    path = folder / "takes-direct"
    path.write_bytes(bytes(4096))
    fd = files.open_read(path)
    try:
        files.make_direct(fd, path)
        return True
    except Unsupported:
        return False
    finally:
        files.close(fd)
        path.unlink()


def skip_where_refused(kind: type[Reader], folder: Path) -> None:
    """Skip a test of a reader that the file system of a folder refuses."""
    if kind.name == "direct" and not takes_direct(folder):
        pytest.skip(
            f"{folder} is on a file system without O_DIRECT, expected one with it, such as ext4; see --basetemp"
        )
