"""What attaching a memory does to a model, what it must not do, and that how a text is cut does not matter."""

from __future__ import annotations

import threading

import pytest
import torch
from naive_model import naive_run
from tiny import ARCHITECTURES, PAD, patched_model, randomise, tiny_model, tokens
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
from deltamem_tool.errors import ArchitectureError, ConfigError, MemoryStateError
from deltamem_tool.surgery import adapter_of

HEADS = (("q", "o"), ("k", "v"), ("q", "k", "v", "o"), ("o",))
RULES = ("standard", "lambda_outside", "no_lambda")
# Float32 against the float64 equations; logits and states are of order 1 to 10.
EQUATION_TOLERANCE = 5e-5
# Float32 against float32, the same sums in another order.
CUT_TOLERANCE = 2e-5

everywhere = pytest.mark.parametrize("name", ARCHITECTURES)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, check_dtype=False)


def close_memory(memory: MemoryState, other: MemoryState, tolerance=CUT_TOLERANCE):
    assert sorted(memory.layers) == sorted(other.layers)
    for layer, state in other.layers.items():
        close(memory.layers[layer], state, tolerance)


@torch.no_grad()
def run(model, ids, cuts=(), memory=None, write=True):
    """Logits of `ids` fed in pieces that end at `cuts`, and the cache."""
    cache = MemoryCache(model, memory=memory, write=write)
    bounds = [0, *cuts, ids.shape[1]]
    pieces = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.cat(pieces, dim=1), cache


def fingerprint_of_base(model):
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return [name for name, _ in model.named_modules()], hooks, {n: p.requires_grad for n, p in model.named_parameters()}


# The base is untouched.


@everywhere
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_memory_changes_no_bit(name, heads, dtype):
    model = tiny_model(name).to(dtype)
    ids = tokens(2, 9)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [key for key, _ in model.named_modules()]
    with torch.no_grad():
        before = model(ids).logits
        attach(model, DeltaMemConfig(rank=4, heads=heads))
        after = model(ids).logits
    assert torch.equal(before, after)
    assert [key for key, _ in model.named_modules()] == modules
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in adapter_of(model).parameters())


@everywhere
def test_detach_gives_the_base_back(name):
    model = tiny_model(name)
    model.get_input_embeddings().weight.requires_grad_(False)
    before, attributes = fingerprint_of_base(model), set(vars(model))
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        generated = model.generate(ids, max_new_tokens=5, do_sample=False)
        randomise(attach(model, DeltaMemConfig(rank=4)))
        assert not torch.equal(model(ids).logits, logits)
        detach(model)
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
    assert fingerprint_of_base(model) == before
    assert set(vars(model)) == attributes
    with pytest.raises(ArchitectureError, match="no memory"):
        detach(model)


@everywhere
@pytest.mark.parametrize("heads", [*HEADS, ("q",), ("k",), ("v",)])
def test_every_corrected_projection_matters(name, heads):
    model = patched_model(name, heads=heads)
    ids = tokens(1, 9)
    logits, _ = run(model, ids)
    for branch in heads:
        with torch.no_grad():
            adapter_of(model).layers["1"].delta[branch].weight.mul_(1.5)
        changed, _ = run(model, ids)
        assert (changed - logits).abs().max() > 1e-3, f"Δ_{branch} does nothing"
        logits = changed


def test_only_the_chosen_layers_have_a_memory():
    model = tiny_model()
    randomise(attach(model, DeltaMemConfig(rank=4, layers=(1,))))
    ids = tokens(1, 7)
    logits, cache = run(model, ids)
    assert sorted(cache.memory.layers) == [1]
    expected, states = naive_run(model, ids[0].tolist())
    close(logits[0], expected, EQUATION_TOLERANCE)
    close(cache.memory.layers[1][0], states[1], EQUATION_TOLERANCE)


# The equations.


@everywhere
@pytest.mark.parametrize("heads", HEADS)
def test_equals_the_equations(name, heads):
    model = patched_model(name, heads=heads)
    ids = tokens(1, 12)
    logits, cache = run(model, ids)
    expected, states = naive_run(model, ids[0].tolist())
    close(logits[0], expected, EQUATION_TOLERANCE)
    for layer, state in states.items():
        close(cache.memory.layers[layer][0], state, EQUATION_TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_heads", [1, 3])
def test_every_update_rule_equals_the_equations(rule, state_heads):
    model = patched_model(update_rule=rule, state_heads=state_heads, alpha=6.0)
    ids = tokens(1, 10)
    start = MemoryState({layer: torch.randn(1, state_heads, 4, 4) for layer in (0, 1)}, adapter_of(model).fingerprint)
    written = [True, False, True, True, False, False, True, True, True, False]
    logits, cache = run(model, ids, memory=start, write=torch.tensor([written]))
    expected, states = naive_run(model, ids[0].tolist(), {i: s[0] for i, s in start.layers.items()}, written)
    close(logits[0], expected, EQUATION_TOLERANCE)
    for layer, state in states.items():
        close(cache.memory.layers[layer][0], state, EQUATION_TOLERANCE)


def test_the_equations_can_tell_the_rules_apart():
    """The comparison above would fail if a rule were taken for another."""
    ids = tokens(1, 10)
    states = {rule: run(patched_model(update_rule=rule), ids)[1].memory.layers[1] for rule in RULES}
    for rule, other in (RULES[:2], RULES[1:], RULES[::2]):
        assert (states[rule] - states[other]).abs().max() > 100 * EQUATION_TOLERANCE


# Chunking cannot matter.


@everywhere
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_call_is_many_calls(name, attention):
    model = patched_model(name, attention=attention)
    ids = tokens(2, 11)
    whole, cache = run(model, ids)
    for cuts in ((1,), (4,), (10,), (3, 4, 9), range(1, 11)):
        pieces, other = run(model, ids, cuts)
        close(pieces, whole, CUT_TOLERANCE)
        close_memory(other.memory, cache.memory)


@everywhere
def test_eager_is_sdpa(name):
    ids = tokens(2, 11)
    eager, cache = run(patched_model(name, attention="eager"), ids)
    sdpa, other = run(patched_model(name, attention="sdpa"), ids)
    close(sdpa, eager, CUT_TOLERANCE)
    close_memory(other.memory, cache.memory)


@everywhere
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(name, attention, side):
    model = patched_model(name, attention=attention)
    rows = [tokens(1, length, seed=length) for length in (9, 4, 6)]
    ids, mask = torch.full((3, 9), PAD), torch.zeros(3, 9, dtype=torch.long)
    for row, text in enumerate(rows):
        at = slice(9 - text.shape[1], 9) if side == "left" else slice(0, text.shape[1])
        ids[row, at], mask[row, at] = text[0], 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    more, ones = tokens(3, 3, seed=5), torch.ones(3, 3, dtype=torch.long)
    with torch.no_grad():
        for cut in (9, 5, 1):  # within the padding too
            cache, pieces = MemoryCache(model), []
            for a, b in ((0, cut), (cut, 9)):
                if a < b:
                    options = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
                    pieces.append(model(ids[:, a:b], past_key_values=cache, **options).logits)
            after = mask.sum(1, keepdim=True) + torch.arange(3)
            full = torch.cat([mask, ones], dim=1)
            pieces.append(model(more, past_key_values=cache, attention_mask=full, position_ids=after).logits)
            logits = torch.cat(pieces, dim=1)
            for row, text in enumerate(rows):
                alone, solo = run(model, torch.cat([text, more[row : row + 1]], dim=1))
                close(logits[row][full[row].bool()], alone[0], CUT_TOLERANCE)
                close_memory(cache.memory.select([row]), solo.memory)


def test_padding_is_the_padding_of_this_call():
    """A mask over past and new tokens: columns of the past must not be taken for new ones."""
    model = patched_model()
    ids, mask = tokens(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    cache = MemoryCache(model)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache, attention_mask=mask[:, :4], position_ids=positions[:, :4])
        model(ids[:, 4:], past_key_values=cache, attention_mask=mask, position_ids=positions[:, 4:])
    _, alone = run(model, ids[:, 3:])
    close_memory(cache.memory, alone.memory)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_padding_cannot_poison_the_state(value):
    layer = adapter_of(patched_model()).layers["0"]
    hidden, state = torch.randn(2, 4, 32), torch.randn(2, 1, 4, 4)
    valid = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    for writes in (valid, valid & torch.tensor([True, False, True, False]), False):
        expected = layer(hidden, state, valid, writes)
        found = layer(hidden.masked_fill(~valid[:, :, None], value), state, valid, writes)
        assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))


@torch.no_grad()
def test_autocast_does_not_round_the_memory():
    layer = adapter_of(patched_model()).layers["0"]
    hidden, state, here = torch.randn(2, 40, 32), torch.randn(2, 1, 4, 4), torch.ones(2, 40).bool()
    readings, after, _ = layer(hidden, state, None, here)
    correction = layer.correction("q", readings)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(hidden, state, None, here)
        assert torch.equal(found[0], readings) and torch.equal(found[1], after)
        assert torch.equal(layer.correction("q", readings), correction)


def test_padding_reads_zero():
    layer = adapter_of(patched_model()).layers["0"]
    hidden, state = torch.randn(2, 4, 32), torch.randn(2, 1, 4, 4)
    valid = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    for writes in (valid, False):
        readings, _, _ = layer(hidden, state, valid, writes)
        assert torch.equal(readings.abs().sum(-1) > 0, valid)


def test_a_row_of_padding_alone_keeps_its_memory():
    model = patched_model()
    _, first = run(model, tokens(2, 5))
    cache = MemoryCache(model, memory=first.memory)
    with torch.no_grad():
        model(tokens(2, 4), past_key_values=cache, attention_mask=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    for layer, state in first.memory.layers.items():
        assert torch.equal(cache.memory.layers[layer][0], state[0])
        assert not torch.equal(cache.memory.layers[layer][1], state[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_state_of_a_bfloat16_model_is_float32(autocast):
    model = patched_model().to(torch.bfloat16)
    ids = tokens(1, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, cache = run(model, ids)
        decoded, other = run(model, ids, range(30, 40))
    assert logits.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in adapter_of(model).parameters())
    for layer, state in cache.memory.layers.items():
        assert state.dtype == other.memory.layers[layer].dtype == torch.float32
        # bfloat16 has 8 bits: numbers that passed through it would all be equal to their own rounding
        assert not torch.equal(state, state.bfloat16().float())


def test_the_memory_of_a_bfloat16_model_is_computed_in_float32():
    """From the same hidden states, the memory of a bfloat16 model is the float32 one: layer 0 sees them."""
    exact, rounded = patched_model(), patched_model()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16().float())
    seen = []
    rounded.to(torch.bfloat16)
    rounded.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    _, cache = run(rounded, tokens(1, 30))
    memory, writes = adapter_of(exact).layers["0"], torch.ones(1, 30).bool()
    _, state, _ = memory(seen[0].float(), torch.zeros(1, 1, 4, 4), None, writes)
    assert torch.equal(cache.memory.layers[0], state)


def test_hidden_states_instead_of_tokens():
    model = patched_model()
    ids = tokens(2, 6)
    logits, cache = run(model, ids)
    other = MemoryCache(model)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=other).logits
    close(embedded, logits, CUT_TOLERANCE)
    close_memory(other.memory, cache.memory)


def test_without_a_cache_the_memory_still_reads_within_the_call():
    model = patched_model()
    ids = tokens(2, 6)
    logits, _ = run(model, ids)
    with torch.no_grad():
        close(model(ids).logits, logits, CUT_TOLERANCE)
        close(model(ids, use_cache=False).logits, logits, CUT_TOLERANCE)
        output = model(ids, use_cache=True)
        assert isinstance(output.past_key_values, MemoryCache)
        assert model(ids, use_cache=False).past_key_values is None
        assert model(ids, return_dict=False)[0].shape == logits.shape


def test_a_cache_that_does_not_write_reads():
    model = patched_model()
    ids = tokens(2, 6)
    _, told = run(model, ids)
    reading, cache = run(model, ids, memory=told.memory, write=False)
    empty, _ = run(model, ids, write=False)
    assert (reading - empty).abs().max() > 1e-3
    for layer, state in told.memory.layers.items():
        assert torch.equal(cache.memory.layers[layer], state)


# What does not fit raises.


def test_a_second_memory_is_refused():
    model = patched_model()
    adapter = adapter_of(model)
    with pytest.raises(ArchitectureError, match="memory already"):
        attach(model)
    assert adapter_of(model) is adapter
    assert len(model.base_model._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", ["dynamic", "static", "tuple"])
def test_another_cache_is_refused(kind):
    model = patched_model()
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
        "tuple": lambda: ((torch.zeros(1, 2, 3, 16),) * 2,) * 2,
    }[kind]()
    with pytest.raises(MemoryStateError, match="MemoryCache") as refusal:
        model(tokens(1, 4), past_key_values=cache)
    assert "forget" in str(refusal.value)
    logits, _ = run(model, tokens(1, 4))  # and the model still works
    assert logits.shape[1] == 4


def _gated():
    """Its q_proj gives [query | gate], which no row says of its type."""
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
    """Its c_attn gives [query | key | value], which no row says of its type."""
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
            r"(?s)\(mamba\) takes no memory.*softmax attention",
        ),
        (lambda: _fused(), r"(?s)\(new\) is not known.*known layout"),
        (lambda: _gated(), r"(?s)not laid out as its names say.*self_attn.q_proj is 128 wide, and .*o_proj takes 64"),
        (lambda: _twice(), "both of layer 0"),
    ],
    ids=["encoder", "encoder-decoder", "state-space", "unknown-attention", "query-and-gate", "one-layer-twice"],
)
def test_other_models_are_refused(make, says):
    model = make()
    before = fingerprint_of_base(model)
    with pytest.raises(ArchitectureError, match=says):
        attach(model)
    assert fingerprint_of_base(model) == before


def test_options_that_do_not_fit_leave_the_model_alone():
    model = tiny_model()
    before = fingerprint_of_base(model)
    with pytest.raises(ConfigError, match="hidden size, 32"):
        attach(model, DeltaMemConfig(rank=33))
    with pytest.raises(ArchitectureError, match=r"no attention in layers \[2, 7\]"):
        attach(model, DeltaMemConfig(layers=(0, 2, 7)))
    assert fingerprint_of_base(model) == before


def test_a_memory_of_another_size_raises():
    model = patched_model()
    _, cache = run(model, tokens(2, 5))
    with pytest.raises(MemoryStateError, match="holds 2 conversations, the batch 3"):
        model(tokens(3, 1), past_key_values=cache)
    fingerprint = adapter_of(model).fingerprint
    for layers, shape in (((0,), (1, 4, 4)), ((0, 1), (1, 3, 3)), ((0, 1), (2, 4, 4)), ((0, 1, 2), (1, 4, 4))):
        wrong = MemoryState({layer: torch.zeros(2, *shape) for layer in layers}, fingerprint)
        with pytest.raises(MemoryStateError, match="does not fit"):
            MemoryCache(model, memory=wrong)
        cache = MemoryCache(model)
        cache.memory = wrong  # past the constructor
        with pytest.raises(MemoryStateError, match="does not fit"):
            model(tokens(2, 1), past_key_values=cache)


def test_a_memory_of_another_adapter_raises():
    model, other = patched_model(), patched_model(seed=1)
    _, cache = run(other, tokens(1, 5))
    with pytest.raises(MemoryStateError, match="another adapter"):
        MemoryCache(model, memory=cache.memory)
    with pytest.raises(MemoryStateError, match="another adapter"):
        model(tokens(1, 1), past_key_values=cache)


def test_a_mask_that_hides_the_padding_raises():
    model = patched_model()
    with pytest.raises(MemoryStateError, match="2-D mask"):
        model(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(MemoryStateError, match="write mask"):
        model(tokens(1, 3), past_key_values=MemoryCache(model, write=torch.ones(1, 2, dtype=torch.bool)))


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("length", [3, 8, 12])
def test_a_mask_of_another_length_raises(sliding, length):
    """Attention counts its columns from the left, the memory from the right: they would mean other tokens."""
    changes = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4, "use_sliding_window": True}
    model = tiny_model(**(changes if sliding else {}))
    attach(model, DeltaMemConfig(rank=4))
    _, cache = run(model, tokens(2, 7))
    memory = cache.memory
    with pytest.raises(MemoryStateError, match=rf"\[2, {length}\], not \[2, 10\]"):
        model(tokens(2, 3), past_key_values=cache, attention_mask=torch.ones(2, length, dtype=torch.long))
    with pytest.raises(MemoryStateError, match=r"\[1, 10\], not \[2, 10\]"):
        model(tokens(2, 3), past_key_values=cache, attention_mask=torch.ones(1, 10, dtype=torch.long))
    assert cache.memory is memory
    with torch.no_grad():
        model(tokens(2, 3), past_key_values=cache, attention_mask=torch.ones(2, 10, dtype=torch.long))
    assert cache.get_seq_length() == 10


def test_gradient_checkpointing_is_refused_in_plain_words():
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


def test_a_parameter_that_came_later_does_not_stop_detach():
    model = tiny_model()
    attach(model)
    model.later = nn.Linear(2, 2)
    model.later.bias.requires_grad_(False)
    detach(model)
    assert all(parameter.requires_grad == (name != "later.bias") for name, parameter in model.named_parameters())
    attach(model)


def test_an_attention_layer_by_itself_raises():
    model = patched_model()
    with pytest.raises(MemoryStateError, match="outside of its decoder"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 32), None, None)


# State is an argument and a return value.


def test_conversations_in_many_threads_are_conversations_alone():
    model = patched_model()
    texts = [tokens(1 + n % 2, 10, seed=n) for n in range(5)]
    expected = [run(model, ids, range(1, 10)) for ids in texts]
    steps = threading.Barrier(len(texts))
    found = {}

    def converse(n: int) -> None:
        cache, pieces = MemoryCache(model), []
        for token in range(10):
            steps.wait(timeout=30)  # every conversation is at the same token, in the model at the same time
            with torch.no_grad():
                pieces.append(model(texts[n][:, token : token + 1], past_key_values=cache).logits)
        found[n] = torch.cat(pieces, dim=1), cache

    threads = [threading.Thread(target=converse, args=(n,)) for n in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for n, (logits, cache) in enumerate(expected):
        assert torch.equal(found[n][0], logits)
        for layer, state in cache.memory.layers.items():
            assert torch.equal(found[n][1].memory.layers[layer], state)


def test_conversations_taking_turns_do_not_meet():
    model = patched_model()
    texts = [tokens(1, 8, seed=n) for n in range(2)]
    caches = [MemoryCache(model) for _ in texts]
    with torch.no_grad():
        for token in range(8):
            for ids, cache in zip(texts, caches, strict=True):
                model(ids[:, token : token + 1], past_key_values=cache)
    for ids, cache in zip(texts, caches, strict=True):
        close_memory(cache.memory, run(model, ids)[1].memory)


def test_a_model_called_within_a_model():
    """What an agent's tool or a judge in a hook does: the inner conversation ends, the outer one goes on."""
    outer, inner = patched_model(), patched_model("llama", seed=1)
    ids = tokens(1, 6)
    expected, cache = run(outer, ids)
    alone, _ = run(inner, ids)
    said = []
    outer.model.layers[0].mlp.register_forward_hook(lambda *_: said.append(run(inner, ids)[0]))
    logits, other = run(outer, ids)
    assert torch.equal(logits, expected) and torch.equal(said[0], alone)
    close_memory(other.memory, cache.memory, 0.0)


class _Broken(nn.Module):
    def forward(self, *args, **kwargs):
        raise RuntimeError("broken on purpose")


def test_an_exception_in_the_decoder_leaves_the_memory():
    model = patched_model()
    ids = tokens(1, 10)
    _, cache = run(model, ids[:, :5])
    before = cache.memory
    copies = {layer: state.clone() for layer, state in before.layers.items()}
    whole = model.model.layers[1].mlp
    model.model.layers[1].mlp = _Broken()
    with pytest.raises(RuntimeError, match="on purpose"):
        model(ids[:, 5:], past_key_values=cache)
    model.model.layers[1].mlp = whole
    assert cache.memory is before
    assert all(torch.equal(before.layers[layer], state) for layer, state in copies.items())
    # The model works on, and the memory goes on from where it was.
    again, other = run(model, ids[:, 5:], memory=cache.memory)
    expected, states = naive_run(model, ids[0, 5:].tolist(), {i: s[0] for i, s in copies.items()})
    close(again[0], expected, EQUATION_TOLERANCE)


def test_a_given_memory_is_not_changed():
    model = patched_model()
    _, first = run(model, tokens(2, 5))
    memory = first.memory
    copies = {layer: state.clone() for layer, state in memory.layers.items()}
    for _ in range(2):
        run(model, tokens(2, 5, seed=3), memory=memory)
    assert all(torch.equal(memory.layers[layer], state) for layer, state in copies.items())


def test_the_fingerprint_follows_every_weight():
    model = patched_model()
    adapter = adapter_of(model)
    seen = {adapter.fingerprint}
    for weight in adapter.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        seen.add(adapter.fingerprint)
    assert len(seen) == 1 + len(list(adapter.parameters()))
    assert patched_model(seed=4).base_model is not None
    assert adapter_of(patched_model(seed=4)).fingerprint == adapter_of(patched_model(seed=4)).fingerprint


def test_errors_are_deltamem_errors():
    assert issubclass(MemoryStateError, DeltaMemError) and issubclass(ArchitectureError, DeltaMemError)
