"""Sessions whose stored rows are decoded on the device, beside the same sessions with rows decoded on the CPU.

Without a GPU the device is memory, and what decodes there is the codecs themselves or Triton's interpreter: everything but the
upload is what runs on a GPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_healthy, flip, opened
from tiny_models import answer, prompt, tiny
from torch import Tensor

import kvdb.runtime.staging
from kvdb import KVDB, format
from kvdb.codecs import CODECS, RecordCodec
from kvdb.errors import Damaged
from kvdb.runtime import attach
from kvdb.runtime.dequantise import Decoder, Triton, decoder_on
from kvdb.runtime.staging import storage_view

pytestmark = pytest.mark.usefixtures("single_thread")
TOKENS = 600
RULES: list[dict[str, Any]] = [{"exact": True}, {"budget": 0.3}, {"mass": 0.9}]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))


class Codecs:
    """A decoder of all that codecs decode, in memory; it counts the rows of each."""

    def __init__(self, known: tuple[str, ...] = tuple(CODECS)) -> None:
        self.known, self.rows = known, dict[str, int]()

    def decodes(self, codec: RecordCodec) -> bool:
        return codec.key.name in self.known and codec.value.name in self.known

    def decode(self, codec: RecordCodec, rows: Tensor, columns: Tensor, out: Tensor) -> None:
        self.rows[str(codec)] = self.rows.get(str(codec), 0) + len(rows)
        some = torch.empty((2, len(rows), *out.shape[2:]), dtype=out.dtype)
        dtype = str(out.dtype).removeprefix("torch.")
        codec.decode(rows.numpy(), np.arange(len(rows)), storage_view(some), dtype)
        out[:, columns] = some


def conversation(
    path: Path, decoder: Decoder | None, model: Any, codec: str, *, tokens: int = TOKENS, **rule: Any
) -> tuple[Tensor, int]:
    """Logits of two turns, of which the second begins within a stored chunk, and the bytes that were read."""
    ids = prompt(tokens + 40).to(next(model.parameters()).device)
    found = []
    with (
        pytest.MonkeyPatch.context() as patch,
        opened(path) as db,
        attach(model, db, codec=codec, **rule) as kv,
    ):
        patch.setattr(kvdb.runtime.staging, "decoder_on", lambda device: decoder)
        for turn in (ids[:, :tokens], ids):
            cache = kv.cache(turn)
            found.append(answer(model, turn, cache).logits)
            kv.save(cache)
        stats = cache.stats()
        assert_healthy(db)
    return torch.cat(found), stats["kv_bytes_read"]


@every_rule
@pytest.mark.parametrize("codec", ["int4", "planes", "raw+int2", "int8;0=raw"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_is_decoded_there_gives_the_same_answer(
    tmp_path: Path, architecture: str, codec: str, rule: dict[str, Any]
) -> None:
    """And costs as many bytes. The first chunk and started ones are raw, so a read is of parts of more than one codec."""
    model, decoder = tiny(architecture), Codecs()
    plain = conversation(tmp_path / "plain", None, model, codec, **rule)
    there = conversation(tmp_path / "there", decoder, model, codec, **rule)
    assert torch.equal(plain[0], there[0])
    assert plain[1] == there[1]
    assert all(count > 0 for count in decoder.rows.values())
    assert set(decoder.rows) == {"raw", codec.partition(";")[0]}


def test_records_that_are_stored_as_they_are_go_as_before(tmp_path: Path) -> None:
    decoder = Codecs()
    conversation(tmp_path / "s", decoder, tiny("llama"), "raw", exact=True)
    assert not decoder.rows


def test_a_codec_that_is_not_known_there_is_decoded_on_the_cpu(tmp_path: Path) -> None:
    model, decoder = tiny("llama"), Codecs(known=("raw", "int8"))
    plain = conversation(tmp_path / "plain", None, model, "int4;0=int8", exact=True)
    there = conversation(tmp_path / "there", decoder, model, "int4;0=int8", exact=True)
    assert torch.equal(plain[0], there[0])
    assert set(decoder.rows) == {"raw", "int8"}


class Slow(Codecs):
    """A device that takes its time."""

    def decode(self, codec: RecordCodec, rows: Tensor, columns: Tensor, out: Tensor) -> None:
        time.sleep(0.01)
        super().decode(codec, rows, columns, out)


@pytest.mark.parametrize(("decoder", "kept"), [(Codecs(), None), (Slow(), False)], ids=["as it is", "slow"])
def test_steps_are_compared_and_the_faster_way_is_kept(tmp_path: Path, decoder: Codecs, kept: bool | None) -> None:
    """And every answer is the same, whichever way its records came."""
    model, ids = tiny("llama"), prompt(TOKENS)
    found = []
    for way in (None, decoder):
        with (
            pytest.MonkeyPatch.context() as patch,
            opened(tmp_path / str(way)) as db,
            attach(model, db, codec="int4", exact=True) as kv,
        ):
            patch.setattr(kvdb.runtime.staging, "decoder_on", lambda device, way=way: way)
            cache = kv.cache(ids)
            told = [answer(model, ids, cache).logits[:, -1]]
            for token in range(40):
                with torch.no_grad():
                    told.append(model(input_ids=torch.full((1, 1), token), past_key_values=cache).logits[:, -1])
            stats = cache.stats()["transfers"]
        found.append(torch.stack(told))
        if way is None:
            assert stats is None
        else:
            assert "a step takes" in stats["why"]
            assert kept is None or stats["coded"] is kept
    assert torch.equal(*found)


def test_damage_is_found_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And named as ever."""
    model, ids, path = tiny("llama"), prompt(TOKENS), tmp_path / "s"
    monkeypatch.setattr(kvdb.runtime.staging, "decoder_on", lambda device: Codecs())
    with opened(path) as db, attach(model, db, codec="int4", exact=True) as kv:
        kv.save(kv.cache(ids), name="n")
        coded = next(s for s in db.segments(db.sequence("n").spans) if s.info.start == 16)
    shard = coded.folder / format.kv_array(coded.info.segment, 0) / format.SHARD_KEY
    flip(shard, 1000)
    with KVDB.open(path) as db, attach(model, db, codec="int4", exact=True) as kv:
        cache = kv.load("n")
        with pytest.raises(Damaged, match=r"sequence n: .*xxh3"), torch.no_grad():
            model(input_ids=ids[:, -1:], past_key_values=cache)


@pytest.mark.slow
def test_triton_gives_the_same_answer(tmp_path: Path) -> None:
    """Of few tokens: in the interpreter, each record takes milliseconds."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'kvdb[triton]'")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is not used where there is a GPU")
    plain = conversation(tmp_path / "plain", None, tiny("llama"), "planes:bits=2+int4", tokens=24, exact=True)
    there = conversation(tmp_path / "there", Triton(), tiny("llama"), "planes:bits=2+int4", tokens=24, exact=True)
    assert torch.equal(plain[0], there[0])


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("codec", ["int4", "planes", "int8;0=raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_gpu_gives_the_same_answer(tmp_path: Path, dtype: torch.dtype, codec: str, rule: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton", reason="triton is not installed: pip install 'kvdb[triton]'")
    model = tiny("llama", dtype=dtype).cuda()
    decoder = decoder_on(next(model.parameters()).device)
    assert decoder is not None
    plain = conversation(tmp_path / "plain", None, model, codec, **rule)
    there = conversation(tmp_path / "there", decoder, model, codec, **rule)
    assert torch.equal(plain[0], there[0])
