"""Templates that render earlier turns differently later: a conversation continues as it was first fed.

The reference is a template that writes the same text from the beginning and only appends.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from chat.talking import SYSTEM, TURNS, assert_same_memory, say
from chat.test_conversation_segments import make_engine
from helpers.tiny import CHAT_TEMPLATE

from deltamem_tool.chat import text
from deltamem_tool.chat.conversation import Conversation, Sampling, generate_together
from deltamem_tool.errors import DataError, ExportError
from deltamem_tool.segments.encode import encode_chat

HEADER = "<|assistant|>{% endif %}"
THINKING = CHAT_TEMPLATE.replace(HEADER, "<|assistant|><think>{% endif %}")
APPENDING = (
    "{% for message in messages %}<|{{ message.role }}|>{{ '<think>' if message.role == 'assistant' }}"
    "{{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
# For each template, its reference, which keeps what the template writes at the first turn.
REWRITING = {
    "thinking that is opened and then dropped": (THINKING, APPENDING),
    "a date": ("{{ strftime_now('%d %B') }}" + CHAT_TEMPLATE, "29 November" + CHAT_TEMPLATE),
    "a count of messages": ("{{ messages | length }}" + CHAT_TEMPLATE, "1" + CHAT_TEMPLATE),
}


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        *((name, "token") for name in REWRITING),
        # Not the count, or the ends of the messages would be unknown.
        *((name, granularity) for name in list(REWRITING)[:2] for granularity in ("message", "sentence")),
    ],
)
def test_a_conversation_continues_as_it_was_first_fed(name, granularity, monkeypatch):
    class Clock(datetime):
        today = datetime(2026, 11, 29, 23, 59)

        @classmethod
        def now(cls, tz=None):
            return cls.today

    monkeypatch.setattr(text, "datetime", Clock)
    rewriting, appending = REWRITING[name]
    conversation, expected = (Conversation(make_engine(granularity, template)) for template in (rewriting, appending))
    for turn in TURNS:
        assert say(conversation, turn) == say(expected, turn)
        Clock.today += timedelta(days=1)
    assert_same_memory(conversation.memory, expected.memory)
    assert conversation.context == expected.context and conversation.messages == expected.messages
    assert conversation.undo() and expected.undo()
    assert say(conversation, TURNS[1]) == say(expected, TURNS[1])
    assert_same_memory(conversation.memory, expected.memory)


def test_dropped_turns_do_not_change_how_the_others_are_rendered():
    conversation, expected = (
        Conversation(make_engine("message", template), window=80) for template in (THINKING, APPENDING)
    )
    assert say(conversation, *TURNS * 2) == say(expected, *TURNS * 2)
    assert conversation.context == expected.context and conversation.context.dropped > 0
    assert_same_memory(conversation.memory, expected.memory)


def test_a_system_message_that_moves_to_the_last_question():
    """Mistral's templates do this: the model reads the system message with every question."""
    moving = (
        "{% for message in messages if message.role != 'system' %}<|{{ message.role }}|>"
        "{{ messages[0].content if loop.last and message.role == 'user' and messages[0].role == 'system' }}"
        "{{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    conversation, expected = Conversation(make_engine("token", moving)), Conversation(make_engine("token"))
    first, *others = TURNS
    assert (
        conversation.generate([SYSTEM, {"role": "user", "content": first}], Sampling(6)).tokens
        == say(expected, SYSTEM["content"] + first)[0]
    )
    assert say(conversation, *others) == say(expected, *(SYSTEM["content"] + turn for turn in others))
    assert_same_memory(conversation.memory, expected.memory)


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE.replace("in messages %}", "in messages | reverse %}"),
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
        "{% if not loop.first %}{{ messages[0].content }}{% endif %}{% endfor %}",
    ],
    ids=["the new messages come first", "the first is said again"],
)
def test_a_rendering_that_does_not_continue_raises(template):
    conversation = Conversation(make_engine("token", template))
    say(conversation, TURNS[0])
    before = conversation.context
    with pytest.raises((ExportError, DataError), match="does not continue"):
        say(conversation, TURNS[1])
    assert conversation.context == before


PARTS = [{"type": "text", "text": "my cat is "}, {"type": "text", "text": "Bella"}]
PARTS_ALONE = CHAT_TEMPLATE.replace(
    "{{ message.content }}", "{% for part in message.content %}{{ part.text }}{% endfor %}"
)
EITHER = CHAT_TEMPLATE.replace(
    "{{ message.content }}",
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ part.text }}{% endfor %}{% endif %}",
)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS_ALONE, EITHER])
def test_lists_of_texts_are_joined_for_any_template(template):
    engine, plain = make_engine("message", template), make_engine("message")
    for content in (PARTS, TURNS[0]):
        conversation, expected = Conversation(engine), Conversation(plain)
        assert say(conversation, [{"role": "user", "content": content}], TURNS[1]) == say(expected, TURNS[0], TURNS[1])
        assert_same_memory(conversation.memory, expected.memory)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"type": "text", "text": "Hello."}], "Message 1 has no role"),
        (["Hello."], "Message 1 has no role"),
        ({"role": "user", "content": "Hello."}, "has no messages"),
        (5, "has no messages"),
        ([{"role": "user"}], "Message 1 has no text"),
        ([SYSTEM, {"role": "user", "content": None}], "Message 2 has no text"),
        ([{"role": "user", "content": 5}], "Message 1 has no text"),
        ([{"role": "user", "content": []}], "Message 1 has no text"),
        ([{"role": "user", "content": ["Hello."]}], "Message 1 has a part that is not text"),
        ([{"role": "user", "content": [*PARTS, {"type": "image", "url": "a.png"}]}], "Message 1 has a part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 1 has a part that is not text"),
        ([{"role": "user", "content": "half \ud83d"}], "not Unicode"),
        ([{"role": "user", "content": [{"type": "text", "text": "half \udce9"}]}], "not Unicode"),
        ("half \ud83d", "not Unicode"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PARTS_ALONE])
def test_invalid_messages_raise(template, messages, says):
    conversation = Conversation(make_engine("token", template))
    say(conversation, TURNS[0])
    before, memory = conversation.context, conversation.memory
    with pytest.raises(DataError, match=says):
        conversation.generate(messages)
    with pytest.raises(DataError, match=says):
        generate_together([conversation], [messages])
    assert conversation.context == before
    assert_same_memory(conversation.memory, memory)


def test_a_system_message_that_the_template_drops_raises():
    silent = CHAT_TEMPLATE.replace("in messages %}", "in messages if message.role != 'system' %}")
    conversation = Conversation(make_engine("token", silent))
    with pytest.raises(DataError, match=r"leaves out message 1 \(system\)"):
        conversation.generate([SYSTEM, {"role": "user", "content": TURNS[0]}])
    assert say(conversation, TURNS[0]) == say(Conversation(make_engine("token")), TURNS[0])


def test_a_byte_order_mark_in_a_template_is_ignored(tokenizer):
    marked = make_engine("token", "\ufeff" + CHAT_TEMPLATE)
    assert say(Conversation(marked), *TURNS) == say(Conversation(make_engine("token")), *TURNS)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template="\ufeff" + CHAT_TEMPLATE)
    assert (
        encode_chat(tokenizer, [SYSTEM]).input_ids.tolist()
        == tokenizer(["<|system|>be brief<|end|>"], add_special_tokens=False).input_ids
    )
