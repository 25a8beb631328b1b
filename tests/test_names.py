"""The public names."""

from __future__ import annotations

import pytest

import deltamem_tool

PUBLIC = {
    "Conversation",
    "DeltaMemConfig",
    "DeltaMemError",
    "MemoryCache",
    "MemoryState",
    "OnnxModel",
    "TorchModel",
    "__version__",
    "attach",
    "convert",
    "detach",
    "encode_chat",
    "evaluate",
    "export_onnx",
    "load",
    "pull",
    "push",
    "save_adapter",
    "train",
    "without_memory",
}


def test_the_public_names_are_unchanged():
    assert set(deltamem_tool.__all__) == PUBLIC and len(deltamem_tool.__all__) == len(PUBLIC)
    assert set(dir(deltamem_tool)) == PUBLIC
    for name in PUBLIC:
        assert getattr(deltamem_tool, name) is not None
    for name in PUBLIC - {"__version__"}:
        assert getattr(deltamem_tool, name).__doc__, f"{name} has no documentation"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        deltamem_tool.nothing  # noqa: B018
