"""Graphs with packed keys and values."""

from __future__ import annotations

import pytest

from deltamem_tool.onnx.runtime.buffered_graph import open_graph


@pytest.fixture
def packed(qwen3):
    """Two layers, with initial buffers so small that conversations exceed them."""
    interface = qwen3.manifest.interface
    assert interface.packed and not interface.max_length
    return open_graph(qwen3.folder, interface)


@pytest.fixture
def small_rooms(monkeypatch):
    monkeypatch.setattr("deltamem_tool.onnx.runtime.buffered_graph.FIRST_ROOM", 4)
