"""Models with bidirectional attention become causal while a memory is attached."""

from __future__ import annotations

import pytest
import torch
from base_model.test_export_sweep import patched
from base_model.tiny_configs import TEXT_IDS

import deltamem_tool as deltamem
from deltamem_tool import MemoryCache
from deltamem_tool._compat import attention_implementation
from deltamem_tool.base_model.attention import attention_layers

TOLERANCE = 1e-4  # float32, sums in another order


@pytest.mark.slow
def test_attention_is_causal_until_the_memory_is_detached():
    model = patched("paligemma")
    assert attention_implementation(model.config) == "sdpa"
    ids = torch.arange(TEXT_IDS.start, TEXT_IDS.start + 9)[None]
    with torch.no_grad():
        whole, beginning = (model(input_ids=ids[:, :n], cache=MemoryCache(model)).logits for n in (9, 4))
    torch.testing.assert_close(whole[:, :4], beginning, atol=TOLERANCE, rtol=0)
    assert all(layer.module.is_causal for layer in attention_layers(model))
    deltamem.detach(model)
    assert not any(layer.module.is_causal for layer in attention_layers(model))
