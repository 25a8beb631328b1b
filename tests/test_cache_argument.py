"""A cache is taken under its new name and its old one, on every version of transformers: used, or an error."""

from __future__ import annotations

import warnings

import pytest
import torch
from running import CUT_TOLERANCE, close, close_memory
from tiny import patched_model, randomise, tiny_model, tokens

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, detach
from deltamem_tool._compat import CACHE_ARGUMENTS, cache_argument, generation_cache_argument, take_cache
from deltamem_tool.errors import MemoryStateError


@pytest.fixture(autouse=True)
def no_deprecation():
    """Nobody is told of a name that we have renamed for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        yield


def _plain(model):
    return model


def _peft(model):
    peft = pytest.importorskip("peft")
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
@pytest.mark.parametrize("wrapped", WRAPPED)
@torch.no_grad()
def test_a_cache_is_used_under_each_name(model, wrapped, call, name):
    ids, start = tokens(2, 5), _started(model)
    expected = MemoryCache(model, memory=start)
    model(ids, cache=expected)
    cache = MemoryCache(model, memory=start)
    CALLS[call](WRAPPED[wrapped](model), ids, **{name: cache})
    assert cache.get_seq_length() == 5
    close_memory(cache.memory, expected.memory)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrapped", WRAPPED)
@torch.no_grad()
def test_two_names_are_an_error_and_neither_cache_has_changed(model, wrapped, call):
    first, second = MemoryCache(model, memory=_started(model)), MemoryCache(model)
    before = first.memory
    with pytest.raises(MemoryStateError, match="Two caches were given: cache= and past_key_values="):
        CALLS[call](WRAPPED[wrapped](model), tokens(2, 5), cache=first, past_key_values=second)
    assert first.memory is before and second.memory is None
    assert first.get_seq_length() == second.get_seq_length() == 0


@torch.no_grad()
def test_a_cache_by_its_place_and_by_a_name_are_two(model):
    names = [name for name in type(model).forward.__code__.co_varnames if name in CACHE_ARGUMENTS]
    place = ["input_ids", "attention_mask", "position_ids"]
    cache = MemoryCache(model)
    logits = model(tokens(2, 5), *[None] * (len(place) - 1), cache).logits
    assert cache.get_seq_length() == 5, names
    close(logits, model(tokens(2, 5)).logits, CUT_TOLERANCE)
    with pytest.raises(MemoryStateError, match="Two caches"):
        model(tokens(2, 5), None, None, cache, cache=MemoryCache(model), past_key_values=MemoryCache(model))


@torch.no_grad()
def test_the_decoder_takes_every_name(model):
    for name in CACHE_ARGUMENTS:
        cache = MemoryCache(model)
        model.base_model(tokens(2, 5), **{name: cache})
        assert cache.memory is not None and cache.get_seq_length() == 5
    with pytest.raises(MemoryStateError, match="Two caches"):
        model.base_model(tokens(2, 5), cache=MemoryCache(model), past_key_values=MemoryCache(model))


@torch.no_grad()
def test_a_name_without_a_cache_is_no_second_one(model):
    cache = MemoryCache(model)
    model(tokens(2, 5), cache=cache, past_key_values=None)
    model(tokens(2, 1), cache=None, past_key_values=cache)
    assert cache.get_seq_length() == 6


def test_detach_gives_back_what_was_on_the_model():
    model, calls = tiny_model(), []
    own = model.forward

    def forward(*args, **kwargs):  # as accelerate puts one on a model
        calls.append(kwargs)
        return own(*args, **kwargs)

    model.forward = forward
    randomise(attach(model, DeltaMemConfig()))
    cache = MemoryCache(model)
    model(tokens(2, 5), cache=cache)
    assert cache.memory is not None and len(calls) == 1
    detach(model)
    assert model.forward is forward
    del model.forward
    assert not {"forward", "generate", "prepare_inputs_for_generation"} & vars(model).keys()


def test_what_a_function_calls_its_cache():
    assert cache_argument(lambda input_ids, cache=None: None) == "cache"
    assert cache_argument(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert cache_argument(lambda **kwargs: None) == generation_cache_argument() == cache_argument(tiny_model().forward)


def test_take_cache():
    given = {"past_key_values": None, "cache_params": 1, "use_cache": True}
    assert take_cache(given) == 1 and given == {"use_cache": True}
    assert take_cache(given) is None
    with pytest.raises(MemoryStateError, match="cache= and cache_params="):
        take_cache({"cache": 1, "cache_params": 1})
