"""The compiled loops compute what NumPy does, once they are compiled for a machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import finish, python
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb.runtime.selection.sketch_scores import boxes_off_by, of_boxes, of_codes, off_by

SCORE = """
import numpy as np
from kvdb.runtime.selection.sketch_kernel import score

q, boxes, scales = np.ones((1, 1, 8), np.float32), np.ones((1, 4, 16), np.int8), np.ones((1, 4), np.float32)
codes, tokens, rows = np.zeros((1, 4, 2, 16), np.uint8), np.full(4, 16, np.int32), np.zeros((1, 2), np.int64)
tops, sums = np.empty((2, 1, 1, 2), np.float32)
score(2, 1)(q, boxes, scales, codes, tokens, rows, 1e4, tops, sums)
print(tops.ravel().tolist(), sums.ravel().tolist())
"""


def test_another_process_compiles_nothing_again(tmp_path: Path) -> None:
    said = [finish(python(SCORE, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2)]
    assert said == ["[8.0, 8.0] [16.0, 16.0]\n"] * 2
    assert len(list(tmp_path.rglob("*score*.nbc"))) == 1


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 6), st.sampled_from((4, 12, 64, 80)), st.integers(1, 9)),
    chunk_tokens=st.integers(1, 40),
    bits=st.integers(1, 4),
    magnitude=st.sampled_from((1.0, 1e-4, 1e-35)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_record_of_any_size_is_scored_as_in_numpy(
    sizes: tuple[int, int, int, int], chunk_tokens: int, bits: int, magnitude: float, seed: int
) -> None:
    heads, chunks, dim, group = sizes
    rng = np.random.default_rng(seed)
    q = (magnitude * rng.standard_normal((heads, group, dim))).astype(np.float32)
    lo, hi = np.sort(rng.integers(-127, 128, (2, heads, chunks, dim)).astype(np.int8), 0)
    scales = rng.uniform(0.001, 0.03, (heads, chunks)).astype(np.float32)
    eights = -(-chunk_tokens // 8)
    codes = rng.integers(0, 256, (heads, chunks, bits, eights * dim), np.uint8)
    tokens = rng.integers(1, chunk_tokens + 1, chunks).astype(np.int32)
    rows = np.stack([rng.permutation(chunks) for _ in range(heads)])[:, : 1 + chunks // 2].copy()
    tensors = [torch.from_numpy(a) for a in (np.concatenate((lo, hi), -1), scales, codes, tokens)]
    out = of_codes(torch.from_numpy(q), (tensors[0], tensors[1], tensors[2], tensors[3]), torch.from_numpy(rows), bits)

    ones = codes.reshape(heads, chunks, bits, eights, 1, dim) >> np.arange(8)[:, None] & 1
    place = (ones * (1 << np.arange(bits)[::-1])[:, None, None, None]).sum(2).reshape(heads, chunks, -1, dim)
    cell = (hi.astype(float) - lo) * scales[..., None] / 2**bits
    keys = (lo * scales[..., None].astype(float))[:, :, None] + cell[:, :, None] * (place + 0.5)
    logits = np.einsum("hgd,hntd->hgnt", q.astype(float), keys)
    logits[:, :, np.arange(place.shape[2]) >= tokens[:, None]] = -np.inf
    true = np.take_along_axis(np.logaddexp.reduce(logits, -1), rows[:, None], 2)
    allowed = np.take_along_axis(off_by(torch.from_numpy(q), torch.from_numpy(scales)).numpy(), rows[:, None], 2)
    assert (abs(out.numpy() - true) <= allowed + 1e-5 * abs(true) + 1e-5).all()


@settings(max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 6), st.sampled_from((4, 12, 16, 64, 80, 512)), st.integers(1, 9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_box_of_any_size_is_scored_as_in_numpy(sizes: tuple[int, int, int, int], seed: int) -> None:
    heads, chunks, dim, group = sizes
    rng = np.random.default_rng(seed)
    corners = rng.standard_normal((heads, group, 2 * dim)).astype(np.float32)
    if seed % 2:
        corners[:] = np.sign(corners)  # with boxes at their ends, sums as large as they can be
    boxes = rng.choice(np.array([-127, 127, 3], np.int8), (heads, chunks, 2 * dim))
    scales = rng.uniform(0.001, 0.03, (heads, chunks)).astype(np.float32)
    out = of_boxes(*(torch.from_numpy(a) for a in (corners, boxes, scales)))
    true = np.einsum("hgd,hnd->hgn", corners.astype(float), boxes) * scales[:, None]
    allowed = boxes_off_by(torch.from_numpy(corners), torch.from_numpy(scales)).numpy()
    assert (abs(out.numpy() - true) <= allowed + 1e-5 * abs(true) + 1e-5).all()


@given(x=st.floats(-87, 0, width=32))
def test_the_exponential_is_one(x: float) -> None:
    from kvdb.runtime.selection.exponential import exp_parts

    part, exponent = exp_parts(np.float32(x))
    assert part * 2.0**exponent == pytest.approx(np.exp(x), rel=2e-7 * (1 - x))
