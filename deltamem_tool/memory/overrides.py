"""The methods of a model that `attach` overrides: `generate`, `forward`, and methods that `generate` calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from deltamem_tool._compat import (
    PREPARE_CACHE,
    STOPPING_CRITERIA,
    GenerationMode,
    cache_argument,
    generation_cache_argument,
    with_one_cache,
)
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.attachment import attachment_of
from deltamem_tool.memory.cache import MemoryCache, token_removal_error
from deltamem_tool.memory.decoder_call import is_memory_off
from deltamem_tool.memory.masks import check_writes_tokens, valid_tokens

Method = Callable[..., Any]
_CACHE = "_deltamem_cache"  # where the cache waits, in a call's generation config, for the call's stopping criteria
Methods = Mapping[str, Callable[[Method], Method]]  # by the name of the method that each one calls


def _with_memory_cache(original: Method) -> Method:
    """Give `generate` a cache with a memory if it has none; repeat the rows of one that was passed for beams."""
    argument = generation_cache_argument()

    @functools.wraps(original)
    def prepare(
        self: PreTrainedModel,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        passed = model_kwargs.get(argument)
        remembers = isinstance(passed, MemoryCache) or (passed is None and not is_memory_off())
        if remembers and generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise token_removal_error()
        original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        copies = 1
        if passed is None and generation_config.use_cache and not is_memory_off():
            check_writes_tokens(attachment_of(self).adapter.config)
            if generation_config.cache_implementation not in (None, "dynamic", "static"):
                raise MemoryStateError(
                    f"A cache of the kind {generation_config.cache_implementation!r} cannot hold the memory.",
                    "",
                    'Leave cache_implementation out, or use "static".',
                )
            cache = MemoryCache(self)
            if generation_config.cache_implementation == "static":
                cache.layers = model_kwargs[argument].layers  # `generate` has chosen their length
            model_kwargs[argument] = cache
        elif isinstance(passed, MemoryCache):
            if not generation_config.use_cache:
                raise MemoryStateError(
                    "A MemoryCache was passed with use_cache=False.",
                    "Every step would feed the whole text into the cache again.",
                    "Leave one of the two out.",
                )
            tagged = None if passed.segment_tags is None else passed.segment_tags.shape[0]
            if (tagged if passed.memory is None else passed.memory.batch_size) == batch_size:
                copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        prepared = model_kwargs.get(argument)
        if isinstance(prepared, MemoryCache):
            pieces = generation_config.prefill_chunk_size is not None
            prepared.begin_generation(None if pieces else generation_config.max_length, copies)
            setattr(generation_config, _CACHE, prepared)  # this call's own copy

    return prepare


class _WatchedCriteria(StoppingCriteriaList):
    """Stopping criteria of `generate` that tell the cache which rows have ended."""

    def __init__(self, criteria: Iterable[StoppingCriteria], cache: MemoryCache) -> None:
        super().__init__(criteria)
        self._cache = cache

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._cache.finish(done)
        return done


def _with_watched_criteria(original: Method) -> Method:
    """Tell the cache which rows have ended: `generate` goes on feeding them padding."""

    @functools.wraps(original)
    def criteria(
        self: PreTrainedModel, generation_config: GenerationConfig, *args: Any, **kwargs: Any
    ) -> StoppingCriteriaList:
        criteria: StoppingCriteriaList = original(self, generation_config, *args, **kwargs)
        cache = vars(generation_config).pop(_CACHE, None)
        # Beams are judged before the best are chosen, and those that have ended are not fed.
        beams = (generation_config.num_beams or 1) > 1
        return criteria if cache is None or beams else _WatchedCriteria(criteria, cache)

    return criteria


def _with_announced_step(original: Method) -> Method:
    """Before every call of `generate`, tell the cache which of the tokens are padding.

    The model gets the mask over a static cache in a form that does not say.
    """
    argument = cache_argument(original)
    parameters = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)  # `generate` looks at the signature
    def prepare(
        self: PreTrainedModel,
        *args: Any,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        args, kwargs = with_one_cache(parameters, argument, args, kwargs)
        cache = kwargs.get(argument)
        given = args[0] if args else kwargs["input_ids"]
        inputs = original(self, *args, attention_mask=attention_mask, **kwargs)
        if isinstance(cache, MemoryCache):
            tokens = inputs.get("input_ids")
            content = tokens if tokens is not None else inputs["inputs_embeds"]
            valid = valid_tokens(attention_mask, len(content), content.shape[1], cache.get_seq_length())
            valid = None if valid is None else valid.to(content.device)
            cache.begin_step(content, valid, given.shape[1])
        return inputs

    return prepare


def _with_one_cache(original: Method) -> Method:
    """Let `forward` and `generate` take the cache under any of its names.

    Here and not in a hook: PEFT and torch.compile call `forward` itself.
    """
    argument = cache_argument(original)
    parameters = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_one_cache(parameters, argument, args, kwargs)
        return original(self, *args, **kwargs)

    return call


FORWARD: Methods = {"forward": _with_one_cache}
GENERATION: Methods = {
    **FORWARD,
    "generate": _with_one_cache,
    "prepare_inputs_for_generation": _with_announced_step,
    PREPARE_CACHE: _with_memory_cache,
    STOPPING_CRITERIA: _with_watched_criteria,
}
_BEFORE = "_deltamem_before"  # where a module keeps methods that were set on it before ours


def override(module: nn.Module, methods: Methods) -> dict[str, MethodType]:
    """Set `methods` on `module`, and return them by name.

    They call the methods that were set before, such as a `forward` of accelerate's.
    """
    before = {name: vars(module)[name] for name in methods if name in vars(module)}
    if before:
        setattr(module, _BEFORE, {**getattr(module, _BEFORE, {}), **before})
    ours = {}
    for name, method in methods.items():
        original = _as_method(name, before[name]) if name in before else getattr(type(module), name)
        ours[name] = MethodType(method(original), module)
    for name, method in ours.items():
        setattr(module, name, method)
    return ours


def restore(module: nn.Module, ours: Mapping[str, MethodType]) -> None:
    """Remove `ours` again.

    A method that has been covered since, for example by torch.compile, stays below and only renames the cache.
    """
    before = vars(module).get(_BEFORE, {})
    for name, method in ours.items():
        if vars(module).get(name) is method:
            delattr(module, name)
            if name in before:
                setattr(module, name, before.pop(name))
    if _BEFORE in vars(module) and not before:
        delattr(module, _BEFORE)


def _as_method(name: str, function: Method) -> Method:
    """Turn a function that was set on a module, and does not take it, into a method.

    It is looked up in each call: a deep copy of the module has its own.
    """

    @functools.wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, _BEFORE)[name](*args, **kwargs)

    of_function = inspect.signature(function)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = of_function.replace(parameters=[this, *of_function.parameters.values()])  # type: ignore[attr-defined]
    return method
