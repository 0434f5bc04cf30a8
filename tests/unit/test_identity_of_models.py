"""Which models share KV: those with the same weights, mathematics, dtype and salt, whatever they are called.

Everything else is a miss whose reason names the field, and an error from `load` that names it too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import opened
from tiny_models import greedy, prompt, stock, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from kvdb import KVDB
from kvdb.errors import IdentityMismatch
from kvdb.runtime import attach
from kvdb.runtime.identity import model_identity, weights_digest

IDS = prompt(40)


@pytest.fixture
def db(tmp_path: Path) -> Iterator[KVDB]:
    """Closed after the test, and nothing may be wrong in it."""
    with opened(tmp_path / "a.kvdb") as store:
        yield store


def identity(model: nn.Module, **options: Any) -> Any:
    return model_identity(model, kv_dtype=next(model.parameters()).dtype, **options)


def changed_weight(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5  # type: ignore[union-attr,index,operator]
    return other


def swapped_shape(model: nn.Module) -> nn.Module:
    """The same bytes in the same order, of another shape."""
    other = copy.deepcopy(model)
    weight = other.model.layers[0].mlp.up_proj.weight  # type: ignore[union-attr,index]
    weight.data = weight.data.reshape(64, 96)  # type: ignore[union-attr,operator]
    return other


def with_config(field: str, value: Any) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        other = copy.deepcopy(model)
        setattr(other.config, field, value)
        return other

    return change


DIFFERENT: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "one weight": (changed_weight, "weights"),
    "dtype": (lambda model: copy.deepcopy(model).to(torch.float16), "dtype"),
    "RoPE base": (
        with_config("rope_parameters", {"rope_type": "default", "rope_theta": 20_000.0}),
        "config.rope_parameters",
    ),
    "norm epsilon": (with_config("rms_norm_eps", 1e-3), "config.rms_norm_eps"),
    "activation": (with_config("hidden_act", "gelu"), "config.hidden_act"),
    "an unknown field": (with_config("temperature_of_attention", 2.0), "config.temperature_of_attention"),
}


@pytest.mark.parametrize(("change", "field"), DIFFERENT.values(), ids=list(DIFFERENT))
def test_a_different_model_is_refused_with_the_field_named(
    db: KVDB, change: Callable[[nn.Module], nn.Module], field: str
) -> None:
    model = tiny()
    with attach(model, db, exact=True) as kv:
        kv.save(kv.cache(IDS), name="mine")
        assert kv.match(IDS).tokens == 39
    other = change(model)
    assert identity(other).digest() != identity(model).digest()
    assert field in identity(other).difference(identity(model))
    with attach(other, db, exact=True) as kv:
        miss = kv.match(IDS[:, :39])
        assert miss.tokens == 0
        assert field in miss.reason
        assert "39 tokens are stored under another identity" in miss.reason
        with pytest.raises(IdentityMismatch, match=field.replace(".", r"\.")):
            kv.load("mine")
        cache = kv.cache(IDS)
        assert cache.metrics.reused_tokens == 0
        assert torch.equal(greedy(other, IDS, cache), stock(other, IDS))


def test_the_shape_of_a_weight_counts_and_not_only_its_bytes() -> None:
    model = tiny()
    assert weights_digest(swapped_shape(model)) != weights_digest(model)


def test_two_weights_that_change_places_change_the_digest() -> None:
    model = tiny()
    other = copy.deepcopy(model)
    first, second = (other.model.layers[i].mlp.up_proj for i in (0, 1))  # type: ignore[union-attr,index]
    first.weight, second.weight = second.weight, first.weight  # type: ignore[union-attr]
    assert weights_digest(other) != weights_digest(model)


def test_another_salt_never_shares(tmp_path: Path) -> None:
    model = tiny()
    with opened(tmp_path / "a.kvdb") as db, attach(model, db, exact=True) as kv:
        kv.save(kv.cache(IDS), name="mine")
    with KVDB.open(tmp_path / "a.kvdb", salt="tenant 2") as db, attach(model, db, exact=True) as kv:
        miss = kv.match(IDS)
        assert (miss.tokens, "salt" in miss.reason) == (0, False)  # nor does it learn what another tenant has stored
        with pytest.raises(IdentityMismatch, match="salt"):
            kv.load("mine")
        assert kv.cache(IDS).metrics.reused_tokens == 0
        assert db.check() == []


def test_the_same_weights_under_another_name_are_the_same_model(db: KVDB) -> None:
    model = tiny()
    with attach(model, db, exact=True) as kv:
        kv.cache(IDS)
    other = tiny()
    other.config._name_or_path = "somewhere/else"  # type: ignore[union-attr]
    other.name_or_path = "somewhere/else"  # type: ignore[assignment]
    assert identity(other) == identity(model)
    with attach(other, db, exact=True) as kv:
        assert kv.cache(IDS).metrics.reused_tokens == 39


def test_a_model_saved_and_loaded_again_is_the_same_model(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    assert identity(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) == identity(model)


def test_generation_settings_do_not_count() -> None:
    model, other = tiny(), tiny()
    other.generation_config.max_length = 77  # type: ignore[union-attr]
    other.config.use_cache = False  # type: ignore[union-attr]
    other.set_attn_implementation("eager")  # type: ignore[operator]
    assert identity(other) == identity(model)


def test_a_weight_changed_after_attach_is_seen_by_everything(db: KVDB) -> None:
    model = tiny()
    with attach(model, db, exact=True) as kv:
        before = kv.identity()
        cache = kv.cache(IDS)
        kv.save(cache, name="old")
        greedy(model, IDS, cache)
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight[0, 0] += 0.5  # type: ignore[union-attr,index,operator]
        assert kv.identity().difference(before) == ["weights"]
        assert kv.match(IDS).tokens == 0
        with pytest.raises(IdentityMismatch, match="weights"):
            kv.save(cache, name="mixed")
        with pytest.raises(IdentityMismatch, match="weights"):
            kv.load("old")
        fresh = kv.cache(IDS)
        assert fresh.metrics.reused_tokens == 0
        mine = greedy(model, IDS, fresh)
    assert torch.equal(mine, stock(model, IDS))


def test_a_weight_changed_through_its_data_is_seen() -> None:
    """torch does not count such writes; merging adapters and many optimisers write this way."""
    model = tiny()
    before = weights_digest(model)
    weight = model.model.layers[0].self_attn.k_proj.weight  # type: ignore[union-attr,index]
    weight.data[0, 0] += 0.5  # type: ignore[union-attr,index]
    assert weights_digest(model) != before


def test_an_adapter_merged_through_data_is_seen_without_reading_every_byte() -> None:
    model = tiny()
    before = weights_digest(model)
    weight = model.model.layers[0].self_attn.k_proj.weight  # type: ignore[union-attr,index]
    weight.data += 0.5  # type: ignore[union-attr,operator]
    assert weights_digest(model, fresh=False) != before


def test_a_replaced_weight_is_seen() -> None:
    model = tiny()
    before = weights_digest(model)
    layer = model.model.layers[0].self_attn.k_proj  # type: ignore[union-attr,index]
    layer.weight = nn.Parameter(layer.weight + 0.5)  # type: ignore[union-attr,operator]
    assert weights_digest(model) != before


def test_a_change_that_is_undone_is_the_same_model_again() -> None:
    model = tiny()
    before = weights_digest(model)
    weight = model.model.norm.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight[0] += 1.0  # type: ignore[index,operator]
        assert weights_digest(model) != before
        weight[0] -= 1.0  # type: ignore[index,operator]
    assert weights_digest(model) == before


def test_an_added_module_counts() -> None:
    """As an adapter does."""
    model = tiny()
    before = weights_digest(model)
    model.model.layers[0].mlp.adapter = nn.Linear(4, 4)  # type: ignore[union-attr,index]
    assert weights_digest(model) != before


def test_models_in_bfloat16_and_inference_mode_have_a_digest() -> None:
    with torch.inference_mode():
        model = tiny(dtype=torch.bfloat16)
    assert weights_digest(model) == weights_digest(tiny(dtype=torch.bfloat16))
    assert weights_digest(model) != weights_digest(tiny(dtype=torch.float16))
