"""Segments end at tokens: a token belongs where its first character is."""

from __future__ import annotations

import pytest
from helpers.tiny import CHAT_TEMPLATE, tiny_tokenizer
from segments.merges import trained
from segments.templates import PLAIN, TALK
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.errors import DataError
from deltamem_tool.segments.encode import tag_chat
from deltamem_tool.segments.tags import SegmentTag


def test_a_token_belongs_where_its_first_character_is():
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    messages = [user("one.\nt"), assistant("wo.\n"), user("x")]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("one.\ntwo.\nx")["input_ids"])
    assert tokens == ["one.Ċtwo.Ċ", "x"]
    with pytest.raises(DataError, match=r"(?s)Message 2 \(assistant\) has no token of its own"):
        tag_chat(tokenizer, messages, "message")
    messages = [user("one.\nt"), assistant("wo.\nx")]
    assert tag_chat(tokenizer, messages, "message").tags == [SegmentTag.LAST, SegmentTag.LAST]
    assert tag_chat(tokenizer, [user("one.\ntwo.\n"), user("x")], "message").tags == [SegmentTag.LAST, SegmentTag.LAST]


def test_tokens_that_share_a_character_stay_together():
    """Emoji are several byte tokens over one character; merged bytes can be of two characters."""
    for tokenizer in (tiny_tokenizer(), trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))):
        tokenizer.chat_template = PLAIN
        messages = [user("é🦺"), assistant("好🐕")]
        tagged = tag_chat(tokenizer, messages, "message")
        first = len(tokenizer("é🦺")["input_ids"])
        assert first > 1 and len(tagged.tags) > first + 1
        assert tagged.tags == [SegmentTag.INSIDE] * (first - 1) + [SegmentTag.LAST] + [SegmentTag.INSIDE] * (
            len(tagged.tags) - first - 1
        ) + [SegmentTag.LAST]


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_before_a_word_belongs_to_the_word(trim):
    byte_level = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    byte_level.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    metaspace = trained(pre_tokenizers.Metaspace())
    # a second space is a token of its own, which stays behind
    of_byte_level = ["One .", "ĠIt Ġis . Ġ", "ĠIt Ġwas . <a>"]
    of_metaspace = ["▁One.", "▁It ▁is. ▁", "▁It ▁was. <a>"]
    for tokenizer, sentences in ((byte_level, of_byte_level), (metaspace, of_metaspace)):
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<a>{% endfor %}"
        tagged = tag_chat(tokenizer, [user("One. It is.  It was.")], "sentence")
        assert tokenizer.convert_ids_to_tokens(tagged.input_ids) == " ".join(sentences).split()
        lengths = [len(sentence.split()) for sentence in sentences]
        assert tagged.tags == [
            tag for length in lengths for tag in [SegmentTag.INSIDE] * (length - 1) + [SegmentTag.LAST]
        ]


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_in_its_own_token_belongs_to_the_previous_segment(trim):
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    tagged = tag_chat(tokenizer, [user("One. ¿")], "sentence", split=str.split)
    assert tokenizer.convert_ids_to_tokens(tagged.input_ids) == ["One", ".", "Ġ", "Â", "¿"]
    assert tagged.tags == [SegmentTag.INSIDE, SegmentTag.INSIDE, SegmentTag.LAST, SegmentTag.INSIDE, SegmentTag.LAST]


class Backwards(PreTrainedTokenizerFast):
    def __call__(self, *inputs, **options):
        encoded = super().__call__(*inputs, **options)
        encoded["offset_mapping"].reverse()
        return encoded


def test_tokens_out_of_text_order_raise(special_tokenizer):
    tokenizer = Backwards(tokenizer_object=special_tokenizer.backend_tokenizer, chat_template=CHAT_TEMPLATE)
    with pytest.raises(DataError, match="not in the order of the text"):
        tag_chat(tokenizer, TALK, "message")
