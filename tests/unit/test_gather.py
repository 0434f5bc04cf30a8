"""Attention over records where they lie agrees with dense attention in float64, whatever the parts, the places and the dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvdb.runtime.gather import Gather, Lent
from kvdb.runtime.staging import Array, storage_view

pytest.importorskip("numba")
KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", KINDS)


class Case:
    """Records in a heap of others, and which of them each KV head is lent, in parts."""

    def __init__(
        self, dtype: str, seed: int, *, heads: int, group: int, dim: int, tokens: int, most: int, parts: int
    ) -> None:
        rng = np.random.default_rng(seed)
        self.dtype, self.tokens, self.dim = dtype, tokens, dim
        self.heap = torch.from_numpy(rng.normal(size=(40, 2, tokens, dim)).astype(np.float32)).to(KINDS[dtype])
        self.q = torch.from_numpy(rng.normal(size=(heads, group, dim)).astype(np.float32))
        self.chosen = [[rng.permutation(40)[: rng.integers(0, most + 1)] for _ in range(heads)] for _ in range(parts)]

    def lent(self, part: int) -> Lent:
        flat, size = storage_view(self.heap).reshape(-1), self.tokens * self.dim
        which = np.concatenate(self.chosen[part]).astype(np.int64)
        starts = np.concatenate(([0], np.cumsum([len(own) for own in self.chosen[part]])))
        return Lent(flat, flat, 2 * size * which, 2 * size * which + size, starts, self.tokens)

    def logits(self, head: int, records: Array) -> tuple[Array, Array]:
        """(group, tokens), and the values (tokens, head_dim), in float64."""
        kv = self.heap[torch.from_numpy(records.astype(np.int64))].double().numpy()
        keys, values = (kv[:, half].reshape(-1, self.dim) for half in (0, 1))
        return self.q[head].double().numpy() @ keys.T, values

    def expected(self, beside: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
        """Outputs and log-sum-exps over everything that is lent."""
        outs, lses = [], []
        for head in range(len(self.q)):
            logits, values = self.logits(head, np.concatenate([part[head] for part in self.chosen]))
            outs.append([])
            lses.append([])
            for g, own in enumerate(logits):
                row, sources = own, values
                if beside is not None and beside[1][head, g] > -np.inf:
                    row, sources = np.append(own, beside[1][head, g]), np.vstack((values, beside[0][head, g]))
                top = row.max(initial=-np.inf)
                weights = np.exp(row - top)
                outs[-1].append(weights @ sources / weights.sum() if len(row) else np.full(self.dim, np.nan))
                lses[-1].append(top + np.log(weights.sum()) if len(row) else -np.inf)
        return np.array(outs), np.array(lses)


def cases(dtype: str) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        dtype=st.just(dtype),
        seed=st.integers(0, 10_000),
        heads=st.integers(1, 4),
        group=st.integers(1, 5),
        dim=st.sampled_from([1, 3, 8, 20, 64, 80]),
        tokens=st.integers(1, 33),
        most=st.integers(1, 6),
        parts=st.integers(1, 3),
    )


@every_dtype
@given(data=st.data())
def test_any_records_in_any_parts_are_attended_to(dtype: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtype))
    running = Gather(case.q, dtype)
    measured = []
    for part in range(len(case.chosen)):
        if data.draw(st.booleans()):
            running.add(case.lent(part))
        else:
            measured.append((part, running.add_measured(case.lent(part))))
    expected, lse = case.expected()
    found = running.lse.numpy().copy()
    some = np.isfinite(lse)
    assert np.array_equal(np.isfinite(found), some)
    assert np.allclose(found[some], lse[some], rtol=1e-5, atol=1e-5)
    out = running.finish().numpy()
    assert np.allclose(out[some], expected[some], rtol=1e-5, atol=1e-5)
    for part, of_records in measured:
        i = 0
        for head, records in enumerate(case.chosen[part]):
            for record in records:
                logits, _ = case.logits(head, np.array([record]))
                own = np.log(np.exp(logits - logits.max()).sum(1)) + logits.max()
                assert np.allclose(of_records[i], own, rtol=1e-5, atol=1e-4)
                i += 1


@every_dtype
@given(data=st.data())
def test_what_is_known_by_its_sum_is_joined(dtype: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtype))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    out = rng.normal(size=case.q.shape).astype(np.float32)
    lse = (rng.normal(size=case.q.shape[:2]) * 4).astype(np.float32)
    lse[rng.random(lse.shape) < 0.3] = -np.inf
    running = Gather(case.q, dtype)
    for part in range(len(case.chosen)):
        running.add(case.lent(part))
    expected, both = case.expected((out, lse))
    found = running.finish(torch.from_numpy(out), torch.from_numpy(lse)).numpy()
    some = np.isfinite(both)
    assert np.allclose(found[some], expected[some], rtol=1e-5, atol=1e-5)


@every_dtype
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_a_tail_is_read_where_it_is(dtype: str, tokens: int) -> None:
    torch.manual_seed(0)
    whole = torch.randn(2, 3, 512, 24).to(KINDS[dtype])  # a batch's buffer with room for more
    k, v = whole[1, :, 5 : 5 + tokens], whole[0].transpose(0, 1).contiguous().transpose(0, 1)[:, :tokens]
    q = torch.randn(3, 2, 24)
    running = Gather(q, dtype)
    running.add(Lent.of_tail(k, v))
    weights = torch.softmax(q.double() @ k.double().transpose(1, 2), -1)
    assert torch.allclose(running.finish().double(), weights @ v.double(), rtol=1e-5, atol=1e-5)


def test_logits_of_any_size_are_weighed() -> None:
    """Far apart, and far from zero: none overflows, none is lost that matters."""
    keys = np.array([-3e4, 0.0, 3e4, 3e4 - 1, 2e4], np.float32)
    values = np.arange(5, dtype=np.float32)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 3, 1, 4]):
        running = Gather(torch.ones(1, 1, 1), "float32")
        for i in order:
            at = np.array([i])
            running.add(Lent(keys, values, at, at, np.array([0, 1]), 1))
        weight = 1 / (1 + np.exp(-1.0))
        assert running.finish().item() == pytest.approx(2 * weight + 3 * (1 - weight), abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_key_that_is_no_number_is_not_hidden(bad: float) -> None:
    """As softmax over it: what it makes of the output is the output."""
    heap = np.ones((4, 2, 3, 8), np.float32)
    heap[2, 0, 1, 4] = bad
    flat = heap.reshape(-1)
    which = np.array([0, 2, 3, 0, 1])
    running = Gather(torch.ones(2, 1, 8), "float32")
    running.add(Lent(flat, flat, which * 48, which * 48 + 24, np.array([0, 3, 5]), 3))
    out = running.finish()
    assert out[0].isnan().all()
    assert torch.equal(out[1], torch.ones(1, 8))


def test_nothing_added_has_no_weight() -> None:
    running = Gather(torch.ones(2, 3, 4), "float16")
    assert (running.lse == -np.inf).all()
    out: Any = torch.full((2, 3, 4), 5.0)
    assert torch.equal(running.finish(out, torch.zeros(2, 3)), out)
