"""Attaching a memory to a model that is already compiled, as a whole or in parts, and detaching it."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import CUT_TOLERANCE, close
from helpers.tiny import logits, randomise, tiny_model

from deltamem_tool import DeltaMemConfig, attach, detach
from deltamem_tool._compat import without_compilation
from deltamem_tool.memory.attach import adapter_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def reset_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model, compiled):
    return compiled(model)


def decoder(model, compiled):
    model.model = compiled(model.model)
    return model


def attention(model, compiled):
    for layer in model.model.layers:
        layer.self_attn.q_proj = compiled(layer.self_attn.q_proj)
        layer.self_attn = compiled(layer.self_attn)
    return model


def one_layer():
    return tiny_model(num_hidden_layers=1)


def remember(model, seed):
    return randomise(attach(model, DeltaMemConfig(rank=4)), seed)


@pytest.mark.parametrize(("compile_part", "seeds"), [(whole, (0, 1)), (decoder, (0,)), (attention, (0,))])
def test_attach_and_detach_take_effect_on_a_compiled_model(compile_part, seeds):
    truth, with_memory = one_layer(), []
    bare = logits(truth)
    for seed in seeds:
        remember(truth, seed)
        with_memory.append(logits(truth))
        detach(truth)
    model = compile_part(one_layer(), lambda part: torch.compile(part, backend="eager"))
    close(logits(model), bare, CUT_TOLERANCE)  # and a graph without a memory exists
    for seed, expected in zip(seeds, with_memory, strict=True):
        adapter = remember(model, seed)
        close(logits(model), expected, CUT_TOLERANCE)
        assert adapter_of(model) is adapter is adapter_of(without_compilation(model))
        detach(model if seed else without_compilation(model))
    close(logits(model), bare, CUT_TOLERANCE)
