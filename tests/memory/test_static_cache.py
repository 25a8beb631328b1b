"""A static KV cache gives the same logits, tokens and memory as a growing one."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.model_runs import cache_of, close, close_memory
from helpers.tiny import ARCHITECTURES, END, patched_model, randomise, tiny_model, tokens
from memory.test_generate import NEVER, SUPPRESSED, continue_alone, left_padded, memory_of, settings
from transformers import GenerationConfig, StaticCache

from deltamem_tool import DeltaMemConfig, MemoryCache, attach
from deltamem_tool.errors import MemoryStateError

TOLERANCE = 2e-5  # the same sums in another order
ROOM = 24
WINDOW = 5


def model_of(name):
    """A patched model; "sliding" has one layer of each kind of attention, "slides first" in the other order."""
    if name in ARCHITECTURES:
        return patched_model(name)
    kinds = ["full_attention", "sliding_attention"]
    kinds = kinds if name == "sliding" else kinds[::-1]
    model = tiny_model("qwen3", use_sliding_window=True, sliding_window=WINDOW, layer_types=kinds)
    randomise(attach(model, DeltaMemConfig(rank=4)))
    return model


every_architecture = pytest.mark.parametrize("name", [*ARCHITECTURES, "sliding", "slides first"])
kinds = pytest.mark.parametrize("name", ["qwen3", "slides first"])


def both(model, **options):
    return MemoryCache(model, max_length=ROOM, **options), MemoryCache(model, **options)


@torch.no_grad()
def feed(model, cache, ids, cuts, mask=None):
    """Logits of `ids` in pieces that end at `cuts`, with the 2-D mask up to there."""
    pieces, bounds = [], [0, *cuts, ids.shape[1]]
    for a, b in itertools.pairwise(bounds):
        pieces.append(model(ids[:, a:b], None if mask is None else mask[:, :b], cache=cache).logits)
    return torch.cat(pieces, dim=1)


@every_architecture
@pytest.mark.parametrize("cuts", [(), (4, 9), (1, 2, 12), tuple(range(1, 14))])
def test_a_static_cache_matches_a_growing_one(name, cuts):
    model, ids = model_of(name), tokens(2, 14)
    static, growing = both(model, memory=memory_of(model, tokens(2, 9, seed=3)))
    assert static.is_compileable and not growing.is_compileable
    close(feed(model, static, ids, cuts), feed(model, growing, ids, cuts), TOLERANCE)
    close_memory(static.memory, growing.memory)
    assert int(static.get_seq_length()) == 14


@every_architecture
@pytest.mark.parametrize("cuts", [(), (4, 9)])
def test_padding_is_ignored(name, cuts):
    model = model_of(name)
    inputs = left_padded([tokens(1, 14), tokens(1, 8, seed=1)])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    static, growing = both(model)
    valid = mask.bool()
    close(
        feed(model, static, ids, cuts, mask)[valid],
        feed(model, growing, ids, cuts, mask)[valid],
        TOLERANCE,
    )
    close_memory(static.memory, growing.memory)


def test_the_mask_must_be_over_past_and_new_tokens():
    model = patched_model()
    cache = MemoryCache(model, max_length=ROOM)
    feed(model, cache, tokens(2, 4), ())
    with pytest.raises(MemoryStateError, match=r"not \[2, 7\]"):
        feed(model, cache, tokens(2, 3), (), torch.ones(2, 3))
    with pytest.raises(MemoryStateError, match="2-D"):
        feed(model, cache, tokens(2, 3), (), torch.ones(2, 1, 3, 7))


@kinds
def test_rows_move_with_their_memory(name):
    model, ids, more = model_of(name), tokens(3, 8), tokens(6, 3, seed=1)
    for move in (
        lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
    ):
        logits, caches = [], both(model)
        for cache in caches:
            feed(model, cache, ids, ())
            move(cache)
            logits.append(feed(model, cache, more[: cache.memory.batch_size], (1,)))
        close(*logits, TOLERANCE)
        close_memory(caches[0].memory, caches[1].memory)


@kinds
def test_a_reset_cache_equals_a_new_one(name):
    model, ids = model_of(name), tokens(2, 5)
    static, growing = both(model)
    feed(model, static, tokens(2, 8, seed=1), ())
    static.reset()
    assert static.memory is None
    close(feed(model, static, ids, (2,)), feed(model, growing, ids, (2,)), TOLERANCE)
    close_memory(static.memory, growing.memory)


# generate


@every_architecture
@pytest.mark.parametrize("options", [False, True])
def test_generate_gives_a_batch_the_same_tokens(name, options):
    model = model_of(name)
    rows = [tokens(1, length, seed=length) for length in (7, 3, 5)]
    static, growing = both(model, memory=memory_of(model, tokens(3, 9)) if options else None)
    how = {"cache": static} if options else {"cache_implementation": "static"}
    output = model.generate(**left_padded(rows), return_dict_in_generate=True, **how, **settings())
    expected = model.generate(**left_padded(rows), cache=growing, **settings())
    assert isinstance(cache_of(output), MemoryCache) and cache_of(output).is_compileable
    assert torch.equal(output.sequences, expected)
    close_memory(cache_of(output).memory, growing.memory)


@kinds
def test_a_row_that_ends_early_has_the_memory_it_has_alone(name):
    model = model_of(name)
    rows = [tokens(1, 5), tokens(1, 7, seed=1)]
    answers = [continue_alone(model, row)[0] for row in rows]
    end = next(token for token in answers[0][1:4] if token not in answers[1])
    alone = [continue_alone(model, ids, stop=end) for ids in rows]
    options = settings(eos_token_id=end, cache_implementation="static", return_dict_in_generate=True)
    output = model.generate(**left_padded(rows), **options)
    for n, (words, cache) in enumerate(alone):
        assert output.sequences[n, 7 : 7 + len(words)].tolist() == words
        close_memory(cache_of(output).memory.select([n]), cache.memory)


@kinds
@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3}])
@pytest.mark.parametrize("given", [False, True])
def test_beams_and_several_sequences_match_a_growing_cache(name, options, given):
    model = model_of(name)
    inputs = left_padded([tokens(1, 6), tokens(1, 4, seed=1)])
    start = memory_of(model, tokens(2, 9)) if given else None
    static, growing = both(model, memory=start)
    options = settings(return_dict_in_generate=True, do_sample="num_beams" not in options, **options)
    outputs = []
    for how in (
        {"cache": static} if given else {"cache_implementation": "static"},
        {"cache": growing},
    ):
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, **how, **options))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    close_memory(cache_of(outputs[0]).memory, growing.memory)


@kinds
@pytest.mark.parametrize("beams", [1, 2])
def test_a_second_generation_continues_the_first(name, beams):
    """It uses the same cache, and gets the whole text or only its new part."""
    model, ids = model_of(name), tokens(2, 5)
    more = torch.cat([torch.full((2, 1), END), tokens(2, 2, seed=1)], dim=1)
    outputs = []
    for cache in both(model):
        options = settings(max_new_tokens=4, eos_token_id=NEVER, suppress_tokens=[END, *SUPPRESSED])
        first = model.generate(ids, cache=cache, **options)
        text = torch.cat([first, more], dim=1)
        outputs.append(model.generate(text, cache=cache, num_beams=beams, **options))
        memory = cache.memory
        if beams == 1:
            text = torch.cat([outputs[-1], more], dim=1)
            unfed = text[:, int(cache.get_seq_length()) :]
            again = model.generate(unfed, attention_mask=torch.ones_like(text), cache=cache, **options)
            outputs[-1], memory = again, cache.memory
        outputs.append(memory)
    assert torch.equal(outputs[0], outputs[2])
    close_memory(outputs[1], outputs[3])


def test_a_prompt_in_pieces_matches_the_whole():
    model = patched_model()
    inputs = left_padded([tokens(1, 10), tokens(1, 6, seed=1)])
    config = GenerationConfig(**settings(cache_implementation="static", return_dict_in_generate=True))
    whole = model.generate(**inputs, generation_config=config)
    config.prefill_chunk_size = 3
    pieces = model.generate(**inputs, generation_config=config)
    assert torch.equal(pieces.sequences, whole.sequences)
    close_memory(cache_of(pieces).memory, cache_of(whole).memory)


def test_a_static_cache_without_a_memory_raises():
    model = patched_model()
    with pytest.raises(MemoryStateError, match="cannot hold the memory"):
        model.generate(tokens(1, 4), cache=StaticCache(config=model.config, max_cache_len=ROOM), **settings())


@kinds
def test_a_cache_that_is_too_small_raises_and_stays_usable(name):
    model, ids = model_of(name), tokens(2, ROOM)
    static, growing = both(model)
    feed(model, static, ids[:, :20], (3,))
    before = static.memory
    with pytest.raises(MemoryStateError, match="no room for 5 more tokens"):
        feed(model, static, tokens(2, 5), ())
    assert static.memory is before and int(static.get_seq_length()) == 20
    close(feed(model, static, ids[:, 20:], (2,)), feed(model, growing, ids, ())[:, 20:], TOLERANCE)
    close_memory(static.memory, growing.memory)
    with pytest.raises(MemoryStateError, match="no room for 1 more tokens"):
        feed(model, static, tokens(2, 1), ())


@kinds
@pytest.mark.parametrize("how", ["new", "same cache, whole text", "same cache, new tokens", "embeddings"])
def test_a_generation_that_would_not_fit_raises_before_feeding(name, how):
    model, ids = model_of(name), tokens(2, 10)
    cache, text, past, mask = MemoryCache(model, max_length=ROOM), ids, 0, None
    if how.startswith("same"):
        feed(model, cache, ids[:, :4], ())
        past, mask = 4, torch.ones_like(ids)
        text = ids[:, 4:] if how.endswith("new tokens") else ids
    prompt = {"inputs_embeds": model.get_input_embeddings()(ids)} if how == "embeddings" else {"input_ids": text}
    before, fits = cache.memory, ROOM - 10 + 1  # the last token is not fed
    with pytest.raises(MemoryStateError, match="no room"):
        model.generate(**prompt, attention_mask=mask, cache=cache, **settings(max_new_tokens=fits + 1, num_beams=2))
    assert cache.memory is before and int(cache.get_seq_length()) == past
    generated = model.generate(**prompt, attention_mask=mask, cache=cache, **settings(max_new_tokens=fits))
    assert int(cache.get_seq_length()) == ROOM
    expected = model.generate(ids, **settings(max_new_tokens=fits))
    assert torch.equal(generated[:, -fits:], expected[:, 10:])


def test_sliding_window_layers_accept_any_length():
    model = tiny_model("qwen3", use_sliding_window=True, sliding_window=WINDOW, layer_types=["sliding_attention"] * 2)
    randomise(attach(model, DeltaMemConfig(rank=4)))
    ids, growing = tokens(2, 14), MemoryCache(model)
    for room in (WINDOW, ROOM):
        close(
            feed(model, MemoryCache(model, max_length=room), ids, (3, 7)),
            feed(model, growing, ids, (3, 7)),
            TOLERANCE,
        )
        growing.reset()
    with pytest.raises(MemoryStateError, match="no room"):  # three columns are not a window of five
        feed(model, MemoryCache(model, max_length=3), ids, (3, 7))
