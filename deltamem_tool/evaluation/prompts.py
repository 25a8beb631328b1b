"""The part of a history shown before the question: nothing, its last tokens, all of it, or passages BM25 finds."""

from __future__ import annotations

from collections.abc import Sequence

from deltamem_tool.baselines.bm25 import rank
from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.conditions import ALL, NOTHING, RETRIEVED, TRUNCATED, WINDOW, EvalProtocol
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.task import Item
from deltamem_tool.segments.messages import Message, text_of
from deltamem_tool.segments.template import ChatTemplate

PASSAGES = 5  # passages from BM25 in the prompt, if no window limits the tokens
_INTRODUCTION = "From earlier conversations:\n\n"


class Views:
    """Renders prompts as text, up to the header of the answer.

    Args:
        subject: gives the tokenizer and the number of positions.
        protocol: gives the length of a window.
        new_tokens: number of tokens reserved for the answer, if an item does not say.
        truncate: number of tokens of the history that remain when it is truncated.
    """

    def __init__(
        self,
        subject: Subject,
        protocol: EvalProtocol,
        new_tokens: int,
        truncate: int | None = None,
    ) -> None:
        self._template = ChatTemplate.from_tokenizer(subject.tokenizer)
        self._subject, self._protocol = subject, protocol
        self._positions, self._new_tokens = subject.positions, new_tokens
        self._within = {WINDOW: protocol.window, TRUNCATED: truncate or 0}

    def prompt(self, item: Item, view: str) -> str:
        """Render the visible part of the history, the question, and the header of the answer.

        Raises:
            DataError: the chat template rejects the messages, or the prompt has more tokens than the model has
                positions. The message names the item.
        """
        try:
            if view in self._within:
                text = self._last_within(item, self._within[view])
            else:
                text = {NOTHING: self._plain, ALL: self._all, RETRIEVED: self._with_passages}[view](item)
        except DataError as error:
            raise DataError(f"{item.where}: {error.what}", error.why, error.next) from error
        count, new_tokens = self._count(text), item.new_tokens or self._new_tokens
        if self._positions is not None and count + new_tokens > self._positions:
            raise DataError(
                f"{item.where} is too long for the model: {count} tokens in view.",
                f"It has {self._positions} positions, {new_tokens} of them for the answer.",
                "Leave this condition out (--conditions), or use a model with more positions.",
            )
        return text

    def _plain(self, item: Item) -> str:
        return self._render(item, item.question)

    def _all(self, item: Item) -> str:
        return self._render(item, _join_messages(_messages(item), item.question))

    def _last_within(self, item: Item, tokens: int) -> str:
        """Render the last messages that fit into `tokens`, including the text that the template adds."""
        messages = _messages(item)
        room = self._count(self._plain(item)) + tokens
        fewest, most = 0, len(messages)
        while fewest < most:  # as many as fit
            middle = (fewest + most + 1) // 2
            fits = self._count(self._last(item, messages, middle)) <= room
            fewest, most = (middle, most) if fits else (fewest, middle - 1)
        return self._last(item, messages, fewest)

    def _last(self, item: Item, messages: Sequence[Message], count: int) -> str:
        """Render the last `count` messages, without leading ones that the template cannot begin with."""
        shown = list(messages[len(messages) - count :])
        while shown and shown[0]["role"] not in ("user", "system"):
            shown = shown[1:]
        return self._render(item, _join_messages(shown, item.question))

    def _with_passages(self, item: Item) -> str:
        """Render the passages that BM25 ranks highest, in the order of the history, inside the question."""
        ranked = rank(_passages(item), item.query or text_of(item.question[-1]))
        chosen: list[int] = []
        room = self._count(self._plain(item)) + self._protocol.window
        for number in ranked:
            if self._protocol.view != WINDOW and len(chosen) == PASSAGES:
                break
            if self._protocol.view == WINDOW and self._count(self._with_messages(item, [*chosen, number])) > room:
                continue  # a shorter one may fit
            chosen.append(number)
        return self._with_messages(item, chosen)

    def _with_messages(self, item: Item, chosen: Sequence[int]) -> str:
        if not chosen:
            return self._plain(item)
        passages = _passages(item)
        context = "\n".join(passages[number] for number in sorted(chosen))
        *before, last = item.question
        return self._render(item, [*before, {**last, "content": f"{_INTRODUCTION}{context}\n\n{text_of(last)}"}])

    def _render(self, item: Item, messages: Sequence[Message]) -> str:
        return self._template.with_kwargs(item.template_kwargs).render(messages, generation_prompt=True)

    def _count(self, text: str) -> int:
        return len(self._subject.tokens([text])[0])


def _messages(item: Item) -> list[Message]:
    return [message for session in item.history for message in session]


def _join_messages(shown: Sequence[Message], question: Sequence[Message]) -> list[Message]:
    """Join history and question. A system prompt of the question replaces that of the history."""
    if question[0]["role"] != "system":
        return [*shown, *question]
    return [question[0], *(message for message in shown if message["role"] != "system"), *question[1:]]


def _passages(item: Item) -> list[str]:
    """Return one passage per message, with its speaker."""
    return [f"{message['role']}: {text_of(message)}" for message in _messages(item)]
