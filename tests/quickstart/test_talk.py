"""The facts, questions and system prompts of the two conversations."""

from __future__ import annotations

import pytest
from chat.talking import make_engine

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.data.fact_words import is_held_out
from deltamem_tool.evaluation.tasks.natural_recall import DIALOGUES, NATURAL
from deltamem_tool.quickstart.talk import remember, told_facts


@pytest.mark.parametrize("words", [DIALOGUES, NATURAL])
def test_an_answer_is_right_if_it_names_only_the_stated_value(words):
    facts = told_facts(words, 4)
    assert facts == told_facts(words, 4) != told_facts(words, 4, seed=4)
    for fact in facts:
        assert fact.is_right(fact.truth) and len(fact.others) == 3
        assert not any(fact.is_right(other) for other in fact.others)
        assert not fact.is_right(f"{fact.truth} {fact.others[0]}")


def test_natural_facts_use_held_out_words_and_values():
    for fact in told_facts(NATURAL, 8):
        assert is_held_out(fact.truth) and fact.truth in fact.statement and fact.truth not in fact.question


@pytest.mark.parametrize("system", [None, "", "be brief"])
def test_every_conversation_begins_with_the_system_prompt(system, tmp_path, monkeypatch):
    conversations = {}
    generate = Conversation.generate

    def recorded(self, content, *args, **options):
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        conversations.setdefault(id(self), (self, []))[1].extend(messages)
        return generate(self, content, *args, **options)

    monkeypatch.setattr(Conversation, "generate", recorded)
    remember(make_engine(), tmp_path / "memory.safetensors", told_facts(NATURAL, 2), system)
    assert len(conversations) == 5  # one statement; two questions, with the memory and without
    for _, messages in conversations.values():
        roles = [message["role"] for message in messages]
        assert roles.count("user") in (1, 2) and roles[1:].count("system") == 0
        assert (roles[0] == "system") == (system is not None)
        assert system is None or messages[0]["content"] == system
