"""Rows of packed keys and values: each matches the same row alone, whatever its length and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.buffered_calls import called, called_with, content, same

from deltamem_tool.memory.cache import MemoryCache
from deltamem_tool.onnx import contract
from deltamem_tool.onnx.runtime.ortvalue import to_device, to_numpy

# The same sums in another order, for logits and states of order 10.
CLOSE = 2e-4


def texts(rows, tokens):
    """Random tokens, int64 `[rows, tokens]`."""
    return np.random.default_rng(rows * tokens).integers(0, 256, (rows, tokens))


def in_pytorch(exported, text):
    """Logits `[T, V]` of all positions of one text, and the states after it, by one call of the model."""
    cache = MemoryCache(exported.model)
    with torch.no_grad():
        logits = exported.model(input_ids=torch.tensor(text)[None], cache=cache).logits[0].numpy()
    return logits, {i: state[0].numpy() for i, state in cache.memory.layers.items()}


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=CLOSE)


def close_states(graph, past, row, expected):
    for layer, state in graph.states(past).items():
        close(state[row], expected[layer])


def test_a_text_that_outgrows_its_buffers_continues_in_larger_ones(qwen3, packed, small_rooms):
    text = texts(1, 40)[0]
    logits, states = in_pytorch(qwen3, text)
    past, end, rooms = packed.empty_past(1), 0, []
    for tokens in (3, 1, 1, 1, 1, 1, 9, 1, 1, 14, 1, 6):
        end += tokens
        actual, past = called(packed, text[None, end - tokens : end], past)
        close(actual[0, -1], logits[end - 1])
        rooms.append(past.lease.buffers.room)
    close_states(packed, past, 0, states)
    assert end == len(text) and len(set(rooms)) > 2 and rooms == sorted(rooms)


PADDING = {
    "left": ["0011111", "1111111", "0000111"],
    "right": ["1111100", "1111111", "1110000"],
    "between": ["1010111", "1111111", "0110010"],
}


@pytest.mark.parametrize("first", PADDING)
@pytest.mark.parametrize("second", PADDING)
def test_rows_of_different_length_match_each_alone(qwen3, packed, small_rooms, first, second):
    """Covers prompts, single tokens, and tokens of only some rows."""
    masks = [PADDING[first], ["1", "1", "1"], ["1", "0", "1"], PADDING[second], ["1", "1", "0"], ["1", "1", "1"]]
    valid = np.array([[int(digit) for digit in "".join(row)] for row in zip(*masks, strict=True)])
    ids = texts(*valid.shape)
    alone = [in_pytorch(qwen3, ids[row, valid[row] > 0]) for row in range(3)]
    past, end = packed.empty_past(3), 0
    for rows in masks:
        call = slice(end, end + len(rows[0]))
        end = call.stop
        actual, past = packed.step(ids[:, call], valid[:, :end], np.ones((3, len(rows[0])), bool), past)
        for row, (logits, _) in enumerate(alone):
            if valid[row, call].any():
                close(actual[row, -1], logits[valid[row, :end].sum() - 1])
    for row, (_, states) in enumerate(alone):
        close_states(packed, past, row, states)


@pytest.mark.parametrize("masks", [[[1] * 6], [[1] * 6, [0, 0, 1, 1, 1, 1]]], ids=["one row", "two rows"])
def test_buffer_contents_after_the_tokens_are_not_read(packed, masks):
    """They may be NaN, from another conversation or from uninitialised memory."""
    mask = np.array(masks)
    rows, new = texts(len(masks), 9), np.ones((len(masks), 3), np.int64)
    whole = np.concatenate([mask, new], axis=1)
    logits = []
    for junk in (0, np.nan):
        _, past = called_with(packed, rows[:, :6], mask, packed.empty_past(len(masks)))
        for value in past.lease.buffers.cache.values():
            array = to_numpy(value).copy()
            for row, length in enumerate(mask.sum(1)):
                array[row, :, length:] = junk
            value.update_inplace(to_device(array, "float32", "cpu"))
        one, past = called_with(packed, rows[:, 6:7], whole[:, :7], past)
        two, _ = called_with(packed, rows[:, 7:], whole, past)
        logits.append(np.concatenate([one, two]))
    assert np.array_equal(*logits)


def test_rows_of_different_length_are_joined_and_selected(qwen3, packed):
    lengths, more = (5, 12, 2), texts(3, 6)
    prompts = [texts(1, length)[0] for length in lengths]
    alone = [in_pytorch(qwen3, np.concatenate([prompt, new])) for prompt, new in zip(prompts, more, strict=True)]
    pasts = [called(packed, prompt[None], packed.empty_past(1))[1] for prompt in prompts]
    past = packed.join(pasts)
    assert past.mask.sum(1).tolist() == list(lengths) and past.length == max(lengths)
    joined = past
    for start, end in ((0, 1), (1, 4), (4, 5), (5, 6)):
        mask = np.concatenate([past.mask, np.ones((3, end - start), np.int64)], axis=1)
        actual, past = called_with(packed, more[:, start:end], mask, past)
        for row, (logits, _) in enumerate(alone):
            close(actual[row, -1], logits[lengths[row] + end - 1])
    for row, (logits, states) in enumerate(alone):
        close_states(packed, past, row, states)
        selection = packed.take(joined, row, np.flatnonzero(joined.mask[row]))
        assert selection.length == lengths[row]
        same(content(packed, selection), content(packed, pasts[row]))
        actual, after = called(packed, more[row : row + 1], selection)
        close(actual[0, -1], logits[-1])
        close_states(packed, after, 0, states)


def test_columns_in_the_middle_can_be_selected(packed):
    """In a row with padding, columns are counted as in the mask."""
    mask = np.array([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    _, past = called_with(packed, texts(2, 6), mask, packed.empty_past(2))
    selection = packed.take(past, 0, np.array([0, 2, 4]))  # the first and the fourth token, and padding
    key = contract.carried_name(contract.PAST, 0, contract.KEY)
    whole = to_numpy(past.lease.buffers.cache[key])[0]
    assert selection.mask.tolist() == [[1, 0, 1]]
    assert np.array_equal(to_numpy(selection.lease.buffers.cache[key])[0, :, :2], whole[:, [0, 3]])


@pytest.mark.parametrize("valid", ["11111100000", "00000111111", "01100000000", "11111111111"])
def test_a_prompt_in_pieces_returns_the_logits_of_its_last_token(qwen3, packed, monkeypatch, valid):
    monkeypatch.setattr("deltamem_tool.onnx.runtime.buffered_graph.LONGEST_CALL", 4)
    mask, ids = np.array([[int(digit) for digit in valid]]), texts(1, 11)
    logits, states = in_pytorch(qwen3, ids[mask > 0])
    actual, past = called_with(packed, ids, mask, packed.empty_past(1))
    close(actual[0, -1], logits[-1])
    close_states(packed, past, 0, states)


def test_prompts_of_a_batch_are_fed_in_pieces(qwen3, packed, monkeypatch):
    monkeypatch.setattr("deltamem_tool.onnx.runtime.buffered_graph.LONGEST_CALL", 4)
    ids = texts(2, 16)
    mask = np.ones_like(ids)
    mask[0, 3:6] = mask[0, 12:] = mask[1, :3] = mask[1, 7:9] = 0
    first, past = called_with(packed, ids[:, :6], mask[:, :6], packed.empty_past(2))
    actual, past = called_with(packed, ids[:, 6:], mask, past)
    for row in range(2):
        close(first[row, -1], in_pytorch(qwen3, ids[row, :6][mask[row, :6] > 0])[0][-1])
        logits, states = in_pytorch(qwen3, ids[row, mask[row] > 0])
        close_states(packed, past, row, states)
        close(actual[row, -1], logits[-1])
