"""The compiled loops are compiled once for a machine, and what they compute exponentials by is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import finish, python
from hypothesis import given
from hypothesis import strategies as st

SCORE = """
import numpy as np
from kvdb.runtime.selection.sketch_kernel import score_of

q, boxes, scales = np.ones((1, 1, 8), np.float32), np.ones((1, 4, 16), np.int8), np.ones((1, 4), np.float32)
codes, tokens, rows = np.zeros((1, 4, 2, 16), np.uint8), np.full(4, 16, np.int32), np.zeros((1, 2), np.int64)
tops, sums = np.empty((2, 1, 1, 2), np.float32)
score_of(2, 1)(q, boxes, scales, codes, tokens, rows, 1e4, tops, sums)
print(tops.ravel().tolist(), sums.ravel().tolist())
"""


def test_another_process_compiles_nothing_again(tmp_path: Path) -> None:
    said = [finish(python(SCORE, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2)]
    assert said == ["[8.0, 8.0] [16.0, 16.0]\n"] * 2
    assert len(list(tmp_path.rglob("*score*.nbc"))) == 1


@given(x=st.floats(-87, 0, width=32))
def test_the_exponential_is_one(x: float) -> None:
    from kvdb.runtime.selection.sketch_kernel import _exp_parts

    part, exponent = _exp_parts(np.float32(x))
    assert part * 2.0**exponent == pytest.approx(np.exp(x), rel=2e-7 * (1 - x))
