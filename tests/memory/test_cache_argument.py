"""A cache is accepted as `cache` and as `past_key_values`, on every version of transformers."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings

import pytest
import torch
from helpers.model_runs import close_memory
from helpers.tiny import patched_model, randomise, tiny_model, tokens

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, detach
from deltamem_tool._compat import CACHE_ARGUMENTS, cache_argument, generation_cache_argument, with_one_cache
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.decoder_call import without_memory


@pytest.fixture(autouse=True)
def no_deprecation():
    """No deprecation warning reaches users for a name that the package renames for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


def _plain(model):
    return model


def _peft(model):
    import peft

    from deltamem_tool._compat import peft_model

    return peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))


def _compiled(model):
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


def _compiled_forward(model):
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


WRAPPED = {"plain": _plain, "peft": _peft, "compiled": _compiled, "compiled forward": _compiled_forward}
CALL_STYLES = [pytest.param(name, marks=pytest.mark.slow if "compiled" in name else ()) for name in WRAPPED]
CALLS = {
    "call": lambda model, ids, **cache: model(ids, **cache),
    "forward": lambda model, ids, **cache: model.forward(ids, **cache),
    "generate": lambda model, ids, **cache: model.generate(input_ids=ids, max_new_tokens=1, do_sample=False, **cache),
}


def _started(model):
    """A memory that is not zero."""
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(2, 6, seed=3), cache=cache)
    return cache.memory


@pytest.fixture
def model():
    return patched_model()


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrapped", CALL_STYLES)
@torch.no_grad()
def test_a_cache_is_accepted_under_both_names(model, wrapped, call, name):
    ids, start = tokens(2, 5), _started(model)
    expected = MemoryCache(model, memory=start)
    model(ids, cache=expected)
    cache = MemoryCache(model, memory=start)
    CALLS[call](WRAPPED[wrapped](model), ids, **{name: cache})
    assert cache.get_seq_length() == 5
    close_memory(cache.memory, expected.memory)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrapped", CALL_STYLES)
@torch.no_grad()
def test_passing_both_names_raises_and_changes_neither_cache(model, wrapped, call):
    first, second = MemoryCache(model, memory=_started(model)), MemoryCache(model)
    before = first.memory
    with pytest.raises(MemoryStateError, match="Two caches were given: cache= and past_key_values="):
        CALLS[call](WRAPPED[wrapped](model), tokens(2, 5), cache=first, past_key_values=second)
    assert first.memory is before and second.memory is None
    assert first.get_seq_length() == second.get_seq_length() == 0


def _call_positionally(module, cache, /, **others):
    return module(tokens(2, 5), None, None, cache, **others)


@pytest.mark.parametrize("part", ["model", "decoder"])
@torch.no_grad()
def test_a_cache_can_be_a_positional_argument(model, part):
    module = model if part == "model" else model.base_model
    cache = MemoryCache(model)
    _call_positionally(module, cache)
    assert cache.get_seq_length() == 5 and cache.memory is not None
    _call_positionally(module, None, cache=cache)
    _call_positionally(module, cache, past_key_values=None)
    assert cache.get_seq_length() == 15


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
@pytest.mark.parametrize("part", ["model", "decoder"])
@torch.no_grad()
def test_a_positional_and_a_named_cache_together_raise(model, part, name):
    module, caches = model if part == "model" else model.base_model, (MemoryCache(model), MemoryCache(model))
    with pytest.raises(MemoryStateError, match=f"Two caches were given: {name}= and one by its place"):
        _call_positionally(module, caches[0], **{name: caches[1]})
    assert all(cache.memory is None for cache in caches)


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_any_argument_passed_twice_raises(model, part):
    module = model if part == "model" else model.base_model
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        _call_positionally(module, MemoryCache(model), input_ids=tokens(2, 5))


@torch.no_grad()
def test_a_base_model_that_wraps_its_decoder_accepts_both_names():
    """OPT's own `forward` calls the decoder that has the hooks."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(vocab_size=99, word_embed_proj_dim=16, max_position_embeddings=32, **sizes)).eval()
    attach(opt, DeltaMemConfig(rank=4))
    for name in CACHE_ARGUMENTS:
        cache = MemoryCache(opt)
        opt.base_model(tokens(2, 5), **{name: cache})
        assert cache.get_seq_length() == 5 and cache.memory is not None
    with pytest.raises(MemoryStateError, match="Two caches"):
        opt.base_model(tokens(2, 5), cache=MemoryCache(opt), past_key_values=MemoryCache(opt))
    detach(opt)
    assert "forward" not in vars(opt.base_model)


@torch.no_grad()
def test_within_without_memory_a_cache_is_still_used(model):
    for name in CACHE_ARGUMENTS:
        for module in (model, model.base_model):
            cache = MemoryCache(model)
            with without_memory():
                module(tokens(2, 5), **{name: cache})
            assert cache.get_seq_length() == 5 and cache.memory is None


@torch.no_grad()
def test_the_decoder_accepts_both_names(model):
    for name in CACHE_ARGUMENTS:
        cache = MemoryCache(model)
        model.base_model(tokens(2, 5), **{name: cache})
        assert cache.memory is not None and cache.get_seq_length() == 5
    with pytest.raises(MemoryStateError, match="Two caches"):
        model.base_model(tokens(2, 5), cache=MemoryCache(model), past_key_values=MemoryCache(model))


@torch.no_grad()
def test_a_none_cache_does_not_count_as_a_second_cache(model):
    cache = MemoryCache(model)
    model(tokens(2, 5), cache=cache, past_key_values=None)
    model(tokens(2, 1), cache=None, past_key_values=cache)
    assert cache.get_seq_length() == 6


class Counted:
    """A `forward` set on a model instance, as accelerate does, which does not receive the model."""

    def __init__(self, model) -> None:
        self.own, self.calls = model.forward, 0
        functools.update_wrapper(self, self.own)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.own(*args, **kwargs)


@torch.no_grad()
def test_a_forward_replaced_before_attach_still_runs():
    model = tiny_model()
    model.forward = before = Counted(model)
    randomise(attach(model, DeltaMemConfig()))
    names = list(inspect.signature(model.forward).parameters)
    assert names == list(inspect.signature(before).parameters) and names[0] == "input_ids"
    cache = MemoryCache(model)
    model(tokens(2, 5), cache=cache)
    assert cache.memory is not None and before.calls == 1
    copied = copy.deepcopy(model)
    copied.lm_head.weight.zero_()
    with without_memory():
        assert not copied(tokens(2, 5)).logits.any(), "the copy computes with the weights of the original"
    detach(model)
    assert model.forward is before
    del model.forward
    assert not {"forward", "generate", "prepare_inputs_for_generation"} & vars(model).keys()


@torch.no_grad()
def test_a_forward_replaced_after_attach_survives_detach():
    model = tiny_model()
    plain = model(tokens(2, 5)).logits
    attach(model, DeltaMemConfig(delta_init="random"))
    model.forward = after = Counted(model)
    cache = MemoryCache(model)
    model(tokens(2, 5), cache=cache)
    assert cache.memory is not None and after.calls == 1
    detach(model)
    assert model.forward is after and torch.equal(model(tokens(2, 5)).logits, plain)


def test_accelerate_hooks_can_be_added_and_removed():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny_model()
    expected = model(tokens(2, 5)).logits
    add_hook_to_module(model, ModelHook())
    attach(model, DeltaMemConfig())
    remove_hook_from_module(model)
    detach(model)
    assert torch.equal(model(tokens(2, 5)).logits, expected)
    attach(model, DeltaMemConfig())
    add_hook_to_module(model, ModelHook())
    detach(model)
    remove_hook_from_module(model)
    assert torch.equal(model(tokens(2, 5)).logits, expected)


def test_cache_argument_finds_the_name_in_a_signature():
    assert cache_argument(lambda input_ids, cache=None: None) == "cache"
    assert cache_argument(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert cache_argument(lambda **kwargs: None) == generation_cache_argument() == cache_argument(tiny_model().forward)


def test_with_one_cache_merges_both_names():
    names = ["input_ids", "cache"]
    assert with_one_cache(names, "cache", (1,), {"past_key_values": 2, "use_cache": True}) == (
        (1,),
        {"use_cache": True, "cache": 2},
    )
    assert with_one_cache(names, "cache", (1, None), {"cache_params": 2}) == ((1, 2), {})
    assert with_one_cache(names, "cache", (1, 2), {"cache": None}) == ((1, 2), {})
    assert with_one_cache(["kwargs"], "cache", (1,), {"cache": 2}) == ((1,), {"cache": 2})
    with pytest.raises(MemoryStateError, match="cache= and cache_params="):
        with_one_cache(names, "cache", (1,), {"cache": 1, "cache_params": 1})
