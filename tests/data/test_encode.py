"""Encoding episodes: every token in its place, all views scored alike, every error with the row."""

from __future__ import annotations

from copy import deepcopy

import pytest
from data.talks import CALLING, SYSTEM, TALK, TOOL_TEMPLATE, TOOLS
from helpers.tiny import with_template, write_jsonl

from deltamem_tool.base_model.limits import Limits
from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.encode import IGNORED, Encoder
from deltamem_tool.data.episode import Episode
from deltamem_tool.data.sources import read_episodes
from deltamem_tool.data.synthetic import DialogueEpisodes
from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.segments.encode import encode_chat
from deltamem_tool.segments.tags import SegmentTag
from deltamem_tool.segments.template import render

EPISODES = [
    Episode(TALK, [[SYSTEM, user("My dog?"), assistant("It is called Rex, a fine dog.")], [*TALK[2:]]], "a:1"),
    Episode([SYSTEM, *TALK, *TALK], [[user("Who?"), assistant("Ünïcode, 42!"), user("Sure?"), assistant("Yes.")]]),
]


def scored(exchange):
    return [label for label in exchange.labels if label != IGNORED]


def pairs(encoded, name="exchanges"):
    """All exchanges, each with its encoding."""
    for episode, each in zip(EPISODES, encoded, strict=True):
        yield from zip(episode.exchanges, getattr(each, name), strict=True)


def test_only_answers_are_labelled(tokenizer):
    encoded = Encoder(tokenizer, 1000, 1000)(EPISODES)
    for messages, exchange in pairs(encoded):
        assert tokenizer.decode(exchange.ids) == render(tokenizer, messages)
        assert tokenizer.decode(scored(exchange)) == messages[-1]["content"] + "<|end|>"
        start = len(exchange.ids) - len(scored(exchange))
        assert exchange.labels == [IGNORED] * start + exchange.ids[start:]
    assert [each.where for each in encoded] == ["a:1", ""]
    assert all(each.recent == each.full == [] for each in encoded)


def test_the_written_text_is_the_history_truncated_on_the_left(tokenizer):
    whole = Encoder(tokenizer, 1000, 1000)(EPISODES)
    cut = Encoder(tokenizer, 20, 1000)(EPISODES)
    for episode, each, short in zip(EPISODES, whole, cut, strict=True):
        assert tokenizer.decode(each.write_ids) == render(tokenizer, episode.history)
        assert each.tags == [SegmentTag.LAST] * len(each.write_ids) and each.cut == 0
        assert short.write_ids == each.write_ids[-20:] and len(short.tags) == 20
        assert short.cut == len(each.write_ids) - 20 > 0
        assert short.exchanges == each.exchanges


@pytest.mark.parametrize("granularity", ["message", "sentence"])
def test_segments_match_encode_chat(tokenizer, granularity):
    histories = [[SYSTEM, *TALK], [user("I moved. My dog too."), assistant("Good. Where?"), user("To Oslo.")]]
    encoder = Encoder(tokenizer, 20, 100, granularity)
    for history, each in zip(histories, encoder([Episode(h, [TALK[2:]]) for h in histories]), strict=True):
        chat = encode_chat(tokenizer, history, granularity)
        assert each.write_ids == chat.input_ids[0, -20:].tolist()
        assert each.tags == chat.segment_tags[0, -20:].tolist() and SegmentTag.LAST in each.tags


@pytest.mark.parametrize("granularity", ["token", "message"])
def test_encoding_many_episodes_equals_encoding_each(tokenizer, granularity):
    """There are more episodes than the tokenizer gets at once."""
    episodes = [DialogueEpisodes(150, 8, 0, 1, 5, 0.5)[n] for n in range(150)]
    encoder = Encoder(tokenizer, 60, 100, granularity, recent_turns=2, full_context=True)
    assert encoder(episodes) == [encoder([episode])[0] for episode in episodes]
    assert encoder([]) == []


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_recent_turns_precede_the_question(tokenizer, turns):
    encoded = Encoder(tokenizer, 1000, 1000, recent_turns=turns)(EPISODES)
    assert encoded[0].exchanges == Encoder(tokenizer, 1000, 1000)(EPISODES)[0].exchanges
    for episode, each in zip(EPISODES, encoded, strict=True):
        history = [message for message in episode.history if message["role"] != "system"]
        shown = history[-2 * turns :]
        for exchange, alone, recent in zip(episode.exchanges, each.exchanges, each.recent, strict=True):
            system = [message for message in exchange if message["role"] == "system"]
            assert tokenizer.decode(recent.ids) == render(tokenizer, [*system, *shown, *exchange[len(system) :]])
            assert scored(recent) == scored(alone)


def test_recent_turns_are_limited_to_those_that_fit(tokenizer):
    history = [user("a" * 30), assistant("b"), user("c" * 5), assistant("d"), user("e"), assistant("f")]
    exchanges = [[user("g"), assistant("h")], [user("i" * 9), assistant("j")]]
    views = [[*history[first:], *exchanges[0]] for first in (0, 2, 4, 6)]
    lengths = [len(tokenizer(render(tokenizer, view))["input_ids"]) for view in views]
    for most in (lengths[0], lengths[0] - 1, lengths[1], lengths[1] - 1):
        (each,) = Encoder(tokenizer, 1000, most, recent_turns=9)([Episode(history, exchanges)])
        fitting = next(view for view, length in zip(views, lengths, strict=True) if length <= most)
        assert tokenizer.decode(each.recent[0].ids) == render(tokenizer, fitting)
    longest = len(each.exchanges[1].ids)
    (each,) = Encoder(tokenizer, 1000, longest, recent_turns=9)([Episode(history, exchanges)])
    assert each.recent[1] == each.exchanges[1]  # none fits
    (each,) = Encoder(tokenizer, 1000, 1000, recent_turns=2)([Episode([assistant("hello")], exchanges)])
    assert each.recent == each.exchanges  # no message of the user, so no turn


def test_the_full_view_is_one_conversation(tokenizer):
    encoded = Encoder(tokenizer, 1000, 1000, full_context=True)(EPISODES)
    assert all(each.recent == [] for each in encoded)
    texts = [render(tokenizer, [SYSTEM, *TALK, *EPISODES[0].exchanges[0][1:]])]
    texts += [render(tokenizer, [*TALK, *TALK[2:]])]
    texts += [render(tokenizer, [SYSTEM, *TALK, *TALK, *EPISODES[1].exchanges[0]])]  # the history's system prompt
    full = [exchange for each in encoded for exchange in each.full]
    assert [tokenizer.decode(exchange.ids) for exchange in full] == texts
    assert all(scored(f) == scored(a) for each in encoded for f, a in zip(each.full, each.exchanges, strict=True))
    cut = [exchange for each in Encoder(tokenizer, 10, 60, full_context=True)(EPISODES) for exchange in each.full]
    assert [exchange.ids for exchange in cut] == [exchange.ids[-70:] for exchange in full]
    assert [exchange.labels for exchange in cut] == [exchange.labels[-70:] for exchange in full]
    assert any(len(exchange.ids) > 70 for exchange in full)


def test_tool_calls_are_written_and_scored(tokenizer):
    other = with_template(tokenizer, TOOL_TEMPLATE)
    call = '[look {"where": "shed", "deep": null}]'
    episodes = [Episode(TOOLS, [TALK[2:]]), Episode(TOOLS[:2], [TOOLS[2:]]), Episode(TOOLS[:2], [TOOLS[2:4]])]
    for granularity in ("token", "message"):
        encoded = Encoder(other, 1000, 1000, granularity, 1, True)(episodes)
        assert f"<|assistant|>{call}<|end|><|tool|>lookfound<|end|>" in tokenizer.decode(encoded[0].write_ids)
        texts = [tokenizer.decode(scored(each.exchanges[0])) for each in encoded]
        assert texts == ["Rex.<|end|>", "In the shed.<|end|>", f"{call}<|end|>"]


GIVEN = "{% if tools %}{{ tools | tojson }}{% endif %}{{ '/no_think' if enable_thinking is false }}"
LOOK = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}


def test_template_options_of_a_row_apply_to_every_text(tokenizer):
    other = with_template(tokenizer, GIVEN + tokenizer.chat_template)
    template_options = {"tools": [LOOK], "enable_thinking": False}
    episodes = [Episode(TALK, [TALK[2:]], "a:1", kwargs) for kwargs in (template_options, {}, {"tools": [LOOK]})]
    for granularity in ("token", "message"):
        encoded = Encoder(other, 1000, 1000, granularity, 1, True)(episodes)
        for episode, each in zip(episodes, encoded, strict=True):
            options = episode.template_kwargs
            assert tokenizer.decode(each.write_ids) == render(other, TALK, **options)
            for views, messages in ((each.exchanges, TALK[2:]), (each.recent, [*TALK[2:], *TALK[2:]])):
                assert tokenizer.decode(views[0].ids) == render(other, messages, **options)
            assert tokenizer.decode(each.full[0].ids) == render(other, [*TALK, *TALK[2:]], **options)
        chat = encode_chat(other, TALK, granularity, template_kwargs=template_options)
        assert chat.input_ids[0].tolist() == encoded[0].write_ids


@pytest.mark.parametrize("granularity", ["token", "message", "sentence"])
def test_a_content_of_none_is_not_rendered(tokenizer, granularity):
    """Covers templates that print the content, that test for it, and that would print something else in its place."""
    calls = "{% for call in message.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}"
    for content in (
        "{{ message.content }}",
        "{{ message.content or '' }}",
        "{{ message.content if message.content is not none }}",
        "{% if message.content is none %}{% else %}{{ message.content }}{% endif %}",
    ):
        source = tokenizer.chat_template.replace("{{ message.content }}", content + calls)
        messages = [user("None?"), CALLING, {"role": "tool", "content": "None"}, assistant("None."), *TALK[2:]]
        chat = encode_chat(with_template(tokenizer, source), messages, granularity)
        expected = "<|user|>None?<|end|><|assistant|>[look]<|end|><|tool|>None<|end|><|assistant|>None.<|end|>"
        assert tokenizer.decode(chat.input_ids[0]) == expected + render(tokenizer, TALK[2:])


# Refusals


@pytest.mark.parametrize("granularity", ["token", "message"])
@pytest.mark.parametrize(
    ("template", "given", "says"),
    [
        ("{{ '' if tools else '' }}", {"tools": [LOOK]}, "leaves out the tools"),
        ("", {"tools": [LOOK]}, "does not use tools"),
        (GIVEN, {"tools": [LOOK], "enable_thinkin": False}, "does not use enable_thinkin"),
    ],
)
def test_template_options_without_effect_are_named(tokenizer, template, given, says, granularity):
    other = with_template(tokenizer, template + tokenizer.chat_template)
    with pytest.raises(DataError, match=f"a:7: The chat template of .* {says}"):
        Encoder(other, 100, 100, granularity)([Episode(TALK[:2], [TALK[2:]], "a:7", given)])
    with pytest.raises(DataError, match=says):
        encode_chat(other, TALK, granularity, template_kwargs=given)


def test_an_exchange_that_is_too_long_is_named(tokenizer, tmp_path):
    short = [*TALK[:2], user("Why?"), assistant("So.")]
    path = write_jsonl(tmp_path / "chats.jsonl", [short] * 3 + [[*TALK[:2], user("Why?"), assistant("because " * 40)]])
    episodes = read_episodes(path).episodes
    assert len(Encoder(tokenizer, 10, 1000)(episodes)) == 4
    with pytest.raises(DataError, match=r"(?s)more than max_read_tokens = 30.*Why\?.*Raise max_read_tokens") as refusal:
        Encoder(tokenizer, 10, 30)(episodes)
    assert refusal.value.what.startswith(f"{path}:4: An exchange has ")
    attempts = list(Encoder(tokenizer, 10, 30).encode_each(episodes))
    assert [isinstance(each, DataError) for each in attempts] == [False] * 3 + [True]


REFUSE = "{% if messages[-1].content | length > 99 %}{{ raise_exception('too long') }}{% endif %}"
NO_RECENT = "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}"


@pytest.mark.parametrize("granularity", ["token", "message"])
@pytest.mark.parametrize("where", ["history", "exchange"])
def test_a_template_that_raises_is_named(tokenizer, granularity, where):
    parts = {"history": TALK[:2], "exchange": TALK[2:]}
    parts[where] = [user("Why?"), assistant("because " * 40)]
    encoder = Encoder(with_template(tokenizer, REFUSE + tokenizer.chat_template), 1000, 1000, granularity)
    with pytest.raises(DataError, match=r"(?s)chats.jsonl:4: The chat template of .* refuses.*too long"):
        encoder([Episode(parts["history"], [parts["exchange"]], "chats.jsonl:4")])


def test_a_view_that_cannot_be_rendered_is_named(tokenizer):
    other = with_template(tokenizer, NO_RECENT + tokenizer.chat_template)
    episode = Episode(TALK[:2], [TALK[2:]], "a:7")
    assert len(Encoder(other, 100, 100)([episode])) == 1
    for options in ({"recent_turns": 1}, {"full_context": True}):
        with pytest.raises(DataError, match=r"(?s)a:7: The chat template.*too many"):
            Encoder(other, 100, 100, **options)([episode])


def test_unsupported_templates_are_named(tokenizer):
    episode = Episode(TALK[:2], [TALK[2:]], "a:1")
    with pytest.raises(DataError, match="no chat template"):
        Encoder(with_template(tokenizer, None), 10, 10)
    # a template that writes the answer before its prompt
    reversing = tokenizer.chat_template.replace("in messages %}", "in messages | reverse %}")
    with pytest.raises(DataError, match=r"(?s)a:1: .*after its prompt"):
        Encoder(with_template(tokenizer, reversing), 100, 100)([episode])
    # a template whose answers depend on the messages before them
    ending = "<|assistant|>{{ message.content }}{{ '!' if loop.index > 2 and message.role == 'assistant' }}<|end|>"
    growing = tokenizer.chat_template.replace("<|{{ message.role }}|>{{ message.content }}<|end|>", ending)
    for options in ({"recent_turns": 1}, {"full_context": True}):
        with pytest.raises(DataError, match=r"(?s)a:1: The answer has different tokens with the history in view"):
            Encoder(with_template(tokenizer, growing), 100, 100, **options)([episode])
    # a template that writes nothing for the answer
    silent = "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"a:1: The chat template of .* leaves out message 2 \(assistant\)"):
        Encoder(with_template(tokenizer, silent), 100, 100)([Episode([user("a")], [TALK[2:]], "a:1")])


def test_contents_that_are_lists_of_texts_are_joined(tokenizer, tmp_path):
    def parts(message):
        half = len(message["content"]) // 2
        texts = message["content"][:half], message["content"][half:]
        return {**message, "content": [{"type": "text", "text": text} for text in texts]}

    encoder = Encoder(tokenizer, 100, 100, "message")
    whole, cut = (
        read_episodes(write_jsonl(tmp_path / "chats.jsonl", [talk])).episodes
        for talk in (TALK, [parts(message) for message in TALK])
    )
    assert cut == whole and encoder(cut) == encoder(whole)


@pytest.mark.parametrize(
    ("before", "opening"),
    [("", "<think>"), ("{{ messages | length }}", ""), ("{{ messages | length }}", "<think>")],
    ids=["thinking that is opened and then dropped", "a count of messages", "both"],
)
def test_a_template_that_rewrites_the_prompt_is_encoded_as_in_a_chat(tokenizer, before, opening):
    """The encoding is the prompt as rendered for generation, followed by the answer."""
    source = before + tokenizer.chat_template.replace(
        "<|assistant|>{% endif %}", f"<|assistant|>{opening}{{% endif %}}"
    )
    other = with_template(tokenizer, source)
    for granularity in ("token", "message"):
        (episode,) = Encoder(other, 100, 100, granularity)([Episode(TALK[:1], [TALK[2:]], "a:1")])
        (exchange,) = episode.exchanges
        prompt = render(other, TALK[2:-1], generation_prompt=True)
        assert prompt.endswith(f"<|assistant|>{opening}")
        assert tokenizer.decode(exchange.ids) == f"{prompt}{TALK[-1]['content']}<|end|>"
        assert tokenizer.decode(scored(exchange)) == f"{TALK[-1]['content']}<|end|>"


@pytest.mark.parametrize("opening", ["", "<think>"])
def test_an_answer_shortened_by_the_template_is_named(tokenizer, opening):
    """Some templates drop the thinking of every answer, including the last."""
    source = tokenizer.chat_template.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    other = with_template(tokenizer, source.replace("<|assistant|>{% endif %}", f"<|assistant|>{opening}{{% endif %}}"))
    thinking = [*TALK[:3], assistant("<think>A dog.</think> Rex.")]
    history = [TALK[0], assistant("<think>So.</think>Noted."), *TALK[2:]]  # earlier messages are up to the template
    assert Encoder(other, 100, 100)([Episode(history, [TALK[2:]])])
    with pytest.raises(DataError, match=r"(?s)a:1: .* changes the answer.*A dog.*leave out its think"):
        Encoder(other, 100, 100)([Episode(TALK[:2], [thinking], "a:1")])
    spaced = tokenizer.chat_template.replace("{{ message.content }}", "\n{{ message.content.split() | join('  ') }}")
    assert Encoder(with_template(tokenizer, spaced), 100, 100)([Episode(TALK[:2], [TALK[2:]])])


def test_invalid_arguments_of_an_encoder_raise(tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="granularity 'word'"):
        Encoder(tokenizer, 10, 10, "word")
    with pytest.raises(DataError, match="no history"):
        Encoder(tokenizer, 10, 10)([Episode([], [TALK])])
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="slow tokenizer"):
        Encoder(tokenizer, 10, 10)


def test_texts_are_limited_to_the_positions_of_the_model(tokenizer):
    talk = [user("my cat is Bella"), assistant("fine"), *TALK[:2]]
    episode = Episode(talk, [TALK[2:]])
    free = Encoder(tokenizer, 1000, 1000, recent_turns=2, full_context=True)([episode])[0]
    alone, whole = len(free.exchanges[0].ids), len(free.full[0].ids)
    assert alone < len(free.write_ids) < whole and len(free.recent[0].ids) > alone
    limits = Limits(positions=alone)
    short = Encoder(tokenizer, 1000, 1000, recent_turns=2, full_context=True, limits=limits)([episode])[0]
    assert (short.write_ids, short.cut) == (free.write_ids[-alone:], len(free.write_ids) - alone)
    assert short.exchanges == short.recent == free.exchanges
    assert short.full[0].ids == free.full[0].ids[-alone:]
    with pytest.raises(DataError, match=f"more than the model's positions.*\n.*\nShorten it to {alone - 1}"):
        Encoder(tokenizer, 1000, 1000, limits=Limits(positions=alone - 1))([episode])


@pytest.mark.parametrize("place", ["history", "exchange"])
def test_a_token_unknown_to_the_model_is_named(tokenizer, place):
    other = deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "[PAD]"})
    limits = Limits(vocabulary=len(tokenizer))
    encoder = Encoder(other, 1000, 1000, limits=limits)
    assert encoder.pad == other.eos_token_id  # masked tokens have an embedding, too
    odd = [user("my dog is [PAD]"), assistant("fine")]
    episode = Episode(odd, [TALK[2:]], "a:1") if place == "history" else Episode(TALK[:2], [odd], "a:1")
    with pytest.raises(DataError, match=r"a:1: The text has a token that the model does not know: '\[PAD\]'"):
        encoder([episode])
