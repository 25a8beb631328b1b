"""What a chat template writes, and where: positions in rendered text, for any template.

Nothing is known about a template but what it renders. To see where it writes a content, the conversation is rendered
once more with a character of no meaning in the content's place; to see a role's header, short conversations are
rendered, each the beginning of a longer one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from deltamem_tool.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # {"role": …, "content": …}, and whatever else the template knows

_PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text has a meaning for
_PROBES = (("user",), ("user", "assistant"), ("system",))  # what a message follows when its role's header is learned


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generation_prompt: bool = False) -> str:
    """The messages as the tokenizer's chat template writes them."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    assert isinstance(text, str)  # one conversation, not tokenised
    return text


class Content(NamedTuple):
    """Where a message's content is in a rendering: after `before`. `after` follows it."""

    before: str
    after: str


class ChatTemplate:
    """A chat template, and what it can be seen to do.

    Args:
        name: of the tokenizer, for errors.
        write: renders messages, with or without a generation prompt; it raises what it likes.
    """

    def __init__(self, name: str, write: Callable[[Sequence[Message], bool], str]) -> None:
        self.name = name
        self._write = write
        self._headers: dict[tuple[str, bool], set[str]] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template of a transformers tokenizer.

        Raises:
            DataError: the tokenizer has no chat template.
        """
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if tokenizer.chat_template is None:
            raise DataError(
                f"The tokenizer {name} has no chat template.", "", "Use the base model's chat or instruct version."
            )
        return cls(name, lambda messages, generation_prompt: render(tokenizer, messages, generation_prompt))

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Raises DataError where the template refuses the messages."""
        try:
            return self._write(messages, generation_prompt)
        except Exception as error:  # a template is a program of others, it can raise anything
            raise DataError(
                f"The chat template of {self.name} refuses the conversation.",
                f"{first_line(error)}.",
                "Change the conversation.",
            ) from error

    def attempt(self, messages: Sequence[Message]) -> str | None:
        """The rendering, if there is one."""
        try:
            return self.render(messages)
        except DataError:
            return None

    def content(self, messages: Sequence[Message], index: int, text: str) -> Content | None:
        """Where message `index` has its content in `text`, the rendering of `messages`.

        Found by rendering once more with another content: what stands before that one must stand in `text` too.
        """
        sentinel = next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)
        changed = list(messages)
        changed[index] = {**messages[index], "content": _shaped(sentinel, messages[index])}
        other = self.attempt(changed)
        if other is None or other.count(sentinel) != 1:
            return None
        before, after = other.split(sentinel)
        return Content(before, after) if text.startswith(before) else None

    def closing(self) -> str:
        """What the template writes after an answer, the conversation's last one or else an earlier one."""
        forms: tuple[Message, ...] = ({"content": ""}, {"content": []})  # text, or a list of parts
        for form in forms:
            talk = [{"role": role, "content": _shaped(role, form)} for role in ("user", "assistant", "user")]
            for messages in (talk[:2], talk):
                text = self.attempt(messages)
                place = None if text is None else self.content(messages, 1, text)
                if place is not None and place.after.strip():
                    return place.after
        return ""

    def header(self, message: Message, before: str) -> str | None:
        """Return the role's header: the one known header that `before`, the text before the content, ends with."""
        key = (message["role"], isinstance(message.get("content"), list))
        if key not in self._headers:
            self._headers[key] = self._learned(message)
        matches = [header for header in self._headers[key] if before.endswith(header)]
        if matches:
            return matches[0] if len(matches) == 1 else None
        opening = self.opening(message)
        return opening if opening is not None and before.endswith(opening) else None

    def _learned(self, message: Message) -> set[str]:
        """Return the headers of messages like this one in short conversations, each the beginning of a longer one."""
        context, sentinel = chr(_PRIVATE_USE[0]), chr(_PRIVATE_USE[1])
        headers = set()
        for roles in _PROBES:
            earlier = [{"role": role, "content": _shaped(context, message)} for role in roles]
            start = self.attempt(earlier)
            text = self.attempt([*earlier, {"role": message["role"], "content": _shaped(sentinel, message)}])
            if start is None or text is None or not text.startswith(start) or text.count(sentinel) != 1:
                continue
            header = text[len(start) : text.index(sentinel)]
            if context not in header:  # else this message took up another's content
                headers.add(header)
        return headers

    def opening(self, message: Message) -> str | None:
        """What the template writes before the content of such a message when nothing precedes it."""
        sentinel = chr(_PRIVATE_USE[0])
        text = self.attempt([{"role": message["role"], "content": _shaped(sentinel, message)}])
        return None if text is None or text.count(sentinel) != 1 else text[: text.index(sentinel)]

    def preamble(self, message: Message, text: str) -> int | None:
        """Return the length of what the template writes before any message.

        None unless `text` starts with that and then with the header of `message`.
        """
        opening = self.opening(message)
        header = None if opening is None else self.header(message, opening)
        if opening is None or header is None or not text.startswith(opening):
            return None
        return len(opening) - len(header)


def _shaped(text: str, message: Message) -> str | list[dict[str, str]]:
    """`text` as a content of the same kind as the message's: templates may take lists of parts only."""
    return [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text
