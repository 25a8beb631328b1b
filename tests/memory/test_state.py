"""A memory is a value: saved bit for bit, forked, selected, stacked, and rejected where it does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import patched_model, tokens

from deltamem_tool import MemoryCache, MemoryState
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.segments.tags import SegmentTag


@pytest.fixture(scope="module")
def model():
    return patched_model(state_heads=2)


@pytest.fixture
def memory(model):
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(3, 8), cache=cache)
    return cache.memory


@pytest.fixture(scope="module")
def message_model():
    return patched_model(state_heads=2, granularity="message")


@pytest.fixture
def open_memory(message_model):
    """The memory of three conversations with an open segment: 5 tokens after a segment of 3, 8 tokens, and 6 tokens
    after 2 that belong to no segment."""
    cache = MemoryCache(message_model)
    cache.segment_tags = torch.full((3, 8), SegmentTag.INSIDE, dtype=torch.int8)
    cache.segment_tags[0, 2] = SegmentTag.LAST
    cache.segment_tags[2, :2] = SegmentTag.OUTSIDE
    with torch.no_grad():
        message_model(tokens(3, 8), cache=cache)
    return cache.memory


def same(memory, other):
    assert memory.adapter == other.adapter and list(memory.layers) == list(other.layers)
    assert list(memory.open_segments) == list(other.open_segments)
    for mine, others in ((memory.layers, other.layers), (memory.open_segments, other.open_segments)):
        assert all(torch.equal(mine[layer], tensor) for layer, tensor in others.items())


def test_a_memory_is_saved_and_loaded_bit_for_bit(memory, model, tmp_path):
    memory.save(tmp_path / "memory.safetensors")
    loaded = MemoryState.load(tmp_path / "memory.safetensors")
    same(loaded, memory)
    assert loaded.nbytes == memory.nbytes == 3 * 2 * 2 * 4 * 4 * 4
    assert loaded.shape.layers == {0: (2, 4, 4), 1: (2, 4, 4)}
    # and its readings are the same: the file is complete
    with torch.no_grad():
        a = model(tokens(3, 4), cache=MemoryCache(model, memory=memory)).logits
        b = model(tokens(3, 4), cache=MemoryCache(model, memory=loaded)).logits
    assert torch.equal(a, b)


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


def test_stacked_memories_are_rows_of_one_batch(memory, open_memory):
    for whole in (memory, open_memory):
        parts = [whole.select([0]), whole.select([1, 2]), whole.select([0])]
        same(MemoryState.stack(parts), whole.select([0, 1, 2, 0]))
        assert all(torch.equal(part.layers[1], whole.select([0]).layers[1]) for part in parts[::2])
        same(MemoryState.stack([whole]), whole)
    with pytest.raises(MemoryStateError, match="no memories to stack"):
        MemoryState.stack([])
    other = MemoryState(memory.layers, "another")
    with pytest.raises(MemoryStateError, match="belongs to another adapter"):
        MemoryState.stack([memory, other])
    with pytest.raises(MemoryStateError, match=r"(?s)does not fit.*layers are \[0\]"):
        MemoryState.stack([memory, MemoryState({0: memory.layers[0]}, memory.adapter)])
    with pytest.raises(MemoryStateError, match=r"(?s)does not fit.*numbers of an open segment"):
        MemoryState.stack([open_memory, MemoryState(open_memory.layers, open_memory.adapter)])


def test_norms_cover_every_state(memory):
    norms = memory.norms()
    assert list(norms) == list(memory.layers)
    for layer, state in memory.layers.items():
        assert norms[layer].shape == (3, 2)
        for row in range(3):
            for head in range(2):
                expected = state[row, head].double().pow(2).sum().sqrt().item()
                assert norms[layer][row, head].item() == pytest.approx(expected, rel=1e-6)
    assert not MemoryState({4: torch.zeros(1, 1, 2, 2)}, "mark").norms()[4].any()


def test_an_open_segment_continues_from_a_file(open_memory, message_model, tmp_path):
    open_memory.save(tmp_path / "m")
    loaded = MemoryState.load(tmp_path / "m")
    same(loaded, open_memory)
    caches = [MemoryCache(message_model, memory=memory) for memory in (open_memory, loaded)]
    with torch.no_grad():
        for cache in caches:
            message_model(tokens(3, 2, seed=1), cache=cache)
            cache.end_segment()
    same(caches[0].memory, caches[1].memory)
    assert not torch.equal(caches[0].memory.layers[0], open_memory.layers[0])


def test_open_tokens_counts_tokens_of_open_segments(memory, open_memory, message_model):
    assert open_memory.open_tokens.tolist() == [5, 8, 6] and open_memory.open_tokens.dtype == torch.int64
    assert open_memory.select([1, 0]).open_tokens.tolist() == [8, 5]
    assert memory.open_tokens.tolist() == [0, 0, 0]
    cache = MemoryCache(message_model, memory=open_memory)
    cache.end_segment()
    assert cache.memory.open_tokens.tolist() == [0, 0, 0] and open_memory.open_tokens.tolist() == [5, 8, 6]


def test_copies_are_independent(memory):
    for copy in (memory.clone(), memory.fork(1), memory.select([0, 1, 2])):
        same(copy, memory)
        before = memory.layers[0].clone()
        copy.layers[0].add_(1)
        assert torch.equal(memory.layers[0], before)


def test_clone_is_detached_from_autograd(memory):
    tracked = MemoryState({layer: state.clone().requires_grad_() * 2 for layer, state in memory.layers.items()}, "mark")
    assert tracked.layers[0].requires_grad and not tracked.clone().layers[0].requires_grad
    assert tracked.fork(2).layers[0].requires_grad  # training goes through the others


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({}, "do not belong together"),
        ({0: torch.zeros(2, 1, 4, 4), 1: torch.zeros(3, 1, 4, 4)}, "do not belong together"),
        ({0: torch.zeros(1, 4, 4)}, r"not float32 \[B, H, R, R\]"),
        ({0: torch.zeros(1, 1, 4, 5)}, r"not float32 \[B, H, R, R\]"),
        ({0: torch.zeros(1, 1, 4, 4).half()}, "float16"),
    ],
)
def test_invalid_layers_raise(layers, says):
    with pytest.raises(MemoryStateError, match=says):
        MemoryState(layers, "mark")


def test_a_memory_of_another_adapter_raises(memory, tmp_path):
    other = patched_model(state_heads=2, seed=1)
    memory.save(tmp_path / "m")
    with pytest.raises(MemoryStateError, match="another adapter"):
        MemoryCache(other, memory=MemoryState.load(tmp_path / "m"))
    narrow = patched_model(state_heads=1)
    with pytest.raises(MemoryStateError, match="does not fit"):
        MemoryCache(narrow, memory=MemoryState.load(tmp_path / "m"))


def test_nan_and_infinity_are_named_in_the_error(memory, open_memory):
    memory.check_finite()
    open_memory.check_finite()
    for whole, part in ((memory, "layers"), (open_memory, "layers"), (open_memory, "open_segments")):
        for value in (np.nan, -np.inf):
            broken = whole.clone()
            getattr(broken, part)[1].view(-1)[-1] = value
            with pytest.raises(MemoryStateError, match="memory of layer 1 contains NaN or infinity"):
                broken.check_finite()


# The cache


def changed(memory, **change):
    return MemoryState(
        **{"layers": memory.layers, "adapter": memory.adapter, "open_segments": memory.open_segments} | change
    )


MISFITS = [
    (lambda m: changed(m, adapter="f" * 64), "belongs to another adapter.*ffffffffffffffff…"),
    (lambda m: changed(m, layers={i: torch.zeros(3, 2, 5, 5) for i in (0, 1)}), "layer 0 has rank 5, the adapter's 4"),
    (
        lambda m: changed(m, layers={i: torch.zeros(3, 1, 4, 4) for i in (0, 1)}),
        "layer 0 has state heads 1, the adapter's 2",
    ),
    (lambda m: changed(m, layers={0: m.layers[0]}), r"layers are \[0\], the adapter's \[0, 1\]"),
    (
        lambda m: changed(m, layers={i: m.layers[0] for i in range(3)}),
        r"layers are \[0, 1, 2\], the adapter's \[0, 1\]",
    ),
    (
        lambda m: changed(m, open_segments={i: torch.zeros(3, 9) for i in (0, 1)}),
        "keeps 9 numbers of an open segment, the adapter 0",
    ),
]


@pytest.mark.parametrize(("change", "says"), MISFITS)
def test_a_memory_that_does_not_fit_the_model_raises(model, memory, change, says):
    with pytest.raises(MemoryStateError, match=f"(?s){says}"):
        MemoryCache(model, memory=change(memory))


def test_starting_from_a_memory_with_nan_raises(model, memory):
    broken = memory.clone()
    broken.layers[1][2, 0, 0, 0] = torch.nan
    with pytest.raises(MemoryStateError, match="memory of layer 1 contains NaN"):
        MemoryCache(model, memory=broken)


@pytest.mark.parametrize(
    ("change", "says"), [*MISFITS, (lambda m: m.select([0, 1]), "has 2 conversations, and the batch 3 rows")]
)
def test_a_conversation_continues_after_a_rejected_memory(model, change, says):
    """A memory of another adapter, set in the middle of a conversation, raises before anything has changed."""
    cache, expected, more = MemoryCache(model), MemoryCache(model), tokens(3, 4, seed=1)
    with torch.no_grad():
        for some in (cache, expected):
            model(tokens(3, 8), cache=some)
        memory, copy = cache.memory, cache.memory.clone()
        cache.memory = foreign = change(memory)
        with pytest.raises(MemoryStateError, match=f"(?s){says}"):
            model(more, cache=cache)
        assert cache.memory is foreign and cache.get_seq_length() == 8
        cache.memory = memory
        same(memory, copy)
        logits = model(more, cache=cache).logits
        assert torch.equal(logits, model(more, cache=expected).logits)
    same(cache.memory, expected.memory)


def test_a_batch_of_another_size_raises_and_changes_nothing(model, memory):
    cache, copy = MemoryCache(model, memory=memory), memory.clone()
    with (
        torch.no_grad(),
        pytest.raises(MemoryStateError, match=r"(?s)has 3 conversations, and the batch 2.*fork\(n\)"),
    ):
        model(tokens(2, 4), cache=cache)
    assert cache.memory is memory and cache.get_seq_length() == 0
    same(memory, copy)


def test_reordering_moves_memory_and_keys_together(model, memory):
    cache, ids = MemoryCache(model), tokens(3, 8)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        same(cache.memory, memory.select([2, 2, 0]))
        more = tokens(3, 2, seed=1)
        logits = model(more, cache=cache).logits
        expected = MemoryCache(model)
        model(ids[[2, 2, 0]], cache=expected)
        assert torch.equal(logits, model(more, cache=expected).logits)


def test_finished_rows_move_with_their_cache_row(model):
    cache = MemoryCache(model)
    cache.begin_generation(max_length=None, copies=1)
    for done, expected in (([1, 0, 0], [False, True, True]), ([0, 0, 0], [True, False, False])):
        cache.finish(torch.tensor(done).bool())
        cache.begin_step(torch.ones(3, 1, dtype=torch.long), valid=None)
        (reads,) = cache.take_step()
        assert reads[:, 0].tolist() == expected
        cache.reorder_cache(torch.tensor([1, 0, 0]))
    assert cache.take_step() is None  # not a step of `generate`


def test_repeating_and_selecting_move_memory_and_keys(model, memory):
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(3, 8), cache=cache)
    cache.batch_repeat_interleave(2)
    same(cache.memory, memory.fork(2))
    assert cache.layers[0].keys.shape[0] == 6
    cache.batch_select_indices(torch.tensor([0, 5]))
    same(cache.memory, memory.select([0, 2]))
    assert cache.layers[0].keys.shape[0] == 2
    loaded = MemoryCache(model, memory=memory)  # no keys yet
    loaded.batch_repeat_interleave(3)
    same(loaded.memory, memory.fork(3))


def test_cropping_a_cache_raises(model):
    cache = MemoryCache(model)
    with torch.no_grad():
        model(tokens(1, 8), cache=cache)
    assert not cache.is_croppable
    with pytest.raises(MemoryStateError, match="cannot forget"):
        cache.crop(-1)
    assert cache.get_seq_length() == 8


def test_a_reset_cache_starts_from_zeros(model):
    cache, fresh, ids = MemoryCache(model), MemoryCache(model), tokens(2, 5)
    with torch.no_grad():
        model(tokens(2, 8, seed=1), cache=cache)
        cache.reset()
        assert cache.memory is None
        model(ids, cache=fresh)
        memory = MemoryCache(model, memory=None)
        model(ids, cache=memory)
    same(memory.memory, fresh.memory)
