"""Invalid models, options, masks and memories raise; and the state is an argument and a return value."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.model_runs import EQUATION_TOLERANCE, close, close_memory, fingerprint_of_base, run
from helpers.naive_model import naive_run
from helpers.tiny import logits, patched_model, tiny_model, tokens
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    MambaConfig,
    Qwen3NextConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from deltamem_tool import DeltaMemConfig, DeltaMemError, MemoryCache, MemoryState, attach, detach
from deltamem_tool.adapter import attach as adapter_attach
from deltamem_tool.errors import ArchitectureError, ConfigError, MemoryStateError
from deltamem_tool.memory import attach as memory_attach
from deltamem_tool.memory.attach import adapter_of

# Invalid input raises.


def test_attaching_a_second_memory_raises():
    model = patched_model()
    adapter = adapter_of(model)
    with pytest.raises(ArchitectureError, match="already has a memory"):
        attach(model)
    assert adapter_of(model) is adapter
    assert len(model.base_model._forward_pre_hooks) == 1


@pytest.mark.parametrize("model", [nn.Linear(2, 2), torch.jit.ignore, None], ids=["module", "function", "none"])
def test_objects_that_are_not_models_raise(model):
    for act in (attach, detach, adapter_of):
        with pytest.raises(ArchitectureError, match="not a model of transformers"):
            act(model)


@pytest.mark.parametrize("where", ["hook_layers", "hook_decoder", "override", "override_methods"])
def test_a_failed_attach_leaves_the_model_unchanged(where, monkeypatch):
    """Whichever step fails, everything before it is undone."""
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    before, attributes, expected = fingerprint_of_base(model), set(vars(model)), logits(model)
    module = adapter_attach if where == "override_methods" else memory_attach
    own = getattr(module, where)

    def broken(*args):
        if where != "override":  # which must set all its methods or none
            own(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, where, broken)
    with pytest.raises(KeyboardInterrupt):
        attach(model)
    monkeypatch.undo()
    assert fingerprint_of_base(model) == before and set(vars(model)) == attributes
    assert torch.equal(logits(model), expected)
    with pytest.raises(ArchitectureError, match="no memory"):
        detach(model)
    attach(model)
    detach(model)
    assert fingerprint_of_base(model) == before and set(vars(model)) == attributes


def test_detach_works_after_the_base_was_quantised():
    model = tiny_model()
    attach(model)
    head = model.lm_head.weight
    head.data = head.data.mul(100).to(torch.int8)
    detach(model)
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter is not head)


@pytest.mark.parametrize("kind", ["dynamic", "static", "tuple"])
def test_a_cache_without_a_memory_raises(kind):
    model = patched_model()
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
        "tuple": lambda: ((torch.zeros(1, 2, 3, 16),) * 2,) * 2,
    }[kind]()
    with pytest.raises(MemoryStateError, match="MemoryCache") as refusal:
        model(tokens(1, 4), cache=cache)
    assert "forget" in str(refusal.value)
    logits, _ = run(model, tokens(1, 4))  # and the model still works
    assert logits.shape[1] == 4


def _gated():
    """A model whose q_proj returns [query | gate], without a row for its type."""
    config = Qwen3NextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.config.model_type = "new"
    return model


def _fused():
    """A model whose c_attn returns [query | key | value], without a row for its type."""
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    model.config.model_type = "new"
    return model


def _twice():
    model = tiny_model()
    model.model.layers[1].self_attn.layer_idx = 0
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)), "decoder-only"),
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)),
            "decoder-only",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32)),
            r"(?s)\(mamba\) cannot have a memory.*softmax attention",
        ),
        (lambda: _fused(), r"(?s)\(new\) is not known.*known layout"),
        (
            lambda: _gated(),
            r"(?s)not have the layout that its names suggest.*self_attn.q_proj is 128 wide, and .*o_proj takes 64",
        ),
        (lambda: _twice(), "both of layer 0"),
    ],
    ids=["encoder", "encoder-decoder", "state-space", "unknown-attention", "query-and-gate", "one-layer-twice"],
)
def test_unsupported_models_raise(make, says):
    model = make()
    before = fingerprint_of_base(model)
    with pytest.raises(ArchitectureError, match=says):
        attach(model)
    assert fingerprint_of_base(model) == before


def test_invalid_options_raise_and_leave_the_model_unchanged():
    model = tiny_model()
    before = fingerprint_of_base(model)
    with pytest.raises(ConfigError, match="hidden size, 32"):
        attach(model, DeltaMemConfig(rank=33))
    with pytest.raises(ArchitectureError, match=r"no attention in layers \[2, 7\]"):
        attach(model, DeltaMemConfig(layers=(0, 2, 7)))
    assert fingerprint_of_base(model) == before


def test_a_memory_of_a_different_shape_raises():
    model = patched_model()
    _, cache = run(model, tokens(2, 5))
    with pytest.raises(MemoryStateError, match="has 2 conversations, and the batch 3 rows"):
        model(tokens(3, 1), cache=cache)
    fingerprint = adapter_of(model).fingerprint
    for layers, shape in (((0,), (1, 4, 4)), ((0, 1), (1, 3, 3)), ((0, 1), (2, 4, 4)), ((0, 1, 2), (1, 4, 4))):
        wrong = MemoryState({layer: torch.zeros(2, *shape) for layer in layers}, fingerprint)
        with pytest.raises(MemoryStateError, match="does not fit"):
            MemoryCache(model, memory=wrong)
        cache = MemoryCache(model)
        cache.memory = wrong  # after the constructor's check
        with pytest.raises(MemoryStateError, match="does not fit"):
            model(tokens(2, 1), cache=cache)


def test_a_memory_of_a_different_adapter_raises():
    model, other = patched_model(), patched_model(seed=1)
    _, cache = run(other, tokens(1, 5))
    with pytest.raises(MemoryStateError, match="another adapter"):
        MemoryCache(model, memory=cache.memory)
    with pytest.raises(MemoryStateError, match="another adapter"):
        model(tokens(1, 1), cache=cache)


def test_a_mask_that_hides_the_padding_raises():
    model = patched_model()
    with pytest.raises(MemoryStateError, match="2-D mask"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(MemoryStateError, match="write mask"):
        model(tokens(1, 3), cache=MemoryCache(model, write=torch.ones(1, 2, dtype=torch.bool)))


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("length", [3, 8, 12])
def test_a_mask_of_the_wrong_length_raises(sliding, length):
    """Attention counts columns from the left and the memory from the right, so they would mean different tokens."""
    changes = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4, "use_sliding_window": True}
    model = tiny_model(**(changes if sliding else {}))
    attach(model, DeltaMemConfig(rank=4))
    _, cache = run(model, tokens(2, 7))
    memory = cache.memory
    with pytest.raises(MemoryStateError, match=rf"\[2, {length}\], not \[2, 10\]"):
        model(tokens(2, 3), cache=cache, attention_mask=torch.ones(2, length, dtype=torch.long))
    with pytest.raises(MemoryStateError, match=r"\[1, 10\], not \[2, 10\]"):
        model(tokens(2, 3), cache=cache, attention_mask=torch.ones(1, 10, dtype=torch.long))
    assert cache.memory is memory
    with torch.no_grad():
        model(tokens(2, 3), cache=cache, attention_mask=torch.ones(2, 10, dtype=torch.long))
    assert cache.get_seq_length() == 10


def test_gradient_checkpointing_raises_a_clear_error():
    model = patched_model()
    model.activation_checkpointing_enable()
    ids = tokens(1, 5)
    with torch.no_grad():
        model.train()(ids)
    model.eval()(ids)
    with pytest.raises(ConfigError, match=r"(?s)not work with a memory\..*activation_checkpointing_disable\(\)"):
        model.train()(ids)
    model.activation_checkpointing_disable()
    model(ids).logits.sum().backward()


def test_detach_works_after_a_parameter_was_added():
    model = tiny_model()
    attach(model)
    model.later = nn.Linear(2, 2)
    model.later.bias.requires_grad_(False)
    detach(model)
    assert all(parameter.requires_grad == (name != "later.bias") for name, parameter in model.named_parameters())
    attach(model)


def test_calling_an_attention_layer_directly_raises():
    model = patched_model()
    with pytest.raises(MemoryStateError, match="outside of its decoder"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 32), None, None)


# The state is an argument and a return value.


def test_conversations_in_threads_match_each_one_run_alone():
    model = patched_model()
    texts = [tokens(1 + n % 2, 10, seed=n) for n in range(5)]
    expected = [run(model, ids, range(1, 10)) for ids in texts]
    steps = threading.Barrier(len(texts))
    results = {}

    def converse(n: int) -> None:
        cache, pieces = MemoryCache(model), []
        for token in range(10):
            steps.wait(timeout=30)  # all conversations are in the model at the same token at the same time
            with torch.no_grad():
                pieces.append(model(texts[n][:, token : token + 1], cache=cache).logits)
        results[n] = torch.cat(pieces, dim=1), cache

    threads = [threading.Thread(target=converse, args=(n,)) for n in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for n, (alone, cache) in enumerate(expected):
        assert torch.equal(results[n][0], alone)
        for layer, state in cache.memory.layers.items():
            assert torch.equal(results[n][1].memory.layers[layer], state)


def test_interleaved_conversations_do_not_mix():
    model = patched_model()
    texts = [tokens(1, 8, seed=n) for n in range(2)]
    caches = [MemoryCache(model) for _ in texts]
    with torch.no_grad():
        for token in range(8):
            for ids, cache in zip(texts, caches, strict=True):
                model(ids[:, token : token + 1], cache=cache)
    for ids, cache in zip(texts, caches, strict=True):
        close_memory(cache.memory, run(model, ids)[1].memory)


def test_a_nested_call_keeps_both_conversations_apart():
    """An agent's tool or a judge in a hook makes such calls. The inner one ends, and the outer one continues."""
    outer, inner = patched_model(), patched_model("llama", seed=1)
    ids = tokens(1, 6)
    expected, cache = run(outer, ids)
    alone, _ = run(inner, ids)
    inner_logits = []
    outer.model.layers[0].mlp.register_forward_hook(lambda *_: inner_logits.append(run(inner, ids)[0]))
    logits, other = run(outer, ids)
    assert torch.equal(logits, expected) and torch.equal(inner_logits[0], alone)
    close_memory(other.memory, cache.memory, 0.0)


class _Broken(nn.Module):
    def forward(self, *args, **kwargs):
        raise RuntimeError("broken on purpose")


def test_an_exception_in_the_decoder_leaves_the_memory_unchanged():
    model = patched_model()
    ids = tokens(1, 10)
    _, cache = run(model, ids[:, :5])
    before = cache.memory
    copies = {layer: state.clone() for layer, state in before.layers.items()}
    whole = model.model.layers[1].mlp
    model.model.layers[1].mlp = _Broken()
    with pytest.raises(RuntimeError, match="on purpose"):
        model(ids[:, 5:], cache=cache)
    model.model.layers[1].mlp = whole
    assert cache.memory is before
    assert all(torch.equal(before.layers[layer], state) for layer, state in copies.items())
    # The model still works, and the memory continues from its last state.
    again, _other = run(model, ids[:, 5:], memory=cache.memory)
    expected, _states = naive_run(model, ids[0, 5:].tolist(), {i: s[0] for i, s in copies.items()})
    close(again[0], expected, EQUATION_TOLERANCE)


def test_the_initial_memory_is_not_modified():
    model = patched_model()
    _, first = run(model, tokens(2, 5))
    memory = first.memory
    copies = {layer: state.clone() for layer, state in memory.layers.items()}
    for _ in range(2):
        run(model, tokens(2, 5, seed=3), memory=memory)
    assert all(torch.equal(memory.layers[layer], state) for layer, state in copies.items())


def test_changing_any_weight_changes_the_fingerprint():
    model = patched_model()
    adapter = adapter_of(model)
    fingerprints = {adapter.fingerprint}
    for weight in adapter.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        fingerprints.add(adapter.fingerprint)
    assert len(fingerprints) == 1 + len(list(adapter.parameters()))
    assert patched_model(seed=4).base_model is not None
    assert adapter_of(patched_model(seed=4)).fingerprint == adapter_of(patched_model(seed=4)).fingerprint


def test_every_error_is_a_deltamem_error():
    assert issubclass(MemoryStateError, DeltaMemError) and issubclass(ArchitectureError, DeltaMemError)
