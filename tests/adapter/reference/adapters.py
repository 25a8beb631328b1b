"""Adapters of the reference implementation: how the tests read, change, compare and refuse them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.parity_cases import FOLDER
from helpers.tiny import listing

from deltamem_tool import convert
from deltamem_tool.adapter.reference.config import REFERENCE_CONFIG
from deltamem_tool.adapter.reference.convert import REFERENCE_WEIGHTS
from deltamem_tool.errors import AdapterError

CASE = FOLDER / "tsw_qo_qwen3"
BASE = str(CASE / "base")
QUERY = "model.layers.1.self_attn.memory_q_proj"
OFF = "model.layers.0.self_attn.delta_k_proj"  # k is not in delta_heads


def writable(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / REFERENCE_WEIGHTS, weights_only=True)


def change_tensors(folder: Path, change) -> None:
    """`change(tensors)` in place, or what it returns instead."""
    tensors = read_tensors(folder)
    changed = change(tensors)
    torch.save(tensors if changed is None else changed, folder / REFERENCE_WEIGHTS)


def change_config(folder: Path, **changes) -> dict:
    config = {**json.loads((folder / REFERENCE_CONFIG).read_text()), **changes}
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / REFERENCE_CONFIG).write_text(json.dumps(config, indent=2))
    return config


def assert_same_adapter(actual: Path, expected: Path) -> None:
    """Byte for byte in the config; names, order, types, shapes and bits of the weights."""
    assert (actual / REFERENCE_CONFIG).read_bytes() == (expected / REFERENCE_CONFIG).read_bytes()
    assert set(listing(actual)) == {REFERENCE_CONFIG, REFERENCE_WEIGHTS}
    assert_same_tensors(read_tensors(actual), read_tensors(expected))


def assert_same_tensors(actual, expected) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_refused(source: Path, tmp_path: Path, *says: str, base: str | None = BASE, error=AdapterError, **options):
    before = listing(tmp_path)
    with pytest.raises(error) as caught:
        convert(source, tmp_path / "out", base=base, **options)
    assert caught.value.what and caught.value.next
    for word in says:
        assert word in str(caught.value)
    assert listing(tmp_path) == before
