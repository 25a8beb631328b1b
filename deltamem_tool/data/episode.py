"""Turn rows into training episodes: a history to write, and exchanges to answer from the memory alone.

A row is a conversation, `{"messages": [...]}`, or a prompt with its response, `{"prompt": ..., "response": ...}`. A
prompt is a list of messages or a string; a response is a string or a list of assistant messages. TRL's name
`completion` is accepted for `response`. A prompt that is a string can come with a `history`: a text, or messages. As in
TRL, `tools` and `chat_template_kwargs` of a row are passed to the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.io.safe_json import parse_json
from deltamem_tool.segments.messages import Message, Problem, is_unicode, problem_of, text_of

ROLES = ("system", "user", "assistant", "tool")
SUPERVISE = ("last", "all")  # user turns of a conversation that are asked
_FOR_TEMPLATE = {"tools": list, "chat_template_kwargs": dict}  # columns and their types; JSON text is also accepted


@dataclass(frozen=True)
class Episode:
    """A history, and exchanges about it: each is a prompt and the assistant's answer, its last message."""

    history: list[Message]
    exchanges: list[list[Message]]
    where: str = field(default="", compare=False)  # file and line that it was read from
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the template: tools, …


def episodes_of(row: Mapping[str, Any], where: str, supervise: str = "last") -> list[Episode]:
    """Make the episodes of one row: one with "last"; with "all" one for each user turn with a history and an answer.

    A user turn goes up to the next one, tool calls and tool messages included; its last assistant message is the
    answer. The history is the system prompt and all before the turn; the exchange is the system prompt and the turn.

    Raises:
        DataError: the row is not a conversation, or one with nothing to remember or nothing to answer.
    """
    if supervise not in SUPERVISE:
        raise ConfigError(f"Unknown supervise {supervise!r}.", f"It is one of {', '.join(SUPERVISE)}.")
    messages = _messages_of(row, where)
    template_kwargs = _template_kwargs(row, where)
    if supervise == "last" and (len(messages) < 2 or messages[-1]["role"] != "assistant"):
        raise _no_question_error(where)
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    starts = [n for n, message in enumerate(turns) if message["role"] == "user"]
    if supervise == "last":
        starts = starts[-1:]
    episodes, answered = [], supervise == "last"
    for start, end in pairwise([*starts, len(turns)]):
        last = max((n for n in range(start, end) if turns[n]["role"] == "assistant"), default=None)
        answered |= last is not None
        if start > 0 and last is not None:
            exchange = system + turns[start : last + 1]
            episodes.append(Episode(system + turns[:start], [exchange], where, template_kwargs))
    if not answered:
        raise DataError(f"{where} asks nothing.", "No user's message has an assistant's answer.", "Add an answer.")
    if not episodes:
        raise DataError(
            f"{where} has no history.", "There is nothing before its last turn.", "Use longer conversations."
        )
    return episodes


def exchange_of(row: Mapping[str, Any], where: str) -> list[Message]:
    """Read the whole conversation of one row, whose last message is the assistant's.

    Raises:
        DataError: the row is not such a conversation.
    """
    messages = _messages_of(row, where)
    if not messages or messages[-1]["role"] != "assistant":
        raise _no_question_error(where)
    return messages


def _no_question_error(where: str) -> DataError:
    return DataError(
        f"{where} asks nothing.", "It does not end with an assistant's message.", "End the conversation with an answer."
    )


def used_columns(row: Mapping[str, Any]) -> set[str]:
    """Return the columns of a row that `episodes_of` reads."""
    speech = {"messages"} if row.get("messages") is not None else {"prompt", "history", _response(row) or "response"}
    return speech | _FOR_TEMPLATE.keys()


def _response(row: Mapping[str, Any]) -> str | None:
    return next((name for name in ("response", "completion") if row.get(name) is not None), None)


def _template_kwargs(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments that a row has for the chat template besides its messages."""
    arguments: dict[str, Any] = {}
    for name, kind in _FOR_TEMPLATE.items():
        value = row.get(name)
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except ValueError as error:
                raise DataError(f"{where}: `{name}` is not JSON.", f"{error}.", "Correct the row.") from error
        if value is not None and not isinstance(value, kind):
            expected = "a list" if kind is list else "an object"
            raise DataError(f"{where}: `{name}` is not {expected}.", f"It is {str(value)[:60]!r}.", "Correct the row.")
        arguments[name] = value
    tools = {"tools": arguments["tools"]} if arguments["tools"] else {}
    return {**(arguments["chat_template_kwargs"] or {}), **tools}


def _messages_of(row: Mapping[str, Any], where: str) -> list[Message]:
    """Check a row, and return its whole conversation."""
    if not isinstance(row, Mapping) or (row.get("messages") is None and row.get("prompt") is None):
        raise DataError(
            f"{where} is not a conversation.",
            "It has no list `messages`, and no `prompt` with a `response`.",
            "Give it one or the other.",
        )
    if row.get("messages") is not None:
        return _check_messages(row["messages"], "messages", where)
    prompt = row["prompt"]
    name = _response(row)
    if name is None:
        raise DataError(f"{where} is not a conversation.", "It has a `prompt` and no `response`.", "Add the response.")
    response = row[name]
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    answer = _check_messages(response, name, where)
    foreign = next((message["role"] for message in answer if message["role"] not in ("assistant", "tool")), None)
    if foreign is not None:
        raise DataError(
            f"{where}: `{name}` has a message of the role {foreign}.",
            "A response may contain only messages of the assistant and of tools.",
            "Move the message to `prompt`.",
        )
    if isinstance(prompt, str):
        return _history(row, where) + _check_messages([{"role": "user", "content": prompt}], "prompt", where) + answer
    if row.get("history") is not None:
        raise DataError(
            f"{where} has two histories.",
            "Its `prompt` is a list of messages, and it has a `history` too.",
            "Make the prompt a string, or put the history into it.",
        )
    return _check_messages(prompt, "prompt", where) + answer


def _history(row: Mapping[str, Any], where: str) -> list[Message]:
    history = row.get("history")
    if history is None:
        return []
    return _check_messages(
        [{"role": "user", "content": history}] if isinstance(history, str) else history, "history", where
    )


def _check_messages(messages: Any, name: str, where: str) -> list[Message]:
    """Check that the list `name` of a row is one of messages; contents that are lists of texts become one text."""
    if not isinstance(messages, list):
        raise DataError(f"{where} is not a conversation.", f"`{name}` is not a list of messages.", "Correct the row.")
    of = "" if name == "messages" else f" of `{name}`"
    for n, message in enumerate(messages, start=1):
        problem = problem_of(message)
        if problem is None and message["role"] not in ROLES:
            why = f"It is {message['role'][:60]!r}; the roles are {', '.join(ROLES)}."
            problem = Problem("has an unknown role", why, "Use one of them.")
        if problem is None and not is_unicode(text_of(message)):
            problem = Problem("is not Unicode text", "It contains half of a surrogate pair.", "Correct the message.")
        if problem is not None:
            raise DataError(f"{where}: message {n}{of} {problem.what}.", problem.why, problem.next)
    return [{**m, "content": text_of(m)} if isinstance(m.get("content"), list) else m for m in messages]
