"""A memory is a value: it is saved to the bit, forked, selected, and refused where it does not fit."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import listing, patched_model, tokens

from deltamem_tool import MemoryCache, MemoryState, memory_file
from deltamem_tool.errors import MemoryStateError


@pytest.fixture(scope="module")
def model():
    return patched_model(state_heads=2)


@pytest.fixture
def memory(model):
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(3, 8), past_key_values=cache)
    return cache.memory


def same(memory, other):
    assert memory.adapter == other.adapter and list(memory.layers) == list(other.layers)
    assert all(torch.equal(memory.layers[layer], state) for layer, state in other.layers.items())


def rewrite(path, change, metadata=()):
    """The memory file `path` with its tensors and metadata changed."""
    with safe_open(path, "pt") as file:
        said = {**file.metadata(), **dict(metadata)}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(change(tensors), path, {key: value for key, value in said.items() if value is not None})


def test_saved_and_loaded_to_the_bit(memory, model, tmp_path):
    memory.save(tmp_path / "memory.safetensors")
    loaded = MemoryState.load(tmp_path / "memory.safetensors")
    same(loaded, memory)
    assert loaded.nbytes == memory.nbytes == 3 * 2 * 2 * 4 * 4 * 4
    assert loaded.shape.layers == {0: (2, 4, 4), 1: (2, 4, 4)}
    # and it reads the same: the file says as much as the object
    with torch.no_grad():
        a = model(tokens(3, 4), past_key_values=MemoryCache(model, memory=memory)).logits
        b = model(tokens(3, 4), past_key_values=MemoryCache(model, memory=loaded)).logits
    assert torch.equal(a, b)


def test_odd_numbers_survive(tmp_path):
    """Denormals, negative zero, the largest and the smallest."""
    numbers = torch.tensor([1e-45, -0.0, torch.finfo().max, torch.finfo().min])
    memory = MemoryState({11: numbers.view(1, 1, 2, 2), 2: numbers.flip(0).view(1, 1, 2, 2)}, "mark")
    memory.save(tmp_path / "m")
    loaded = MemoryState.load(tmp_path / "m")
    assert sorted(loaded.layers) == [2, 11]
    for layer, state in memory.layers.items():
        assert torch.equal(loaded.layers[layer].view(torch.int32), state.view(torch.int32))


def test_saving_with_gradients_and_views(memory, tmp_path):
    tracked = MemoryState(
        {layer: state.clone().requires_grad_().transpose(2, 3) for layer, state in memory.layers.items()},
        memory.adapter,
    )
    tracked.save(tmp_path / "m")
    for layer, state in MemoryState.load(tmp_path / "m").layers.items():
        assert torch.equal(state, memory.layers[layer].transpose(2, 3))


def test_a_write_that_fails_leaves_the_old_file(memory, tmp_path, monkeypatch):
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


def test_a_new_file_is_readable_by_others(memory, tmp_path):
    before = os.umask(0o022)
    try:
        memory.save(tmp_path / "memory")
    finally:
        os.umask(before)
    assert (tmp_path / "memory").stat().st_mode & 0o777 == 0o644


def test_fork_repeats_rows_and_select_picks_them(memory):
    forked = memory.fork(2)
    assert forked.batch_size == 6
    for layer, state in memory.layers.items():
        assert torch.equal(forked.layers[layer][::2], state) and torch.equal(forked.layers[layer][1::2], state)
    picked = memory.select([2, 0, 2])
    same(picked, memory.select(torch.tensor([2, 0, 2])))
    for layer, state in memory.layers.items():
        assert torch.equal(picked.layers[layer], state[[2, 0, 2]])
    with pytest.raises(IndexError):
        memory.select([3])


def test_copies_are_independent(memory):
    for copy in (memory.clone(), memory.fork(1), memory.select([0, 1, 2])):
        same(copy, memory)
        before = memory.layers[0].clone()
        copy.layers[0].add_(1)
        assert torch.equal(memory.layers[0], before)


def test_clone_is_cut_off_from_autograd(memory):
    tracked = MemoryState({layer: state.clone().requires_grad_() * 2 for layer, state in memory.layers.items()}, "mark")
    assert tracked.layers[0].requires_grad and not tracked.clone().layers[0].requires_grad
    assert tracked.fork(2).layers[0].requires_grad  # training goes through the others


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({}, "disagree"),
        ({0: torch.zeros(2, 1, 4, 4), 1: torch.zeros(3, 1, 4, 4)}, "disagree"),
        ({0: torch.zeros(1, 4, 4)}, r"not float32 \[B, H, R, R\]"),
        ({0: torch.zeros(1, 1, 4, 5)}, r"not float32 \[B, H, R, R\]"),
        ({0: torch.zeros(1, 1, 4, 4).half()}, "float16"),
    ],
)
def test_what_is_no_memory_is_refused(layers, says):
    with pytest.raises(MemoryStateError, match=says):
        MemoryState(layers, "mark")


@pytest.mark.parametrize(
    ("change", "metadata", "says"),
    [
        (lambda t: t, {"format_version": str(memory_file.FORMAT_VERSION + 1)}, "of memory format 2.*Update"),
        (lambda t: t, {"format_version": None}, "of memory format None"),
        (lambda t: t, {"format": "pt"}, "no memory file"),
        (lambda t: t, {"adapter": None}, "no fingerprint"),
        (lambda t: {}, {}, "no states"),
        (lambda t: t | {"layers.0.state": t["layers.0.state"] * torch.nan}, {}, "layers.0.state.*NaN"),
        (lambda t: t | {"layers.1.state": t["layers.1.state"] + torch.inf}, {}, "layers.1.state.*infinity"),
        (lambda t: t | {"layers.0.state": t["layers.0.state"].double()}, {}, "no float32 state"),
        (lambda t: t | {"layers.0.state": t["layers.0.state"].bfloat16()}, {}, "no float32 state|cannot be read"),
        (lambda t: t | {"layers.0.state": t["layers.0.state"][0]}, {}, "no float32 state"),
        (lambda t: t | {"layers.x.state": torch.zeros(1)}, {}, "layers.x.state"),
        (lambda t: {"layers.0.state": t["layers.0.state"], "layers.1.state": t["layers.1.state"][:1]}, {}, "disagree"),
    ],
)
def test_damaged_files_are_refused(memory, tmp_path, change, metadata, says):
    memory.save(tmp_path / "m")
    rewrite(tmp_path / "m", change, metadata)
    with pytest.raises(MemoryStateError, match=f"(?s){says}"):
        MemoryState.load(tmp_path / "m")


def test_files_that_are_none_are_refused(memory, tmp_path):
    with pytest.raises(MemoryStateError, match="no memory file"):
        MemoryState.load(tmp_path / "nowhere")
    with pytest.raises(MemoryStateError, match="no memory file"):
        MemoryState.load(tmp_path)
    memory.save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        (tmp_path / "m").write_bytes(whole[:length])
        with pytest.raises(MemoryStateError, match="cannot be read"):
            MemoryState.load(tmp_path / "m")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_memory_that_could_not_be_loaded_is_not_saved(memory, tmp_path, value):
    memory = memory.clone()
    memory.layers[1][0, 0, 0, 0] = value
    with pytest.raises(MemoryStateError, match="NaN.*layers.1.state"):
        memory.save(tmp_path / "m")
    assert listing(tmp_path) == {}


def test_another_adapters_memory_is_refused(memory, tmp_path):
    other = patched_model(state_heads=2, seed=1)
    memory.save(tmp_path / "m")
    with pytest.raises(MemoryStateError, match="another adapter"):
        MemoryCache(other, memory=MemoryState.load(tmp_path / "m"))
    narrow = patched_model(state_heads=1)
    with pytest.raises(MemoryStateError, match="does not fit"):
        MemoryCache(narrow, memory=MemoryState.load(tmp_path / "m"))


# The cache


def test_reordering_moves_memory_and_keys_together(model, memory):
    cache, ids = MemoryCache(model), tokens(3, 8)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        same(cache.memory, memory.select([2, 2, 0]))
        more = tokens(3, 2, seed=1)
        logits = model(more, past_key_values=cache).logits
        expected = MemoryCache(model)
        model(ids[[2, 2, 0]], past_key_values=expected)
        assert torch.equal(logits, model(more, past_key_values=expected).logits)


def test_what_has_ended_moves_with_its_row(model):
    cache = MemoryCache(model)
    cache.begin_generation(torch.tensor([7]))
    cache.begin_step(prompt=False)
    assert cache.unfinished(torch.tensor([[7], [1], [2]])).tolist() == [[False], [True], [True]]
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    cache.begin_step(prompt=False)
    assert cache.unfinished(torch.tensor([[1], [1], [1]])).tolist() == [[True], [False], [False]]
    assert cache.unfinished(torch.tensor([[7], [1], [1]])) is None  # no step of `generate`


def test_repeating_and_selecting_move_both(model, memory):
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(3, 8), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    same(cache.memory, memory.fork(2))
    assert cache.layers[0].keys.shape[0] == 6
    cache.batch_select_indices(torch.tensor([0, 5]))
    same(cache.memory, memory.select([0, 2]))
    assert cache.layers[0].keys.shape[0] == 2
    loaded = MemoryCache(model, memory=memory)  # no keys yet
    loaded.batch_repeat_interleave(3)
    same(loaded.memory, memory.fork(3))


def test_a_cache_cannot_take_tokens_back(model):
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(1, 8), past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(MemoryStateError, match="cannot forget"):
        cache.crop(-1)
    assert cache.get_seq_length() == 8


def test_a_reset_cache_starts_from_zeros(model):
    cache, fresh, ids = MemoryCache(model), MemoryCache(model), tokens(2, 5)
    with torch.no_grad():
        model(tokens(2, 8, seed=1), past_key_values=cache)
        cache.reset()
        assert cache.memory is None
        model(ids, past_key_values=fresh)
        memory = MemoryCache(model, memory=None)
        model(ids, past_key_values=memory)
    same(memory.memory, fresh.memory)
