"""Converting rows to episodes: every form of a row, every turn that can be scored, every bad row named."""

from __future__ import annotations

import json

import pytest
from data.talks import CALL, CALLING, FOUND, SYSTEM, TALK, TOOLS

from deltamem_tool.data.dialogues import assistant, user
from deltamem_tool.data.episode import Episode, episodes_of, used_columns
from deltamem_tool.errors import ConfigError, DataError


def episodes_from(messages, supervise="last"):
    return episodes_of({"messages": messages}, "here", supervise)


def test_the_last_turn_is_scored_and_the_rest_is_history():
    tool = {"role": "tool", "content": "found"}
    longer = [SYSTEM, *TALK, user("And now?"), assistant("Wait."), tool, assistant("Rex still.")]
    assert episodes_from(TALK) == [Episode(TALK[:2], [TALK[2:]])]
    assert episodes_from([SYSTEM, *TALK]) == [Episode([SYSTEM, *TALK[:2]], [[SYSTEM, *TALK[2:]]])]
    assert episodes_from(longer) == [Episode([SYSTEM, *TALK], [[SYSTEM, *longer[5:]]])]
    assert episodes_from(longer)[0].where == "here"
    assert episodes_from([assistant("Hello."), *TALK[2:]]) == [Episode([assistant("Hello.")], [TALK[2:]])]


def test_every_turn_with_a_history_and_an_answer_is_scored():
    turns = [*TALK, user("Sure?"), user("I ask again."), CALLING, FOUND, assistant("Yes."), FOUND, user("Thanks.")]
    assert episodes_from([SYSTEM, *turns], "all") == [
        Episode([SYSTEM, *TALK[:2]], [[SYSTEM, *TALK[2:]]]),
        Episode([SYSTEM, *turns[:5]], [[SYSTEM, *turns[5:9]]]),  # up to its last assistant message
    ]
    assert episodes_from(TALK, "all") == episodes_from(TALK)
    assert episodes_from([assistant("Hello."), *TALK], "all") == [
        Episode([assistant("Hello.")], [TALK[:2]]),
        Episode([assistant("Hello."), *TALK[:2]], [TALK[2:]]),
    ]


@pytest.mark.parametrize("nothing", [None, "", "absent"])
def test_tool_turns_are_kept_unchanged(nothing):
    calling = {"role": "assistant", "tool_calls": [CALL]} | ({} if nothing == "absent" else {"content": nothing})
    messages = [*TALK[:2], user("Where is it?"), calling, FOUND, assistant("In the shed.")]
    (episode,) = episodes_from(messages)
    assert episode.exchanges == [messages[2:]]
    assert episode.exchanges[0][1:3] == [calling, FOUND]
    (called,) = episodes_from(messages[:4])  # a call can be the answer
    assert called.exchanges == [messages[2:4]]


def test_rows_of_prompts_and_responses():
    expected = [Episode(TALK[:2], [TALK[2:]])]
    for row in (
        {"prompt": TALK[:3], "response": "Rex."},
        {"prompt": TALK[:3], "completion": "Rex."},
        {"prompt": TALK[:3], "response": [TALK[3]]},
        {"prompt": TALK[2]["content"], "history": TALK[:2], "response": "Rex."},
        {"prompt": TALK[2]["content"], "history": TALK[:2], "completion": [TALK[3]], "id": 3},
        {"messages": TALK, "prompt": "something else"},
    ):
        assert episodes_of(row, "here", "last") == expected
    columns = {"prompt": "What is it called?", "history": "A text on a dog, Rex.", "response": TOOLS[3:]}
    assert episodes_of(columns, "here", "last") == [
        Episode([user("A text on a dog, Rex.")], [[user("What is it called?"), *TOOLS[3:]]])
    ]
    system = {"prompt": "So?", "history": [SYSTEM, user("a")], "response": "b"}
    assert episodes_of(system, "here") == [Episode([SYSTEM, user("a")], [[SYSTEM, user("So?"), assistant("b")]])]


A, B = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
BAD = [  # a row as JSON, and what is said of it
    ("[]", "no list `messages`"),
    ("3", "no list `messages`"),
    ("{}", "no list `messages`, and no `prompt`"),
    ('{"messages": null}', "no list `messages`"),
    ('{"messages": {}}', "`messages` is not a list"),
    ('{"messages": []}', "asks nothing"),
    ('{"messages": ["hello"]}', "message 1 has no role"),
    (f'{{"messages": [{A}, {{"content": "b"}}]}}', "message 2 has no role"),
    (
        '{"messages": [{"role": "bot", "content": "a"}]}',
        "message 1 has an unknown role.*'bot'.*system, user, assistant, tool",
    ),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "message 1 has no role"),
    ('{"messages": [{"role": "user"}]}', "message 1 has no text"),
    ('{"messages": [{"role": "user", "content": null}]}', "message 1 has no text"),
    ('{"messages": [{"role": "user", "content": null, "tool_calls": [1]}]}', "message 1 has no text"),
    ('{"messages": [{"role": "assistant", "content": null}]}', "message 1 has no text"),
    ('{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}', "message 1 has no text"),
    ('{"messages": [{"role": "user", "content": ["a"]}]}', "message 1 has a part that is not text"),
    ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 1 has a part that is not text"),
    ('{"messages": [{"role": "user", "content": []}]}', "message 1 has no text"),
    (r'{"messages": [{"role": "user", "content": "a\ud83d"}]}', "message 1 is not Unicode"),
    (f'{{"messages": [{A}, {A}]}}', "asks nothing"),
    (f'{{"messages": [{A}, {B}]}}', "no history"),
    (f'{{"messages": [{B}, {B}]}}', "no history"),
    (f'{{"messages": [{{"role": "system", "content": "s"}}, {A}, {B}]}}', "no history"),
    ('{"prompt": "a"}', "has a `prompt` and no `response`"),
    ('{"prompt": "a", "response": "b"}', "no history"),
    ('{"prompt": 3, "response": "b"}', "`prompt` is not a list"),
    ('{"prompt": "a", "response": 3}', "`response` is not a list"),
    ('{"prompt": "a", "completion": 3}', "`completion` is not a list"),
    ('{"prompt": "a", "history": 3, "response": "b"}', "`history` is not a list"),
    ('{"prompt": "a", "history": [{"role": "user"}], "response": "b"}', "message 1 of `history` has no text"),
    ('{"prompt": [{"role": "user"}], "response": "b"}', "message 1 of `prompt` has no text"),
    (f'{{"prompt": [{A}], "response": [{A}]}}', "`response` has a message of the role user"),
    (f'{{"prompt": [{A}], "history": "h", "response": "b"}}', "two histories"),
    (f'{{"prompt": [{A}], "response": []}}', "asks nothing"),
    (f'{{"messages": [{A}, {B}, {A}, {B}], "tools": {{"name": "look"}}}}', "`tools` is not a list"),
    (f'{{"messages": [{A}, {B}, {A}, {B}], "tools": "[3"}}', "`tools` is not JSON"),
    (f'{{"messages": [{A}, {B}, {A}, {B}], "chat_template_kwargs": ["a"]}}', "`chat_template_kwargs` is not an object"),
]


LOOK = {"type": "function", "function": {"name": "look", "parameters": {}}}


def test_tools_and_template_options_of_a_row_are_kept():
    for tools in ([LOOK], json.dumps([LOOK])):
        for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
            row = {"messages": TALK, "tools": tools, "chat_template_kwargs": kwargs}
            for supervise in ("last", "all"):
                (episode,) = episodes_of(row, "here", supervise)
                assert episode.template_kwargs == {"enable_thinking": False, "tools": [LOOK]}
                assert list(episode.history) == TALK[:2]
    row = {"prompt": "So?", "history": "a", "response": "b", "tools": [], "chat_template_kwargs": None}
    assert episodes_of(row, "here")[0].template_kwargs == {}


def test_used_columns_returns_the_columns_that_are_read():
    assert used_columns({"messages": TALK, "prompt": "a"}) == {"messages", "tools", "chat_template_kwargs"}
    row = {"prompt": "a", "completion": "b", "response": None}
    assert used_columns(row) == {"prompt", "history", "completion", "tools", "chat_template_kwargs"}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "asks nothing"),
        ([user("a"), user("b")], "asks nothing"),
        ([assistant("a"), user("b")], "asks nothing"),
        ([user("a"), assistant("b"), user("c")], "no history"),
    ],
)
def test_rows_without_a_turn_to_score_raise(messages, says):
    with pytest.raises(DataError, match=says) as refusal:
        episodes_from(messages, "all")
    assert refusal.value.what.startswith("here ")


def test_an_unknown_choice_of_turns_is_named():
    with pytest.raises(ConfigError, match=r"some.*\n.*last, all"):
        episodes_from(TALK, "some")
