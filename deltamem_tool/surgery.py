"""Attach a memory to a causal language model with hooks, and take it off again.

The base keeps its modules, names and weights. While the decoder runs, one `DecoderCall` (of this thread, so that
threads do not meet) holds the states it started from and the states it has made; the hooks read and fill it, and the
cache takes the new states when the decoder has finished. Nothing about a conversation is kept on the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deltamem_tool._compat import PREPARE_CACHE, cache_argument, generation_cache_argument, stop_tokens, take_cache
from deltamem_tool.adapter_module import DeltaMemAdapter
from deltamem_tool.architectures import AttentionLayer, attention_layers, layers_at, select_layers
from deltamem_tool.call_masks import refuse_without_segments, segment_tokens, valid_tokens, writing_tokens
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.decoder_call import DecoderCall, is_off, run, running
from deltamem_tool.errors import ArchitectureError, ConfigError, MemoryStateError
from deltamem_tool.layouts import Projection
from deltamem_tool.memory import BASE_SLICE_WIDTH, DeltaMemory
from deltamem_tool.memory_file import check_memory
from deltamem_tool.patched import PATCH, hf_model, patch_of
from deltamem_tool.state import MemoryCache, MemoryState


@dataclass
class Patch:
    """All that `detach` has to undo."""

    adapter: DeltaMemAdapter
    handles: list[RemovableHandle]
    required_grad: list[tuple[nn.Parameter, bool]]
    replaced: dict[str, Any]  # methods that were set on the model itself, by name: accelerate's `forward`, say


def attach(model: PreTrainedModel, config: DeltaMemConfig | None = None) -> DeltaMemAdapter:
    """Give `model` a fresh memory and freeze its own weights.

    Args:
        model: a decoder-only causal language model.
        config: the mechanism; the paper's token-state write by default.

    Returns:
        The adapter, whose parameters are the only ones that train.

    Raises:
        ArchitectureError: the model cannot take a memory, or has one.
        ConfigError: the options do not fit the model.
    """
    config, model = config or DeltaMemConfig(), hf_model(model)
    layers = select_layers(attention_layers(model), config)
    adapter = fresh_adapter(config, layers, _first_columns)
    hook(model, adapter)
    return adapter


def fresh_adapter(
    config: DeltaMemConfig,
    layers: Sequence[AttentionLayer],
    first_columns: Callable[[Projection, int], Tensor],
) -> DeltaMemAdapter:
    """A new adapter for `layers`, whose modules only have to know their shapes.

    `first_columns` gives the first n columns `[out, n]` of a projection's weight; it is asked only where
    `config.delta_init` starts from them.
    """
    adapter = DeltaMemAdapter(config, layers)
    if config.delta_init == "base_slice":
        for layer in layers:
            columns = {head: first_columns(layer.projection(head), BASE_SLICE_WIDTH) for head in config.heads}
            adapter.memory(layer.index).start_from_base(columns)
    return adapter


def _first_columns(projection: Projection, count: int) -> Tensor:
    weight = projection.weight
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise ConfigError(
            f"The weight of {projection.name} is quantised.",
            "delta_init=base_slice starts from plain ones.",
            "Use delta_init zero or random, or attach before quantising.",
        )
    return projection.take(weight[:count] if projection.is_transposed else weight[:, :count].T).T


def detach(model: PreTrainedModel) -> None:
    """Take the memory off: hooks gone, the base trainable where it was before."""
    patch: Patch = patch_of(model)
    model = hf_model(model)
    for handle in patch.handles:
        handle.remove()
    for parameter, required_grad in patch.required_grad:
        parameter.requires_grad_(required_grad)
    for name in (*_OVERRIDES, PATCH):
        vars(model).pop(name, None)
    vars(model).update(patch.replaced)


def adapter_of(model: PreTrainedModel) -> DeltaMemAdapter:
    """The adapter of a patched model."""
    patch: Patch = patch_of(model)
    return patch.adapter


def hook(model: PreTrainedModel, adapter: DeltaMemAdapter) -> None:
    """Put `adapter` on `model` and freeze the model's own weights."""
    if hasattr(model, PATCH):
        raise ArchitectureError("This model has a memory already.", "", "Call detach(model) first.")
    layers = layers_at(attention_layers(model), adapter.layer_indices)
    # Parameters and not their names, which change where a LoRA comes later.
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    decoder = decoder_of(model)
    handles = [
        decoder.register_forward_pre_hook(_before_decoder(model, decoder, adapter), with_kwargs=True),
        decoder.register_forward_hook(_after_decoder, always_call=True),
    ]
    for layer in layers:
        memory = adapter.memory(layer.index)
        handles.append(layer.module.register_forward_pre_hook(_before_attention(layer.index, memory), with_kwargs=True))
        for branch in adapter.config.heads:
            projection = layer.projection(branch)
            correct = _correct(layer.index, memory, branch, projection)
            handles.append(projection.linear.register_forward_hook(correct))
    replaced = {name: vars(model)[name] for name in _OVERRIDES if name in vars(model)}
    setattr(model, PATCH, Patch(adapter, handles, required_grad, replaced))
    for name, override in _OVERRIDES.items():
        own = _as_method(replaced[name]) if name in replaced else getattr(type(model), name)
        setattr(model, name, MethodType(override(own), model))


def _as_method(function: Callable) -> Callable:
    """A function that was set on a model, and does not take it, in the form of a method."""

    @functools.wraps(function)
    def method(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """What the model calls with its tokens: its base model; but OPT and BART's decoder-only form call the decoder that
    is all there is in theirs."""
    base = model.base_model
    inner = dict(base.named_children())
    return inner["decoder"] if list(inner) == ["decoder"] else base


def _before_decoder(model: PreTrainedModel, decoder: nn.Module, adapter: DeltaMemAdapter):
    parameters = list(inspect.signature(decoder.forward).parameters)
    argument = cache_argument(decoder.forward)

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if is_off():
            return None
        kwargs = {**dict(zip(parameters, args, strict=False)), **kwargs}
        cache = take_cache(kwargs)
        if cache is None:
            refuse_without_segments(adapter.config)
            cache = MemoryCache(model)
            use_cache = kwargs.get("use_cache")
            usual = getattr(model.config.get_text_config(decoder=True), "use_cache", True)
            if usual if use_cache is None else use_cache:
                kwargs[argument] = cache
        elif isinstance(cache, MemoryCache):
            kwargs[argument] = cache
        else:
            raise MemoryStateError(
                f"A {type(cache).__name__} has no place for the memory.",
                "The model would forget at every call.",
                "Pass cache=deltamem.MemoryCache(model), or none.",
            )
        if module.training and torch.is_grad_enabled() and getattr(module, "is_activation_checkpointing", False):
            raise ConfigError(
                "transformers' gradient checkpointing does not work with a memory.",
                "It takes the cache from the layers.",
                "Call model.activation_checkpointing_disable(); `deltamem train` has its own.",
            )
        tokens = kwargs.get("input_ids")
        content = tokens if tokens is not None else kwargs["inputs_embeds"]
        batch, length = content.shape[:2]
        if adapter.device != content.device:
            adapter.to(content.device)  # the adapter follows the model, which does not know of it
        memory = adapter.empty_memory(batch) if cache.memory is None else cache.memory
        _check_fit(memory, adapter, batch)
        step = cache.take_step()
        reads = (
            valid_tokens(kwargs.get("attention_mask"), batch, length, cache.get_seq_length())
            if step is None
            else step[0]
        )
        if reads is not None and reads.device.type == "cpu" and not torch.compiler.is_compiling() and reads.all():
            reads = None  # cheap to see on a CPU, and it saves every layer its masks
        writes, last = segment_tokens(
            adapter.config, cache.segments, content, reads, writing_tokens(cache.write, reads, content)
        )
        run(DecoderCall(cache, memory.to(content.device), reads, writes, last, length, outer=running()))
        return (), kwargs

    return hook


def _check_fit(memory: MemoryState, adapter: DeltaMemAdapter, batch: int) -> None:
    """Refuse a memory that is not `adapter`'s, or not of this batch: `cache.memory` can be set to anything."""
    if not torch.compiler.is_compiling():  # while a graph is traced, weights have no values to take a fingerprint of
        check_memory(memory.shape, memory.adapter, adapter.memory_shape, adapter.fingerprint)
    if memory.batch_size != batch:
        raise MemoryStateError(
            f"The memory holds {memory.batch_size} conversations, the batch {batch}.",
            "",
            "Give every row its own: memory.fork(n) repeats rows, memory.select(rows) picks them.",
        )


def _after_decoder(module: nn.Module, args: tuple, output: Any) -> None:
    call = None if is_off() else running()
    if call is None:
        return  # or the hook before the decoder refused the call
    run(call.outer)
    if output is not None:  # None: the decoder raised, and the cache keeps the memory it had
        before = call.memory
        segments = {**before.segments, **call.segments}
        call.cache.memory = MemoryState({**before.layers, **call.states}, before.adapter, segments)
        if call.cache.openings is not None:
            for layer, opening in call.openings.items():
                call.cache.openings[layer] = call.cache.openings.get(layer, 0.0) + opening
        if call.cache.segments is not None:  # what was said of tokens that have come is used up
            rest = call.cache.segments[:, call.tokens :]
            call.cache.segments = rest if rest.shape[1] else None


def _before_attention(index: int, memory: DeltaMemory):
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if is_off():
            return
        call = running()
        if call is None:
            raise MemoryStateError(
                "An attention layer ran outside of its decoder.", "", "Call the model, or its base model, as a whole."
            )
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        segment = call.memory.segments.get(index)
        openings: list[Tensor] | None = None if call.cache.openings is None else []
        readings, state, segment = memory(
            hidden, call.memory.layers[index], call.reads, call.writes, segment, call.last, openings
        )
        call.readings[index], call.states[index] = memory.scaled(readings), state
        if openings:
            call.openings[index] = openings[0]
        if segment is not None:
            call.segments[index] = segment

    return hook


def _correct(index: int, memory: DeltaMemory, branch: str, projection: Projection):
    whole = projection.is_whole

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if is_off():
            return None
        call = running()
        assert call is not None  # the attention's own hook has seen to it
        if whole:
            return memory.correct(branch, call.readings[index], output)
        return output + projection.place(memory.correction(branch, call.readings[index])).to(output.dtype)

    return hook


def _with_memory_cache(own: Callable):
    """`generate` without a cache gets one with a memory; one that was given is repeated for beams."""
    argument = generation_cache_argument()

    @functools.wraps(own)
    def prepare(
        self: PreTrainedModel, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        given = model_kwargs.get(argument)
        own(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if given is None and generation_config.use_cache:
            refuse_without_segments(adapter_of(self).config)
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
            marked = None if given.segments is None else given.segments.shape[0]
            if (marked if given.memory is None else given.memory.batch_size) == batch_size:
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

    @functools.wraps(own)  # `generate` looks at the signature
    def prepare(self: PreTrainedModel, *args, attention_mask=None, is_first_iteration: bool = False, **kwargs):
        cache = take_cache(kwargs)
        given = {argument: cache, "attention_mask": attention_mask}
        inputs = own(self, *args, **given, is_first_iteration=is_first_iteration, **kwargs)
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
    names = [name for name in inspect.signature(own).parameters if name != "self"]

    @functools.wraps(own)
    def call(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if argument in names[: len(args)]:  # the cache comes by its place
            kwargs.update(zip(names, args, strict=False))
            args = ()
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[argument] = cache
        return own(self, *args, **kwargs)

    return call


_OVERRIDES: dict[str, Callable[[Callable], Callable]] = {
    "forward": _with_one_cache,
    "generate": _with_one_cache,
    "prepare_inputs_for_generation": _with_announced_step,
    PREPARE_CACHE: _with_memory_cache,
}
