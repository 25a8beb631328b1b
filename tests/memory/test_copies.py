"""Deep copies of a model with a memory are independent; shallow copies share it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers.model_runs import close_memory, fingerprint_of_base, run
from helpers.tiny import ARCHITECTURES, logits, patched_model, randomise, tiny_model, tokens
from memory.test_wrapped import gpt2, with_lora

from deltamem_tool import DeltaMemConfig, MemoryCache, attach, detach
from deltamem_tool.errors import ArchitectureError
from deltamem_tool.memory.attach import adapter_of

OPT = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def opt():
    """An OPT, whose decoder is a module of its base model."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(vocab_size=96, max_position_embeddings=64, init_std=0.2, **OPT)).eval()
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


def lora():
    model = with_lora(gpt2())
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


MODELS = {**{name: lambda name=name: patched_model(name) for name in ARCHITECTURES}, "opt": opt, "lora": lora}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@torch.no_grad()
def zeroed(model):
    for weight in adapter_of(model).parameters():
        weight.zero_()


@every_model
def test_a_deep_copy_is_independent(make):
    model, ids = make(), tokens(2, 7)
    expected, cache = run(model, ids)
    bare = make()
    detach(bare)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    zeroed(model)
    (after, other), reference = run(copied, ids, (4,)), run(make(), ids, (4,))
    assert torch.equal(after, reference[0])
    close_memory(other.memory, reference[1].memory, 0.0)
    detach(model)
    assert torch.equal(logits(model), logits(bare))
    assert torch.equal(run(copied, ids)[0], expected), "detaching the original takes the copy's memory off"
    zeroed(copied)
    assert torch.equal(logits(copied), logits(bare)), "the copy's own adapter is not what it computes with"
    detach(copied)
    assert torch.equal(logits(copied), logits(bare))
    before = [fingerprint_of_base(each) for each in (copied, model, bare)]
    assert before[0] == before[1] == before[2]
    randomise(attach(copied, DeltaMemConfig(rank=4)))
    assert torch.equal(run(copied, ids)[0], expected)
    assert cache.memory.batch_size == 2


def test_a_deep_copy_generates_and_trains_independently():
    model, ids = patched_model(), tokens(1, 5)
    copied = copy.deepcopy(model)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    zeroed(model)
    cache = MemoryCache(copied)
    assert torch.equal(copied.generate(ids, max_new_tokens=4, do_sample=False, cache=cache), expected)
    assert cache.memory is not None and cache.memory.adapter == adapter_of(copied).fingerprint
    copied(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in adapter_of(copied).parameters())
    assert all(weight.grad is None for weight in adapter_of(model).parameters())


def test_a_deep_copy_of_only_the_base_model_is_independent():
    model, ids = patched_model(), tokens(1, 6)
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        copied = copy.deepcopy(model.model)
        zeroed(model)
        assert torch.equal(copied(ids).last_hidden_state, expected)


def test_changed_weights_of_a_copy_are_used():
    adapter = adapter_of(patched_model())
    with torch.no_grad():
        adapter.layer(0).key.weight.mul_(1.0)  # the original has counted more changes than the copy will
    before = adapter.fingerprint
    copied = copy.deepcopy(adapter)
    assert copied.fingerprint == before
    fingerprints = {before}
    for _ in range(4):
        with torch.no_grad():
            copied.layer(0).key.weight.mul_(1.5)
        fingerprints.add(copied.fingerprint)
    assert len(fingerprints) == 5 and adapter.fingerprint == before


@pytest.mark.parametrize("first", [0, 1])
def test_shallow_copies_share_the_memory(first, tmp_path):
    model = patched_model()
    models = [model, copy.copy(model)]
    expected = logits(patched_model())
    assert all(torch.equal(logits(each), expected) for each in models)
    with pytest.raises(ArchitectureError, match="already has a memory"):
        attach(models[first])
    detach(models[first])
    bare = logits(tiny_model())
    for each in models:
        assert torch.equal(logits(each), bare)
        assert len(list(each.parameters())) == len(list(tiny_model().parameters())) and "deltamem" not in repr(each)
        with pytest.raises(ArchitectureError, match="no memory"):
            adapter_of(each)
    models[1 - first].save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), bare)
    randomise(attach(models[1 - first], DeltaMemConfig(rank=4)))
    assert torch.equal(logits(models[1 - first]), expected)


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_pickling_raises(write):
    model = patched_model()
    expected = logits(model)
    with pytest.raises(ArchitectureError, match="cannot be pickled") as refusal:
        write(model)
    assert "save_adapter" in str(refusal.value)
    assert torch.equal(logits(model), expected)
    adapter = pickle.loads(pickle.dumps(adapter_of(model)))
    assert adapter.fingerprint == adapter_of(model).fingerprint
    detach(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(tiny_model()))
