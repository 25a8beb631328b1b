"""The device on which a command loads the model."""

from __future__ import annotations

import click
import pytest
import torch
from helpers.tiny import logits

from deltamem_tool.adapter import load
from deltamem_tool.cli.engines import load_on, torch_engine


def test_the_device_auto_is_passed_as_a_device_map(monkeypatch):
    requests, own = [], load.load
    monkeypatch.setattr(load, "load", lambda *args, **kwargs: requests.append(kwargs) or own(*args, **kwargs))
    spread, plain = (load_on(device, "builtin:adapter", {}) for device in ("auto", "cpu"))
    assert requests == [{"device_map": "auto"}, {}]
    assert torch.equal(logits(spread), logits(plain))


def load_on_it(adapter, device, options):
    return load_on(device, adapter, options)


@pytest.mark.parametrize("engine_of", [torch_engine, load_on_it])
def test_sharding_a_base_needs_several_processes(engine_of):
    with pytest.raises(click.UsageError, match="torchrun"):
        engine_of("builtin:adapter", "tp", {})
