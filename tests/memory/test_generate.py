"""`model.generate()` with a memory: each way to decode gives what the model gives token by token, and each row, beam
and call carries its own state."""

from __future__ import annotations

import pytest
import torch
from helpers.model_runs import cache_of, close_memory
from helpers.recording_cache import RecordingCache
from helpers.tiny import ARCHITECTURES, END, PAD, patched_model, tiny_model, tokens
from transformers import GenerationConfig

from deltamem_tool import MemoryCache, MemoryState
from deltamem_tool.errors import MemoryStateError
from deltamem_tool.memory.attach import adapter_of

NEW = 8
NEVER = 95  # a stop token that `settings` forbids
SUPPRESSED = [PAD, NEVER]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def settings(**options):
    """Generation options that decode to the maximum length, unless `options` change this."""
    return {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": NEVER, "pad_token_id": PAD} | (
        {"suppress_tokens": SUPPRESSED} | options
    )


@torch.no_grad()
def continue_alone(model, ids, memory=None, new=NEW, stop=NEVER):
    """Greedy continuation of one conversation, token by token, without `generate`: the new tokens and the cache."""
    cache = MemoryCache(model, memory=memory)
    generated, feed = [], ids
    for _ in range(new):
        logits = model(feed, cache=cache).logits[0, -1].clone()
        logits[SUPPRESSED] = -torch.inf
        generated.append(int(logits.argmax()))
        if generated[-1] == stop:
            break
        feed = torch.tensor([generated[-1:]])
    return generated, cache


def memory_of(model, ids) -> MemoryState:
    cache = MemoryCache(model)
    with torch.no_grad():
        model(ids, cache=cache)
    return cache.memory


def left_padded(rows):
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=PAD) for row in rows])
    return {"input_ids": ids, "attention_mask": torch.cat([_ones(row, width) for row in rows])}


def _ones(row, width):
    return torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0))


@every_architecture
@pytest.mark.parametrize("options", [False, True])
def test_greedy_decoding_matches_a_token_loop(name, options):
    model, ids = patched_model(name), tokens(1, 6)
    generated, expected = continue_alone(model, ids)
    cache = MemoryCache(model) if options else None
    output = model.generate(ids, cache=cache, **settings())
    assert output[0, 6:].tolist() == generated
    if options:
        close_memory(cache.memory, expected.memory)


def test_the_memory_changes_the_generated_tokens():
    """Without this, the tests here would also pass without a memory."""
    model, ids = patched_model(), tokens(1, 6)
    start = memory_of(model, tokens(1, 20, seed=4))
    plain = model.generate(ids, **settings())
    remembered = model.generate(ids, cache=MemoryCache(model, memory=start), **settings())
    unwritten = model.generate(ids, cache=MemoryCache(model, write=False), **settings())
    assert plain.tolist() != remembered.tolist()
    assert plain.tolist() != unwritten.tolist()


def test_without_a_kv_cache_every_step_recomputes_from_the_start():
    model, ids = patched_model(), tokens(2, 6)
    assert torch.equal(model.generate(ids, use_cache=False, **settings()), model.generate(ids, **settings()))
    with pytest.raises(MemoryStateError, match="use_cache=False"):
        model.generate(ids, use_cache=False, cache=MemoryCache(model), **settings())


def test_generate_without_a_cache_returns_a_cache_with_the_memory():
    model, ids = patched_model(), tokens(1, 6)
    output = model.generate(ids, return_dict_in_generate=True, **settings())
    _, expected = continue_alone(model, ids)
    close_memory(cache_of(output).memory, expected.memory)


@every_architecture
def test_a_batch_matches_its_rows_run_alone(name):
    model = patched_model(name)
    rows = [tokens(1, length, seed=length) for length in (7, 3, 5)]
    start = memory_of(model, tokens(3, 12))
    for memory in (None, start):
        cache = MemoryCache(model, memory=memory)
        output = model.generate(**left_padded(rows), cache=cache, **settings())
        for row, ids in enumerate(rows):
            generated, alone = continue_alone(model, ids, None if memory is None else memory.select([row]))
            assert output[row, 7:].tolist() == generated
            close_memory(cache.memory.select([row]), alone.memory)


def test_sampled_tokens_are_written_to_the_memory():
    model, ids = patched_model(), tokens(1, 6)
    start = memory_of(model, tokens(1, 12))
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        cache = MemoryCache(model, memory=start)
        outputs.append(model.generate(ids, cache=cache, **settings(do_sample=True, temperature=2.0)))
        fed = MemoryCache(model, memory=start)
        with torch.no_grad():
            model(outputs[-1][:, :-1], cache=fed)
        close_memory(cache.memory, fed.memory)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("loaded", [False, True])
def test_every_returned_sequence_has_its_own_memory(loaded):
    model = patched_model()
    rows = [tokens(1, 6), tokens(1, 4, seed=1)]
    start = memory_of(model, tokens(2, 12)) if loaded else None
    cache = MemoryCache(model, memory=start)
    torch.manual_seed(0)
    options = settings(do_sample=True, temperature=2.0, num_return_sequences=3)
    output = model.generate(**left_padded(rows), cache=cache, **options)
    assert cache.memory.batch_size == 6 and len({tuple(row) for row in output.tolist()}) == 6
    for n, sequence in enumerate(output):
        row = n // 3
        fed = MemoryCache(model, memory=start.select([row]) if loaded else None)
        with torch.no_grad():
            model(sequence[None, 6 - rows[row].shape[1] : -1], cache=fed)
        close_memory(cache.memory.select([n]), fed.memory)


@every_architecture
@pytest.mark.parametrize("loaded", [False, True])
def test_each_beam_carries_its_own_state(name, loaded, tmp_path):
    model = patched_model(name)
    rows = [tokens(1, 6), tokens(1, 4, seed=1)]
    start = None
    if loaded:
        memory_of(model, tokens(2, 12)).save(tmp_path / "memory")
        start = MemoryState.load(tmp_path / "memory")

    options = settings(num_beams=3, num_return_sequences=3, output_scores=True, return_dict_in_generate=True)
    cache = RecordingCache(model, memory=start)
    output = model.generate(**left_padded(rows), cache=cache, **options)
    assert any(beams != sorted(set(beams)) for beams in cache.taken), "no beam ever replaced another"
    assert output.sequences.shape == (6, 6 + NEW)
    # The beam of each sequence's last token has seen everything but that token. (The reordering after the last step is
    # arbitrary, since transformers no longer uses the cache.)
    for n, sequence in enumerate(output.sequences):
        row, beam = n // 3, int(output.beam_indices[n, -1])
        fed = MemoryCache(model, memory=start.select([row]) if loaded else None)
        with torch.no_grad():
            model(sequence[None, 6 - rows[row].shape[1] : -1], cache=fed)
        close_memory(cache.memories[-1].select([beam]), fed.memory)


@pytest.mark.parametrize("loaded", [False, True])
def test_beam_search_with_and_without_a_cache_agree(loaded):
    """Scores of beams come from their own states: recomputing every prefix from scratch gives the same winners."""
    model, ids = patched_model(), tokens(1, 6)
    options = settings(num_beams=4, num_return_sequences=2)
    if not loaded:
        assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
        return
    start = memory_of(model, tokens(1, 12))
    actual = model.generate(ids, cache=MemoryCache(model, memory=start), **options)
    scores = _log_probabilities(model, actual, start)
    greedy, _ = continue_alone(model, ids, start)
    greedy = torch.cat([ids, torch.tensor([greedy])], dim=1)
    assert scores[0] >= scores[1] and scores[0] >= _log_probabilities(model, greedy, start)[0] - 1e-4
    output = model.generate(
        ids,
        cache=MemoryCache(model, memory=start),
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    torch.testing.assert_close(output.sequences_scores * NEW, scores, atol=1e-4, rtol=0)


@torch.no_grad()
def _log_probabilities(model, sequences, start):
    """Log-probabilities of the last NEW tokens of each sequence, fed from `start` in one call."""
    logits = model(sequences, cache=MemoryCache(model, memory=start.fork(len(sequences)))).logits
    logits = logits[:, -NEW - 1 : -1].log_softmax(-1)
    return logits.gather(-1, sequences[:, -NEW:, None]).sum((1, 2))


def _ends_early(model, rows, memory=None):
    """A stop token that one row generates early and another never."""
    answers = [
        continue_alone(model, ids, None if memory is None else memory.select([n]))[0] for n, ids in enumerate(rows)
    ]
    for token in answers[0][1:4]:
        if token not in answers[1]:
            return token
    raise AssertionError("choose other rows: both say the same")


@pytest.mark.parametrize("pad_is_end", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_row_that_ends_early_has_the_memory_it_has_alone(pad_is_end, loaded):
    model = patched_model()
    rows = [tokens(1, 5), tokens(1, 7, seed=1)]
    start = memory_of(model, tokens(2, 12)) if loaded else None
    end = _ends_early(model, rows, start)
    # The prompts contain the stop token too, like the earlier turns of a chat, where it ends nothing.
    rows = [torch.cat([row[:, :2], torch.tensor([[end]]), row[:, 2:]], dim=1) for row in rows]
    alone = [continue_alone(model, ids, start.select([n]) if loaded else None, stop=end) for n, ids in enumerate(rows)]
    for width in (NEW, 3):  # the shorter one stops before the other row is finished
        cache = MemoryCache(model, memory=start)
        options = settings(max_new_tokens=width, eos_token_id=end, pad_token_id=end if pad_is_end else PAD)
        output = model.generate(**left_padded(rows), cache=cache, **options)
        for n, ids in enumerate(rows):
            generated = alone[n][0][:width]
            assert output[n, 8 : 8 + len(generated)].tolist() == generated
            expected = continue_alone(model, ids, start.select([n]) if loaded else None, new=width, stop=end)[1]
            close_memory(cache.memory.select([n]), expected.memory)


def test_writing_padding_after_the_end_would_change_the_memory():
    """Checks that the test above can fail: a finished row is fed for several steps."""
    model = patched_model()
    rows = [tokens(1, 5), tokens(1, 7, seed=1)]
    end = _ends_early(model, rows)
    cache = MemoryCache(model)
    output = model.generate(**left_padded(rows), cache=cache, **settings(eos_token_id=end))
    assert (output[0] == PAD).sum() - 2 >= 3  # two of them are padding of its prompt
    with torch.no_grad():
        fed = MemoryCache(model)
        model(output[:1, 2:-1], cache=fed)
    layer = cache.memory.layers[1][0] - fed.memory.layers[1][0]
    assert layer.abs().max() > 1e-2, "writing the padding would make no difference"


def test_a_prompt_of_embeddings_can_end_early():
    model = patched_model()
    ids = torch.cat([tokens(1, 5), tokens(1, 5, seed=1)])
    first = [continue_alone(model, row[None])[0][0] for row in ids]
    assert first[0] != first[1]
    cache = MemoryCache(model)
    embedded = model.get_input_embeddings()(ids).detach()
    model.generate(inputs_embeds=embedded, cache=cache, **settings(eos_token_id=first[0]))
    close_memory(cache.memory.select([0]), memory_of(model, ids[:1]))  # it generated only its end


def test_rows_that_ended_can_be_continued_by_hand():
    """If fed by hand, a row whose answer has ended continues to read and write, stop tokens included."""
    model = patched_model()
    rows = [tokens(1, 5), tokens(1, 5, seed=1)]
    end = _ends_early(model, rows)
    cache = MemoryCache(model)
    model.generate(torch.cat(rows), cache=cache, **settings(eos_token_id=end))
    for fed in (torch.full((2, 1), end), tokens(2, 1, seed=2)):
        before = cache.memory
        with torch.no_grad():
            model(fed, cache=cache)
        for row in range(2):
            change = cache.memory.layers[1][row] - before.layers[1][row]
            assert change.abs().max() > 1e-3, f"row {row} did not write"


@pytest.mark.parametrize("how", ["same cache, whole text", "same cache, new tokens", "memory alone"])
def test_a_second_generation_continues_the_first(how):
    model, ids = patched_model(), tokens(2, 6)
    more = torch.cat([torch.full((2, 1), END), tokens(2, 3, seed=1)], dim=1)
    options = settings(eos_token_id=[END, NEVER], suppress_tokens=[END, *SUPPRESSED])
    cache = MemoryCache(model)
    first = model.generate(ids, cache=cache, **options)
    text = torch.cat([first, more], dim=1)
    if how == "same cache, whole text":
        second = model.generate(text, cache=cache, **options)[:, text.shape[1] :]
    elif how == "same cache, new tokens":
        fed = torch.cat([first[:, -1:], more], dim=1)  # the last token of the first call has not been fed
        second = model.generate(fed, attention_mask=torch.ones_like(text), cache=cache, **options)
        second = second[:, fed.shape[1] :]
    else:
        cache = MemoryCache(model, memory=cache.memory)
        fed = torch.cat([first[:, -1:], more], dim=1)
        second = model.generate(fed, cache=cache, **options)[:, fed.shape[1] :]
    if how != "memory alone":  # the whole text in one call gives the same
        expected = MemoryCache(model)
        output = model.generate(text, cache=expected, **options)
        assert torch.equal(second, output[:, text.shape[1] :])
        close_memory(cache.memory, expected.memory)
    else:
        fed = torch.cat([text[:, 6 + NEW - 1 :], second[:, :-1]], dim=1)
        expected = MemoryCache(model, memory=memory_of(model, first[:, :-1]))
        with torch.no_grad():
            model(fed, cache=expected)
        close_memory(cache.memory, expected.memory)


def test_a_prompt_in_pieces_matches_the_whole():
    model, ids = patched_model(), tokens(2, 10)
    ids[:, 2] = END
    config = GenerationConfig(**settings(eos_token_id=[END, NEVER], suppress_tokens=[END, *SUPPRESSED]))
    whole, cache = MemoryCache(model), MemoryCache(model)
    expected = model.generate(ids, generation_config=config, cache=whole)
    config.prefill_chunk_size = 3
    assert torch.equal(model.generate(ids, generation_config=config, cache=cache), expected)
    close_memory(cache.memory, whole.memory)


def test_a_generation_without_writing_keeps_the_memory():
    model, ids = patched_model(), tokens(1, 6)
    start = memory_of(model, tokens(1, 12))
    cache = MemoryCache(model, memory=start, write=False)
    model.generate(ids, cache=cache, **settings())
    for layer, state in start.layers.items():
        assert torch.equal(cache.memory.layers[layer], state)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static", "quantized"])
def test_caches_that_cannot_hold_a_memory_raise(kind):
    model = patched_model()
    with pytest.raises((MemoryStateError, ImportError)) as refusal:
        model.generate(tokens(1, 4), cache_implementation=kind, **settings())
    if refusal.type is MemoryStateError:
        assert "cache_implementation" in str(refusal.value)


def test_decoding_that_removes_tokens_raises():
    model = patched_model()
    ids = tokens(1, 3).repeat(1, 4)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model(seed=1)}):
        cache = MemoryCache(model)
        with pytest.raises(MemoryStateError, match="forget its last tokens"):
            model.generate(ids, cache=cache, **settings(**options))
        assert cache.memory is None and cache.get_seq_length() == 0
    assert adapter_of(model) is not None and model.generate(ids, **settings()).shape == (1, 12 + NEW)
