"""Find what a chat template writes, and where: positions in rendered text, for any template.

Nothing is assumed about a template; it is only rendered. To find where it writes a content, the conversation is
rendered again with a meaningless character in place of the content. To find a role's header, short conversations are
rendered, each a prefix of a longer one. The same technique shows whether the template writes everything that was said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from deltamem_tool.errors import DataError, first_line
from deltamem_tool.segments.messages import BYTE_ORDER_MARK, Message, check_messages, check_unicode, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Content", "Message", "Refusal", "render"]

_PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning
_TEMPLATES = 64  # templates with the arguments of rows that are kept at once
_SHAPES = 256  # shapes of conversations that a template remembers as complete
_PROBES = (("user",), ("user", "assistant"), ("system",))  # roles before a message whose header is learned


class Refusal(DataError):
    """An error that the chat template itself raises."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    generation_prompt: bool = False,
    **template_kwargs: Any,
) -> str:
    """Render messages with the tokenizer's chat template and `template_kwargs`, such as `tools`."""
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=generation_prompt, **template_kwargs
    )
    assert isinstance(text, str)  # one conversation, not tokenised
    return text


class Content(NamedTuple):
    """The text of a rendering before and after a message's content."""

    before: str
    after: str


class ChatTemplate:
    """A chat template, and where it writes messages, as found by rendering.

    Args:
        name: name of the tokenizer, for errors.
        write: function that renders messages, with or without a generation prompt, with `template_kwargs`; it may raise
            any exception.
        source: source of the template, in which the names of `template_kwargs` are looked up.
        template_kwargs: arguments of the template besides the messages, such as `tools`.
    """

    def __init__(
        self,
        name: str,
        write: Callable[..., str],
        source: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._write = write
        self._source = source
        self._kwargs = dict(template_kwargs or {})
        self._headers: dict[tuple[str, bool], set[str]] = {}
        self._complete: set[tuple[Any, ...]] = set()  # shapes of conversations that are written completely
        self._having: dict[str, ChatTemplate] = {}  # by their arguments

    def with_kwargs(self, template_kwargs: Mapping[str, Any]) -> ChatTemplate:
        """Return the same template with further `template_kwargs`. Templates are cached with what they have learned.

        Raises:
            DataError: the template does not use one of them.
        """
        if not template_kwargs:
            return self
        key = json.dumps(template_kwargs, default=repr)
        if key in self._having:
            return self._having[key]
        unknown = [name for name in template_kwargs if not re.search(rf"\b{re.escape(name)}\b", self._source)]
        if unknown:
            raise DataError(
                f"The chat template of {self.name} does not use {', '.join(unknown)}.",
                "The template would ignore it.",
                "Leave it out, or use a model whose template uses it.",
            )
        if len(self._having) == _TEMPLATES:
            self._having.clear()
        self._having[key] = ChatTemplate(self.name, self._write, self._source, {**self._kwargs, **template_kwargs})
        return self._having[key]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Return the template of a transformers tokenizer.

        Raises:
            DataError: the tokenizer has no chat template.
        """
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if tokenizer.chat_template is None:
            raise DataError(
                f"The tokenizer {name} has no chat template.", "", "Use the base model's chat or instruct version."
            )
        source = tokenizer.chat_template
        several = source.values() if isinstance(source, dict) else [source]  # by names, such as "tool_use"
        return cls(name, partial(render, tokenizer), "\n".join(several))

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """Render messages.

        If the template does not support contents that are lists of texts, they are joined to one text. If it supports
        only lists, a text is passed as a list.

        Raises:
            Refusal: the template rejects the messages.
            DataError: a message has no role or no text, or the template leaves out a content or tool calls.
        """
        check_messages(messages, text_alone=False)
        text = self._render_unchecked(messages, generation_prompt)
        self._check_complete(messages)
        return text

    def _render_unchecked(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        takes_text, takes_parts = self._kinds
        if not takes_parts:
            if any(isinstance(m.get("content"), list) for m in messages):
                check_messages(messages)
            messages = [{**m, "content": text_of(m)} if isinstance(m.get("content"), list) else m for m in messages]
        elif not takes_text:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
                for m in messages
            ]
        text = self._without_none(messages, generation_prompt, self._render_raw(messages, generation_prompt))
        check_unicode(text, "The conversation")
        return text

    def _without_none(self, messages: Sequence[Message], generation_prompt: bool, text: str) -> str:
        """Remove the word None from `text` if the template prints it for a missing content.

        Templates may test whether a content is None, so it cannot be replaced by an empty text for all of them.
        """
        if not any(m.get("content", "") is None for m in messages):
            return text
        filled = [{**m, "content": _NOTHING} if m.get("content", "") is None else m for m in messages]
        try:
            other = self._render_raw(filled, generation_prompt)
        except Refusal:
            return text
        return other.replace(_NOTHING, "") if other.replace(_NOTHING, "None") == text else text

    def _render_raw(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        try:
            text = self._write(list(messages), generation_prompt, **self._kwargs)
        except Exception as error:  # a template is someone else's program and can raise anything
            raise Refusal(
                f"The chat template of {self.name} refuses the conversation.",
                f"{first_line(error)}.",
                "Change the conversation.",
            ) from error
        return text.removeprefix(BYTE_ORDER_MARK)

    @cached_property
    def _kinds(self) -> tuple[bool, bool]:
        """Whether the template supports a content that is a text, and one that is a list of texts."""
        sentinel = chr(_PRIVATE_USE[0])
        written = []
        for content in (sentinel, [{"type": "text", "text": sentinel}]):
            try:
                written.append(self._render_raw([{"role": "user", "content": content}]))
            except Refusal:
                written.append("")
        text, parts = written
        takes_text = sentinel in text
        # A template that does not support lists may print the list, which contains the text.
        takes_parts = sentinel in parts and (parts == text or not takes_text)
        return takes_text or not takes_parts, takes_parts

    def _check_complete(self, messages: Sequence[Message]) -> None:
        """Check that the template writes every message, and the tools; once for each shape of a conversation."""
        shape = tuple(
            (m["role"], type(m.get("content")), bool(m.get("content")), bool(m.get("tool_calls"))) for m in messages
        )
        if shape in self._complete:
            return
        probes = [_probe(message, number) for number, message in enumerate(messages)]
        text = self.try_render(probes)
        if text is not None:
            for number, message in enumerate(messages):
                for key, sentinel in (("content", _CONTENT_SENTINEL), ("tool_calls", _NAME_SENTINEL)):
                    if message.get(key) and sentinel.format(number) not in text:
                        raise DataError(
                            f"The chat template of {self.name} leaves out message {number + 1} ({message['role']}).",
                            f"The rendered text does not contain its {key}.",
                            "Leave the message out or change its role, or use a model whose template writes it.",
                        )
            if self._kwargs.get("tools"):
                without = ChatTemplate(self.name, self._write, template_kwargs={**self._kwargs, "tools": None})
                if text == without.try_render(probes):
                    raise DataError(
                        f"The chat template of {self.name} leaves out the tools.",
                        "The rendered text is the same without them.",
                        "Leave them out, or use a model whose template writes tools.",
                    )
        if len(self._complete) == _SHAPES:
            self._complete.clear()
        self._complete.add(shape)

    def continues(self, messages: Sequence[Message], index: int) -> bool:
        """Return whether the template writes all later contents, and no earlier ones, after that of message `index`.

        A system message may be anywhere: some templates write it with the last question.
        """
        text = self.try_render([_probe(message, number) for number, message in enumerate(messages)])
        if text is None or text.count(_CONTENT_SENTINEL.format(index)) != 1:
            return False
        after = text.partition(_CONTENT_SENTINEL.format(index))[2]
        return all(
            (_CONTENT_SENTINEL.format(number) in after) == (number > index)
            for number, message in enumerate(messages)
            if message.get("content") and message["role"] not in ("system", "developer")
        )

    def try_render(self, messages: Sequence[Message]) -> str | None:
        """Return the rendering, or None if there is an error."""
        try:
            return self._render_unchecked(messages)
        except DataError:
            return None

    def exchange(self, messages: Sequence[Message]) -> tuple[str, str]:
        """Return the prompt for the last of `messages`, which is an answer, and the text of that answer.

        Some templates write the header of a finished answer differently from the generation prompt, for example without
        the thinking block that the prompt opens. The prompt then ends with the generation prompt, and the answer starts
        with its content.

        Raises:
            DataError: as in `render`, or the template does not show where the answer is.
        """
        prompt, text = self.render(messages[:-1], generation_prompt=True), self.render(messages)
        if text.startswith(prompt):
            answer = text[len(prompt) :]
        else:
            last = len(messages) - 1
            place = self.content(messages, last, text)
            if place is None or not self.continues(messages, last):
                raise DataError(
                    "The chat template renders the prompt differently once the answer follows.",
                    f"Prompt: {prompt[-80:]!r}; with the answer: {text[:80]!r}….",
                    "Use a tokenizer whose template writes an answer after its prompt.",
                )
            answer = text[len(place.before) :]
        content = text_of(messages[-1])
        if "".join(content.split()) not in "".join(answer.split()):  # templates may change whitespace
            raise DataError(
                f"The chat template of {self.name} changes the answer.",
                f"Given: {content[:80]!r}; written: {answer[:80]!r}.",
                "Change the answer, for example leave out its thinking, or use another model's template.",
            )
        return prompt, answer

    def content(self, messages: Sequence[Message], index: int, text: str) -> Content | None:
        """Find the content of message `index` in `text`, the rendering of `messages`.

        The messages are rendered once more with another content; the text before it must be in `text`, too.
        """
        sentinel = next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)
        changed = list(messages)
        changed[index] = {**messages[index], "content": _as_content(sentinel, messages[index])}
        other = self.try_render(changed)
        if other is None or other.count(sentinel) != 1:
            return None
        before, after = other.split(sentinel)
        return Content(before, after) if text.startswith(before) else None

    def closing(self) -> str:
        """Return the text that the template writes after an answer: the last one, or else an earlier one."""
        forms: tuple[Message, ...] = ({"content": ""}, {"content": []})  # text, or a list of parts
        for form in forms:
            talk = [{"role": role, "content": _as_content(role, form)} for role in ("user", "assistant", "user")]
            for messages in (talk[:2], talk):
                text = self.try_render(messages)
                place = None if text is None else self.content(messages, 1, text)
                if place is not None and place.after.strip():
                    return place.after
        return ""

    def header(self, message: Message, before: str) -> str | None:
        """Return the role's header: the one known header that `before`, the text before the content, ends with."""
        key = (message["role"], isinstance(message.get("content"), list))
        if key not in self._headers:
            self._headers[key] = self._learn_headers(message)
        matches = [header for header in self._headers[key] if before.endswith(header)]
        if matches:
            return matches[0] if len(matches) == 1 else None
        opening = self.opening(message)
        return opening if opening is not None and before.endswith(opening) else None

    def _learn_headers(self, message: Message) -> set[str]:
        """Return the headers of messages like this one in short conversations, each the beginning of a longer one."""
        context, sentinel = chr(_PRIVATE_USE[0]), chr(_PRIVATE_USE[1])
        headers = set()
        for roles in _PROBES:
            earlier = [{"role": role, "content": _as_content(context, message)} for role in roles]
            start = self.try_render(earlier)
            text = self.try_render([*earlier, {"role": message["role"], "content": _as_content(sentinel, message)}])
            if start is None or text is None or not text.startswith(start) or text.count(sentinel) != 1:
                continue
            header = text[len(start) : text.index(sentinel)]
            if context not in header:  # otherwise the template writes another message's content within this one
                headers.add(header)
        return headers

    def opening(self, message: Message) -> str | None:
        """Return the text before the content of such a message at the beginning of a conversation."""
        sentinel = chr(_PRIVATE_USE[0])
        text = self.try_render([{"role": message["role"], "content": _as_content(sentinel, message)}])
        return None if text is None or text.count(sentinel) != 1 else text[: text.index(sentinel)]

    def preamble(self, message: Message, text: str) -> int | None:
        """Return the length of the text that the template writes before any message.

        Return None unless `text` starts with this text, followed by the header of `message`.
        """
        opening = self.opening(message)
        header = None if opening is None else self.header(message, opening)
        if opening is None or header is None or not text.startswith(opening):
            return None
        return len(opening) - len(header)


def _as_content(text: str, message: Message) -> str | list[dict[str, str]]:
    """Return `text` as a content of the message's kind, since some templates take only lists of parts."""
    return [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text


_NOTHING = "\ue104"  # in place of None
_CONTENT_SENTINEL = "\ue100{}\ue101"  # in place of a message's content,
_NAME_SENTINEL = "\ue102{}\ue103"  # and of the names of the functions that it calls


def _probe(message: Message, number: int) -> Message:
    """Return `message` with placeholders for its content and its tool calls."""
    probe = {**message}
    if message.get("content"):
        probe["content"] = _as_content(_CONTENT_SENTINEL.format(number), message)
    if message.get("tool_calls"):
        probe["tool_calls"] = [_with_name(call, _NAME_SENTINEL.format(number)) for call in message["tool_calls"]]
    return probe


def _with_name(call: Any, name: str) -> Any:
    """Return a tool call with another function name."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_name(call["function"], name)}
    return {**call, "name": name} if isinstance(call, Mapping) else call
