"""Logits and states equal the reference implementation's, in one piece and in two, eager and SDPA."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.parity_cases import CASES, load_calls, load_model

from deltamem_tool import MemoryCache

TOLERANCE = 1e-4  # on logits and states, float32


def run(model, calls, cut=None):
    """Feed `calls`; `cut` = (call, token) runs that call in two parts. Yields each call's logits and memory."""
    cache = MemoryCache(model)
    for index, call in enumerate(calls):
        if call.fresh_kv_cache:
            cache = MemoryCache(model, memory=cache.memory, write=call.writes)
        cache.write = call.writes
        tokens, past = call.input_ids.shape[1], call.attention_mask.shape[1] - call.input_ids.shape[1]
        bounds = [0, cut[1], tokens] if cut is not None and cut[0] == index else [0, tokens]
        logits = []
        for start, end in itertools.pairwise(bounds):
            mask = call.attention_mask[:, : past + end]
            positions = (call.attention_mask.cumsum(1) - 1).clamp_min(0)[:, past + start : past + end]
            with torch.no_grad():
                output = model(
                    input_ids=call.input_ids[:, start:end],
                    attention_mask=mask,
                    position_ids=positions,
                    cache=cache,
                )
            logits.append(output.logits)
        if call.one_message:
            cache.end_segment()
        yield torch.cat(logits, dim=1), cache.memory


def compare(model, calls, cut=None):
    for call, (logits, memory) in zip(calls, run(model, calls, cut), strict=True):
        torch.testing.assert_close(logits[call.valid], call.logits[call.valid], atol=TOLERANCE, rtol=0)
        assert sorted(memory.layers) == sorted(call.states)
        for layer, state in call.states.items():
            torch.testing.assert_close(memory.layers[layer], state, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_states_match_the_reference(case, attention):
    model, calls = load_model(case, attention), load_calls(case)
    compare(model, calls)
    for index, call in enumerate(calls):
        for token in range(1, call.input_ids.shape[1]):
            compare(model, calls, cut=(index, token))


def test_perturbed_weights_fail_the_comparison(tmp_path):
    """A memory whose weights are slightly off fails."""
    case = "tsw_fresh_kv_qwen3"
    model, calls = load_model(case, "eager"), load_calls(case)
    from deltamem_tool.memory.attach import adapter_of

    with torch.no_grad():
        adapter_of(model).layers["0"].value.weight.mul_(1.01)
    with pytest.raises(AssertionError):
        compare(model, calls)
