"""A base spread over two devices that this machine lacks: fake tensors on simulated devices.

Fake tensors have a device and a shape but no numbers, and torch raises if operands are on different devices. The
backend cannot be unregistered, so these functions run in their own process.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import send_to_device
from helpers.tiny import tiny_model, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from deltamem_tool import DeltaMemConfig, MemoryCache, MemoryState, attach

FIRST, SECOND = "pretended:0", "pretended:1"
SPLIT = {"model.embed_tokens": FIRST, "model.layers.0": FIRST, "model.rotary_emb": FIRST}
SPLIT |= {"model.layers.1": SECOND, "model.norm": SECOND, "lm_head": SECOND}
Places = list[list[str]]  # the devices of each layer's tensors


def move(module: nn.Module, device: str | torch.device) -> nn.Module:
    """Replace torch's own `Module.to`, which cannot move fake tensors."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = tensor.detach().to(device)
                    tensors[name] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved
    return module


class Lacking:
    """The device module that torch queries for a device type."""

    def is_available(self) -> bool:
        return False

    def is_initialized(self) -> bool:
        return False

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return 0


def seen() -> dict[str, Any]:
    """The results of the functions below, by name."""
    _setup_privateuseone_for_python_backend("pretended", Lacking())
    by_message = {"granularity": "message", "branches": ("q", "k", "v", "o"), "o_norm": True}
    with patch.object(nn.Module, "to", move), FakeTensorMode(), torch.no_grad():
        return {"mixed": mixed(), "token": in_two_parts({}), "message": in_two_parts(by_message), "moved": moved()}


def split(model, places: dict[str, str]) -> None:
    """Do what accelerate's `dispatch_model` does, for fake tensors."""

    def bring(module, args, kwargs):
        device = next(module.parameters()).device
        return send_to_device(args, device), send_to_device(kwargs, device)

    for name, device in places.items():
        module = model.get_submodule(name).to(device)
        if list(module.parameters()):
            module.register_forward_pre_hook(bring, with_kwargs=True)


def places_of(memory: MemoryState, adapter) -> Places:
    """The devices of each layer's state, open segment and weights."""
    parts = [part for part in (memory.layers, memory.open_segments) if part]
    tensors = [(*(part[i] for part in parts), *adapter.layer(i).parameters()) for i in memory.layers]
    return [sorted({str(tensor.device) for tensor in of_layer}) for of_layer in tensors]


def in_two_parts(options: dict[str, Any]) -> list[Places]:
    """Places after calls of a model with two layers on two devices. Before the first call, all is on the CPU."""
    model = tiny_model()
    adapter = attach(model, DeltaMemConfig(rank=4, **options))
    split(model, SPLIT)
    with adapter.in_training():  # fake tensors have no fingerprint
        cache, places = MemoryCache(model), [places_of(adapter.empty_memory(2), adapter)]
        for past, length in ((0, 9), (9, 1), (10, 3)):
            if options:
                cache.segment_tags = torch.ones(2, length, dtype=torch.int8, device=FIRST)
            mask = torch.ones(2, past + length, dtype=torch.long, device=FIRST)
            model(tokens(2, length).to(FIRST), attention_mask=mask, cache=cache)
            places.append(places_of(cache.memory, adapter))
        places.append(places_of(adapter.empty_memory(2), adapter))
        cache.reorder_cache(torch.tensor([1, 0]))
        places.append(places_of(cache.memory, adapter))
        places.append(places_of(MemoryState.stack([cache.memory, cache.memory.to("cpu")]), adapter))
    return places


def moved() -> list[Places]:
    """Calls of a model that moves from device to device."""
    model, places = tiny_model(), []
    adapter = attach(model, DeltaMemConfig(rank=4))
    with adapter.in_training():
        cache = MemoryCache(model)
        for device in ("cpu", FIRST, SECOND):
            model.to(device)
            cache.layers = MemoryCache(model).layers  # keys and values stay behind
            model(tokens(1, 5).to(device), cache=cache)
            places.append(places_of(cache.memory, adapter))
    return places


def mixed() -> str:
    """The error of torch for operands on two devices."""
    try:
        torch.zeros(1, device=FIRST) + torch.zeros(1, device=SECOND)
    except RuntimeError as error:
        return str(error)
    return ""
