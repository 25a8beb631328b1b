"""The hooks that run in a forward pass of a decoder with a memory.

A `DecoderCall`, one per thread, holds the states that the call started from and the states that it computes. The hooks
read and fill it. When the decoder has finished, the cache takes the new states.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltamem_tool._compat import cache_argument, drop_hooks, with_one_cache, without_compilation
from deltamem_tool.base_model.attention import attention_layers, layers_at
from deltamem_tool.base_model.layouts import Projection
from deltamem_tool.errors import ConfigError, MemoryStateError
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attachment import Attachment
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.decoder_call import DecoderCall, current_call, is_memory_off, set_current_call
from deltamem_tool.memory.file import check_memory
from deltamem_tool.memory.masks import (
    check_one_text,
    check_writes_tokens,
    replace_unknown_padding,
    segment_tokens,
    valid_tokens,
    writing_tokens,
)
from deltamem_tool.memory.state import MemoryState

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def hook_decoder(attachment: Attachment, decoder: nn.Module) -> None:
    """Hook the decoder: a `DecoderCall` begins and ends with it."""
    parameters, argument = list(inspect.signature(decoder.forward).parameters), cache_argument(decoder.forward)
    begin = partial(_begin_call, attachment, parameters, argument)
    attachment.handles.append(decoder.register_forward_pre_hook(begin, with_kwargs=True))
    attachment.handles.append(decoder.register_forward_hook(_end_call, always_call=True))


def hook_layers(attachment: Attachment) -> None:
    """Hook the attention layers that have a memory and their projections, or hook them again.

    Raises:
        ArchitectureError: the model does not have these layers, or no longer has them.
    """
    layers = layers_at(attention_layers(attachment.model), attachment.adapter.layer_indices)
    projections = [
        (layer, branch, layer.projection(branch)) for layer in layers for branch in attachment.adapter.config.branches
    ]
    names = [layer.name for layer in layers] + [projection.name for _, _, projection in projections]
    path = list(dict.fromkeys(step for name in names for step in _path(attachment.model, name)))
    for handle in attachment.layer_handles:
        handle.remove()
    attachment.layer_handles.clear()
    for module in (child for _, _, child in path):
        drop_hooks(module, (_before_attention, _after_projection))
    for layer in layers:
        read_and_write = partial(_before_attention, attachment.adapter, layer.index)
        attachment.layer_handles.append(layer.module.register_forward_pre_hook(read_and_write, with_kwargs=True))
    for layer, branch, projection in projections:
        correct = partial(_after_projection, attachment.adapter, layer.index, branch, projection)
        attachment.layer_handles.append(projection.linear.register_forward_hook(correct))
    attachment.path = path


def _path(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Return the path from `model` to its module `name`, as (parent, name, child).

    But for what torch.compile puts around a module: a trace takes it for the module.
    """
    for part in name.split("."):
        child = model.get_submodule(part)
        if all(without_compilation(module) is module for module in (model, child)):
            yield model, part, child
        model = child


def _begin_call(
    attachment: Attachment, parameters: Sequence[str], argument: str, module: nn.Module, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """Begin a `DecoderCall`."""
    args, kwargs = with_one_cache(parameters, argument, args, kwargs)
    if is_memory_off():
        return args, kwargs
    if attachment.has_moved:
        hook_layers(attachment)
    adapter = attachment.adapter
    for name in parameters[: len(args)]:
        if name in kwargs:
            raise TypeError(f"{type(module).__name__}.forward() got multiple values for argument {name!r}")
    kwargs |= dict(zip(parameters, args, strict=False))
    cache = kwargs.get(argument)
    if cache is None:
        check_writes_tokens(adapter.config)
        cache = MemoryCache(attachment.model)
        use_cache = kwargs.get("use_cache")
        default = getattr(attachment.model.config.get_text_config(decoder=True), "use_cache", True)
        if default if use_cache is None else use_cache:
            kwargs[argument] = cache
    elif not isinstance(cache, MemoryCache):
        raise MemoryStateError(
            f"A {type(cache).__name__} cannot hold the memory.",
            "The model would forget everything after each call.",
            "Pass cache=deltamem.MemoryCache(model), or no cache.",
        )
    step = cache.take_step()  # first, so that a call that is refused does not leave it to the next
    if module.training and torch.is_grad_enabled() and getattr(module, "is_activation_checkpointing", False):
        raise ConfigError(
            "transformers' gradient checkpointing does not work with a memory.",
            "It calls the layers without the cache.",
            "Call model.activation_checkpointing_disable(); `deltamem train` has its own.",
        )
    kwargs.pop("logits_to_keep", None)  # Gemma 4's decoder would feed its last layers these tokens alone
    tokens = kwargs.get("input_ids")
    content = tokens if tokens is not None else kwargs["inputs_embeds"]
    batch, length = content.shape[:2]
    memory = adapter.empty_memory(batch) if cache.memory is None else cache.memory
    _check_fit(memory, adapter, batch)
    past = None
    if not torch.compiler.is_compiling():
        cache.check_room(length)
        past = cache.length
    mask = kwargs.get("attention_mask")
    valid = valid_tokens(mask, batch, length, cache.get_seq_length()) if step is None else step[0]
    if valid is not None and valid.device.type == "cpu" and not torch.compiler.is_compiling() and valid.all():
        valid = None  # cheap to see on a CPU, and it saves every layer its masks
    if tokens is not None and valid is not None and not torch.compiler.is_compiling():
        kwargs["input_ids"] = replace_unknown_padding(tokens, valid, _rows_of(attachment.model))
    if cache.write is not False and not torch.compiler.is_compiling():  # a memory that is only read is every text's
        check_one_text(kwargs, valid, base_separates=mask is None and kwargs.get(argument) is None)
    write_mask, segment_end = segment_tokens(
        adapter.config, cache.segment_tags, content, valid, writing_tokens(cache.write, valid, content)
    )
    set_current_call(
        DecoderCall(cache, memory.for_autograd(), valid, write_mask, segment_end, length, past, outer=current_call())
    )
    return (), kwargs


def _rows_of(model: PreTrainedModel) -> int:
    """Return the number of token ids with an embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _check_fit(memory: MemoryState, adapter: DeltaMemAdapter, batch: int) -> None:
    """Check that a memory is `adapter`'s, and of this batch: `cache.memory` can be set to anything."""
    if not torch.compiler.is_compiling():  # while a graph is traced, weights have no values to take a fingerprint of
        check_memory(memory.shape, memory.adapter, adapter.memory_shape, adapter.fingerprint)
    if memory.batch_size != batch:
        raise MemoryStateError(
            f"The memory has {memory.batch_size} conversations, and the batch {batch} rows.",
            "",
            "Give every row its own: memory.fork(n) repeats rows, memory.select(rows) picks them.",
        )


def _end_call(module: nn.Module, args: Args, output: Any) -> None:
    """End the `DecoderCall`: the cache takes the new states."""
    call = None if is_memory_off() else current_call()
    if call is None:
        return  # or the hook before the decoder refused the call
    set_current_call(call.outer)
    if output is None:  # the decoder raised, and the cache keeps the memory it had
        if call.past is not None:
            call.cache.drop_after(call.past)
    else:
        before = call.memory
        segments = {**before.open_segments, **call.open_segments}
        call.cache.memory = MemoryState({**before.layers, **call.states}, before.adapter, segments)
        if not torch.compiler.is_compiling():  # a graph would be compiled anew for every number
            call.cache.count(call.tokens)
        if call.cache.write_gates is not None:
            for layer, gates in call.write_gates.items():
                call.cache.write_gates[layer] = call.cache.write_gates.get(layer, 0.0) + gates
        if call.cache.segment_tags is not None:  # the tags of this call's tokens are used up
            rest = call.cache.segment_tags[:, call.tokens :]
            call.cache.segment_tags = rest if rest.shape[1] else None


def _before_attention(adapter: DeltaMemAdapter, index: int, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
    """Read and write, before the attention of layer `index`."""
    if is_memory_off():
        return
    call = current_call()
    if call is None:
        raise MemoryStateError(
            "An attention layer was called outside of its decoder.",
            "",
            "Call the model, or its base model, as a whole.",
        )
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    # Weights and state follow the layer, wherever a device map has put it: the model does not know of them.
    layer, (state, segment) = adapter.layer_on(index, hidden.device), call.memory.layer_on(index, hidden.device)
    call.move_masks(hidden.device)
    output = layer(hidden, state, call.read_mask, call.write_mask, segment, call.segment_end)
    call.readings[index], call.states[index] = layer.scale_readings(output.readings), output.state
    if output.open_segment is not None:
        call.open_segments[index] = output.open_segment
    if call.cache.write_gates is not None and output.write_gates is not None:
        written = call.write_mask if segment is None else call.segment_end
        call.write_gates[index] = _sum_gates(output.write_gates, written)


def _sum_gates(gates: Tensor, written: Tensor | bool | None) -> Tensor:
    """Reduce β `[B, T, H, R]` of the `written` tokens to `[B, 2]`: the sum of its means, and the number of writes."""
    count = written.sum(1) if isinstance(written, Tensor) else gates.new_tensor(gates.shape[1]).expand(len(gates))
    return torch.stack([gates.mean((2, 3)).sum(1), count.to(gates.dtype)], dim=1)


def _after_projection(
    adapter: DeltaMemAdapter,
    index: int,
    branch: str,
    projection: Projection,
    module: nn.Module,
    args: Args,
    output: Tensor,
) -> Tensor | None:
    """Correct what a projection of layer `index` puts out."""
    if is_memory_off():
        return None
    call = current_call()
    assert call is not None  # the attention's own hook has seen to it
    layer, readings = adapter.layer(index), call.readings[index]
    if projection.is_whole and output.shape[-1] == projection.width:
        return layer.correct(branch, readings, output)
    return output + projection.match_width(output, layer.correction(branch, readings)).to(output)
