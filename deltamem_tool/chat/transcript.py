"""The messages of a conversation, as the chat template renders them and as tokens. Answers are never tokenised again.

In rendered text, a placeholder stands for each answer, to tell the text of the template around it from the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from deltamem_tool.chat.text import ChatText
from deltamem_tool.errors import DataError, ExportError
from deltamem_tool.segments.boundaries import Span, Split, english, owners_of, spans_of, tags_of
from deltamem_tool.segments.messages import Message, check_messages, text_of

_MARK = "\ue000"
_ANSWER = f"{_MARK}{{}}{_MARK}"  # private-use characters, so no template trims them


@dataclass(frozen=True)
class Turn:
    """New messages and the answer to them.

    Args:
        messages: the new messages. For a model without a chat template, a text is one user message.
        answer: text of the answer.
        tokens: tokens of the answer in the context, without a stop token, which the template writes.
    """

    messages: tuple[Message, ...]
    answer: str = ""
    tokens: tuple[int, ...] = ()


class Tags(NamedTuple):
    """Segment tags of new tokens.

    Args:
        marks: one tag per token.
        ended: whether the previous segment ends where these tokens begin, so that none of them ends it.
    """

    tags: list[int]
    ended: bool


class _Rendering(NamedTuple):
    """New tokens and all spans of a rendering, in which the new ones begin at the character `start`."""

    rendered: str
    start: int
    offsets: list[tuple[int, int]]
    spans: list[Span]


@dataclass(frozen=True)
class Transcript:
    """The messages of a conversation. It is never changed: every method returns a new one.

    Args:
        system: system messages at the beginning.
        turns: turns whose tokens are in the context.
        dropped: earlier turns, which have left the context.
        rendered: text of the context up to the last answer, with placeholders for the earlier answers. Each turn is as
            the template rendered it when it was the last one.
    """

    system: tuple[Message, ...] = ()
    turns: tuple[Turn, ...] = ()
    dropped: tuple[Turn, ...] = ()
    rendered: str = ""

    @property
    def messages(self) -> list[Message]:
        """All messages, including those of dropped turns."""
        messages = list(self.system)
        for turn in (*self.dropped, *self.turns):
            messages += [*turn.messages, {"role": "assistant", "content": turn.answer}]
        return messages

    @property
    def head(self) -> str:
        """`rendered` with the last answer."""
        return self.rendered + (_ANSWER.format(len(self.turns) - 1) if self.turns else "")

    def begin(self, text: ChatText, content: str | Sequence[Message]) -> tuple[Transcript, list[int]]:
        """Return the transcript with another turn, which has no answer yet, and the tokens that it adds.

        Raises:
            ExportError: the chat template rejects the messages or does not write the last answer, or the messages are
                empty.
            DataError: a message contains the placeholder for answers, or as in `ChatText.render`.
        """
        if not content:
            raise _empty_prompt_error("The prompt is empty.")
        if not isinstance(content, str):
            check_messages(content)
        new = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
        if any(_MARK in text_of(message) for message in new):
            raise DataError(
                "The prompt contains the character U+E000.",
                "It is the placeholder for answers when a conversation is rendered, and has no meaning in any text.",
                "Leave it out.",
            )
        system = self.system
        if not self.turns and not system:
            count = next((i for i, message in enumerate(new) if message.get("role") != "system"), 0)
            system, new = tuple(new[:count]), new[count:]
        if isinstance(content, str) and not text.has_template:
            rendered = self.head + content
        else:
            earlier = [*system, *self._with_placeholders(self.turns)]
            rendered = text.render([*earlier, *new])
            if not rendered.startswith(self.head):
                rendered = self.head + self._added_text(text, earlier, new, rendered)
        added = rendered[len(self.head) :]
        tokens = text.encode(added, special_tokens=not text.has_template and not self.head)
        if not tokens:
            raise _empty_prompt_error("The text has no tokens.")
        turns = (*self.turns, Turn(tuple(new)))
        return replace(self, system=system, turns=turns, rendered=rendered), tokens

    def _added_text(self, text: ChatText, earlier: list[Message], new: list[Message], rendered: str) -> str:
        """Return the part of `rendered` after the last answer, if `rendered` does not begin like the context.

        Templates may write what was said before in other words by now: without its thinking, under another date. In the
        context and in the memory it stays as it was read.
        """
        if not self.turns or not text.template.continues([*earlier, *new], len(earlier) - 1):
            raise ExportError(
                "The chat template does not continue this conversation.",
                "It does not write the new messages after the last answer.",
                "Start a new conversation, with this one's memory if it should remember.",
            )
        return rendered.rpartition(_ANSWER.format(len(self.turns) - 1))[2]

    def tags(self, text: ChatText, granularity: str, start: int) -> Tags:
        """Tag the tokens of `rendered` from the character `start` on, where a turn begins.

        They are the rest of the last answer's message, the new messages, and the header of the next answer.

        Raises:
            DataError: the chat template does not show where a message ends.
        """
        new = self._render_new(text, start, english if granularity == "sentence" else None)
        tags = tags_of(new.rendered, new.offsets, [span for span in new.spans if span.end > new.start])
        return Tags(tags, any(span.end == new.start and span.segment for span in new.spans))

    def owners(self, text: ChatText, start: int) -> list[int]:
        """Return the message that each of these tokens belongs to, by its index in the context.

        Tokens of the answer's header belong to the next message. Text that the template writes before all messages
        belongs to the first one.

        Raises:
            DataError: as in `tags`.
        """
        new = self._render_new(text, start, None)
        return [max(0, owner - 1) for owner in owners_of(new.rendered, new.offsets, new.spans)]

    def _render_new(self, text: ChatText, start: int, split: Split | None) -> _Rendering:
        earlier, turn = self.turns[:-1], self.turns[-1]
        messages = [*self.system, *self._with_placeholders(earlier), *turn.messages]
        # As the template writes it now: the end is that of `rendered`, what comes before it may not be.
        rendered = text.render(messages)
        start += len(rendered) - len(self.rendered)
        encoding = text.tokenizer.encode(rendered[start:], add_special_tokens=False)
        offsets = [(start + first, start + last) for first, last in encoding.offsets]
        return _Rendering(rendered, start, offsets, spans_of(text.template, messages, rendered, True, split))

    def with_answer(self, answer: str, tokens: Sequence[int]) -> Transcript:
        """Return the transcript with the answer to the last turn."""
        last = replace(self.turns[-1], answer=answer, tokens=tuple(tokens))
        return replace(self, turns=(*self.turns[:-1], last))

    def keep(self, text: ChatText, count: int) -> Transcript:
        """Keep only the last `count` turns of the context, rendered as if the conversation began with them."""
        dropped_turns, kept_turns = self.turns[: len(self.turns) - count], self.turns[len(self.turns) - count :]
        shorter = replace(self, turns=(), dropped=(*self.dropped, *dropped_turns), rendered="")
        if not kept_turns:
            return replace(shorter, rendered=_render_system(text, self.system))
        for turn in kept_turns:
            plain = turn.messages[0]["content"] if not text.has_template else turn.messages
            shorter = shorter.begin(text, plain)[0].with_answer(turn.answer, turn.tokens)
        return shorter

    def tokens(self, text: ChatText) -> list[int]:
        """Return all tokens of the context, including those of the last answer.

        Raises:
            ExportError: the template does not write every answer exactly once.
        """
        tokens: list[int] = []
        rest = self.head
        for number, turn in enumerate(self.turns):
            before, placeholder, rest = rest.partition(_ANSWER.format(number))
            if not placeholder:
                raise ExportError(
                    "The chat template does not write every answer of this conversation.",
                    f"Answer {number + 1} is not in the rendered text.",
                    "Start a new conversation with this one's memory.",
                )
            first = not text.has_template and number == 0
            tokens += [*text.encode(before, special_tokens=first), *turn.tokens]
        return tokens + text.encode(rest)

    def _with_placeholders(self, turns: Sequence[Turn]) -> list[Message]:
        messages: list[Message] = []
        for number, turn in enumerate(turns):
            messages += [*turn.messages, {"role": "assistant", "content": _ANSWER.format(number)}]
        return messages


def _render_system(text: ChatText, system: tuple[Message, ...]) -> str:
    """The system messages' own text.

    Empty where the template writes it with the first user message only, which then brings it again.
    """
    if not system:
        return ""
    try:
        alone = text.render(list(system), generation_prompt=False)
        followed = text.render([*system, {"role": "user", "content": _ANSWER.format(0)}])
    except ExportError:
        return ""
    return alone if followed.startswith(alone) else ""


def _empty_prompt_error(why: str) -> ExportError:
    return ExportError("There is nothing to answer.", why, "Give it some text.")
