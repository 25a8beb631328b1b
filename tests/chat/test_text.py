"""Text is tokenised completely, whatever state the tokenizer was left in."""

from __future__ import annotations

import pytest
from chat.talking import TURNS, say
from helpers.tiny import tiny_tokenizer
from tokenizers import Tokenizer

from deltamem_tool.chat.conversation import Conversation
from deltamem_tool.chat.text import ChatText
from deltamem_tool.chat.torch_engine import TorchModel
from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.encode import Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.segments.encode import encode_chat

TALK = [user(TURNS[0]), assistant("fine")]


def cut(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(6)


def filled_up(tokenizer):
    tokenizer.backend_tokenizer.enable_padding(length=64)


def called_by_another(tokenizer):
    tokenizer(["x", "longer"], truncation=True, max_length=6, padding="max_length", split_special_tokens=True)


def set_to_split(tokenizer):
    tokenizer.split_special_tokens = True


@pytest.mark.parametrize("spoil", [cut, filled_up, called_by_another, set_to_split])
def test_earlier_truncation_and_padding_settings_are_ignored(engine, spoil):
    clean, spoilt = tiny_tokenizer(), tiny_tokenizer()
    spoil(spoilt)
    text = f"<|user|>{TURNS[0]}<|end|>"
    expected = clean(text).input_ids
    assert ChatText.from_tokenizer(spoilt).encode(text) == expected
    for granularity in ("token", "message"):
        assert (
            encode_chat(spoilt, TALK, granularity).input_ids.tolist()
            == encode_chat(clean, TALK, granularity).input_ids.tolist()
        )
    episodes = [Episode(TALK, [TALK])]
    assert Encoder(spoilt, 1000, 1000)(episodes) == Encoder(clean, 1000, 1000)(episodes)

    # Also if the setting is changed after the conversation has begun.
    later = tiny_tokenizer()
    other = TorchModel(engine.model, later)
    other.stop_tokens = engine.stop_tokens
    talk = Conversation(other)
    answers = say(talk, TURNS[0])
    spoil(later)
    assert answers + say(talk, *TURNS[1:]) == say(Conversation(engine), *TURNS)


def test_a_chat_does_not_change_the_tokenizer():
    tokenizer = tiny_tokenizer()
    cut(tokenizer), filled_up(tokenizer)
    before = tokenizer.backend_tokenizer.to_str()
    ChatText.from_tokenizer(tokenizer).encode(TURNS[0])
    assert tokenizer.backend_tokenizer.to_str() == before


def test_the_shipped_tokenizer_does_not_truncate():
    from deltamem_tool.io.names import ASSETS

    tokenizer = Tokenizer.from_file(str(ASSETS / "backbone" / "tokenizer.json"))
    assert tokenizer.truncation is None and tokenizer.padding is None
