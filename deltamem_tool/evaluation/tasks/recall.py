"""Recall of facts: a conversation tells facts, and a question asks for one of them.

Every fact is a held-out pair, so no answer appeared in training. `NaturalRecall` asks in the same way for other facts
(`natural_recall.py`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamem_tool.data import dialogues
from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation import EPISODES, FACTS
from deltamem_tool.evaluation.scoring.metrics import exact, normalise
from deltamem_tool.evaluation.task import Item
from deltamem_tool.segments.messages import Message

STATED, CHANGED, CONTRADICTED = "stated", "changed", "contradicted"
SMALL_TALK, OTHER_FACTS = "small_talk", "facts"
EXACT, OLD, FALSE_ANSWER = "exact", "old", "false_answer"  # metrics
NEVER_TOLD = "never told"  # in the names of groups
_VALUES = {normalise(value) for kind in dialogues.KINDS for value in kind.values}


@dataclass(frozen=True)
class AskedFact(Item):
    """A question about a fact.

    Args:
        stale: for a fact that was told twice, the answer with the first value.
        others: values of the other facts in the conversation.
        is_told: whether the fact was told at all.
    """

    stale: str = ""
    others: tuple[str, ...] = ()
    is_told: bool = True


class Recall:
    """`episodes` conversations for each number of `facts` and each `delay`.

    The score is whether the whole answer is the expected one. For facts that were told twice, `old` is whether the
    answer is the one with the first value. If some questions are `unanswerable`, `false_answer` is whether the answer
    names a wrong value.

    Args:
        facts: number of facts that are told, one of which is asked for.
        episodes: number of conversations for each number of facts and each delay.
        kind: how the fact was told. `stated`: once. `changed`: first with another value, then corrected ("Actually, my
            dog is Rex."). `contradicted`: the same, but the second statement does not mark a correction. The last
            statement is the correct one.
        delay: number of turns between the fact and the question.
        between: content of these turns: `small_talk`, or `facts` about other attributes, each stated once and then
            changed.
        distractors: number of further facts that are never asked for. They are of the same kind as the requested fact
            as long as there are any (the names of a cat, a horse and a parrot for that of a dog), then of other kinds.
        session: number of turns per session. Each session of a history is written in a separate context; by default,
            there is only one.
        unanswerable: share of conversations whose question is about something that was never told, in half of them of
            the same kind as a fact that was told. They form separate groups. The correct answer says so.
        seed: random seed.

    Raises:
        ConfigError: an option is out of range, or there are not so many facts.
    """

    name = "recall"
    max_new_tokens = 24
    _metric = EXACT
    _most = len(dialogues.KIND_OF)  # facts that a conversation can tell

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
    ) -> None:
        self._facts = _numbers("numbers of facts", facts, 1, self._most)
        self._delays = _numbers("delays", delay, 0)
        (self._episodes,) = _numbers("episodes", episodes, 1)
        (self._distractors,) = _numbers("distractors", distractors, 0)
        self._session = None if session is None else _numbers("turns of a session", session, 1)[0]
        self._kind = one_of("kind", kind, (STATED, CHANGED, CONTRADICTED))
        self._between = one_of("between", between, (SMALL_TALK, OTHER_FACTS))
        self._seed = seed
        self._unanswerable = _questions("unanswerable", unanswerable, self._episodes)
        told_twice = [OLD] if kind != STATED else []
        self.metrics: Sequence[str] = (self._metric, *told_twice, *([FALSE_ANSWER] if self._unanswerable else []))
        count = max(self._facts) + self._distractors
        others = ["the delay"] if between == OTHER_FACTS and max(self._delays) > 0 else []
        others += ["a question about none of them"] if self._unanswerable else []
        if count > self._most - len(others):
            raise ConfigError(
                f"A conversation can tell at most {self._most} facts.",
                f"This one tells {count}" + (f", which leaves none for {' and '.join(others)}." if others else "."),
                "Choose fewer facts or distractors.",
            )

    def items(self) -> list[Item]:
        """Return one item per conversation."""
        return [item for count in self._facts for delay in self._delays for item in self._conversations(count, delay)]

    def _conversations(self, facts: int, delay: int) -> list[Item]:
        rng = random.Random("/".join(["recall", str(self._seed), str(facts), *self.variant(delay)]))
        group = f"{facts} fact{'s' * (facts > 1)}"
        if self._delays != [0]:
            group += f", {delay} turn{'s' * (delay != 1)} later"
        never_told = set(random.Random(f"{group}/{self._seed}").sample(range(self._episodes), self._unanswerable))
        return [
            self._item(rng, group, f"{group}, conversation {n}", facts, delay, n in never_told)
            for n in range(self._episodes)
        ]

    def variant(self, delay: int) -> list[str]:
        """Return the options that change the conversations; without options, they are always the same."""
        parts = [] if self._kind == STATED else [self._kind]
        parts += [f"{delay} {self._between}"] if delay else []
        return parts + ([f"{self._distractors} distractors"] if self._distractors else [])

    def _item(self, rng: random.Random, group: str, name: str, facts: int, delay: int, never_told: bool) -> Item:
        chosen = self._sample(rng, facts)
        asked_fact = rng.choice(chosen)
        if self._distractors:
            others = [fact for fact in chosen if fact != asked_fact]
            chosen += self._similar_facts(rng, [asked_fact, *others], self._distractors)
            rng.shuffle(chosen)
        messages, stale = self._messages(rng, chosen, asked_fact)
        other_rng = random.Random(f"{name}/{self._seed}")  # so that all other conversations stay as they are
        unsaid = self._untold_fact(other_rng, chosen) if never_told else None
        said_later: list[str] = []
        if delay and self._between == OTHER_FACTS:
            turns, said_later = self._other_facts(rng, chosen, delay)
            if unsaid is not None:  # which these turns must not tell either
                turns, said_later = self._other_facts(other_rng, [*chosen, unsaid], delay)
            messages += turns
        else:
            messages += self._small_talk(rng, delay)
        question = self._question(rng, asked_fact)
        if unsaid is not None:
            question = self._question(other_rng, unsaid)
        system, history = _sessions(messages, self._session)
        return AskedFact(
            id=name,
            history_id=name,
            history=history,
            question=[*system, dialogues.user(question)],
            answers=[self._answer(asked_fact) if unsaid is None else self._unknown_answer(unsaid)],
            group=group if unsaid is None else f"{group}, {NEVER_TOLD}",
            where=name,
            stale="" if stale is None or unsaid is not None else self._answer(stale),
            others=(*(fact.value for fact in chosen if fact != asked_fact), *said_later),
            is_told=unsaid is None,
        )

    def _messages(self, rng: random.Random, facts: Sequence[Any], asked_fact: Any) -> tuple[list[Message], Any]:
        """Return a conversation that tells `facts`, and the former value of `asked_fact` if it was told twice."""
        if self._kind == STATED:
            return self._fact_history(rng, facts), None
        stale = self._other_value(rng, asked_fact, facts)
        first = [stale if fact == asked_fact else fact for fact in facts]
        return self._fact_history(rng, first, asked_fact, is_change=self._kind == CHANGED), stale

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        """Return the deciding metric and the other requested ones."""
        scores = {EXACT: exact(answer, item.answers[0])}
        if OLD in self.metrics:
            scores[OLD] = exact(answer, item.stale) if isinstance(item, AskedFact) and item.stale else 0.0
        if FALSE_ANSWER in self.metrics:
            scores[FALSE_ANSWER] = float(bool(_values_in(answer) - _values_in(item.answers[0])))
        return scores

    # Parts of the conversations. `facts` have the type that `_sample` draws, with a `value`.

    def _sample(self, rng: random.Random, count: int) -> list[Any]:
        return dialogues.sample_facts(rng, count, held_out=True)

    def _similar_facts(self, rng: random.Random, facts: Sequence[Any], count: int) -> list[Any]:
        return dialogues.similar_facts(rng, facts, count, held_out=True)

    def _other_value(self, rng: random.Random, fact: Any, facts: Sequence[Any]) -> Any:
        return dialogues.sample_value(rng, fact.attribute, held_out=True, other_than=fact.value)

    def _untold_fact(self, rng: random.Random, facts: Sequence[Any]) -> Any:
        return dialogues.untold_fact(rng, facts, held_out=True)

    def _fact_history(
        self, rng: random.Random, facts: Sequence[Any], repeated_fact: Any = None, is_change: bool = False
    ) -> list[Message]:
        """Return a conversation that tells `facts` and ends with `repeated_fact`, if there is one."""
        if repeated_fact is None:
            return dialogues.fact_history(rng, facts, held_out=True)
        sentence = repeated_fact.change(rng) if is_change else repeated_fact.statement(rng)
        messages = dialogues.fact_history(rng, facts, held_out=True, changed=0.0)
        return messages + dialogues.statement_exchange(rng, sentence)

    def _small_talk(self, rng: random.Random, turns: int) -> list[Message]:
        return dialogues.small_talk(rng, turns)

    def _other_facts(self, rng: random.Random, facts: Sequence[Any], turns: int) -> tuple[list[Message], list[str]]:
        """Return turns that tell other facts, and the values of these if they are scored."""
        return dialogues.other_facts(rng, facts, turns, held_out=True), []

    def _question(self, rng: random.Random, fact: Any) -> str:
        question: str = fact.question(rng)
        return question

    def _answer(self, fact: Any) -> str:
        answer: str = fact.answer
        return answer

    def _unknown_answer(self, fact: Any) -> str:
        unknown: str = fact.unknown_answer
        return unknown


def _values_in(answer: str) -> set[str]:
    """Return all values of any kind that occur in an answer as words."""
    return {word for word in normalise(answer).split() if word in _VALUES}


def _sessions(messages: Sequence[Message], turns: int | None) -> tuple[list[Message], list[list[Message]]]:
    """Return the system prompt, if there is one, and the sessions, each of which starts with it."""
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turned = messages[len(system) :]
    size = len(turned) if turns is None else 2 * turns
    return system, [[*system, *turned[start : start + size]] for start in range(0, len(turned), size)]


def _numbers(name: str, value: Sequence[int] | int, least: int, most: int | None = None) -> list[int]:
    """Return one integer or several as a list."""
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not numbers or not all(type(n) is int and least <= n and (most is None or n <= most) for n in numbers):
        bounds = f"from {least} to {most}" if most is not None else f"{least} or more"
        raise ConfigError(f"The {name} must be {bounds}.", f"It is {value!r}.", "Correct this option of the task.")
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"The {name} contain a duplicate.", f"They are {value!r}.", "Leave the duplicate out.")
    return numbers


def share(name: str, value: float) -> float:
    """Check an option that is a share.

    Raises:
        ConfigError: the option is not a number from 0 to 1.
    """
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ConfigError(
            f"{name} must be a share, from 0 to 1.", f"It is {value!r}.", "Correct this option of the task."
        )
    return value


def _questions(name: str, value: float, of: int) -> int:
    """Convert a share to a number of questions, at least one if it is above 0."""
    count = round(share(name, value) * of)
    if value > 0 and count == 0:
        raise ConfigError(
            f"{name} is too small for a single question.",
            f"A share of {value} of {of} conversations is less than one conversation.",
            "Ask for more episodes, or a larger share.",
        )
    return count


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """Check an option that is one of a few words.

    Raises:
        ConfigError: the option is none of them.
    """
    if value not in known:
        raise ConfigError(f"The recall task has no {name} {value!r}.", "", f"Choose from {', '.join(known)}.")
    return value
