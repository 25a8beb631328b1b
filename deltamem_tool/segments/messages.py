"""Check the messages of a conversation before a chat template renders them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deltamem_tool.errors import DataError

Message = dict[str, Any]  # {"role": …, "content": …}, and whatever else the template knows

BYTE_ORDER_MARK = "\ufeff"  # some editors put it at the start of a file; it is not text


def check_messages(messages: Sequence[Message], text_alone: bool = True) -> None:
    """Check that there are messages, and that each has a role and a content.

    The content is a string or a list of parts, `{"type": "text", "text": …}`; it may be missing beside tool calls.

    Args:
        messages: the conversation.
        text_alone: whether all parts must be text.

    Raises:
        DataError: there is no message, or one has no role, no text, or a part that is not text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise DataError("The conversation has no messages.", "", 'Give it a list of {"role": …, "content": …}.')
    for number, message in enumerate(messages, start=1):
        problem = problem_of(message, text_alone)
        if problem is not None:
            raise DataError(f"Message {number} {problem.what}.", problem.why, problem.next)


class Problem(NamedTuple):
    """What is wrong with a message, without its subject; why, and what to do next."""

    what: str
    why: str
    next: str


def problem_of(message: Any, text_alone: bool = True) -> Problem | None:
    """Return what `check_messages` finds wrong with a message, or None."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return Problem("has no role", f"It is {str(message)[:60]!r}.", "Add it to the message.")
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return None  # a message that only calls tools
    if isinstance(content, str):
        return None
    if not isinstance(content, list) or not content:
        return Problem("has no text", "`content` is not a string.", "Correct the message.")
    others = [part for part in content if not _is_part(part, text_alone)]
    if others:
        advice = 'Use only parts {"type": "text", "text": …}.'
        return Problem("has a part that is not text", f"It is {str(others[0])[:60]!r}.", advice)
    return None


def text_of(message: Message) -> str:
    """Return the whole text of a message, with its parts joined."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def is_unicode(text: str) -> bool:
    """Return whether `text` is valid Unicode. JSON and non-UTF-8 command lines can contain half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(text: str, name: str) -> None:
    """Check that `text` is Unicode.

    Raises:
        DataError: `text` contains half of a surrogate pair; the error says so of `name`.
    """
    if not is_unicode(text):
        half = next(place for place, character in enumerate(text) if not is_unicode(character))
        around = text[max(0, half - 20) : half + 20]
        raise DataError(
            f"{name} is not Unicode text.", f"It contains half of a surrogate pair: {around!r}.", "Correct the text."
        )


def _is_part(part: Any, text_alone: bool) -> bool:
    if not isinstance(part, Mapping):
        return False
    is_text = part.get("type", "text") == "text"
    return isinstance(part.get("text"), str) if is_text else not text_alone
