"""llama.cpp as a way to keep KV: the model's own GGUF, and session files as its `--prompt-cache` writes them.

Weights stay as the GGUF has them (4 and 8 bits), products are taken with activations of 8 bits: its logits differ from those of float32
weights before any KV is stored otherwise. Its cache has a fixed size and is allocated whole with the context.
"""

from __future__ import annotations

import ctypes
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from kvdb.tools.bench.rivals import Saved, Way
from kvdb.tools.models import packaged_files

_PREFILL_BATCH: Final = 512  # its default
_CELLS: Final = 256  # what it rounds the size of a cache up to


class Llama(Way):
    """One way for each type of KV."""

    kv_type: ClassVar[str]
    flash: ClassVar[str] = "AUTO"
    computes = "Q4_1 weights"
    packages = ("llama-cpp-python",)

    @cached_property
    def api(self) -> Any:
        import llama_cpp

        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library calls it as long as it lives
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        return llama_cpp

    def load(self) -> None:
        self.context: Any = None
        self.model = self.api.llama_model_load_from_file(
            os.fsencode(packaged_files("smollm2")[0]), self.api.llama_model_default_params()
        )
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self._open(batch=8)
        self._decode(list(range(8)))
        self.drop()

    def save(self, folder: Path, ids: Tensor) -> Saved:
        tokens = ids[0, :-1].tolist()
        self._open(batch=_PREFILL_BATCH)
        started = time.perf_counter()
        for at in range(0, len(tokens), _PREFILL_BATCH):
            self._decode(tokens[at : at + _PREFILL_BATCH])
        prefilled = time.perf_counter()
        path = folder / "session"
        self._expect(
            self.api.llama_state_save_file(self.context, os.fsencode(path), self._array(tokens), len(tokens)),
            "llama_state_save_file",
        )
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        return Saved(prefilled - started, time.perf_counter() - prefilled)

    def first(self, folder: Path, ids: Tensor) -> Tensor:
        self._open(batch=8)
        room, count = self._array([0] * ids.shape[1]), ctypes.c_size_t()
        self._expect(
            self.api.llama_state_load_file(
                self.context, os.fsencode(folder / "session"), room, len(room), ctypes.byref(count)
            ),
            "llama_state_load_file",
        )
        assert list(room[: count.value]) == ids[0, :-1].tolist()
        return self._decode(ids[0, -1:].tolist())

    def step(self, token: int) -> Tensor:
        return self._decode([token])

    def drop(self) -> None:
        if self.context is not None:
            self.api.llama_free(self.context)
        self.context = None

    def _open(self, *, batch: int) -> None:
        self.drop()
        wanted = self.api.llama_context_default_params()
        wanted.n_ctx = -(-self.room // _CELLS) * _CELLS
        wanted.n_batch = wanted.n_ubatch = batch
        wanted.n_threads = wanted.n_threads_batch = self.threads
        wanted.type_k = wanted.type_v = getattr(self.api, f"GGML_TYPE_{self.kv_type}")
        wanted.flash_attn_type = getattr(self.api, f"LLAMA_FLASH_ATTN_TYPE_{self.flash}")
        self.context = self.api.llama_init_from_model(self.model, wanted)
        self._expect(self.context, "llama_init_from_model")

    def _decode(self, tokens: list[int]) -> Tensor:
        """Logits after the last one."""
        array = self._array(tokens)  # the batch points to it
        batch = self.api.llama_batch_get_one(array, len(tokens))
        self._expect(self.api.llama_decode(self.context, batch) == 0, "llama_decode")
        values = self.api.llama_get_logits_ith(self.context, -1)
        buffer = (ctypes.c_float * self.vocabulary).from_address(ctypes.addressof(values.contents))
        return torch.frombuffer(buffer, dtype=torch.float32).clone()

    def _array(self, tokens: list[int]) -> Any:
        return (self.api.llama_token * len(tokens))(*tokens)

    def _expect(self, worked: object, call: str) -> None:
        if not worked:
            raise RuntimeError(f"{call} with {self.kv_type} KV: failed, expected success")


class LlamaF32(Llama):
    """Its flash attention casts float32 KV to float16 first: logits are then those of F16 KV, to the bit."""

    name, kv_type, flash = "llama.cpp, f32 KV", "F32", "DISABLED"
    how = "llama_state_save_file, llama_state_load_file; type_k = type_v = F32, flash_attn_type = DISABLED"


class LlamaF16(Llama):
    name, kv_type = "llama.cpp, f16 KV", "F16"
    how = "llama_state_save_file, llama_state_load_file; type_k = type_v = F16, its default"


class LlamaQ8(Llama):
    name, kv_type = "llama.cpp, q8_0 KV", "Q8_0"
    how = "llama_state_save_file, llama_state_load_file; type_k = type_v = Q8_0"


class LlamaQ4(Llama):
    name, kv_type = "llama.cpp, q4_0 KV", "Q4_0"
    how = "llama_state_save_file, llama_state_load_file; type_k = type_v = Q4_0"
