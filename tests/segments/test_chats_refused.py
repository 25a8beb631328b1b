"""Chats that cannot be tagged raise: templates without clear message boundaries, messages without tokens."""

from __future__ import annotations

import pytest
from helpers.tiny import CHAT_TEMPLATE
from segments.templates import CHATML, COUNTING, MISTRAL, PLAIN, SYSTEM, TALK, with_template
from transformers import ByT5Tokenizer

from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.segments.encode import encode_chat, tag_chat
from deltamem_tool.segments.tags import SegmentTag


@pytest.mark.parametrize("granularity", ["message", "sentence"])
def test_a_template_without_clear_message_boundaries_raises(special_tokenizer, granularity):
    tokenizer = with_template(special_tokenizer, COUNTING, "some/model")
    assert tag_chat(tokenizer, TALK[:1], granularity).tags.count(SegmentTag.LAST) == (
        1 if granularity == "message" else 2
    )
    says = r"(?s)some/model .* message 1 \(user\) ends and message 2 \(assistant\) starts.*role assistant.*only appends"
    with pytest.raises(DataError, match=says):
        tag_chat(tokenizer, TALK, granularity)
    with pytest.raises(
        DataError, match=r"^Conversation 2: The chat template of some/model does not show where message 1"
    ):
        encode_chat(tokenizer, [TALK[:1], TALK], granularity)
    assert encode_chat(tokenizer, [TALK], "token").attention_mask.all()


@pytest.mark.parametrize(
    "template",
    [
        # the header changes with what follows
        "{% for m in messages %}<{{ m.role }}{{ messages | length }}>{{ m.content }}{% endfor %}",
        # the content occurs twice
        "{{ messages[-1].content }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        # the length of the content is a part of the header
        "{{ messages | length }}{% for m in messages %}{{ m.content | length }}>{{ m.content }}{% endfor %}",
        # the last message comes first
        "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        # a colon before the last answer alone, so that a header has to tell where the next question starts; it is two
        "{% for m in messages %}{% if m.role == 'user' %}{% if not loop.first and loop.previtem.role != 'user' %}"
        "{{ '\n' }}{% endif %}> {% elif m.role == 'assistant' and loop.last %}: {% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_unsupported_templates_raise(special_tokenizer, template):
    with pytest.raises(DataError, match=r"The chat template of its/name does not show where message"):
        tag_chat(with_template(special_tokenizer, template), TALK, "message")


@pytest.mark.parametrize("granularity", ["token", "message"])
@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        # only the last messages are written
        ("{% for m in messages[-2:] %}<{{ m.role }}>{{ m.content }}{% endfor %}", TALK, r"message 1 \(user\)"),
        # a role that the template does not know
        (CHAT_TEMPLATE.replace("in messages %}", "in messages if message.role in 'user' %}"),
         [user("a"), {"role": "usr", "content": "b"}], r"message 2 \(usr\)"),
        (CHAT_TEMPLATE, [user("a"), {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}],
         r"message 2 \(assistant\)\.\nThe rendered text does not contain its tool_calls"),
    ],
)  # fmt: skip
def test_parts_that_a_template_drops_are_named(special_tokenizer, template, messages, says, granularity):
    with pytest.raises(DataError, match="chat template of its/name leaves out " + says):
        tag_chat(with_template(special_tokenizer, template), messages, granularity)


def test_a_template_that_changes_sentences_raises(special_tokenizer):
    for template in (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }} ({{ m.content | length }}){% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.content }}{% endfor %}",
    ):
        tokenizer = with_template(special_tokenizer, template)
        assert tag_chat(tokenizer, TALK, "message").tags.count(SegmentTag.LAST) == 4
        for messages in (TALK, [user("Hi."), assistant("Ho.")]):
            with pytest.raises(DataError, match=r"its/name does not show where the content of message 1 \(user\) is"):
                tag_chat(tokenizer, messages, "sentence")


def test_a_message_without_tokens_is_named(special_tokenizer):
    tokenizer = with_template(special_tokenizer, PLAIN)
    with pytest.raises(DataError, match=r"(?s)Message 3 \(assistant\) has no token of its own.*writes nothing"):
        tag_chat(tokenizer, [SYSTEM, user("a"), assistant(""), user("b")], "message")
    with pytest.raises(DataError, match=r"Message 2 \(assistant\) has no token"):
        tag_chat(tokenizer, [user("a"), assistant("")], "sentence")
    silent = {"role": "system", "content": ""}
    assert tag_chat(tokenizer, [silent, user("a"), silent], "message").tags == [SegmentTag.LAST]


def test_a_generation_prompt_that_changes_earlier_text_raises(special_tokenizer):
    tokenizer = with_template(
        special_tokenizer, "{% if add_generation_prompt %}<think>{% endif %}" + CHAT_TEMPLATE, "a/b"
    )
    assert tag_chat(tokenizer, TALK, "message")
    with pytest.raises(DataError, match="a/b renders the messages differently before a generation prompt"):
        tag_chat(tokenizer, TALK, "message", add_generation_prompt=True)


def test_errors_raised_by_the_template_are_reported(special_tokenizer):
    tokenizer = with_template(special_tokenizer, MISTRAL)
    with pytest.raises(DataError, match=r"(?s)of its/name refuses the conversation.*Roles must alternate"):
        tag_chat(tokenizer, [*TALK, *TALK[1:]], "message")
    tokenizer.chat_template = "{{ messages[0].content + [] }}"
    with pytest.raises(DataError, match=r"(?s)refuses the conversation.*can only concatenate"):
        tag_chat(tokenizer, TALK, "message")


def test_invalid_options_and_conversations_raise(special_tokenizer):
    tokenizer = with_template(special_tokenizer, CHATML)
    with pytest.raises(ConfigError, match=r"(?s)Unknown granularity 'word'.*token, message, sentence"):
        encode_chat(tokenizer, TALK, "word")
    with pytest.raises(ConfigError, match=r"(?s)Unknown padding side 'top'.*left, right"):
        encode_chat(tokenizer, TALK, padding_side="top")
    with pytest.raises(ConfigError, match='not used at granularity "message"'):
        encode_chat(tokenizer, TALK, "message", split=str.split)
    with pytest.raises(DataError, match="no conversation to encode"):
        encode_chat(tokenizer, [])
    with pytest.raises(DataError, match=r"Conversation 2: .*has no messages"):
        encode_chat(tokenizer, [TALK, []])
    with pytest.raises(DataError, match="has no messages"):
        tag_chat(tokenizer, [], "message")
    with pytest.raises(DataError, match="Message 2 has no role"):
        encode_chat(tokenizer, [TALK[0], {"content": "a"}])
    with pytest.raises(DataError, match="has no messages"):
        encode_chat(tokenizer, "Hello", "message")
    with pytest.raises(DataError, match="its/name has no chat template"):
        encode_chat(with_template(special_tokenizer, None), TALK)


def test_a_slow_tokenizer_raises_where_tags_are_needed():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template, tokenizer.name_or_path = PLAIN, "google/byt5"
    with pytest.raises(
        DataError, match=r"(?s)google/byt5 does not give the positions.*ByT5Tokenizer is a slow.*Use a fast"
    ):
        encode_chat(tokenizer, TALK)
    assert encode_chat(tokenizer, [user("abc")], "token").input_ids.tolist() == [[100, 101, 102]]
