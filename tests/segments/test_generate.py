"""`model.generate()` where the adapter writes by segments: the prompt's tags, and the open segment that grows."""

from __future__ import annotations

import pytest
import torch
from helpers.recording_cache import RecordingCache
from helpers.tiny import ARCHITECTURES, PAD, patched_model, tokens
from segments.tagged import DIFFERENT, close_memory, run
from transformers import GenerationConfig

from deltamem_tool import MemoryCache, MemoryState
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.segments.tags import SegmentTag

NEW = 6
NEVER = 95  # a stop token that `settings` forbids
# Prompts of six and of four tokens; each ends with the beginning of an answer, whose segment is open.
ROWS = [tokens(1, 6), tokens(1, 4, seed=1)]
TAGS = [torch.tensor([[0, 1, 1, 2, 1, 1]]), torch.tensor([[1, 2, 0, 1]])]

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
started = pytest.mark.parametrize("started", [False, True], ids=["empty", "started"])


def settings(**options):
    return {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": NEVER,
        "pad_token_id": PAD,
        "suppress_tokens": [PAD, NEVER],
    } | options


def start_of(model) -> MemoryState:
    """A memory of two conversations, each with an open segment."""
    ids, tags = tokens(2, 8, seed=7), torch.tensor([[1, 1, 2, 1, 2, 1, 1, 1], [1, 2, 1, 1, 2, 2, 1, 1]])
    return run(model, ids, tags)[1].memory


def batch():
    """Both prompts, padded on the left, with their tags."""
    pad = torch.nn.functional.pad
    ids = torch.cat([ROWS[0], pad(ROWS[1], (2, 0), value=PAD)])
    mask = torch.cat([torch.ones(1, 6, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1, 1]])])
    return {"input_ids": ids, "attention_mask": mask}, torch.cat(
        [TAGS[0], pad(TAGS[1], (2, 0), value=SegmentTag.OUTSIDE)]
    )


def expected_memory(model, generated, row, memory=None):
    """The memory after one call over the prompt of `row` and all that was said but its last token, which is never fed.
    `said` holds the padding too."""
    ids = generated[None, 6 - ROWS[row].shape[1] : -1]
    joined = torch.full((1, ids.shape[1] - TAGS[row].shape[1]), SegmentTag.INSIDE)
    return run(model, ids, torch.cat([TAGS[row], joined], dim=1), memory=memory)[1].memory


@every_architecture
@started
def test_the_answer_continues_the_segment_opened_by_its_prompt(name, started):
    model = patched_model(name, granularity="message", couple_lambda=False)
    start = start_of(model).select([0]) if started else None
    cache = MemoryCache(model, memory=start)
    cache.segment_tags = TAGS[0]
    output = model.generate(ROWS[0], cache=cache, **settings())
    assert output.shape == (1, 6 + NEW) and cache.segment_tags is None
    assert cache.memory.open_tokens.tolist() == [2 + NEW - 1]
    close_memory(cache.memory, expected_memory(model, output[0], 0, start))


@started
def test_the_tags_change_the_generated_tokens(model, started):
    """Otherwise, these tests would also pass without tags."""
    start = start_of(model).select([0]) if started else None
    generated = []
    for tags in (TAGS[0], torch.tensor([[2, 2, 2, 2, 2, 2]]), None):
        cache = MemoryCache(model, memory=start)
        cache.segment_tags = tags
        generated.append(model.generate(ROWS[0], cache=cache, **settings(max_new_tokens=12)).tolist())
    assert generated[0] != generated[1] and generated[0] != generated[2]


@started
def test_a_batch_matches_its_rows_run_alone(model, started):
    start = start_of(model) if started else None
    prompts, tags = batch()
    cache = MemoryCache(model, memory=start)
    cache.segment_tags = tags
    output = model.generate(**prompts, cache=cache, **settings())
    for row, ids in enumerate(ROWS):
        alone = MemoryCache(model, memory=start.select([row]) if started else None)
        alone.segment_tags = TAGS[row]
        expected = model.generate(ids, cache=alone, **settings())
        assert torch.equal(output[row, 6:], expected[0, ids.shape[1] :])
        close_memory(cache.memory.select([row]), alone.memory)


def test_a_prompt_in_pieces_matches_the_whole(model):
    config = GenerationConfig(**settings())
    prompts, tags = batch()
    whole, pieces = MemoryCache(model), MemoryCache(model)
    whole.segment_tags = pieces.segment_tags = tags
    expected = model.generate(**prompts, generation_config=config, cache=whole)
    config.prefill_chunk_size = 4
    assert torch.equal(model.generate(**prompts, generation_config=config, cache=pieces), expected)
    close_memory(pieces.memory, whole.memory)


def test_a_row_that_ends_early_writes_no_padding(model):
    prompts, tags = batch()
    plain = MemoryCache(model)
    plain.segment_tags = tags
    generated = model.generate(**prompts, cache=plain, **settings())[:, 6:].tolist()
    end = next(token for token in generated[0][1:3] if token not in generated[1])
    count = generated[0].index(end)
    cache = MemoryCache(model)
    cache.segment_tags = tags
    output = model.generate(**prompts, cache=cache, **settings(eos_token_id=end))
    assert output[0, 6 : 6 + count + 2].tolist() == [*generated[0][:count], end, PAD]
    assert cache.memory.open_tokens.tolist() == [2 + count, 1 + NEW - 1]
    close_memory(cache.memory.select([0]), expected_memory(model, output[0, : 6 + count + 1], 0))
    close_memory(cache.memory.select([1]), expected_memory(model, output[1], 1))


@started
def test_a_second_turn_ends_the_answer_segment_and_continues(model, started):
    """The answer's segment ends with its last token, which the second turn feeds; then a question, then an answer."""
    start = start_of(model).select([0]) if started else None
    cache = MemoryCache(model, memory=start)
    cache.segment_tags = TAGS[0]
    first = model.generate(ROWS[0], cache=cache, **settings())
    text = torch.cat([first, tokens(1, 4, seed=3)], dim=1)
    cache.segment_tags = torch.tensor([[2, 1, 1, 2, 1]])
    second = model.generate(text, cache=cache, **settings())
    answers = torch.full((1, NEW - 1), SegmentTag.INSIDE)
    tags = torch.cat([TAGS[0], answers, torch.tensor([[2, 1, 1, 2, 1]]), answers], dim=1)
    _, expected = run(model, second[:, :-1], tags, memory=start)
    close_memory(cache.memory, expected.memory)
    cache.end_segment()
    assert (cache.memory.layers[1] - expected.memory.layers[1]).abs().max() > DIFFERENT


def test_a_generation_without_writing_keeps_memory_and_open_segment(model):
    start = start_of(model)
    prompts, tags = batch()
    cache = MemoryCache(model, memory=start, write=False)
    cache.segment_tags = tags
    model.generate(**prompts, cache=cache, **settings())
    close_memory(cache.memory, start, 0.0)
    assert cache.segment_tags is None


# Beams, and several sequences of one prompt.


@started
@pytest.mark.parametrize("returned", [1, 2])
def test_each_beam_carries_its_own_open_segment(model, started, returned):
    start = start_of(model) if started else None

    prompts, tags = batch()
    cache = RecordingCache(model, memory=start)
    cache.segment_tags = tags
    options = settings(num_beams=2, num_return_sequences=returned, output_scores=True, return_dict_in_generate=True)
    output = model.generate(**prompts, cache=cache, **options)
    assert any(beams != sorted(set(beams)) for beams in cache.taken), "no beam ever replaced another"
    assert output.sequences.shape == (2 * returned, 6 + NEW)
    for n, sequence in enumerate(output.sequences):
        row, beam = n // returned, int(output.beam_indices[n, -1])
        expected = expected_memory(model, sequence, row, start.select([row]) if started else None)
        close_memory(cache.memories[-1].select([beam]), expected)
    assert not torch.equal(cache.memories[-1].open_segments[1][0], cache.memories[-1].open_segments[1][1]), (
        "both beams say the same"
    )


@started
def test_every_returned_sequence_has_its_own_open_segment(model, started):
    start = start_of(model) if started else None
    prompts, tags = batch()
    cache = MemoryCache(model, memory=start)
    cache.segment_tags = tags
    torch.manual_seed(0)
    options = settings(do_sample=True, temperature=2.0, num_return_sequences=3)
    output = model.generate(**prompts, cache=cache, **options)
    assert cache.memory.batch_size == 6 and len({tuple(row) for row in output.tolist()}) == 6
    for n, sequence in enumerate(output):
        expected = expected_memory(model, sequence, n // 3, start.select([n // 3]) if started else None)
        close_memory(cache.memory.select([n]), expected)


# Invalid input raises.


def test_generating_without_a_cache_raises_since_there_are_no_tags(model):
    for options in ({}, {"use_cache": False}):
        with pytest.raises(MemoryStateError, match="writes by message"):
            model.generate(ROWS[0], **settings(**options))


@pytest.mark.parametrize("beams", [1, 2])
def test_tags_of_a_different_prompt_raise(model, beams):
    start = start_of(model).select([0])
    cache = MemoryCache(model, memory=start)
    cache.segment_tags = TAGS[1]
    with pytest.raises(
        MemoryStateError, match=rf"cache.segment_tags has shape \[{beams}, 4\], but the tokens have \[{beams}, 6\]"
    ):
        model.generate(ROWS[0], cache=cache, **settings(num_beams=beams))
    close_memory(cache.memory, start.fork(beams), 0.0)
