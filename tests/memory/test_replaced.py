"""Modules that are replaced after `attach`: the memory moves to the new ones."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from helpers.model_runs import CUT_TOLERANCE, close, close_memory, fingerprint_of_base, run
from helpers.tiny import logits, randomise, tiny_model, tokens
from memory.test_wrapped import gpt2
from torch import nn
from transformers import PreTrainedModel

from deltamem_tool import DeltaMemConfig, attach, detach
from deltamem_tool._compat import peft_model
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.attach import adapter_of

TOLERANCE = 1e-3  # merging adds products of weights; a memory that is left out changes logits by more than 0.1
MODELS = {"qwen3": tiny_model, "gpt2": gpt2}
every_model = pytest.mark.parametrize("name", MODELS)


def config(name: str, kind: str = "lora"):
    """The config of a PEFT adapter with random weights, on projections that a memory corrects and on others."""
    targets = {"qwen3": ["q_proj", "o_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"]}[name]
    if kind == "ia3":
        options = {"feedforward_modules": [], "fan_in_fan_out": name == "gpt2"}
        return peft.IA3Config(target_modules=targets, init_ia3_weights=False, **options)
    options = {"fan_in_fan_out": name == "gpt2", "use_dora": kind == "dora"}
    return peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)


def tuned(name: str, kind: str = "lora", **changes):
    base = MODELS[name](**changes)
    torch.manual_seed(1)
    return peft_model(base, config(name, kind)).eval()


def unloaded(model):
    return model.unload()


def merged(model):
    return model.merge_and_unload()


def merged_in_place(model):
    model.merge_adapter()
    return model


@torch.no_grad()
def another_linear(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Linear(32, 64, bias=False)
        layer.self_attn.q_proj.weight.copy_(torch.randn(64, 32, generator=torch.Generator().manual_seed(2)) * 0.2)
    return model


def another_attention(model):
    for layer in model.model.layers:
        layer.self_attn = copy.deepcopy(layer.self_attn)
        layer.self_attn.q_proj.weight.data *= 1.5
    return model


def other_layers(model):
    model.model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.model.layers)
    return model


def with_memory(model):
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


def check(model, truth, ids):
    """`model` is what `truth` is, to which the memory was attached last; and it can be detached."""
    logits_of, cache = run(model, ids, (4,))
    expected, other = run(truth, ids, (4,))
    close(logits_of, expected, TOLERANCE)
    close_memory(cache.memory, other.memory, TOLERANCE)
    detach(truth)
    assert (run_bare(truth, ids) - expected).abs().max() > 100 * TOLERANCE
    detach(model)
    close(run_bare(model, ids), run_bare(truth, ids), TOLERANCE)
    assert not any(sum(hooks) for hooks in fingerprint_of_base(inner(model))[1].values())


def inner(model):
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


@torch.no_grad()
def run_bare(model, ids):
    return model(ids).logits


@pytest.mark.parametrize("change", [unloaded, merged, merged_in_place])
@pytest.mark.parametrize(
    ("name", "kind"), [("qwen3", "lora"), ("qwen3", "dora"), ("qwen3", "ia3"), ("gpt2", "lora"), ("gpt2", "ia3")]
)
@pytest.mark.parametrize("used", [False, True])
def test_the_memory_stays_when_a_peft_adapter_is_removed(name, kind, change, used):
    model, ids = with_memory(tuned(name, kind)), tokens(2, 7)
    if used:
        logits(model)
    check(change(model), with_memory(change(tuned(name, kind))), ids)


@every_model
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_the_memory_stays_when_a_peft_adapter_is_added_and_removed(name, kind):
    ids = tokens(2, 7)
    model = with_memory(MODELS[name]())
    bare = run(model, ids)[0]
    torch.manual_seed(1)
    wrapped = peft_model(model, config(name, kind)).eval()
    logits_of = run(wrapped, ids)[0]
    close(logits_of, run(with_memory(tuned(name, kind)), ids)[0], CUT_TOLERANCE)
    assert (logits_of - bare).abs().max() > 100 * TOLERANCE
    assert torch.equal(run(wrapped.unload(), ids)[0], bare)


@pytest.mark.parametrize("change", [another_linear, another_attention, other_layers])
def test_the_memory_follows_modules_that_a_user_replaces(change):
    model, ids = with_memory(tiny_model()), tokens(2, 7)
    run(model, ids)
    check(change(model), with_memory(change(tiny_model())), ids)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_the_memory_follows_dynamic_quantisation():
    """Quantisation copies hooks to the modules that replace others."""
    ids = tokens(2, 7)

    def quantised(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    model = with_memory(tiny_model())
    truth = quantised(tiny_model())
    randomise(attach(truth, DeltaMemConfig(rank=4)))
    close(run(quantised(model), ids)[0], run(truth, ids)[0], TOLERANCE)
    close(run(model, ids)[0], run(with_memory(tiny_model()), ids)[0], CUT_TOLERANCE)


def test_removed_layers_are_named_in_the_error():
    model, ids = with_memory(tiny_model()), tokens(1, 5)
    layers = model.model.layers
    model.model.layers = layers[:1]
    for _ in range(2):
        with pytest.raises(ArchitectureError, match=r"no attention in layers \[1\]"):
            run(model, ids)
    model.model.layers = layers
    assert torch.equal(run(model, ids)[0], run(with_memory(tiny_model()), ids)[0])


@pytest.mark.slow
def test_a_compiled_model_follows_replaced_modules():
    one_layer = {"num_hidden_layers": 1}  # what is compiled once a call
    model, ids = with_memory(tuned("qwen3", **one_layer)), tokens(1, 6)
    base = model.get_base_model()
    compiled = torch.compile(base, backend="eager")
    close(run(compiled, ids)[0], run(model, ids)[0], TOLERANCE)
    model.merge_and_unload()
    truth = with_memory(merged(tuned("qwen3", **one_layer)))
    close(run(compiled, ids)[0], run(truth, ids)[0], TOLERANCE)
    torch._dynamo.reset()
    assert adapter_of(compiled) is adapter_of(base)
