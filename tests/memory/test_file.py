"""The memory file: loads bit for bit, is written completely or not at all, and is rejected when damaged."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from helpers.tiny import listing
from safetensors import safe_open
from safetensors.torch import save_file

from deltamem_tool import MemoryState
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory import file as memory_file

SEGMENT = "layers.1.segment"


@pytest.fixture
def memory():
    generator = torch.Generator().manual_seed(0)
    return MemoryState({layer: torch.randn(3, 2, 4, 4, generator=generator) for layer in (0, 1)}, "mark")


@pytest.fixture
def segment_memory(memory):
    """A memory of an adapter that writes by segment, with 0, 1 and 2 open tokens."""
    sums = {layer: state.flatten(1)[:, :20].clone() for layer, state in memory.layers.items()}
    for segment in sums.values():
        segment[:, -1] = torch.arange(3)
    return MemoryState(memory.layers, memory.adapter, sums)


def rewrite(path, change, metadata=()):
    """The memory file `path` with its tensors and metadata changed."""
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **dict(metadata)}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(change(tensors), path, {key: value for key, value in header.items() if value is not None})


def test_open_segments_are_saved_bit_for_bit(segment_memory, tmp_path):
    segment_memory.open_segments[1][0, :3] = torch.tensor([1e-45, -0.0, torch.finfo().max])
    segment_memory.save(tmp_path / "m")
    loaded = MemoryState.load(tmp_path / "m")
    for mine, others in ((loaded.layers, segment_memory.layers), (loaded.open_segments, segment_memory.open_segments)):
        assert list(mine) == list(others) == [0, 1]
        for layer, tensor in others.items():
            assert torch.equal(mine[layer].view(torch.int32), tensor.view(torch.int32))
    assert loaded.shape == segment_memory.shape and loaded.nbytes == segment_memory.nbytes
    assert loaded.nbytes == 3 * 2 * (2 * 4 * 4 + loaded.shape.segment_width) * 4


def test_a_memory_read_from_bytes_equals_the_file(segment_memory, tmp_path):
    segment_memory.save(tmp_path / "m")
    stored = memory_file.read_memory(tmp_path / "m")
    for content in (memory_file.memory_bytes(stored), (tmp_path / "m").read_bytes()):
        assert memory_file.memory_from_bytes(content, "this").digest() == stored.digest()


def test_a_memory_replaced_while_it_is_read_is_one_of_both(memory, tmp_path, monkeypatch):
    """States of one adapter must not be taken for those of the other."""
    path, states = tmp_path / "m", {layer: state + 1 for layer, state in memory.layers.items()}
    memory.save(path)
    check = memory_file._check_header

    def replaced(*args):
        check(*args)
        MemoryState(states, "another").save(path)

    monkeypatch.setattr(memory_file, "_check_header", replaced)
    stored = memory_file.read_memory(path)
    written = {"mark": memory.layers, "another": states}[stored.adapter]
    assert all(np.array_equal(state, written[layer].numpy()) for layer, state in stored.states.items())


def test_denormals_and_extreme_numbers_survive_saving(tmp_path):
    """Covers denormals, negative zero, and the largest and smallest numbers."""
    numbers = torch.tensor([1e-45, -0.0, torch.finfo().max, torch.finfo().min])
    memory = MemoryState({11: numbers.view(1, 1, 2, 2), 2: numbers.flip(0).view(1, 1, 2, 2)}, "mark")
    memory.save(tmp_path / "m")
    loaded = MemoryState.load(tmp_path / "m")
    assert sorted(loaded.layers) == [2, 11]
    for layer, state in memory.layers.items():
        assert torch.equal(loaded.layers[layer].view(torch.int32), state.view(torch.int32))


def test_tensors_with_gradients_and_views_can_be_saved(memory, tmp_path):
    tracked = MemoryState(
        {layer: state.clone().requires_grad_().transpose(2, 3) for layer, state in memory.layers.items()},
        memory.adapter,
    )
    tracked.save(tmp_path / "m")
    for layer, state in MemoryState.load(tmp_path / "m").layers.items():
        assert torch.equal(state, memory.layers[layer].transpose(2, 3))


def test_a_failed_write_keeps_the_old_file(memory, tmp_path, monkeypatch):
    path = tmp_path / "memory"
    memory.save(path)
    before, content = listing(tmp_path), path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, full)
            with pytest.raises(OSError, match="No space"):
                memory.fork(2).save(path)
            with pytest.raises(OSError, match="No space"):
                memory.save(tmp_path / "new")
        assert listing(tmp_path) == before
        assert path.read_bytes() == content


def test_a_new_file_has_the_usual_permissions(memory, tmp_path):
    before = os.umask(0o022)
    try:
        memory.save(tmp_path / "memory")
    finally:
        os.umask(before)
    assert (tmp_path / "memory").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("change", "metadata", "says"),
    [
        (lambda t: t, {"format_version": str(memory_file.FORMAT_VERSION + 1)}, "of memory format 2.*Update"),
        (lambda t: t, {"format_version": None}, "of memory format None"),
        (lambda t: t, {"format": "pt"}, "is not a memory file"),
        (lambda t: t, {"adapter": None}, "no fingerprint"),
        (lambda t: {}, {}, "no states"),
        (lambda t: t | {"layers.0.state": t["layers.0.state"] * torch.nan}, {}, "layers.0.state.*NaN"),
        (lambda t: t | {"layers.1.state": t["layers.1.state"] + torch.inf}, {}, "layers.1.state.*infinity"),
        (lambda t: t | {"layers.0.state": t["layers.0.state"].double()}, {}, "is not a float32 state"),
        (lambda t: t | {"layers.0.state": t["layers.0.state"].bfloat16()}, {}, "is not a float32 state|cannot be read"),
        (lambda t: t | {"layers.0.state": t["layers.0.state"][0]}, {}, "is not a float32 state"),
        (lambda t: t | {"layers.x.state": torch.zeros(1)}, {}, "layers.x.state"),
        (lambda t: {"layers.0.state": t["layers.0.state"], "layers.1.state": t["layers.1.state"][:1]}, {}, "disagree"),
    ],
)
def test_damaged_files_raise(memory, tmp_path, change, metadata, says):
    memory.save(tmp_path / "m")
    rewrite(tmp_path / "m", change, metadata)
    with pytest.raises(MemoryStateError, match=f"(?s){says}"):
        MemoryState.load(tmp_path / "m")
    with pytest.raises(MemoryStateError, match=f"(?s){says}"):
        memory_file.memory_from_bytes((tmp_path / "m").read_bytes(), "this")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {name: tensor for name, tensor in t.items() if name != SEGMENT}, "disagree on their open segments"),
        (lambda t: t | {"layers.2.segment": t[SEGMENT].clone()}, "disagree on their open segments"),
        (lambda t: t | {SEGMENT: t[SEGMENT][:, 1:].clone()}, "disagree on their open segments"),
        (lambda t: t | {SEGMENT: t[SEGMENT] * torch.nan}, f"{SEGMENT}' contains NaN"),
        (lambda t: t | {SEGMENT: t[SEGMENT] - torch.inf}, f"{SEGMENT}' contains NaN or infinity"),
        (lambda t: t | {SEGMENT: t[SEGMENT].double()}, SEGMENT),
        (lambda t: t | {SEGMENT: t[SEGMENT][0].clone()}, SEGMENT),
        (lambda t: t | {SEGMENT: t[SEGMENT][..., None]}, SEGMENT),
        (lambda t: t | {f"layers.{i}.segment": t[SEGMENT][:2].clone() for i in (0, 1)}, "number of conversations"),
        (lambda t: t | {"layers.1.state": t["layers.1.state"][:1].clone()}, "number of conversations"),
        (lambda t: t | {"layers.1.state": t["layers.1.state"].flatten(2)}, "layers.1.state"),
    ],
)
def test_damaged_segments_raise(segment_memory, tmp_path, change, says):
    segment_memory.save(tmp_path / "m")
    rewrite(tmp_path / "m", change)
    with pytest.raises(MemoryStateError, match=f"(?s)damaged.*{says}"):
        MemoryState.load(tmp_path / "m")


def test_loading_states_that_are_not_square_raises(memory, tmp_path):
    memory.save(tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: {name: tensor[..., :3].clone() for name, tensor in t.items()})
    with pytest.raises(MemoryStateError, match="not square"):
        MemoryState.load(tmp_path / "m")


def test_missing_and_foreign_files_raise(memory, tmp_path):
    with pytest.raises(MemoryStateError, match=r"memory file .*nowhere does not exist"):
        MemoryState.load(tmp_path / "nowhere")
    with pytest.raises(MemoryStateError, match=r"is not a memory file"):
        MemoryState.load(tmp_path)
    memory.save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        (tmp_path / "m").write_bytes(whole[:length])
        with pytest.raises(MemoryStateError, match="cannot be read"):
            MemoryState.load(tmp_path / "m")
        with pytest.raises(MemoryStateError, match=r"this is not a memory file\.\nIt cannot be read"):
            memory_file.memory_from_bytes(whole[:length], "this")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_saving_a_memory_with_nan_raises(memory, tmp_path, value):
    memory = memory.clone()
    memory.layers[1][0, 0, 0, 0] = value
    with pytest.raises(MemoryStateError, match=r"NaN.*layers.1.state"):
        memory.save(tmp_path / "m")
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 2, 5, 5), (3, 1, 4, 4)])
def test_states_of_inconsistent_shapes_raise(memory, tmp_path, shape):
    memory.save(tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors: {**tensors, "layers.1.state": torch.zeros(shape)})
    with pytest.raises(MemoryStateError, match="not square, or differ in size"):
        memory_file.read_memory(tmp_path / "m")
