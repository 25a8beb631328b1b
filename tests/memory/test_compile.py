"""torch.compile: the memory is in one graph, which follows changes between calls."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import cache_of, close, close_memory
from helpers.tiny import randomise, tiny_model, tokens
from memory.test_generate import continue_alone, left_padded, memory_of, settings
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool.memory.attach import adapter_of

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # logits are of order 1 to 10; leaving out the memory changes them by more than 1e-2
ROOM = 20


@pytest.fixture(autouse=True)
def reset_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def one_layer():
    """A patched model of one layer, because tracing takes seconds per layer."""
    model = tiny_model(num_hidden_layers=1)
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


def compiled(model, backend="eager", **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, **options), counter


@torch.no_grad()
def step(run, model, caches, column, **inputs):
    """Feed one token to the compiled model and to the eager one."""
    ids = tokens(2, ROOM)[:, column : column + 1]
    logits = [each(ids, cache=cache, **inputs).logits for each, cache in zip((run, model), caches, strict=True)]
    close(*logits, TOLERANCE)
    close_memory(caches[0].memory, caches[1].memory, TOLERANCE)


def filled(model, room):
    """Two caches with the same text, and room for this many tokens, or growing ones for None."""
    caches = [MemoryCache(model, max_length=room) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(tokens(2, 4), cache=cache)
    return caches


def test_a_compiled_model_with_a_growing_cache_matches_eager():
    model = one_layer()
    run, counter = compiled(model, fullgraph=True)
    caches = filled(model, None)
    for column in range(4, 8):
        step(run, model, caches, column)
    assert counter.frame_count == 2  # torch must first see its length vary


def test_steps_over_a_static_cache_need_one_graph():
    model = one_layer()
    run, counter = compiled(model, "aot_eager", fullgraph=True)
    caches = filled(model, ROOM)
    for column in range(4, 8):
        step(run, model, caches, column)
    assert counter.frame_count == 1
    other = memory_of(model, tokens(2, 9, seed=1))
    for cache in caches:
        cache.memory = other
    step(run, model, caches, 8)
    for cache in caches:
        cache.write = False
    before = caches[0].memory
    step(run, model, caches, 9)
    close_memory(caches[0].memory, before, 0.0)
    for cache in caches:
        cache.write = torch.tensor([[True], [False]])
    step(run, model, caches, 10)
    changed = (caches[0].memory.layers[0] - before.layers[0]).abs().amax((1, 2, 3))
    assert changed[0] > 1e-3 and changed[1] == 0


def test_a_whole_compiled_conversation_matches_eager():
    """Includes the prompt, with padding, from an empty memory."""
    model = one_layer()
    run, _ = compiled(model)
    inputs = left_padded([tokens(1, 6), tokens(1, 3, seed=1)])
    caches = [MemoryCache(model, max_length=ROOM) for _ in range(2)]
    with torch.no_grad():
        for each, cache in zip((run, model), caches, strict=True):
            each(**inputs, cache=cache)
    close_memory(caches[0].memory, caches[1].memory, TOLERANCE)
    mask = inputs["attention_mask"]
    for column in range(6, 9):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        step(run, model, caches, column, attention_mask=mask)


def test_a_graph_break_keeps_the_memory():
    model = one_layer()
    handle = model.base_model.layers[0].self_attn.k_proj.register_forward_hook(torch._dynamo.disable(lambda *_: None))
    run, counter = compiled(model)
    caches = filled(model, ROOM)
    for column in range(4, 7):
        step(run, model, caches, column)
    assert counter.frame_count > 1
    handle.remove()


def test_generate_compiles_its_decoding_step_once():
    """On a GPU, `generate` does this by default."""
    model = one_layer()
    rows = [tokens(1, 5), tokens(1, 7, seed=1)]
    end = continue_alone(model, rows[0])[0][2]
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    graphs = []
    for ids, options in (
        (rows, {"eos_token_id": end}),
        ([rows[0], rows[1][:, :4]], {}),
        (rows, {"num_beams": 2}),
        (rows, {"changed": True}),
    ):
        if options.pop("changed", False):  # the compiled graph does not depend on the weights' values
            with torch.no_grad():
                for weight in adapter_of(model).parameters():
                    weight.mul_(1.2)
        options = settings(return_dict_in_generate=True, **options)
        expected = model.generate(**left_padded(ids), **options)
        output = model.generate(
            **left_padded(ids), cache_implementation="static", max_cache_len=ROOM, compile_config=config, **options
        )
        assert torch.equal(output.sequences, expected.sequences)
        close_memory(cache_of(output).memory, cache_of(expected).memory, TOLERANCE)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1, 2], "compiled anew for the adapter's new fingerprint alone"
