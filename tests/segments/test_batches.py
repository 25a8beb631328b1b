"""A batch of chats equals its conversations with padding."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from segments.templates import CHATML, SYSTEM, TALK, with_template

from deltamem_tool.errors import DataError
from deltamem_tool.segments.encode import encode_chat, tag_chat
from deltamem_tool.segments.tags import SegmentTag


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("granularity", ["token", "message", "sentence"])
def test_a_batch_equals_its_padded_conversations(special_tokenizer, side, granularity):
    tokenizer = with_template(special_tokenizer, CHATML)
    conversations = [TALK, TALK[:1], [SYSTEM, *TALK]]
    batch = encode_chat(tokenizer, conversations, granularity, add_generation_prompt=True, padding_side=side)
    rows = [tag_chat(tokenizer, messages, granularity, add_generation_prompt=True) for messages in conversations]
    width = max(len(row.input_ids) for row in rows)
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, width)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    for n, row in enumerate(rows):
        length = len(row.input_ids)
        real = slice(width - length, width) if side == "left" else slice(0, length)
        assert batch.input_ids[n, real].tolist() == row.input_ids
        assert batch.attention_mask[n, real].tolist() == [1] * length
        assert batch.attention_mask[n].sum() == length
        assert (batch.input_ids[n][batch.attention_mask[n] == 0] == tokenizer.pad_token_id).all()
        if batch.segment_tags is not None:
            assert batch.segment_tags[n, real].tolist() == row.tags
            assert (batch.segment_tags[n][batch.attention_mask[n] == 0] == SegmentTag.OUTSIDE).all()
    if granularity == "token":
        assert batch.segment_tags is None and all(set(row.tags) == {SegmentTag.LAST} for row in rows)
    else:
        assert batch.segment_tags.shape == (3, width) and batch.segment_tags.dtype == torch.int8


def test_one_conversation_gives_a_batch_of_one(special_tokenizer):
    tokenizer = with_template(special_tokenizer, CHATML)
    one, same = encode_chat(tokenizer, TALK), encode_chat(tokenizer, [TALK])
    assert torch.equal(one.input_ids, same.input_ids) and torch.equal(one.segment_tags, same.segment_tags)
    assert one.segment_tags[0].tolist() == tag_chat(tokenizer, TALK, "message").tags
    chatted = tokenizer.apply_chat_template(TALK, return_dict=True, return_tensors="pt")
    assert torch.equal(one.input_ids, chatted["input_ids"])


def test_the_end_token_is_used_where_there_is_no_padding_token(special_tokenizer):
    tokenizer = deepcopy(with_template(special_tokenizer, CHATML))  # a copy shares the special tokens
    tokenizer.pad_token = None
    batch = encode_chat(tokenizer, [TALK, TALK[:1]])
    assert batch.input_ids[1, 0] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"(?s)no token to pad with.*tokenizer.pad_token"):
        encode_chat(tokenizer, [TALK, TALK[:1]])
    assert encode_chat(tokenizer, [TALK, TALK]).attention_mask.all()
