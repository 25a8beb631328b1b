"""The methods of a model that a memory overrides: what `generate` and `forward` do beside the model's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deltamem_tool._compat import PREPARE_CACHE, cache_argument, generation_cache_argument, stop_tokens, with_one_cache
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.attached import patch_of
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.decoder_call import is_off
from deltamem_tool.memory.masks import refuse_without_segments, valid_tokens


def _with_memory_cache(own: Callable):
    """`generate` without a cache gets one with a memory; one that was given is repeated for beams."""
    argument = generation_cache_argument()

    @functools.wraps(own)
    def prepare(
        self: PreTrainedModel, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        given = model_kwargs.get(argument)
        own(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if given is None and generation_config.use_cache and not is_off():
            refuse_without_segments(patch_of(self).adapter.config)
            if generation_config.cache_implementation not in (None, "dynamic", "static"):
                raise MemoryStateError(
                    f"A cache of the kind {generation_config.cache_implementation!r} has no place for the memory.",
                    "",
                    'Leave cache_implementation out, or use "static".',
                )
            cache = MemoryCache(self)
            if generation_config.cache_implementation == "static":
                cache.layers = model_kwargs[argument].layers  # `generate` has chosen their length
            model_kwargs[argument] = cache
        elif isinstance(given, MemoryCache):
            if not generation_config.use_cache:
                raise MemoryStateError(
                    "A MemoryCache was given with use_cache=False.",
                    "Every step would feed the whole text into it again.",
                    "Leave one of the two out.",
                )
            tagged = None if given.segment_tags is None else given.segment_tags.shape[0]
            if (tagged if given.memory is None else given.memory.batch_size) == batch_size:
                copies = max(generation_config.num_beams, generation_config.num_return_sequences)
                given.batch_repeat_interleave(copies)
        cache = model_kwargs.get(argument)
        if isinstance(cache, MemoryCache):
            cache.begin_generation(stop_tokens(generation_config))

    return prepare


def _with_announced_step(own: Callable):
    """Before every call, `generate` tells the cache whether it feeds the prompt or what it has produced, and which of
    these tokens are padding: the model gets the mask over a static cache in a form that does not say."""
    argument = cache_argument(own)
    parameters = [name for name in inspect.signature(own).parameters if name != "self"]

    @functools.wraps(own)  # `generate` looks at the signature
    def prepare(self: PreTrainedModel, *args, attention_mask=None, is_first_iteration: bool = False, **kwargs):
        args, kwargs = with_one_cache(parameters, argument, args, kwargs)
        cache = kwargs.get(argument)
        kwargs |= {"attention_mask": attention_mask, "is_first_iteration": is_first_iteration}
        inputs = own(self, *args, **kwargs)
        if isinstance(cache, MemoryCache):
            tokens = inputs.get("input_ids")
            content = tokens if tokens is not None else inputs["inputs_embeds"]
            valid = valid_tokens(attention_mask, len(content), content.shape[1], cache.get_seq_length())
            valid = None if valid is None else valid.to(content.device)
            cache.begin_step(None if is_first_iteration else tokens, valid)
        return inputs

    return prepare


def _with_one_cache(own: Callable):
    """`forward` and `generate` take the cache under any of its names. Here and not in a hook: PEFT and torch.compile
    call `forward` itself."""
    argument = cache_argument(own)
    parameters = [name for name in inspect.signature(own).parameters if name != "self"]

    @functools.wraps(own)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_one_cache(parameters, argument, args, kwargs)
        return own(self, *args, **kwargs)

    return call


_OVERRIDES: dict[str, Callable[[Callable], Callable]] = {
    "forward": _with_one_cache,
    "generate": _with_one_cache,
    "prepare_inputs_for_generation": _with_announced_step,
    PREPARE_CACHE: _with_memory_cache,
}
_BEFORE = "_deltamem_before"  # where a module keeps methods that were set on it before ours


def override(module: nn.Module, names: Iterable[str] = tuple(_OVERRIDES)) -> dict[str, MethodType]:
    """Set our methods on `module`, and return them by name. What was set on it before, such as a `forward` of
    accelerate's, is called by them."""
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    if before:
        setattr(module, _BEFORE, before)
    ours = {}
    for name in names:
        own = _as_method(name, before[name]) if name in before else getattr(type(module), name)
        ours[name] = MethodType(_OVERRIDES[name](own), module)
        setattr(module, name, ours[name])
    return ours


def restore(module: nn.Module, ours: Mapping[str, MethodType]) -> None:
    """Take `ours` off again. One that somebody else has covered since, with torch.compile say, stays below it and only
    renames the cache."""
    left = {name for name, method in ours.items() if vars(module).get(name) is not method}
    before = getattr(module, _BEFORE, {})
    for name in ours.keys() - left:
        delattr(module, name)
        if name in before:
            setattr(module, name, before[name])
    if before and not left & before.keys():
        delattr(module, _BEFORE)


def _as_method(name: str, function: Callable) -> Callable:
    """A function that was set on a module, and does not take it, in the form of a method. It is looked up in each call:
    a deep copy of the module has its own."""

    @functools.wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, _BEFORE)[name](*args, **kwargs)

    of_function = inspect.signature(function)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = of_function.replace(parameters=[this, *of_function.parameters.values()])  # type: ignore[attr-defined]
    return method
