"""`torch.inference_mode()`: models and memories created inside can be used outside, and vice versa."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import CUT_TOLERANCE, close, run
from helpers.tiny import patched_model, save_checkpoint, tiny_model, tokens

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach, detach, load, save_adapter
from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.memory.attach import adapter_of

CONFIG = DeltaMemConfig(rank=4, delta_init="base_slice")


@pytest.fixture
def folder(tmp_path):
    base = save_checkpoint(tmp_path / "base")
    with torch.inference_mode():
        create_adapter(str(base), CONFIG, tmp_path / "adapter")
    return tmp_path / "adapter"


def learns(model) -> None:
    """Check that a training step changes every weight of the adapter, and its fingerprint."""
    adapter, ids = adapter_of(model), tokens(1, 6)
    before = adapter.fingerprint
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in adapter.parameters())
    optimizer.step()
    assert adapter.fingerprint != before


def test_a_model_loaded_in_inference_mode_can_be_trained(folder):
    with torch.inference_mode():
        model = load(folder)
        inside, _ = run(model, tokens(1, 6))
    expected, _ = run(load(folder), tokens(1, 6))
    assert torch.equal(inside, expected) and torch.equal(run(model, tokens(1, 6))[0], expected)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *adapter_of(model).parameters()))
    learns(model)


def test_a_memory_attached_in_inference_mode_can_be_trained():
    model = tiny_model()
    with torch.inference_mode():
        attach(model, CONFIG)
        run(model, tokens(1, 6))
    learns(model)


def test_detach_restores_a_base_created_in_inference_mode():
    with torch.inference_mode():
        model = tiny_model()
    required = [parameter.requires_grad for parameter in model.parameters()]
    assert all(required)
    attach(model, CONFIG)
    assert run(model, tokens(1, 6))[0].isfinite().all()
    detach(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == required


@pytest.mark.parametrize("options", [{}, {"granularity": "message"}], ids=["token", "message"])
def test_a_memory_written_inside_is_read_where_gradients_are_computed(options, tmp_path):
    model = patched_model(**options)
    history, ids = tokens(1, 7), tokens(1, 6, seed=1)

    def loss(memory):
        adapter_of(model).zero_grad()
        value = model(ids, labels=ids, cache=MemoryCache(model, memory)).loss
        value.backward()
        return value.detach(), [
            weight.grad.clone() for weight in adapter_of(model).parameters() if weight.grad is not None
        ]

    with torch.inference_mode():
        _, cache = run(model, history)
    expected, gradients = loss(run(model, history)[1].memory.clone())
    actual, others = loss(cache.memory)
    close(actual, expected, CUT_TOLERANCE)
    for gradient, other in zip(gradients, others, strict=True):
        close(other, gradient, CUT_TOLERANCE)
    model(ids, labels=ids, cache=cache).loss.backward()  # the conversation itself can also be continued
    cache.memory.save(tmp_path / "memory.safetensors")
    assert MemoryState.load(tmp_path / "memory.safetensors").adapter == adapter_of(model).fingerprint


def test_a_weight_changed_in_inference_mode_is_used():
    model = patched_model()
    adapter = adapter_of(model)
    fingerprints = [adapter.fingerprint]
    with torch.inference_mode():
        adapter.layer(0).key.weight.mul_(1.5)
        fingerprints.append(adapter.fingerprint)
        adapter.layer(0).key.weight.data = torch.randn(4, 32)
    fingerprints.append(adapter.fingerprint)
    with torch.inference_mode():
        adapter.layer(0).key.weight.mul_(1.5)
    fingerprints.append(adapter.fingerprint)
    assert len(set(fingerprints)) == 4


def test_an_adapter_can_be_saved_in_inference_mode(folder, tmp_path):
    with torch.inference_mode():
        save_adapter(load(folder), tmp_path / "again")
    assert adapter_of(load(tmp_path / "again")).fingerprint == adapter_of(load(folder)).fingerprint
