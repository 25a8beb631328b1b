"""Tags of a chat, compared with pieces that the tests assemble for each template."""

from __future__ import annotations

import pytest
from helpers.tiny import CHAT_TEMPLATE
from segments.templates import (
    CASES,
    CHATML,
    HYBRID,
    OPEN,
    SEGMENT,
    SYSTEM,
    TALK,
    chatml,
    expected,
    hybrid,
    with_template,
)

from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.errors import DataError
from deltamem_tool.segments import template as template_module
from deltamem_tool.segments.encode import tag_chat
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.segments.template import ChatTemplate

CONVERSATIONS = {
    "question": TALK[:1],
    "turn": TALK[:2],
    "three": TALK[:3],
    "talk": TALK,
    "with a system": [SYSTEM, *TALK],
    "question with a system": [SYSTEM, *TALK[:1]],
    "long": [SYSTEM, *TALK, *TALK, user("Ok.")],
    "empty contents": [user(""), assistant(""), user("And?"), assistant("")],
    "contents that look like templates": [user("<|im_start|>user\n"), assistant("<|im_end|>\n[INST] <|im_start|>")],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [False, True])
def test_every_message_is_a_segment(special_tokenizer, case, conversation, prompt):
    template, pieces_of, opening = CASES[case]
    tokenizer, messages = with_template(special_tokenizer, template), CONVERSATIONS[conversation]
    pieces = pieces_of(messages) + ([(opening, OPEN)] if prompt and opening else [])
    assert expected(tokenizer, pieces) == tag_chat(tokenizer, messages, "message", add_generation_prompt=prompt)


@pytest.mark.parametrize("granularity", ["message", "sentence"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "hybrid"])
def test_tags_of_the_first_messages_are_a_prefix_of_the_whole(special_tokenizer, merging_tokenizer, case, granularity):
    tokenizer = with_template(special_tokenizer if granularity == "message" else merging_tokenizer, CASES[case][0])
    for messages in ([SYSTEM, *TALK, TALK[0]], [*TALK, TALK[0]]):
        whole = tag_chat(tokenizer, messages, granularity)
        # a system message that is a part of the first user message renders as nothing alone
        for stop in range(1 + (messages[0] == SYSTEM), len(messages)):
            part = tag_chat(tokenizer, messages[:stop], granularity)
            prompted = tag_chat(tokenizer, messages[:stop], granularity, add_generation_prompt=True)
            assert prompted.tags[: len(part.tags)] == part.tags
            for begun in (part, prompted) if messages[stop]["role"] == "assistant" else (part,):
                assert begun.input_ids == whole.input_ids[: len(begun.input_ids)]
                assert begun.tags == whole.tags[: len(begun.tags)]
        assert whole.tags.count(SegmentTag.LAST) == (5 if granularity == "message" else 7)


def test_a_template_that_rewrites_earlier_turns_is_tagged(special_tokenizer):
    """The last answer has a thinking block until another question follows."""
    tokenizer = with_template(special_tokenizer, HYBRID)
    thought = assistant("<think>\nA dog, then.\n</think>\n\nRex.")
    last = tag_chat(tokenizer, [*TALK[:3], thought], "message")
    earlier = tag_chat(tokenizer, [*TALK[:3], thought, user("Ok.")], "message")
    pieces = hybrid(TALK[:3])
    answer = "<|im_start|>assistant\n<think>\nA dog, then.\n</think>\n\nRex.<|im_end|>\n"
    assert last == expected(tokenizer, [*pieces, (answer, SEGMENT)])
    pieces += [("<|im_start|>assistant\nRex.<|im_end|>\n", SEGMENT), ("<|im_start|>user\nOk.<|im_end|>\n", SEGMENT)]
    assert earlier == expected(tokenizer, pieces)


def test_a_template_with_text_after_the_last_message_is_tagged(special_tokenizer):
    """No rendering is the beginning of another, but every header is known from a message alone."""
    message = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    tokenizer = with_template(
        special_tokenizer, "{% for message in messages %}" + message + "{% endfor %}{{ eos_token }}"
    )
    *pieces, (last, kind) = chatml([SYSTEM, *TALK])
    assert tag_chat(tokenizer, [SYSTEM, *TALK], "message") == expected(tokenizer, [*pieces, (last + "<|end|>", kind)])


def test_text_before_the_first_message_that_depends_on_it_belongs_to_it(special_tokenizer):
    tokenizer = with_template(special_tokenizer, "[{{ messages[0].content | length }}]" + CHAT_TEMPLATE)
    pieces = [("[10]<|user|>One and 10<|end|>", SEGMENT), ("<|assistant|>Two<|end|>", SEGMENT)]
    messages = [user("One and 10"), assistant("Two")]
    assert tag_chat(tokenizer, messages, "message") == expected(tokenizer, pieces)


def test_consecutive_and_system_messages_are_tagged(special_tokenizer):
    tokenizer = with_template(special_tokenizer, CHATML)
    messages = [
        *TALK[:1],
        user("And?"),
        SYSTEM,
        assistant("Wait."),
        {"role": "tool", "content": "[1]"},
        *TALK[1:],
        SYSTEM,
    ]
    tagged = tag_chat(tokenizer, messages, "message")
    assert tagged == expected(tokenizer, chatml(messages))
    assert tagged.tags.count(SegmentTag.LAST) == len(messages) - 2
    only = tag_chat(tokenizer, [SYSTEM, SYSTEM], "message", add_generation_prompt=True)
    assert only == expected(tokenizer, [*chatml([SYSTEM, SYSTEM]), ("<|im_start|>assistant\n", OPEN)])


@pytest.mark.parametrize("granularity", ["token", "message", "sentence"])
def test_a_list_of_texts_is_joined_for_a_template_without_lists(special_tokenizer, granularity):
    tokenizer = with_template(special_tokenizer, CHATML)
    parts = {"role": "user", "content": [{"type": "text", "text": "A dog."}, {"type": "text", "text": " A cat"}]}
    tagged = tag_chat(tokenizer, [parts, *TALK[1:]], granularity)
    whole = tag_chat(tokenizer, [user("A dog. A cat"), *TALK[1:]], granularity)
    assert tagged[:2] == whole[:2] and (granularity == "sentence" or tagged.tags == whole.tags)
    with pytest.raises(DataError, match="Message 1 has a part that is not text"):
        tag_chat(tokenizer, [{"role": "user", "content": [*parts["content"], {"type": "image"}]}], granularity)
    with pytest.raises(DataError, match="not Unicode text"):
        tag_chat(tokenizer, [user("half \ud83d")], granularity)


def test_contents_that_are_lists_of_parts_are_tagged(special_tokenizer):
    parts = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
        "{{ part.text if part.type == 'text' else '[INST]' }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A dog. A cat."}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    pieces = [
        (f"<|im_start|>{text}<|im_end|>\n", SEGMENT) for text in ("user\n[INST]A dog. A cat.", "assistant\nYes.") * 2
    ]
    for granularity in ("message", "sentence"):
        tokenizer = with_template(special_tokenizer, "<|begin|>" + parts)
        tagged = tag_chat(tokenizer, [picture, answer, picture, answer], granularity)
        assert tagged == expected(tokenizer, [("<|begin|>", None), *pieces])

    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    tokenizer = with_template(special_tokenizer, HYBRID)
    for granularity in ("message", "sentence"):
        # the thinking block of the call is removed with the next question
        tagged = tag_chat(tokenizer, [user("Look."), call, user("And?")], granularity)
        called = '<|im_start|>assistant\n<tool_call>[{"name": "look"}]</tool_call><|im_end|>\n'
        ends = [("<|im_start|>user\nLook.<|im_end|>\n", SEGMENT), ("<|im_start|>user\nAnd?<|im_end|>\n", SEGMENT)]
        assert tagged == expected(tokenizer, [ends[0], (called, SEGMENT), ends[1]])


def test_a_template_remembers_a_bounded_number_of_shapes(special_tokenizer, monkeypatch):
    """A conversation has another shape after each turn, and a server renders conversations for months."""
    monkeypatch.setattr(template_module, "_SHAPES", 4)
    template = ChatTemplate.from_tokenizer(with_template(special_tokenizer, CHATML))
    for length in range(1, 12):
        template.render([user("Hello.")] * length)
        assert len(template._complete) <= 4
