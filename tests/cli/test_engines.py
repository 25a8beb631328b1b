"""Where a command puts the model."""

from __future__ import annotations

import click
import pytest
import torch
from helpers.tiny import logits

from deltamem_tool.adapter import load
from deltamem_tool.cli.engines import load_on, torch_engine


def test_auto_is_a_device_map(monkeypatch):
    asked, own = [], load.load
    monkeypatch.setattr(load, "load", lambda *args, **kwargs: asked.append(kwargs) or own(*args, **kwargs))
    spread, plain = (load_on(device, "builtin:adapter", {}) for device in ("auto", "cpu"))
    assert asked == [{"device_map": "auto"}, {}]
    assert torch.equal(logits(spread), logits(plain))


def test_sharing_a_base_needs_processes_and_an_evaluation():
    with pytest.raises(click.UsageError, match="torchrun"):
        load_on("tp", "builtin:adapter", {})
    with pytest.raises(click.UsageError, match="only `deltamem eval`"):
        torch_engine("builtin:adapter", "tp", {})
