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
from deltamem_tool.segments.encode import mark_chat
from deltamem_tool.segments.tags import INSIDE, LAST


def test_a_token_belongs_where_its_first_character_is():
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    messages = [user("one.\nt"), assistant("wo.\n"), user("x")]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("one.\ntwo.\nx")["input_ids"])
    assert tokens == ["one.Ċtwo.Ċ", "x"]
    with pytest.raises(DataError, match=r"(?s)Message 2 \(assistant\) has no token of its own"):
        mark_chat(tokenizer, messages, "message")
    messages = [user("one.\nt"), assistant("wo.\nx")]
    assert mark_chat(tokenizer, messages, "message").marks == [LAST, LAST]
    assert mark_chat(tokenizer, [user("one.\ntwo.\n"), user("x")], "message").marks == [LAST, LAST]


def test_tokens_that_share_a_character_stay_together():
    """Emoji are several byte tokens over one character; merged bytes can be of two characters."""
    for tokenizer in (tiny_tokenizer(), trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))):
        tokenizer.chat_template = PLAIN
        messages = [user("é🦺"), assistant("好🐕")]
        marked = mark_chat(tokenizer, messages, "message")
        first = len(tokenizer("é🦺")["input_ids"])
        assert first > 1 and len(marked.marks) > first + 1
        assert marked.marks == [INSIDE] * (first - 1) + [LAST] + [INSIDE] * (len(marked.marks) - first - 1) + [LAST]


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_before_a_word_is_the_words(trim):
    byte_level = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    byte_level.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    metaspace = trained(pre_tokenizers.Metaspace())
    # a second space is a token of its own, which stays behind
    of_byte_level = ["One .", "ĠIt Ġis . Ġ", "ĠIt Ġwas . <a>"]
    of_metaspace = ["▁One.", "▁It ▁is. ▁", "▁It ▁was. <a>"]
    for tokenizer, sentences in ((byte_level, of_byte_level), (metaspace, of_metaspace)):
        tokenizer.chat_template = "{% for message in messages %}{{ message.content }}<a>{% endfor %}"
        marked = mark_chat(tokenizer, [user("One. It is.  It was.")], "sentence")
        assert tokenizer.convert_ids_to_tokens(marked.input_ids) == " ".join(sentences).split()
        lengths = [len(sentence.split()) for sentence in sentences]
        assert marked.marks == [mark for length in lengths for mark in [INSIDE] * (length - 1) + [LAST]]


@pytest.mark.parametrize("trim", [False, True])
def test_a_space_in_a_token_of_its_own_stays_behind(trim):
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    marked = mark_chat(tokenizer, [user("One. ¿")], "sentence", split=str.split)
    assert tokenizer.convert_ids_to_tokens(marked.input_ids) == ["One", ".", "Ġ", "Â", "¿"]
    assert marked.marks == [INSIDE, INSIDE, LAST, INSIDE, LAST]


class Backwards(PreTrainedTokenizerFast):
    def __call__(self, *inputs, **options):
        encoded = super().__call__(*inputs, **options)
        encoded["offset_mapping"].reverse()
        return encoded


def test_tokens_that_are_not_in_the_order_of_the_text_are_refused(special):
    tokenizer = Backwards(tokenizer_object=special.backend_tokenizer, chat_template=CHAT_TEMPLATE)
    with pytest.raises(DataError, match="not in the order of the text"):
        mark_chat(tokenizer, TALK, "message")
