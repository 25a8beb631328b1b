"""Writing by segments: splitting changes nothing, which tokens read and write, and where an open segment is kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.model_runs import EQUATION_TOLERANCE, close
from helpers.naive_model import naive_run
from helpers.tiny import ARCHITECTURES, PAD, patched_model, tokens
from segments.tagged import DIFFERENT, LENGTH, OPEN, TAGS, close_memory, run, same_memory

from deltamem_tool import MemoryCache, MemoryState
from deltamem_tool.memory.attach import adapter_of
from deltamem_tool.segments.tags import SegmentTag

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
both_option_sets = pytest.mark.parametrize(
    "options",
    [
        {"granularity": "message"},
        {"granularity": "sentence", "couple_lambda": False, "gates": "head", "state_heads": 2, "o_norm": True},
    ],
    ids=["coupled", "own"],
)


@every_architecture
@both_option_sets
def test_splitting_a_call_changes_nothing(name, options):
    model, ids = patched_model(name, **options), tokens(2, LENGTH)
    whole, cache = run(model, ids, TAGS)
    assert cache.memory.open_tokens.tolist() == OPEN
    for cuts in ((1,), (5,), (10,), (3, 4, 9), range(1, LENGTH)):
        pieces, other = run(model, ids, TAGS, cuts, sliced=cuts[0] == 3)
        close(pieces, whole)
        close_memory(other.memory, cache.memory)


def test_every_row_matches_the_equations():
    model, ids = patched_model(granularity="message", state_heads=2), tokens(2, LENGTH)
    logits, cache = run(model, ids, TAGS)
    for row in range(2):
        expected, states = naive_run(model, ids[row].tolist(), tags=TAGS[row].tolist())
        close(logits[row], expected, EQUATION_TOLERANCE)
        for layer, state in states.items():
            close(cache.memory.layers[layer][row], state, EQUATION_TOLERANCE)


def test_tags_are_consumed_with_their_tokens(model):
    ids, cache = tokens(2, LENGTH), MemoryCache(model)
    cache.segment_tags = TAGS
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        assert torch.equal(cache.segment_tags, TAGS[:, 4:])
        model(ids[:, 4:10], cache=cache)
        assert torch.equal(cache.segment_tags, TAGS[:, 10:])
        model(ids[:, 10:], cache=cache)
    assert cache.segment_tags is None


# Which tokens read and write.


@torch.no_grad()
def test_a_token_reads_the_state_from_before_its_segment():
    memory = adapter_of(patched_model(granularity="message", couple_lambda=False)).layer(0)
    torch.manual_seed(0)
    hidden, state = torch.randn(1, 9, 32), torch.randn(1, 1, 4, 4)
    tags = torch.tensor([[1, 1, 2, 1, 1, 1, 2, 2, 1]])
    writes, last = tags != SegmentTag.OUTSIDE, tags == SegmentTag.LAST
    empty = torch.zeros(1, memory.config.segment_width)
    readings, *_ = memory(hidden, state, None, writes, empty, last)
    states = []
    for a, b in ((0, 3), (3, 7), (7, 8), (8, 9)):
        _, before, *_ = memory(hidden[:, :a], state, None, writes[:, :a], empty, last[:, :a])
        outside = torch.zeros(1, b - a, dtype=torch.bool)
        alone, *_ = memory(hidden[:, a:b], before, None, outside, empty, outside)
        close(readings[:, a:b], alone)
        states.append(before)
    for before, after in itertools.pairwise(states):
        assert (before - after).abs().max() > DIFFERENT


def test_a_segment_affects_logits_only_after_its_end(model):
    ids = tokens(1, 8)
    unwritten, _ = run(model, ids, torch.zeros(1, 8))
    logits, _ = run(model, ids, torch.tensor([[1, 1, 1, 1, 2, 0, 0, 0]]))
    assert torch.equal(logits[:, :5], unwritten[:, :5])
    assert (logits[:, 5] - unwritten[:, 5]).abs().max() > DIFFERENT


def test_outside_tokens_read_and_do_not_write(model):
    _, start = run(model, tokens(2, LENGTH, seed=1), TAGS)
    ids, outside = tokens(2, 6), torch.full((2, 6), SegmentTag.OUTSIDE)
    logits, cache = run(model, ids, outside, memory=start.memory)
    same_memory(cache.memory, start.memory)
    empty, _ = run(model, ids, outside)
    assert (logits - empty).abs().max() > DIFFERENT


@torch.no_grad()
def test_an_outside_token_within_a_segment_is_not_part_of_it():
    memory = adapter_of(patched_model(granularity="message")).layer(0)
    torch.manual_seed(0)
    hidden, state, empty = torch.randn(1, 5, 32), torch.randn(1, 1, 4, 4), torch.zeros(1, memory.config.segment_width)
    tags = torch.tensor([[1, 0, 1, 2, 1]])
    _, after, rest, _ = memory(hidden, state, None, tags != SegmentTag.OUTSIDE, empty, tags == SegmentTag.LAST)
    inside = [0, 2, 3, 4]
    expected = memory(
        hidden[:, inside], state, None, tags[:, inside] != SegmentTag.OUTSIDE, empty, tags[:, inside] == SegmentTag.LAST
    )
    close(after, expected[1])
    close(rest, expected[2])


@torch.no_grad()
def test_segments_of_one_token_equal_writing_by_token():
    segments, single = patched_model(granularity="message"), patched_model()
    adapter_of(single).load_state_dict(adapter_of(segments).state_dict())
    ids = tokens(2, 7)
    logits, cache = run(segments, ids, torch.full((2, 7), SegmentTag.LAST))
    other = MemoryCache(single)
    close(single(ids, cache=other).logits, logits)
    for layer, state in other.memory.layers.items():
        close(cache.memory.layers[layer], state)


def test_untagged_tokens_join_the_open_segment(model):
    """The prompt of an answer opens a segment, and generated tokens have no tags."""
    ids = tokens(1, 8)
    tags = torch.tensor([[1, 2, 1, 1, 1, 1, 1, 1]])
    logits, expected = run(model, ids, tags)
    cache = MemoryCache(model)
    cache.segment_tags = tags[:, :4]
    with torch.no_grad():
        pieces = [model(ids[:, :4], cache=cache).logits]
        pieces += [model(ids[:, t : t + 1], cache=cache).logits for t in range(4, 8)]
    close(torch.cat(pieces, dim=1), logits)
    close_memory(cache.memory, expected.memory)
    assert cache.memory.open_tokens.tolist() == [6]


@both_option_sets
def test_end_segment_equals_a_last_tag(options):
    model, ids = patched_model(**options), tokens(2, LENGTH)
    ended = TAGS.clone()
    ended[0, -1] = SegmentTag.LAST
    _, expected = run(model, ids, ended)
    _, cache = run(model, ids, TAGS)
    before = cache.memory
    copy = before.clone()
    cache.end_segment()
    close_memory(cache.memory, expected.memory)
    same_memory(before, copy)  # a memory is a value
    assert cache.memory.open_tokens.tolist() == [0, 0]
    assert not any(segment.any() for segment in cache.memory.open_segments.values())
    for layer, state in before.layers.items():  # row 1 had no open segment
        assert torch.equal(cache.memory.layers[layer][1], state[1])
        assert (cache.memory.layers[layer][0] - state[0]).abs().max() > DIFFERENT
    again = (tokens(2, 3, seed=5), torch.tensor([[1, 2, 1], [0, 1, 2]]))
    close(run(model, *again, memory=cache.memory)[0], run(model, *again, memory=expected.memory)[0])


# Writing switched off.


@pytest.mark.parametrize("tagged", [False, True])
def test_without_writing_states_and_open_segments_do_not_change(model, tagged):
    _, start = run(model, tokens(2, LENGTH, seed=1), TAGS)
    ids = tokens(2, LENGTH)
    logits, cache = run(model, ids, TAGS if tagged else None, memory=start.memory, write=False)
    same_memory(cache.memory, start.memory)
    outside, _ = run(model, ids, torch.zeros_like(TAGS), memory=start.memory)
    close(logits, outside)


def test_tokens_that_do_not_write_are_not_in_the_mean(model):
    ids, write = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool)
    write[0, [0, 3, 5, 10]] = False
    write[1, [2, 3]] = False
    logits, cache = run(model, ids, TAGS, write=write)
    expected, other = run(model, ids, TAGS.masked_fill(~write, SegmentTag.OUTSIDE))
    close(logits, expected)
    close_memory(cache.memory, other.memory)
    _, whole = run(model, ids, TAGS)
    assert all((whole.memory.layers[0] - cache.memory.layers[0]).abs().amax((1, 2, 3)) > DIFFERENT)


# Batches.


@every_architecture
@both_option_sets
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_result(name, options, side):
    model = patched_model(name, **options)
    rows = [tokens(1, length, seed=length) for length in (9, 4, 6)]
    tags_of_rows = [torch.tensor([row]) for row in ([0, 1, 1, 2, 1, 1, 2, 1, 1], [1, 2, 0, 2], [1, 1, 1, 1, 1, 1])]
    ids, mask, tags = torch.full((3, 9), PAD), torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, text in enumerate(rows):
        at = slice(9 - text.shape[1], 9) if side == "left" else slice(0, text.shape[1])
        ids[row, at], mask[row, at], tags[row, at] = text[0], 1, tags_of_rows[row][0]
    more, more_tags = tokens(3, 3, seed=5), torch.tensor([[2, 0, 1], [1, 1, 1], [1, 2, 0]])
    full = torch.cat([mask, torch.ones_like(more)], dim=1)
    positions = (full.cumsum(1) - 1).clamp_min(0)
    ids, tags = torch.cat([ids, more], dim=1), torch.cat([tags, more_tags], dim=1)
    for cuts in ((9,), (1, 5, 9)):  # within the padding too
        cache, pieces = MemoryCache(model), []
        cache.segment_tags = tags
        for a, b in zip((0, *cuts), (*cuts, 12), strict=True):
            where = {"attention_mask": full[:, :b], "position_ids": positions[:, a:b]}
            with torch.no_grad():
                pieces.append(model(ids[:, a:b], cache=cache, **where).logits)
        logits = torch.cat(pieces, dim=1)
        for row, text in enumerate(rows):
            alone_marks = torch.cat([tags_of_rows[row], more_tags[row : row + 1]], dim=1)
            alone, solo = run(model, torch.cat([text, more[row : row + 1]], dim=1), alone_marks)
            close(logits[row][full[row].bool()], alone[0])
            close_memory(cache.memory.select([row]), solo.memory)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@torch.no_grad()
def test_nan_in_padding_does_not_reach_a_segment(value):
    memory = adapter_of(patched_model(granularity="message", couple_lambda=False)).layer(0)
    torch.manual_seed(0)
    hidden, state = torch.randn(2, 4, 32), torch.randn(2, 1, 4, 4)
    carried = torch.randn(2, memory.config.segment_width).abs()
    valid = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    last = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    expected = memory(hidden, state, valid, valid, carried, last)
    actual = memory(hidden.masked_fill(~valid[:, :, None], value), state, valid, valid, carried, last)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_open_segments_of_a_bfloat16_model_are_float32():
    model = patched_model(granularity="message").to(torch.bfloat16)
    _, cache = run(model, tokens(2, LENGTH), TAGS)
    for segment in cache.memory.open_segments.values():
        assert segment.dtype == torch.float32 and not torch.equal(segment, segment.bfloat16().float())


# An open segment is a part of the memory value.


def test_an_open_segment_is_copied_with_its_memory(model, tmp_path):
    _, start = run(model, tokens(2, LENGTH, seed=1), TAGS)
    memory = start.memory
    memory.save(tmp_path / "memory")
    halves = [memory.select([0]), memory.select([1])]
    for other in (
        MemoryState.load(tmp_path / "memory"),
        memory.clone(),
        memory.to("cpu"),
        memory.fork(1),
        memory.select([0, 1]),
        memory.fork(2).select([1, 3]),
        MemoryState.stack(halves),
        MemoryState.stack(halves[::-1]).select([1, 0]),
    ):
        same_memory(other, memory)
        assert other.open_tokens.tolist() == OPEN
    ids, tags = tokens(2, 4), torch.tensor([[1, 2, 1, 0], [1, 1, 2, 0]])
    logits, cache = run(model, ids, tags, memory=MemoryState.load(tmp_path / "memory"))
    expected, other = run(model, ids, tags, memory=memory)
    assert torch.equal(logits, expected)
    same_memory(cache.memory, other.memory)
    closed = MemoryCache(model, memory=memory)
    closed.end_segment()
    changed, _ = run(model, ids, tags, memory=closed.memory)
    assert (logits[0] - changed[0]).abs().max() > DIFFERENT, "the open segment made no difference"


def test_copies_of_an_open_segment_are_independent(model):
    _, start = run(model, tokens(2, LENGTH), TAGS)
    before = start.memory.open_segments[0].clone()
    for copy in (start.memory.clone(), start.memory.fork(1), start.memory.select([0, 1])):
        copy.open_segments[0].add_(1)
        assert torch.equal(start.memory.open_segments[0], before)


def test_reordered_rows_keep_their_tags_and_open_segments(model):
    ids = tokens(2, LENGTH)
    picked = torch.tensor([1, 0, 1])
    _, expected = run(model, ids[picked], TAGS[picked])
    for change in ("batch_select_indices", "reorder_cache"):
        _, cache = run(model, ids[:, :4], TAGS[:, :4])
        cache.segment_tags = TAGS[:, 4:]
        getattr(cache, change)(picked)
        with torch.no_grad():
            model(ids[picked, 4:], cache=cache)
        close_memory(cache.memory, expected.memory)
    _, cache = run(model, ids[:, :4], TAGS[:, :4])
    cache.segment_tags = TAGS[:, 4:]
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        model(ids[:, 4:].repeat_interleave(2, dim=0), cache=cache)
    close_memory(cache.memory, run(model, ids, TAGS)[1].memory.fork(2))
    cache.segment_tags = TAGS
    cache.reset()
    assert cache.memory is None and cache.segment_tags is None
