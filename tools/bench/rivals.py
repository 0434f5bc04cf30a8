"""Ways to keep KV from one process to the next, side by side: the contract, transformers' caches, and KVDB.

A way's life has two processes. One saves the KV of a prompt but for its last token, whole on the disk when `save` returns. The other loads
its model, then asks for the token after the same prompt, as a new request would, and goes on from there.

Not here: llama.cpp (`kvdb.tools.bench.llama`), and who wins.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from kvdb import KVDB
from kvdb.runtime import attach
from kvdb.tools.bench.setup import real_model

KV: Final = "prefilled.pt"
"""What transformers prefilled, for all ways that save KV of it; one of them has the very same file, written in its own time."""


class Saved(NamedTuple):
    """prefill_s: None where the KV came from the file KV, which somebody else prefilled."""

    prefill_s: float | None
    save_s: float


class Way(ABC):
    """`folder` is the way's own, below the one where the file KV lies; ids are (1, tokens), logits (vocabulary,) float32."""

    name: ClassVar[str]
    how: ClassVar[str]
    """The calls a user would make."""
    computes: ClassVar[str] = "float32"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    reuses: ClassVar[bool] = True
    """Whether anything outlives a process."""
    vocabulary: int
    """Known once the model is loaded."""

    def __init__(self, threads: int, room: int) -> None:
        """room: tokens that a cache of fixed size must hold."""
        self.threads, self.room = threads, room
        torch.set_num_threads(threads)

    @abstractmethod
    def load(self) -> None:
        """Load the model and run it once; no KV stays."""

    @abstractmethod
    def save(self, folder: Path, ids: Tensor) -> Saved:
        """Compute what must be computed and leave it in the folder, synced. The model is loaded."""

    @abstractmethod
    def first(self, folder: Path, ids: Tensor) -> Tensor:
        """Logits after the prompt, with the KV of all but its last token taken from the folder."""

    def again(self, folder: Path, ids: Tensor) -> Tensor:
        """The same for the next request of a process that keeps what it may and lets its KV go."""
        self.drop()
        return self.first(folder, ids)

    @abstractmethod
    def step(self, token: int) -> Tensor:
        """Logits after one more token."""

    @abstractmethod
    def drop(self) -> None:
        """Let the KV go; what a running server keeps stays."""

    def close(self) -> None:
        self.drop()


class _Transformers(Way):
    cache: Any

    def load(self) -> None:
        self.model: Any = real_model().model
        self.vocabulary, self.cache = self.model.config.vocab_size, None
        _run(self.model, torch.arange(8)[None], DynamicCache(config=self.model.config))

    def step(self, token: int) -> Tensor:
        return _run(self.model, torch.tensor([[token]]), self.cache)

    def drop(self) -> None:
        self.cache = None


class Prefilled(_Transformers):
    """Nothing is kept: every process prefills."""

    name, how, reuses = "DynamicCache", "DynamicCache(config=config); model(ids, past_key_values=cache)", False
    offloading: ClassVar[bool] = False

    def save(self, folder: Path, ids: Tensor) -> Saved:
        """Leaves the file KV for the others."""
        self.cache = DynamicCache(config=self.model.config)
        started = time.perf_counter()
        _run(self.model, ids[:, :-1], self.cache)
        prefilled = time.perf_counter()
        _write({f"{i}.{part}": kv for i, part, kv in _tensors(self.cache)}, folder.parent / KV)
        return Saved(prefilled - started, 0.0)

    def first(self, folder: Path, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config, offloading=self.offloading)
        return _run(self.model, ids, self.cache)

    def again(self, folder: Path, ids: Tensor) -> Tensor:
        """KV that never left the process."""
        self.cache.crop(ids.shape[1] - 1 - self.cache.get_seq_length())
        return _run(self.model, ids[:, -1:], self.cache)


class Offloaded(Prefilled):
    name, offloading = "OffloadedCache", True
    how = "DynamicCache(config=config, offloading=True); model(ids, past_key_values=cache)"

    def load(self) -> None:
        super().load()
        _run(self.model, torch.arange(8)[None], DynamicCache(config=self.model.config, offloading=True))

    def save(self, folder: Path, ids: Tensor) -> Saved:
        return Saved(None, 0.0)


class TorchFile(_Transformers):
    name = "torch.save"
    how = "torch.save(dict of tensors, path); torch.load(path, weights_only=True); cache.update(keys, values, layer)"

    def save(self, folder: Path, ids: Tensor) -> Saved:
        tensors = torch.load(folder.parent / KV, weights_only=True)
        started = time.perf_counter()
        self._write(tensors, folder / "kv")
        return Saved(None, time.perf_counter() - started)

    def first(self, folder: Path, ids: Tensor) -> Tensor:
        tensors = self._read(folder / "kv")
        self.cache = _dynamic(self.model.config, tensors)
        return _run(self.model, ids[:, -1:], self.cache)

    def _write(self, tensors: dict[str, Tensor], path: Path) -> None:
        _write(tensors, path)

    def _read(self, path: Path) -> dict[str, Tensor]:
        return torch.load(path, weights_only=True)


class Safetensors(TorchFile):
    name, packages = "safetensors", ("torch", "transformers", "safetensors")
    how = "safetensors.torch.save_file(tensors, path); load_file(path); cache.update(keys, values, layer)"

    def _write(self, tensors: dict[str, Tensor], path: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, path)
        _sync(path)

    def _read(self, path: Path) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(path)


class _Quantised(_Transformers):
    """transformers saves no QuantizedCache: the tensors it keeps are saved, with torch.save, and put back."""

    backend: ClassVar[str]
    options: ClassVar[dict[str, int]] = {"nbits": 4}

    def load(self) -> None:
        super().load()
        cache = self._new()
        for _ in range(
            2
        ):  # the second one decodes what the first one quantised; quanto compiles its loops once on a machine
            _run(self.model, torch.arange(64)[None], cache)

    def save(self, folder: Path, ids: Tensor) -> Saved:
        """Quantising is what this cache adds to prefilling, and is part of saving here."""
        tensors = torch.load(folder.parent / KV, weights_only=True)
        self.cache = self._new()
        started = time.perf_counter()
        for index in range(len(self.cache.layers)):
            self.cache.update(tensors.pop(f"{index}.keys"), tensors.pop(f"{index}.values"), index)
        kept = [tuple(map(self._packed, _quantised(layer))) for layer in self.cache.layers]
        _write(kept, folder / "kv")
        return Saved(None, time.perf_counter() - started)

    def first(self, folder: Path, ids: Tensor) -> Tensor:
        self.cache, kept = self._new(), torch.load(folder / "kv", weights_only=True)
        config = self.model.config
        tokens, kv_heads = ids.shape[1] - 1, config.num_key_value_heads
        shape = torch.Size((1, kv_heads, tokens, config.head_dim))
        nothing = torch.empty(1, kv_heads, 1, config.head_dim)
        for layer, (keys, values) in zip(self.cache.layers, kept, strict=True):
            layer.lazy_initialization(nothing, nothing)
            layer._quantized_keys, layer._quantized_values = (self._unpacked(kv, layer, shape) for kv in (keys, values))
            layer.cumulative_length = tokens
        return _run(self.model, ids[:, -1:], self.cache)

    def _new(self) -> Any:
        return QuantizedCache(self.backend, self.model.config, **self.options)

    def _packed(self, kv: Any) -> Any:
        return kv

    def _unpacked(self, kv: Any, layer: Any, shape: torch.Size) -> Any:
        return kv


class Quanto(_Quantised):
    name, backend = "QuantizedCache, quanto, 4 bits", "quanto"
    how = "QuantizedCache('quanto', config, nbits=4); torch.save of its packed tensors"
    packages = ("torch", "transformers", "optimum-quanto")

    def _packed(self, kv: Any) -> Any:
        tensors: dict[str, Tensor] = {}
        kv.save_to_state_dict(tensors, "", False)
        return tensors

    def _unpacked(self, kv: Any, layer: Any, shape: torch.Size) -> Any:
        from optimum.quanto import WeightQBitsTensor

        stride = torch.empty(shape, device="meta").stride()
        return WeightQBitsTensor.load_from_state_dict(
            kv, "", layer.qtype, layer.axis_key, layer.q_group_size, shape, stride, []
        )


class Hqq(_Quantised):
    name, backend = "QuantizedCache, hqq, 4 bits", "hqq"
    how = "QuantizedCache('hqq', config, nbits=4); torch.save of its packed tensors"
    packages = ("torch", "transformers", "hqq")


class Fp8(_Quantised):
    name, backend = "QuantizedCache, fp8", "fp8"
    how = "QuantizedCache('fp8', config); torch.save of its tensors"
    options: ClassVar[dict[str, int]] = {}


class Kvdb(Way):
    cache: Any
    kv: Any

    name, how = "KVDB", "attach(model, db); kv.cache(ids)"
    packages = ("kvdb", "torch", "transformers", "numba")
    rule: ClassVar[dict[str, Any]] = {}

    def load(self) -> None:
        self.model: Any = real_model().model
        self.vocabulary = self.model.config.vocab_size
        self.held, self.cache, self.kv = ExitStack(), None, None
        _run(self.model, torch.arange(8)[None], DynamicCache(config=self.model.config))

    def save(self, folder: Path, ids: Tensor) -> Saved:
        """Prefilling and saving are one; before and after it, loops are compiled, as they are once on a machine."""
        with TemporaryDirectory(dir=folder) as other:
            self._store(Path(other), ids[:, :129])
        started = time.perf_counter()
        self._store(folder, ids)
        taken = time.perf_counter() - started
        self.first(folder, ids)
        self.close()
        return Saved(taken, 0.0)

    def _store(self, folder: Path, ids: Tensor) -> None:
        with KVDB.open(folder / "s.kvdb") as db, attach(self.model, db, **self.rule) as kv:
            kv.save(kv.cache(ids))

    def first(self, folder: Path, ids: Tensor) -> Tensor:
        if self.kv is None:
            db = self.held.enter_context(KVDB.open(folder / "s.kvdb"))
            self.kv = self.held.enter_context(attach(self.model, db, **self.rule))
        self.cache = self.kv.cache(ids)
        return _run(self.model, ids[:, -1:], self.cache)

    def step(self, token: int) -> Tensor:
        return _run(self.model, torch.tensor([[token]]), self.cache)

    def drop(self) -> None:
        self.cache = None

    def close(self) -> None:
        self.drop()
        self.held.close()
        self.kv = None


class KvdbExact(Kvdb):
    name, how, rule = "KVDB, exact", "attach(model, db, exact=True); kv.cache(ids)", {"exact": True}


class KvdbInt4(Kvdb):
    name, how, rule = "KVDB, int4", "attach(model, db, codec='int4'); kv.cache(ids)", {"codec": "int4"}


def _run(model: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[0, -1].float()


def _dynamic(config: Any, tensors: dict[str, Tensor]) -> DynamicCache:
    """Empties the dict on the way, so that no more than one layer is there twice."""
    cache = DynamicCache(config=config)
    for index in range(len(cache.layers)):
        cache.update(tensors.pop(f"{index}.keys"), tensors.pop(f"{index}.values"), index)
    return cache


def _tensors(cache: DynamicCache) -> list[tuple[int, str, Tensor]]:
    return [(i, part, getattr(layer, part)) for i, layer in enumerate(cache.layers) for part in ("keys", "values")]


def _quantised(layer: Any) -> tuple[Any, Any]:
    return layer._quantized_keys, layer._quantized_values


def _write(what: Any, path: Path) -> None:
    torch.save(what, path)
    _sync(path)


def _sync(path: Path) -> None:
    for each in (path, path.parent):
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
