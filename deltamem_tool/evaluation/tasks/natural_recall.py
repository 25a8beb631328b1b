"""Recall of natural facts: hundreds of words, attributes and sentences, seen in training or not."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from deltamem_tool.data import fact_conversations, facts
from deltamem_tool.data.dialogues import Message
from deltamem_tool.data.fact_conversations import FORMS
from deltamem_tool.data.fact_words import SYSTEMS, HeldOut
from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation import EPISODES, FACTS
from deltamem_tool.evaluation.scoring.metrics import declines, mentions_only
from deltamem_tool.evaluation.task import Item, create_task
from deltamem_tool.evaluation.tasks.recall import (
    FALSE_ANSWER,
    OLD,
    SMALL_TALK,
    STATED,
    AskedFact,
    Recall,
    one_of,
    share,
)

CONTAINS = "contains"  # the metric that decides
HELD_OUT = ("attributes", "values", "phrasings")
DIALOGUES, NATURAL = "dialogues", "natural"  # words
_OTHERS = 30  # number of facts between the fact and the question before one of them changes


def recall(words: str = DIALOGUES, seed: int = 0, **options: Any) -> Recall:
    """Create the recall task for one kind of words: the shipped backbone's `dialogues`, or `natural` facts.

    Raises:
        ConfigError: `words` is unknown, or the task does not have the options.
    """
    kind = {DIALOGUES: Recall, NATURAL: NaturalRecall}[one_of("words", words, (DIALOGUES, NATURAL))]
    task: Recall = create_task(kind, f"recall of {words}", {"seed": seed, **options}, None)
    return task


class NaturalRecall(Recall):
    """`episodes` conversations for each number of `facts` and each `delay`, of natural facts.

    `contains` is whether the answer has the value, and the value of no other fact in the conversation. For facts that
    were told twice, `old` is the same for the first value. For an unanswerable question, `contains` is whether the
    answer says in any words that it does not know. `false_answer` is 1 for every answer that is neither correct nor
    says that it does not know.

    Args:
        facts: number of facts that are told, one of which is asked for.
        episodes: number of conversations for each number of facts and each delay.
        seed: random seed.
        kind: as in `Recall`.
        delay: as in `Recall`.
        between: as in `Recall`.
        distractors: as in `Recall`.
        session: as in `Recall`.
        unanswerable: as in `Recall`.
        held_out: those of `attributes`, `values` and `phrasings` that are drawn from the sets never used in training;
            the others are drawn from the training sets.
        form: `chat`, or `plain` for all facts in one message.
        talk: mean number of turns of small talk before each statement of a chat.
        third_person: share of facts about other people than the user.
        bare: share of values that are arbitrary words, regardless of the attribute.
        system: system prompt of every conversation; false for none. By default, half of the chats have one of several.

    Raises:
        ConfigError: an option is out of range, options do not go together, or there are not so many facts.
    """

    max_new_tokens = 48
    _metric = CONTAINS
    _most = 64  # half of the held-out attributes, so that values can still be distinguished

    def __init__(
        self,
        facts: Sequence[int] | int = FACTS,
        episodes: int = EPISODES,
        seed: int = 0,
        kind: str = STATED,
        delay: Sequence[int] | int = (0,),
        between: str = SMALL_TALK,
        distractors: int = 0,
        session: int | None = None,
        unanswerable: float = 0.0,
        held_out: Sequence[str] = HELD_OUT,
        form: str = "chat",
        talk: float = 1.0,
        third_person: float = 0.25,
        bare: float = 0.0,
        system: str | Literal[False] | None = None,
    ) -> None:
        parts: list[Any] = list(held_out) if isinstance(held_out, list | tuple) else [held_out]
        self._held_out = HeldOut(**{one_of("held_out", part, HELD_OUT): True for part in parts})
        super().__init__(facts, episodes, seed, kind, delay, between, distractors, session, unanswerable)
        self._form = one_of("form", form, tuple(FORMS))
        if form == "plain" and (kind != STATED or self._delays != [0] or session is not None):
            raise ConfigError(
                "A plain conversation is one message.",
                "It has no correction, no delay and no sessions.",
                "Leave out kind, delay and session, or use form=chat.",
            )
        self._talk = _number("talk", talk)
        self._third_person, self._bare = share("third_person", third_person), share("bare", bare)
        if not (system is None or system is False or isinstance(system, str)):
            raise ConfigError(
                "system must be text, or false.", f"It is {system!r}.", "Correct this option of the task."
            )
        self._systems, self._system = ((), None) if system is False else (SYSTEMS, system)

    def variant(self, delay: int) -> list[str]:
        """Return the options that distinguish its conversations from others with the same seed."""
        return [NATURAL, *super().variant(delay)]

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        """Return `contains` and the other requested metrics."""
        assert isinstance(item, AskedFact)
        value, others, knows = item.answers[0], item.others, not declines(answer)
        right = (
            mentions_only(answer, value, [*others, *filter(None, [item.stale])]) if item.is_told else float(not knows)
        )
        scores = {CONTAINS: right}
        if OLD in self.metrics:
            scores[OLD] = mentions_only(answer, item.stale, [*others, value]) if item.stale else 0.0
        if FALSE_ANSWER in self.metrics:
            scores[FALSE_ANSWER] = float(knows and not right)
        return scores

    def _sample(self, rng: random.Random, count: int) -> list[Any]:
        return facts.sample_facts(rng, count, self._held_out, self._third_person, self._bare)

    def _similar_facts(self, rng: random.Random, told_facts: Sequence[Any], count: int) -> list[Any]:
        return facts.similar_facts(rng, told_facts, count, self._held_out)

    def _other_value(self, rng: random.Random, fact: Any, told_facts: Sequence[Any]) -> Any:
        return facts.other_value(rng, fact, told_facts, self._held_out)

    def _untold_fact(self, rng: random.Random, told_facts: Sequence[Any]) -> Any:
        return facts.untold_fact(rng, told_facts, self._held_out, self._third_person)

    def _fact_history(
        self, rng: random.Random, told_facts: Sequence[Any], repeated_fact: Any = None, is_change: bool = False
    ) -> list[Message]:
        messages = fact_conversations.system_prompt(rng, self._form, self._systems, self._system)
        if repeated_fact is None:
            return messages + fact_conversations.fact_history(rng, told_facts, self._form, self._held_out, self._talk)
        messages += fact_conversations.fact_history(
            rng, told_facts, self._form, self._held_out, self._talk, changed=0.0
        )
        if is_change:
            return messages + fact_conversations.statement_exchange(rng, repeated_fact.change(rng, self._held_out))
        sentence = fact_conversations.statement_sentence(rng, repeated_fact, self._form, self._held_out)
        return messages + fact_conversations.statement_exchange(rng, sentence)

    def _small_talk(self, rng: random.Random, turns: int) -> list[Message]:
        return fact_conversations.small_talk(rng, turns)

    def _other_facts(
        self, rng: random.Random, told_facts: Sequence[Any], turns: int
    ) -> tuple[list[Message], list[str]]:
        others = facts.similar_facts(rng, told_facts, min(turns, _OTHERS), self._held_out)
        messages: list[Message] = []
        values: list[str] = []
        for turn in range(turns):
            fact = others[turn % len(others)]
            if turn < len(others):
                sentence = fact_conversations.statement_sentence(rng, fact, self._form, self._held_out)
            else:
                fact = others[turn % len(others)] = facts.other_value(rng, fact, [*told_facts, *others], self._held_out)
                sentence = fact.change(rng, self._held_out)
            messages += fact_conversations.statement_exchange(rng, sentence)
            values.append(fact.value)
        return messages, values

    def _question(self, rng: random.Random, fact: Any) -> str:
        question: str = fact.question(rng, FORMS[self._form], self._held_out)
        return question

    def _answer(self, fact: Any) -> str:
        value: str = fact.value
        return value


def _number(name: str, value: float) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ConfigError(
            f"{name} must be a number, 0 or more.", f"It is {value!r}.", "Correct this option of the task."
        )
    return value
