"""What goes wrong silently elsewhere gives the right output here, or a clear error: never a wrong answer.

`right_or_refused` is the sentence of the whole file. A refusal is one of KVDB's own errors with a message that says what was
found and what was expected; where transformers refuses first (a ValueError of its own), that is fine too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import answer, greedy, prompt, stock, stock_answer, tiny
from torch import Tensor, nn
from transformers import DynamicCache

from kvdb import KVDB
from kvdb.errors import InvalidInput, KVDBError, Unsupported
from kvdb.runtime import attach
from kvdb.runtime.attach import Attachment
from kvdb.runtime.attention import IMPLEMENTATION

pytestmark = pytest.mark.usefixtures("single_thread")
REFUSALS = (KVDBError, ValueError, NotImplementedError)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny()


@pytest.fixture
def kv(model: nn.Module, db: KVDB) -> Iterator[Attachment]:
    with attach(model, db, exact=True) as attached:
        yield attached


def right_or_refused(run: Callable[[], Tensor], expected: Callable[[], Tensor]) -> str:
    """The word "right" or the message of the refusal; any other end fails."""
    try:
        found = run()
    except REFUSALS as error:
        return str(error)
    assert torch.equal(found, expected())
    return "right"


# -- prompts that do not fit the cache


def test_a_cache_longer_than_the_prompt_is_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    with pytest.raises(InvalidInput, match="prompt of 20 tokens for a cache of 49, expected a longer one"):
        greedy(model, ids[:, :20], cache)


def test_a_cache_equal_to_the_prompt_is_refused(model: nn.Module, kv: Attachment) -> None:
    """transformers would feed the whole prompt again."""
    ids = prompt(50)
    cache = kv.cache(ids)
    with pytest.raises(InvalidInput, match="prompt of 49 tokens for a cache of 49, expected a longer one"):
        greedy(model, ids[:, :49], cache)


@pytest.mark.parametrize("position", [0, 17, 48])
def test_a_wrong_prefix_with_the_same_last_token_is_refused(model: nn.Module, kv: Attachment, position: int) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    other = ids.clone()
    other[0, position] += 1
    with pytest.raises(InvalidInput, match=f"at position {position} of row 0"):
        greedy(model, other, cache)


def test_after_a_refusal_the_cache_still_gives_the_right_answer(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    for wrong in (ids[:, :20], ids[:, :49], ids + 1, ids.repeat(2, 1)):
        with pytest.raises(InvalidInput):
            greedy(model, wrong.clamp(max=127), cache)
    assert torch.equal(greedy(model, ids, cache), stock(model, ids))


def test_a_shorter_cache_than_the_prompt_is_completed(model: nn.Module, kv: Attachment) -> None:
    """As `generate` does with any filled cache: it feeds what is missing."""
    ids = prompt(90)
    cache = kv.cache(ids[:, :50])
    assert torch.equal(greedy(model, ids, cache), stock(model, ids))


def test_the_same_prompt_again_on_a_grown_cache_is_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    greedy(model, ids, cache)
    with pytest.raises(InvalidInput, match="expected a longer one"):
        greedy(model, ids, cache)


def test_wrong_positions_in_a_plain_forward_pass_are_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    with pytest.raises(InvalidInput, match=r"positions 0\.\.0 were passed, but the cache holds 49 tokens"):
        model(input_ids=ids[:, -1:], past_key_values=cache, position_ids=torch.tensor([[0]]))
    with torch.no_grad():
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, position_ids=torch.tensor([[49]])).logits
    assert logits[0, -1].argmax() == stock(model, ids, 1)[0, 0]


# -- ways to generate that reorder, repeat or shorten a cache


def test_prompt_lookup_decoding_on_a_filled_cache_is_right_or_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(20).repeat(1, 3)  # repeats, so that the lookup proposes something
    cache = kv.cache(ids)
    right_or_refused(lambda: greedy(model, ids, cache, prompt_lookup_num_tokens=3), lambda: stock(model, ids))


def test_assisted_decoding_on_a_filled_cache_is_right_or_refused(model: nn.Module, kv: Attachment) -> None:
    ids, assistant = prompt(60), tiny(seed=1)
    cache = kv.cache(ids)
    right_or_refused(lambda: greedy(model, ids, cache, assistant_model=assistant), lambda: stock(model, ids))


def test_a_model_that_assists_itself_is_right_or_refused(model: nn.Module, kv: Attachment) -> None:
    """Every proposal is accepted: the case that would not crop."""
    ids, assistant = prompt(60), tiny()
    cache = kv.cache(ids)
    right_or_refused(lambda: greedy(model, ids, cache, assistant_model=assistant), lambda: stock(model, ids))


def test_beam_search_is_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    with pytest.raises(InvalidInput, match="2 sequences for a cache of 1, expected as many; beams"):
        greedy(model, ids, cache, num_beams=2)


def test_beams_on_a_batch_that_happens_to_have_as_many_rows_are_right_or_refused(
    model: nn.Module, kv: Attachment
) -> None:
    ids = prompt(50).repeat(2, 1)
    cache = kv.cache(ids)
    right_or_refused(lambda: greedy(model, ids[:1], cache, num_beams=2), lambda: stock(model, ids[:1], num_beams=2))


def test_several_return_sequences_are_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    with pytest.raises(InvalidInput, match="several return sequences are not supported yet"):
        model.generate(  # type: ignore[operator]
            ids, past_key_values=cache, max_new_tokens=4, do_sample=True, num_return_sequences=2
        )


def test_several_samples_of_one_prompt_work_as_a_batch(model: nn.Module, kv: Attachment) -> None:
    """The way the error above leaves open."""
    ids = prompt(50).repeat(3, 1)
    assert torch.equal(greedy(model, ids, kv.cache(ids)), stock(model, ids))


def test_a_left_padded_batch_is_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    cache = kv.cache(ids)
    with pytest.raises(Unsupported, match="attention_mask is not all ones, expected prompts of equal length"):
        greedy(model, ids, cache, attention_mask=mask)


def test_a_mask_of_ones_is_fine(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50, batch=2)
    found = greedy(model, ids, kv.cache(ids), attention_mask=torch.ones_like(ids))
    assert torch.equal(found, stock(model, ids))


@pytest.mark.parametrize(
    "operation", ["crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"]
)
def test_a_cache_that_is_told_to_change_shape_refuses(model: nn.Module, kv: Attachment, operation: str) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    argument: dict[str, tuple[Any, ...]] = {
        "crop": (-3,), "reset": (), "batch_repeat_interleave": (2,),
        "reorder_cache": (torch.tensor([0]),), "batch_select_indices": (torch.tensor([0]),),
    }  # fmt: skip
    with pytest.raises(Unsupported, match="expected plain greedy or sampled generation"):
        getattr(cache, operation)(*argument[operation])
    assert torch.equal(greedy(model, ids, cache), stock(model, ids))


def test_embeddings_in_place_of_ids_are_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    embeddings = model.get_input_embeddings()(ids)  # type: ignore[operator]
    with pytest.raises(Unsupported, match="no input_ids"):
        model(inputs_embeds=embeddings[:, -1:], past_key_values=cache)
    message = right_or_refused(
        lambda: model.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=4),  # type: ignore[operator]
        lambda: stock(model, ids, 4),
    )
    assert message != "right"


# -- models whose attention is something else


SCALED = {"rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 2048}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "softcap (gemma2)": ("gemma2", {"head_dim": 16, "attn_logit_softcapping": 50.0}, "softcaps attention logits"),
    "MLA (deepseek_v3)": (
        "deepseek_v3",
        {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
         "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
         "num_key_value_heads": 4, "first_k_dense_replace": 1},
        "latent attention",
    ),
    "recurrent layers (qwen3_next)": (
        "qwen3_next",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
         "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
        "recurrent",
    ),
    "recurrent layers (mamba)": ("mamba", {"state_size": 8}, "attach"),
    "recurrent layers (jamba)": (
        "jamba",
        {"num_experts": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        "not supported yet",
    ),
    "chunked attention (llama4)": (
        "llama4_text",
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 64},
        "chunked",
    ),
    "dynamic RoPE": ("llama", {"rope_parameters": {"rope_type": "dynamic", **SCALED}}, "'dynamic'"),
    "longrope": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **SCALED}},
        "'longrope'",
    ),
    "longrope (phi3)": (
        "phi3",
        {"original_max_position_embeddings": 2048,
         "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **SCALED}},
        "'longrope'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_a_model_that_would_be_wrong_is_refused_before_it_runs(
    db: KVDB, kind: str, changes: dict[str, Any], reason: str
) -> None:
    model = tiny(kind, **changes)
    with pytest.raises(Unsupported, match=reason):
        attach(model, db, exact=True)


def test_attention_sinks_are_refused_at_the_first_pass_and_nothing_is_stored(db: KVDB) -> None:
    model = gpt_oss()
    with attach(model, db, exact=True) as kv:
        with pytest.raises(Unsupported, match="s_aux"):
            kv.cache(prompt(50))
        assert db.sequences() == []


def gpt_oss(layers: tuple[str, str] = ("sliding_attention", "full_attention")) -> nn.Module:
    model = tiny(
        "gpt_oss", head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=32,
        layer_types=list(layers), rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.sinks.fill_(8.0)
    return model


def test_attention_sinks_are_not_ignored_in_sliding_layers_alone(db: KVDB) -> None:
    """No full layer is there to notice them."""
    model, ids = gpt_oss(("sliding_attention",) * 2), prompt(100)
    with attach(model, db, exact=True) as kv, pytest.raises(Unsupported, match="s_aux"):
        kv.cache(ids)


def test_attention_sinks_are_not_ignored_with_a_stock_cache_while_attached(db: KVDB) -> None:
    model, ids = gpt_oss(), prompt(100)
    with attach(model, db, exact=True), pytest.raises(Unsupported, match="s_aux"):
        stock(model, ids)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_rope_scaling_that_does_not_depend_on_length_is_supported(db: KVDB, kind: str) -> None:
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    model, ids = tiny(rope_parameters={"rope_type": kind, **SCALED, **extra}), prompt(1100)
    with attach(model, db, exact=True) as kv:
        kv.cache(ids)
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == 1099
        assert torch.equal(greedy(model, ids, cache), stock(model, ids))


# -- another attention than KVDB's


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_implementation_set_inside_the_block_never_computes_with_the_handle(
    model: nn.Module, db: KVDB, other: str
) -> None:
    ids = prompt(50)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        model.set_attn_implementation(other)  # type: ignore[operator]
        with pytest.raises(Unsupported, match="live in a KVDB store, expected KVDB's attention function"):
            greedy(model, ids, cache)
    assert implementation(model) == "sdpa"
    assert torch.equal(stock(model, ids), stock(tiny(), ids))


def implementation(model: nn.Module) -> str:
    return str(model.config._attn_implementation)  # type: ignore[union-attr]


def test_the_inner_model_run_directly_is_refused(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(50)
    cache = kv.cache(ids)
    with pytest.raises(Unsupported, match="outside a forward pass of the attached model"):
        model.model(input_ids=ids[:, -1:], past_key_values=cache)  # type: ignore[operator]
    assert torch.equal(greedy(model, ids, cache), stock(model, ids))


def test_another_model_with_this_cache_is_refused(model: nn.Module, kv: Attachment) -> None:
    ids, other = prompt(50), tiny(seed=1)
    cache = kv.cache(ids)
    with pytest.raises(Unsupported, match="outside a forward pass of the attached model"):
        greedy(other, ids, cache)


def test_a_cache_used_after_the_block_is_refused(model: nn.Module, db: KVDB) -> None:
    ids = prompt(50)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
    with pytest.raises(KVDBError):
        greedy(model, ids, cache)
    with attach(model, db, exact=True), pytest.raises(KVDBError, match="another attachment"):
        greedy(model, ids, cache)
    for call in (lambda: kv.cache(ids), lambda: kv.load("x")):
        with pytest.raises(InvalidInput, match="outside its 'with' block"):
            call()


def test_a_cache_saved_after_the_block_is_refused(model: nn.Module, db: KVDB) -> None:
    ids = prompt(50)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        greedy(model, ids, cache)
    with pytest.raises(InvalidInput):
        kv.save(cache, name="late")
    assert [s.name for s in db.sequences()] == [None]


def test_a_second_attachment_inside_the_first_is_refused_and_harms_nothing(model: nn.Module, db: KVDB) -> None:
    ids = prompt(50)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        with pytest.raises(InvalidInput, match="attached already"), attach(model, db, budget=0.5):
            pass
        assert implementation(model) == IMPLEMENTATION
        assert torch.equal(greedy(model, ids, cache), stock(tiny(), ids))


def test_two_models_attached_at_once_do_not_meet(model: nn.Module, db: KVDB) -> None:
    ids, other = prompt(50), tiny(seed=1)
    expected, of_other = stock(model, ids), stock(other, ids)
    with attach(model, db, exact=True) as one, attach(other, db, exact=True) as two:
        first, second = one.cache(ids), two.cache(ids)
        with pytest.raises(InvalidInput, match="another attachment"):
            model(input_ids=ids[:, -1:], past_key_values=second)
        assert torch.equal(greedy(model, ids, first), expected)
        assert torch.equal(greedy(other, ids, second), of_other)


# -- other caches while attached


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_stock_cache_while_attached_gets_ordinary_output(db: KVDB, architecture: str) -> None:
    model, ids = tiny(architecture), prompt(300, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    options = {"attention_mask": mask}
    expected = [stock(model, ids), stock(model, ids, **options), stock(model, ids, num_beams=3)]
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        found = [stock(model, ids), stock(model, ids, **options), stock(model, ids, num_beams=3)]
        plain = model(input_ids=ids, attention_mask=mask).logits
        mine = greedy(model, ids, cache)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mine, expected[0])
    assert torch.equal(plain, model(input_ids=ids, attention_mask=mask).logits)


@contextmanager
def interrupted(model: nn.Module, error: BaseException) -> Iterator[None]:
    """The second layer raises."""

    def stop(*_: Any) -> None:
        raise error

    hook = model.model.layers[1].register_forward_pre_hook(stop)  # type: ignore[union-attr,index,operator]
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["Ctrl-C", "error"])
def test_a_stock_cache_after_an_interrupted_pass_gets_ordinary_output(
    model: nn.Module, db: KVDB, error: BaseException
) -> None:
    """A pass that never ended must not leave the next one without its mask."""
    ids = prompt(60, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    expected = stock_answer(model, ids, 1), stock(model, ids, attention_mask=mask)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        with interrupted(model, error), pytest.raises(type(error)):
            greedy(model, ids, cache)
        assert torch.equal(stock(model, ids, attention_mask=mask), expected[1])
    with attach(model, db, exact=True):
        assert torch.equal(stock(model, ids, attention_mask=mask), expected[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["Ctrl-C", "error"])
def test_a_failing_pass_makes_the_cache_unusable(model: nn.Module, db: KVDB, error: BaseException) -> None:
    """Its layers are of different lengths: going on would be silently wrong."""
    ids = prompt(60)
    with attach(model, db, exact=True) as kv:
        cache = kv.cache(ids)
        with interrupted(model, error), pytest.raises(type(error)):
            greedy(model, ids, cache)
        with pytest.raises(InvalidInput, match="failed half-way"):
            greedy(model, ids, cache)
        with pytest.raises(InvalidInput, match="failed half-way"):
            kv.save(cache, name="broken")
        with pytest.raises(KVDBError):
            model.model(input_ids=ids[:, -1:], past_key_values=cache)  # type: ignore[operator]
        again = kv.cache(ids)  # what was stored before is whole
        assert again.metrics.reused_tokens == 59
        assert torch.equal(greedy(model, ids, again), stock(tiny(), ids))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["Ctrl-C", "error"])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_interrupted_prefill_keeps_whole_blocks_or_nothing(
    model: nn.Module, db: KVDB, error: BaseException, batch: int
) -> None:
    """Inside the second layer of the third block: the first layer has already taken it."""
    ids = prompt(2500, batch=batch)
    seen: list[int] = []

    def stop(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise error

    with attach(model, db, exact=True) as kv:
        hook = model.model.layers[1].register_forward_pre_hook(stop)  # type: ignore[union-attr,index,operator]
        with pytest.raises(type(error)) as caught:
            kv.cache(ids)
        hook.remove()
        assert caught.value is error
        assert db.check() == []
        kept = {kv.match(row).tokens for row in ids}
        assert kept <= ({1024, 2048} if isinstance(error, KeyboardInterrupt) else {0})
        cache = kv.cache(ids)
        assert cache.metrics.reused_tokens == min(kept)
        assert torch.equal(greedy(model, ids, cache), stock(tiny(), ids))


# -- what attach changed is put back


def state(model: nn.Module) -> tuple[Any, ...]:
    return (
        implementation(model),
        dict(model._forward_hooks),
        dict(model._forward_pre_hooks),
        dict(vars(model)).get("prepare_inputs_for_generation"),
    )


class Boom(Exception):
    pass


def leave_with(error: BaseException, model: nn.Module, db: KVDB) -> None:
    with attach(model, db, exact=True) as kv:
        kv.cache(prompt(50))
        raise error


@pytest.mark.parametrize("implementation_before", ["sdpa", "eager"])
def test_everything_is_put_back_at_the_end(db: KVDB, implementation_before: str) -> None:
    model, ids = tiny(), prompt(50)
    model.set_attn_implementation(implementation_before)  # type: ignore[operator]
    before, expected = state(model), stock(model, ids)
    with attach(model, db, exact=True) as kv:
        greedy(model, ids, kv.cache(ids))
    assert state(model) == before
    for raised in (Boom(), KeyboardInterrupt()):
        with pytest.raises(type(raised)):
            leave_with(raised, model, db)
        assert state(model) == before
    with pytest.raises(Boom), attach(model, db, exact=True) as kv, interrupted(model, Boom()):
        kv.cache(prompt(50, seed=1))
    assert state(model) == before
    assert torch.equal(stock(model, ids), expected)


def test_a_users_own_prepare_function_is_used_and_put_back(db: KVDB) -> None:
    model, ids = tiny(), prompt(50)
    calls = []
    original = model.prepare_inputs_for_generation

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)  # type: ignore[operator]

    model.prepare_inputs_for_generation = own  # type: ignore[assignment]
    with attach(model, db, exact=True) as kv:
        assert torch.equal(greedy(model, ids, kv.cache(ids)), stock(tiny(), ids))
    assert calls
    assert model.prepare_inputs_for_generation is own


def test_importing_the_runtime_touches_no_table_of_transformers() -> None:
    from helpers import finish, python

    code = """
import kvdb.runtime
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
assert "kvdb" not in AttentionInterface().valid_keys()
assert "kvdb" not in AttentionMaskInterface().valid_keys()
print("clean")
"""
    assert finish(python(code)).strip() == "clean"


# -- wrong calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact": True, "budget": 0.1}, "expected one of them"),
        ({"budget": 0}, "budget: 0 tokens"),
        ({"budget": 1.5}, "budget: 1.5"),
        ({"fidelity": "roughly"}, "fidelity is 'roughly'"),
        ({"selector": "oracle"}, "selector is 'oracle'"),
    ],
)
def test_impossible_options_are_refused(model: nn.Module, db: KVDB, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        attach(model, db, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.empty(1, 0, dtype=torch.int64),
        torch.ones(1, 3),
        torch.ones(1, 1, 3, dtype=torch.int64),
        torch.tensor([[-1, 2]]),
    ],
    ids=["empty", "floats", "three dimensions", "negative"],
)
def test_what_is_no_prompt_is_refused(kv: Attachment, wrong: Tensor) -> None:
    with pytest.raises(InvalidInput, match="input_ids"):
        kv.cache(wrong)


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(db: KVDB) -> None:
    model = tiny(max_position_embeddings=100)
    with attach(model, db, exact=True) as kv:
        with pytest.raises(InvalidInput, match="prompt of 101 tokens, expected at most 100, the model's context"):
            kv.cache(prompt(101))
        assert torch.equal(greedy(model, prompt(100), kv.cache(prompt(100)), 1), stock(model, prompt(100), 1))


def test_a_prompt_of_one_token_works(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(1)
    cache = kv.cache(ids)
    assert cache.length == 0
    assert torch.equal(greedy(model, ids, cache), stock(model, ids))


def test_sampling_with_a_seed_draws_what_the_stock_run_draws(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(60)

    def sampled(cache: Any) -> Tensor:
        torch.manual_seed(5)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=True, top_k=0, temperature=1.0)  # type: ignore[operator]
        return out[:, 60:]

    mine = sampled(kv.cache(ids))
    assert torch.equal(mine, sampled(DynamicCache(config=model.config)))


def test_scores_of_a_plain_loop_of_forward_passes_are_the_stock_ones(model: nn.Module, kv: Attachment) -> None:
    ids = prompt(60)
    cache, dense = kv.cache(ids), stock_answer(model, ids, 5)
    assert torch.equal(answer(model, ids, cache, 5).tokens, dense.tokens)
