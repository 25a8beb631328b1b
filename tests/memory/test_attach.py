"""`attach`: what it changes in a model, what it leaves alone, and that splitting a text over calls changes nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import (
    CUT_TOLERANCE,
    EQUATION_TOLERANCE,
    HEADS,
    RULES,
    cache_of,
    close,
    close_memory,
    every_architecture,
    fingerprint_of_base,
    run,
)
from helpers.naive_model import naive_run
from helpers.tiny import PAD, base_parameters, patched_model, randomise, tiny_model, tokens

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach, detach
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.attach import adapter_of

# The base is untouched.


@every_architecture
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_memory_leaves_logits_bit_identical(name, heads, dtype):
    model = tiny_model(name).to(dtype)
    ids = tokens(2, 9)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modules = [key for key, _ in model.named_modules()]
    with torch.no_grad():
        before = model(ids).logits
        attach(model, DeltaMemConfig(rank=4, branches=heads))
        after = model(ids).logits
    assert torch.equal(before, after)
    assert [key for key, _ in model.named_modules()] == modules
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in base_parameters(model))
    assert all(parameter.requires_grad for parameter in adapter_of(model).parameters())


@every_architecture
def test_detach_restores_the_base(name):
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


@every_architecture
@pytest.mark.parametrize("heads", [*HEADS, ("q",), ("k",), ("v",)])
def test_every_corrected_projection_changes_the_logits(name, heads):
    model = patched_model(name, branches=heads)
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


@every_architecture
@pytest.mark.parametrize("heads", HEADS)
def test_logits_and_states_match_the_equations(name, heads):
    model = patched_model(name, branches=heads)
    ids = tokens(1, 12)
    logits, cache = run(model, ids)
    expected, states = naive_run(model, ids[0].tolist())
    close(logits[0], expected, EQUATION_TOLERANCE)
    for layer, state in states.items():
        close(cache.memory.layers[layer][0], state, EQUATION_TOLERANCE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state_heads", [1, 3])
def test_every_update_rule_matches_the_equations(rule, state_heads):
    model = patched_model(update_rule=rule, state_heads=state_heads, alpha=6.0)
    ids = tokens(1, 10)
    start = MemoryState({layer: torch.randn(1, state_heads, 4, 4) for layer in (0, 1)}, adapter_of(model).fingerprint)
    written = [True, False, True, True, False, False, True, True, True, False]
    logits, cache = run(model, ids, memory=start, write=torch.tensor([written]))
    expected, states = naive_run(model, ids[0].tolist(), {i: s[0] for i, s in start.layers.items()}, written)
    close(logits[0], expected, EQUATION_TOLERANCE)
    for layer, state in states.items():
        close(cache.memory.layers[layer][0], state, EQUATION_TOLERANCE)


def test_update_rules_give_different_results():
    """The comparison above would therefore notice a wrong rule."""
    ids = tokens(1, 10)
    states = {rule: run(patched_model(update_rule=rule), ids)[1].memory.layers[1] for rule in RULES}
    for rule, other in (RULES[:2], RULES[1:], RULES[::2]):
        assert (states[rule] - states[other]).abs().max() > 100 * EQUATION_TOLERANCE


# Chunking cannot matter.


@every_architecture
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_splitting_a_call_changes_nothing(name, attention):
    model = patched_model(name, attention=attention)
    ids = tokens(2, 11)
    whole, cache = run(model, ids)
    for cuts in ((1,), (4,), (10,), (3, 4, 9), range(1, 11)):
        pieces, other = run(model, ids, cuts)
        close(pieces, whole, CUT_TOLERANCE)
        close_memory(other.memory, cache.memory)


@every_architecture
def test_eager_and_sdpa_attention_agree(name):
    ids = tokens(2, 11)
    eager, cache = run(patched_model(name, attention="eager"), ids)
    sdpa, other = run(patched_model(name, attention="sdpa"), ids)
    close(sdpa, eager, CUT_TOLERANCE)
    close_memory(other.memory, cache.memory)


@every_architecture
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_result(name, attention, side):
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
                    pieces.append(model(ids[:, a:b], cache=cache, **options).logits)
            after = mask.sum(1, keepdim=True) + torch.arange(3)
            full = torch.cat([mask, ones], dim=1)
            pieces.append(model(more, cache=cache, attention_mask=full, position_ids=after).logits)
            logits = torch.cat(pieces, dim=1)
            for row, text in enumerate(rows):
                alone, solo = run(model, torch.cat([text, more[row : row + 1]], dim=1))
                close(logits[row][full[row].bool()], alone[0], CUT_TOLERANCE)
                close_memory(cache.memory.select([row]), solo.memory)


def test_the_mask_of_past_tokens_is_not_applied_to_new_ones():
    """In a mask over past and new tokens, columns of the past must not be applied to new tokens."""
    model = patched_model()
    ids, mask = tokens(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    cache = MemoryCache(model)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        model(ids[:, :4], cache=cache, attention_mask=mask[:, :4], position_ids=positions[:, :4])
        model(ids[:, 4:], cache=cache, attention_mask=mask, position_ids=positions[:, 4:])
    _, alone = run(model, ids[:, 3:])
    close_memory(cache.memory, alone.memory)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_nan_in_padding_does_not_reach_the_state(value):
    layer = adapter_of(patched_model()).layers["0"]
    hidden, state = torch.randn(2, 4, 32), torch.randn(2, 1, 4, 4)
    valid = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    for writes in (valid, valid & torch.tensor([True, False, True, False]), False):
        expected = layer(hidden, state, valid, writes)
        actual = layer(hidden.masked_fill(~valid[:, :, None], value), state, valid, writes)
        assert all(torch.equal(a, b) for a, b in zip(actual[:2], expected[:2], strict=True))


@torch.no_grad()
def test_autocast_leaves_the_memory_in_float32():
    layer = adapter_of(patched_model()).layers["0"]
    hidden, state, here = torch.randn(2, 40, 32), torch.randn(2, 1, 4, 4), torch.ones(2, 40).bool()
    readings, after, *_ = layer(hidden, state, None, here)
    correction = layer.correction("q", readings)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(hidden, state, None, here)
        assert torch.equal(result[0], readings) and torch.equal(result[1], after)
        assert torch.equal(layer.correction("q", readings), correction)


def test_padding_gets_zero_readings():
    layer = adapter_of(patched_model()).layers["0"]
    hidden, state = torch.randn(2, 4, 32), torch.randn(2, 1, 4, 4)
    valid = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    for writes in (valid, False):
        readings, *_ = layer(hidden, state, valid, writes)
        assert torch.equal(readings.abs().sum(-1) > 0, valid)


def test_a_row_of_only_padding_keeps_its_memory():
    model = patched_model()
    _, first = run(model, tokens(2, 5))
    cache = MemoryCache(model, memory=first.memory)
    with torch.no_grad():
        model(tokens(2, 4), cache=cache, attention_mask=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    for layer, state in first.memory.layers.items():
        assert torch.equal(cache.memory.layers[layer][0], state[0])
        assert not torch.equal(cache.memory.layers[layer][1], state[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_state_of_a_bfloat16_model_is_float32(autocast):
    model = patched_model().to(torch.bfloat16)
    ids = tokens(1, 40)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, cache = run(model, ids)
        _decoded, other = run(model, ids, range(30, 40))
    assert logits.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in adapter_of(model).parameters())
    for layer, state in cache.memory.layers.items():
        assert state.dtype == other.memory.layers[layer].dtype == torch.float32
        # bfloat16 has 8 bits: numbers that passed through it would all equal their rounded values
        assert not torch.equal(state, state.bfloat16().float())


def test_the_memory_of_a_bfloat16_model_is_computed_in_float32():
    """Layer 0 gets the same hidden states, so the memory of a bfloat16 model must equal the float32 one."""
    exact, rounded = patched_model(), patched_model()
    with torch.no_grad():
        for parameter in base_parameters(exact):
            parameter.copy_(parameter.bfloat16().float())
    inputs = []
    rounded.to(torch.bfloat16)
    rounded.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
    )
    _, cache = run(rounded, tokens(1, 30))
    memory, writes = adapter_of(exact).layers["0"], torch.ones(1, 30).bool()
    _, state, *_ = memory(inputs[0].float(), torch.zeros(1, 1, 4, 4), None, writes)
    assert torch.equal(cache.memory.layers[0], state)


def test_inputs_embeds_work_like_input_ids():
    model = patched_model()
    ids = tokens(2, 6)
    logits, cache = run(model, ids)
    other = MemoryCache(model)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), cache=other).logits
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
        assert isinstance(cache_of(output), MemoryCache)
        assert cache_of(model(ids, use_cache=False)) is None
        assert model(ids, return_dict=False)[0].shape == logits.shape


def test_a_read_only_cache_still_reads():
    model = patched_model()
    ids = tokens(2, 6)
    _, start = run(model, ids)
    reading, cache = run(model, ids, memory=start.memory, write=False)
    empty, _ = run(model, ids, write=False)
    assert (reading - empty).abs().max() > 1e-3
    for layer, state in start.memory.layers.items():
        assert torch.equal(cache.memory.layers[layer], state)
