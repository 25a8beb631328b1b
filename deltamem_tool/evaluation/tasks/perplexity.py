"""The likelihood of a conversation's last answers, given what was said before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from deltamem_tool.errors import ConfigError, DataError
from deltamem_tool.evaluation.task import Item, require_data
from deltamem_tool.evaluation.tasks.unrelated import unrelated_conversations
from deltamem_tool.segments.messages import Message


class _Talk(NamedTuple):
    """A conversation in sessions, of which the end of the last one is scored."""

    name: str
    sessions: Sequence[Sequence[Message]]
    where: str
    template_kwargs: Mapping[str, Any] = {}


class Perplexity:
    """The last answers of each conversation, one item per answer.

    The history ends where the last `turns` begin. So all items of a conversation share one memory, and the memory of
    another conversation is their donor. The items form the session that follows: under every condition, each answer has
    the turns between the history and itself in view.

    Args:
        data: conversations in a format of `deltamem train` (a .jsonl or .parquet file, or a dataset of the Hub), or a
            .json file in LoCoMo's format, whose sessions are kept.
        turns: number of answers per conversation.
        split, revision: split and revision of a dataset of the Hub.
        facts: write the memories from generated conversations with this many facts instead, as in the task `text`; with
            0 they are empty.
        history: write the memories from the conversations of this file instead.
        seed: random seed for the generated conversations.

    Raises:
        ConfigError: there is no data, or no turn to score.
    """

    name = "perplexity"
    by_likelihood: Literal[True] = True

    def __init__(
        self,
        data: str | None = None,
        turns: int = 1,
        split: str = "train",
        revision: str | None = None,
        facts: int | None = None,
        history: str | None = None,
        seed: int = 0,
    ) -> None:
        if type(turns) is not int or turns < 1:
            raise ConfigError("The number of turns to score must be 1 or more.", f"It is {turns!r}.", "Correct it.")
        texts = {"split": split, "revision": revision, "history": history}
        self._data = require_data(self.name, data, "conversations.jsonl", **texts)
        self._turns, self._split, self._revision = turns, split, revision
        self._facts, self._history, self._seed = facts, history, seed

    def items(self) -> list[Item]:
        """Return one item per answer."""
        talks = list(self._talks())
        if self._facts is None and self._history is None:
            return [item for talk in talks for item in self._question_items(talk)]
        others = unrelated_conversations(len(talks), self._facts, self._seed, self._history)
        return [
            replace(item, history=history)
            for talk, (_, history) in zip(talks, others, strict=True)
            for item in self._question_items(talk)
        ]

    def _talks(self) -> Iterator[_Talk]:
        if Path(self._data).suffix.lower() == ".json":
            from deltamem_tool.data.sources import check_file_options

            check_file_options(self._data, self._split, self._revision)
            return _locomo(self._data)
        return _conversations(self._data, self._split, self._revision)

    def _question_items(self, talk: _Talk) -> Iterator[Item]:
        *earlier, last = talk.sessions
        system = [message for message in last[:1] if message["role"] == "system"]
        answered = _answer_places(last)[-self._turns :]
        begin = answered[0][0] if answered else 0
        history = [*earlier, list(last[:begin])] if begin > len(system) else earlier
        if len(answered) < self._turns or not history:
            raise DataError(
                f"{talk.where} has too few turns.",
                f"Its last {self._turns} turns are scored, and something must precede them.",
                "Ask for fewer (--set turns=N), or leave it out.",
            )
        for number, (_, answer) in enumerate(answered, start=1):
            text = last[answer].get("content")
            where = f"{talk.where}, message {answer + 1}"
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{where} is empty.", "It is the answer to be scored.", "Correct it.")
            group = f"turn {number} of {self._turns}" if self._turns > 1 else "last turn"
            question = [*system, *last[begin:answer]]
            asked = next(message for message in reversed(question) if message["role"] == "user")
            yield Item(
                f"{talk.name}/{number}",
                talk.name,
                history,
                question,
                [text],
                group,
                where,
                str(asked["content"]),
                template_kwargs=talk.template_kwargs,
            )


def _answer_places(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Return the start of each user turn that has an answer, and the position of the answer.

    The answer is the last message of the assistant in that turn.
    """
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    turns = []
    for start, end in pairwise([*starts, len(messages)]):
        answers = [number for number in range(start, end) if messages[number]["role"] == "assistant"]
        if answers:
            turns.append((start, answers[-1]))
    return turns


def _conversations(data: str, split: str, revision: str | None) -> Iterator[_Talk]:
    from deltamem_tool.data.sources import read_episodes

    for number, episode in enumerate(read_episodes(data, split, revision).episodes, start=1):
        (exchange,) = episode.exchanges  # the last turn, after the system prompt if the history has one
        turn = exchange[1:] if exchange[0]["role"] == "system" else exchange
        yield _Talk(str(number), [[*episode.history, *turn]], episode.where, episode.template_kwargs)


def _locomo(data: str) -> Iterator[_Talk]:
    from deltamem_tool.evaluation.tasks.locomo import LoCoMo

    seen = set()
    for item in LoCoMo(data).items():
        if item.history_id not in seen:
            seen.add(item.history_id)
            yield _Talk(item.history_id, item.history, item.where.rpartition(" question ")[0])
