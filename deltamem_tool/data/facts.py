"""Natural facts about the user and other people: draw, state, correct, ask for and answer them.

A `HeldOut` (`fact_words`) says which of their words never appear in training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltamem_tool.data.fact_words import (
    ATTRIBUTES,
    CLAUSES,
    CORRECTIONS,
    NAMES,
    UNTOLD_VALUE,
    WORDS,
    HeldOut,
    Kind,
    Phrases,
)

SAME_ATTRIBUTE = 0.1  # probability that a fact is about an attribute of which another person's value is told too
_TRIES = 20  # to draw a value that can be told from all others, before another attribute is taken
_IGNORED = re.compile(r"\b(a|an|the)\b|[\W_]+")


@dataclass(frozen=True)
class Fact:
    """An attribute and its value; of the user, unless `owner` names somebody else."""

    kind: Kind
    attribute: str
    value: str
    owner: str | None = None

    @property
    def key(self) -> tuple[str | None, str]:
        """Owner and attribute, which have one value."""
        return self.owner, self.attribute

    def statement(self, rng: random.Random, phrasing: str) -> str:
        """Fill a sentence in which the user states the fact."""
        return self._said(rng, phrasing)

    def change(self, rng: random.Random, held_out: HeldOut) -> str:
        """Draw a sentence in which the user corrects an earlier value."""
        return self._said(rng, rng.choice(CORRECTIONS[held_out.phrasings]))

    def question(self, rng: random.Random, phrases: Phrases, held_out: HeldOut) -> str:
        """Draw a sentence in which the user asks for the value."""
        return self._said(rng, rng.choice(phrases.questions[held_out.phrasings]))

    @property
    def answer(self) -> str:
        """The assistant's answer where the fact was stated."""
        return self._said(None, "{Answer}.")

    @property
    def unknown_answer(self) -> str:
        """The assistant's answer where the fact was never stated."""
        # "is", where others are "at" or "on": what is unknown has no preposition.
        return replace(self, kind=replace(self.kind, is_="is"), value=UNTOLD_VALUE).answer

    @property
    def topic(self) -> str:
        """The topic in the words of the user: "my dentist", "Anna's dentist", "I … breakfast"."""
        words = self._words("I", "my")
        return words["n"] if self.kind.clause == "is" else f"{words['s']} … {self.attribute}"

    def _words(self, me: str, mine: str) -> dict[str, str]:
        """The words for the slots of clauses, if the user is `me`."""
        possessive = "the" if not self.kind.is_owned else mine if self.owner is None else f"{self.owner}'s"
        ending = "" if self.owner is None else "s"
        verbs = {verb: f"{verb}{ending}" for verb in ("prefer", "like", "want")}
        return {
            "n": f"{possessive} {self.attribute}",
            "s": self.owner or me,
            "a": self.attribute,
            "v": self.value,
            "is": self.kind.is_,
            "asked": self.kind.asked,
            "do": "do" if self.owner is None else "does",
            **verbs,
        }

    def _said(self, rng: random.Random | None, sentence: str) -> str:
        """Fill a sentence: with the user's clauses, drawn by `rng`, or without one with the assistant's, the first."""
        words = self._words("you", "your") if rng is None else self._words("I", "my")
        clauses: dict[str, str] = {}
        for slot, forms in CLAUSES[self.kind.clause].items():
            if f"{{{slot}}}" in sentence.lower():
                text = (forms[0] if rng is None else rng.choice(forms)).format_map(words)
                clauses |= {slot: text, slot.capitalize(): text[0].upper() + text[1:]}
        return sentence.format_map(clauses)


def sample_facts(
    rng: random.Random, count: int, held_out: HeldOut, third_person: float = 0.0, bare: float = 0.0
) -> list[Fact]:
    """Draw `count` facts that can be told apart: no value occurs in what is said of another fact.

    Args:
        rng: what they are drawn with.
        count: how many.
        held_out: which of their words no training sees.
        third_person: probability that a fact is somebody else's, such as Anna's.
        bare: probability that a value is any word of the word list, whatever it is about.
    """
    facts: list[Fact] = []
    while len(facts) < count:
        fact = _sample(rng, facts, held_out, third_person, bare)
        if _is_apart(fact, facts):
            facts.append(fact)
    return facts


def other_value(rng: random.Random, fact: Fact, facts: Sequence[Fact], held_out: HeldOut) -> Fact:
    """Draw `fact` with another value, which occurs in none of `facts`."""
    others = [other for other in facts if other != fact]
    is_bare = fact.value in WORDS[held_out.values]
    while True:
        other = replace(fact, value=_value(rng, fact.kind, held_out, float(is_bare)))
        if _is_apart(other, others) and not _overlap(other.value, fact.value):
            return other


def untold_fact(
    rng: random.Random, facts: Sequence[Fact], held_out: HeldOut, third_person: float = 0.0, kin: float = 0.5
) -> Fact:
    """Draw a fact that is none of `facts`, with probability `kin` about an attribute of the kind of one of them."""
    while True:
        fact = _sample(rng, facts, held_out, third_person, 0.0)
        if facts and rng.random() < kin:
            told = rng.choice(facts)
            attribute = rng.choice(told.kind.attributes[held_out.attributes])
            value = told.kind.value(rng, held_out.values)
            fact = Fact(told.kind, attribute, value, _owner(rng, told.kind, held_out, third_person))
        if _is_apart(fact, facts):
            return fact


def similar_facts(rng: random.Random, facts: Sequence[Fact], count: int, held_out: HeldOut) -> list[Fact]:
    """Draw `count` facts of the user about other attributes than those of `facts`.

    Those of the kind of the first of `facts` come before those of the others' kinds, and these before all others.
    """
    kinds = [fact.kind for fact in facts]
    attributes = rng.sample(ATTRIBUTES[held_out.attributes], len(ATTRIBUTES[held_out.attributes]))
    attributes.sort(key=lambda pair: kinds.index(pair[0]) if pair[0] in kinds else len(kinds))
    told = list(facts)
    for kind, attribute in attributes:
        if len(told) == len(facts) + count:
            break
        if all(attribute != fact.attribute for fact in told):
            drawn = (Fact(kind, attribute, kind.value(rng, held_out.values)) for _ in range(_TRIES))
            told += [fact for fact in drawn if _is_apart(fact, told)][:1]
    return told[len(facts) :]


def _sample(rng: random.Random, facts: Sequence[Fact], held_out: HeldOut, third_person: float, bare: float) -> Fact:
    """A fact which may not be apart from `facts`."""
    kind, attribute = rng.choice(ATTRIBUTES[held_out.attributes])
    if third_person and facts and rng.random() < SAME_ATTRIBUTE:
        told = rng.choice(facts)
        kind, attribute = told.kind, told.attribute
    return Fact(kind, attribute, _value(rng, kind, held_out, bare), _owner(rng, kind, held_out, third_person))


def _value(rng: random.Random, kind: Kind, held_out: HeldOut, bare: float) -> str:
    if bare and rng.random() < bare:
        return rng.choice(WORDS[held_out.values])
    return kind.value(rng, held_out.values)


def _owner(rng: random.Random, kind: Kind, held_out: HeldOut, third_person: float) -> str | None:
    if not kind.is_owned or rng.random() >= third_person:
        return None
    return rng.choice(NAMES[held_out.values])


def _is_apart(fact: Fact, facts: Sequence[Fact]) -> bool:
    """Return whether the value of `fact` does not occur in texts about `facts`, nor their values in its texts."""
    if _within(fact.value, fact.topic):
        return False
    return all(
        fact.key != other.key
        and not _overlap(fact.value, other.value)
        and not _within(fact.value, other.topic)
        and not _within(other.value, fact.topic)
        for other in facts
    )


def _overlap(one: str, other: str) -> bool:
    return _within(one, other) or _within(other, one)


def _within(value: str, text: str) -> bool:
    """Return whether a value occurs in a text by its letters and digits, so that no score is more lenient."""
    return _letters(value) in _letters(text)


def _letters(text: str) -> str:
    return _IGNORED.sub("", text.lower())
