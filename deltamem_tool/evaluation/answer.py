"""Questions asked of a model under a condition: with which memory, or without the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.evaluation.conditions import SCALE_ZERO, Condition
from deltamem_tool.memory.adapter import DeltaMemAdapter
from deltamem_tool.memory.attach import adapter_of, detach, hook
from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.memory.state import MemoryState
from deltamem_tool.segments.encode import pad_token, padded


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    memory: MemoryState | None,
    condition: Condition,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, without surrounding space.

    Args:
        prompts: as text, with the header of the answer.
        memory: a row a prompt: its own or its donor's, as the condition has it; None for zeros. The prompt reads it and
            does not write.
    """
    ids = tokenizer(list(prompts), add_special_tokens=False).input_ids
    pad = pad_token(tokenizer, ids)
    inputs = {
        "input_ids": padded(ids, pad, "left").to(model.device),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, "left").to(model.device),
    }
    with under(model, condition):
        cache = cache_of(model, memory, condition, len(prompts))
        output = _generate(model, inputs, max_new_tokens, pad, **({} if cache is None else {"cache": cache}))
    return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


@contextmanager
def under(model: PreTrainedModel, condition: Condition) -> Iterator[None]:
    """Inside the block the model is as `condition` has it: with its adapter, with Δ = 0, or without, perhaps with a
    LoRA."""
    if condition.memory is None:
        with _without_adapter(model), condition.lora.on(model) if condition.lora else nullcontext():
            yield
    else:
        with _corrections_off(adapter_of(model)) if condition.memory == SCALE_ZERO else nullcontext():
            yield


def cache_of(model: PreTrainedModel, memory: MemoryState | None, condition: Condition, rows: int) -> MemoryCache | None:
    """What a question starts from inside `under`: `memory`, or zeros, which it does not write; None for no adapter."""
    if condition.memory is None:
        return None
    adapter = adapter_of(model)
    if memory is None:
        memory = adapter.empty_memory(rows)
    # With Δ = 0 it is another adapter, so the memory is bound anew.
    states = MemoryState(memory.layers, adapter.fingerprint, memory.open_segments)
    return MemoryCache(model, states, write=False)


def _generate(model: PreTrainedModel, inputs: dict[str, Tensor], new: int, pad: int, **cache: Any) -> Tensor:
    """Continuation `[B, new at most]`."""
    output = cast(Any, model).generate(**inputs, **cache, max_new_tokens=new, do_sample=False, pad_token_id=pad)
    return output[:, inputs["input_ids"].shape[1] :]


@contextmanager
def _without_adapter(model: PreTrainedModel) -> Iterator[None]:
    adapter = adapter_of(model)
    detach(model)
    try:
        yield
    finally:
        hook(model, adapter)


@contextmanager
def _corrections_off(adapter: DeltaMemAdapter) -> Iterator[None]:
    """Every Δ is zero inside the block."""
    branches, layers = adapter.config.branches, adapter.layer_indices
    deltas = [adapter.memory(layer).delta_of(branch).weight for layer in layers for branch in branches]
    kept = [weight.detach().clone() for weight in deltas]
    try:
        with torch.no_grad():
            for weight in deltas:
                weight.zero_()
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(deltas, kept, strict=True):
                weight.copy_(value)
