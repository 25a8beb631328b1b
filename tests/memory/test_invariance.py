"""A conversation gives the same answer however it is run: with any options, in any pieces, padded, in beams, in another
process, from any copy of its memory. `conversations.py` draws the models and the texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.conversations import (
    NEVER,
    Batch,
    Elsewhere,
    alone,
    cuts,
    equal,
    examples,
    feed,
    long_texts,
    memory_of,
    new_cache,
    places_of,
    rooms,
    same,
    same_memory,
    segmented_setups,
    setups,
    texts,
)
from helpers.tiny import PAD
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LogitsProcessor

from deltamem_tool import MemoryCache, MemoryState
from deltamem_tool.config import GRANULARITIES
from deltamem_tool.segments.tags import SegmentTag

pytestmark = pytest.mark.slow

OTHER = {"eager": "sdpa", "sdpa": "eager"}


# In pieces.


@examples(100)
@given(setups(), long_texts(), st.data())
def test_splitting_a_conversation_changes_nothing(setup, text, data):
    """Covers one call, a few calls, single tokens, another attention implementation, and positions given or counted."""
    model = setup.model()
    start = memory_of(model, data.draw(texts(0, 6), "before"))
    logits, memory = alone(model, text, start)
    bounds = data.draw(cuts(len(text)), "bounds")
    positions, ahead, by_hand = (data.draw(st.booleans(), name) for name in ("positions", "ahead", "by_hand"))
    others = [
        ("in pieces", model, bounds, {"positions": positions, "ahead": ahead, "by_hand": by_hand and not ahead}),
        ("token by token", model, list(range(1, len(text))), {}),
        ("other attention", replace(setup, attention=OTHER[setup.attention]).model(), bounds, {"positions": positions}),
    ]
    for label, other, ends, how in others:
        cache = new_cache(other, start, data.draw(rooms(len(text)), "room"))
        same(feed(other, cache, Batch.of([text]), ends, **how)[0], logits, f"logits {label}")
        same_memory(cache.memory, memory)


@examples(40)
@given(segmented_setups(), st.lists(st.tuples(texts(), st.booleans()), min_size=1, max_size=3), st.data())
def test_end_segment_equals_a_last_tag(setup, drawn, data):
    """The same state by the tag of the last token or by `end_segment()` after it, which leaves alone whose segment has
    ended already."""
    rows = [replace(row, tags=(*row.tags[:-1], SegmentTag.LAST), writes=(*row.writes[:-1], True)) for row, _ in drawn]
    open_ = [
        replace(row, tags=(*row.tags[:-1], SegmentTag.INSIDE)) if late else row
        for row, (_, late) in zip(rows, drawn, strict=True)
    ]
    model = setup.model()
    batch = Batch.padded(open_, places_of([len(row) for row in rows], "right"))
    cache = MemoryCache(model)
    feed(model, cache, batch, data.draw(cuts(batch.ids.shape[1]), "bounds"))
    assert (cache.memory.open_tokens > 0).tolist() == [late for _, late in drawn]
    if any(late for _, late in drawn):
        cache.end_segment()
    for n, row in enumerate(rows):
        same_memory(cache.memory, alone(model, row)[1], n)


# In a batch with others, padded.


@st.composite
def places(draw, lengths):
    """The columns of every row's tokens, with padding before, after or between them."""
    side = draw(st.sampled_from(("left", "right", "anywhere")))
    if side != "anywhere":
        return places_of(lengths, side)
    rows = []
    for length in lengths:
        holes = draw(st.lists(st.integers(0, length), max_size=4))  # the token to pad before, or the end
        rows.append([token + sum(hole <= token for hole in holes) for token in range(length)])
    return rows


@examples(100)
@given(setups(), st.lists(texts(), min_size=1, max_size=4), st.data())
def test_padding_a_batch_changes_nothing(setup, rows, data):
    model = setup.model()
    columns = data.draw(places([len(row) for row in rows]), "columns")
    batch = Batch.padded(rows, columns, fill=data.draw(st.sampled_from((PAD, 50)), "fill"))
    width = batch.ids.shape[1]
    bounds = data.draw(cuts(width), "bounds")
    # Without positions, the model counts columns. This keeps the distances of tokens without padding between them.
    apart = any(row[-1] - row[0] >= len(row) for row in columns)
    positions = apart or data.draw(st.booleans(), "positions")
    starts = [memory_of(model, data.draw(texts(1, 4), "before")) for _ in rows] if data.draw(st.booleans()) else None
    room = data.draw(rooms(width), "room")
    cache = new_cache(model, None if starts is None else MemoryState.stack(starts), room)
    logits = feed(model, cache, batch, bounds, positions=positions, ahead=data.draw(st.booleans(), "ahead"))
    for n, row in enumerate(rows):
        expected, memory = alone(model, row, None if starts is None else starts[n])
        same(logits[n, columns[n]], expected, f"logits of row {n}")
        same_memory(cache.memory, memory, n)


# In beams.


@examples(60)
@given(setups(), st.data())
def test_reordered_beams_carry_their_own_history(setup, data):
    """A random tree of beams. At every step, each row continues with any row's keys, states and open segment."""
    model = setup.model()
    beams, steps, ahead = (data.draw(st.integers(*range_), name) for name, range_ in _TREE.items())
    prompt = data.draw(texts(1, 6), "prompt")
    cache = new_cache(model, room=data.draw(rooms(len(prompt) + 3 * steps), "room"))
    feed(model, cache, Batch.of([prompt]))
    cache.batch_repeat_interleave(beams)
    pasts = [prompt] * beams
    for step in range(steps):
        length = data.draw(st.integers(1, 3), "length")
        step_texts = [data.draw(texts(length, length), f"step {step}") for _ in range(beams)]
        taken = torch.tensor(data.draw(st.lists(st.integers(0, beams - 1), min_size=beams, max_size=beams), "taken"))
        if ahead and setup.segmented:  # tags of later tokens belong to the past, and move with it
            cache.segment_tags = Batch.of(step_texts).tags
        (cache.batch_select_indices if data.draw(st.booleans(), "select") else cache.reorder_cache)(taken)
        if ahead and setup.segmented:
            step_texts = [
                replace(row, tags=step_texts[past].tags) for row, past in zip(step_texts, taken.tolist(), strict=True)
            ]
            assert torch.equal(cache.segment_tags, Batch.of(step_texts).tags)
        pasts = [pasts[past] + row for row, past in zip(step_texts, taken.tolist(), strict=True)]
        logits = feed(model, cache, Batch.of(step_texts))
    for n, past in enumerate(pasts):
        expected, memory = alone(model, past)
        same(logits[n], expected[-length:], f"logits of beam {n}")
        same_memory(cache.memory, memory, n)


_TREE = {"beams": (1, 4), "steps": (1, 4), "ahead": (0, 1)}


class Forced(LogitsProcessor):
    """Forces every beam of a conversation to generate a given text."""

    def __init__(self, continuations, prompt, beams):
        self.continuations, self.prompt, self.beams = torch.tensor(continuations), prompt, beams

    def __call__(self, input_ids, scores):
        token = self.continuations[:, input_ids.shape[1] - self.prompt].repeat_interleave(self.beams)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


@examples(50)
@given(setups(), st.lists(texts(1, 8), min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_generate_matches_one_call_over_the_whole_text(setup, prompts, beams, data):
    """Prompts of any lengths, of which every beam says the same: its token loop is the whole text in one call. What is
    generated belongs to the open segment, and the last token that is said is not fed."""
    new = data.draw(st.integers(1, 5), "new")
    continuations = [
        replace(data.draw(texts(new, new), "said"), tags=(SegmentTag.INSIDE,) * new, writes=(True,) * new)
        for _ in prompts
    ]
    prompts = [replace(prompt, writes=(True,) * len(prompt)) for prompt in prompts]
    model = setup.model()
    starts = [memory_of(model, data.draw(texts(1, 4), "before")) for _ in prompts] if data.draw(st.booleans()) else None
    columns = places_of([len(prompt) for prompt in prompts], "left")
    batch = Batch.padded(prompts, columns)
    room = data.draw(rooms(batch.ids.shape[1] + new), "room")
    cache = new_cache(model, None if starts is None else MemoryState.stack(starts), room)
    output = _generate(model, cache, setup, batch, continuations, beams)
    tokens = torch.tensor([row.tokens for row in continuations])
    assert torch.equal(output.sequences[:, batch.ids.shape[1] :], tokens)
    logits = torch.stack(output.logits, dim=1)  # [B·beams, new, vocabulary]
    for n, prompt in enumerate(prompts):
        whole = prompt + continuations[n].part(0, -1)
        expected, memory = alone(model, whole, None if starts is None else starts[n])
        for beam in range(n * beams, (n + 1) * beams):
            same(logits[beam], expected[len(prompt) - 1 :], f"logits of conversation {n}, beam {beam % beams}")
            same_memory(cache.memory, memory, beam)


def _generate(model, cache, setup, batch, continuations, beams):
    if setup.segmented:
        cache.segment_tags = batch.tags
    return model.generate(
        batch.ids,
        attention_mask=batch.valid.long(),
        cache=cache,
        max_new_tokens=len(continuations[0]),
        num_beams=beams,
        do_sample=False,
        eos_token_id=NEVER,
        pad_token_id=PAD,
        logits_processor=[Forced([row.tokens for row in continuations], batch.ids.shape[1], beams)],
        output_logits=True,
        return_dict_in_generate=True,
    )


# Compiled.


@pytest.mark.parametrize("granularity", GRANULARITIES[:2])
@examples(2)
@given(st.data())
def test_compiled_steps_match_eager_ones(granularity, data):
    """An eager prompt, then one compiled graph for every token after it, with a static cache."""
    setup = data.draw(setups(granularity=granularity), "setup")
    prompt, text = data.draw(texts(), "prompt"), data.draw(texts(6, 8), "text")
    model = setup.model()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    cache = new_cache(model, room=len(prompt) + len(text))
    logits = [feed(model, cache, Batch.of([prompt]))[0]]
    for token in range(len(text)):
        cache.write = torch.tensor([text.writes[token : token + 1]])
        if setup.segmented:
            cache.segment_tags = torch.tensor([text.tags[token : token + 1]], dtype=torch.int8)
        with torch.no_grad():
            logits.append(run(torch.tensor([text.tokens[token : token + 1]]), cache=cache).logits[0])
    assert counter.frame_count == 1
    expected, memory = alone(model, prompt + text)
    same(torch.cat(logits), expected, "logits")
    same_memory(cache.memory, memory)


# From a memory.


@pytest.fixture(scope="module")
def other_process():
    process = Elsewhere()
    yield process
    process.close()


@examples(60)
@given(setups(), texts(), texts(), st.data())
def test_a_memory_file_resumes_bit_for_bit_elsewhere(other_process, tmp_path_factory, setup, before, after, data):
    """Another process continues from a memory file bit-identically to the process that wrote it."""
    model = setup.model()
    first = MemoryCache(model)
    feed(model, first, Batch.of([before]), data.draw(cuts(len(before)), "bounds before"))
    path = tmp_path_factory.mktemp("memory") / "memory"
    first.memory.save(path)
    bounds = data.draw(cuts(len(after)), "bounds after")
    second = MemoryCache(model, memory=first.memory)
    logits = feed(model, second, Batch.of([after]), bounds)
    resumed, memory = other_process.resume(setup, path, after, bounds)
    assert torch.equal(resumed, logits)
    assert equal(memory, second.memory)


@examples(60)
@given(setups(), st.lists(texts(1, 8), min_size=2, max_size=3), st.data())
def test_copied_memories_continue_like_the_original(setup, befores, data):
    """Covers fork, select, stack and clone in the middle of conversations, including open segments."""
    model = setup.model()
    memories = [memory_of(model, before) for before in befores]
    clones = [memory.clone() for memory in memories]
    memory, rows = MemoryState.stack(memories), list(range(len(befores)))
    for change in data.draw(
        st.lists(st.sampled_from(("fork", "select", "stack", "clone")), min_size=1, max_size=3), "changes"
    ):
        if change == "fork":
            copies = data.draw(st.integers(1, 3), "copies")
            memory, rows = memory.fork(copies), [row for row in rows for _ in range(copies)]
        elif change == "select":
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4), "rows")
            memory, rows = memory.select(chosen), [rows[row] for row in chosen]
        elif change == "stack":
            memory, rows = MemoryState.stack([memory, memories[0]]), [*rows, 0]
        else:
            memory = memory.clone()
    length = data.draw(st.integers(1, 8), "length")
    afters = [data.draw(texts(length, length), "after") for _ in rows]
    cache = MemoryCache(model, memory=memory)
    logits = feed(model, cache, Batch.of(afters), data.draw(cuts(length), "bounds"))
    for n, (row, after) in enumerate(zip(rows, afters, strict=True)):
        expected, then = alone(model, after, clones[row])
        same(logits[n], expected, f"logits of copy {n}")
        same_memory(cache.memory, then, n)
    assert all(equal(memory, before) for memory, before in zip(memories, clones, strict=True)), "a memory was changed"
