"""Small English dialogues in which people state, change and ask for facts.

The shipped backbone, the quickstart and the `recall` task use them. Their words are in `assets/dialogues.toml`. A fact
is an (attribute, value) pair such as (sister, Anna). A fifth of each attribute's values is *held out*, chosen by
checksum: no conversation for training contains a pair that a conversation for evaluation uses.
"""

from __future__ import annotations

import random
import tomllib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from deltamem_tool.io.names import ASSETS

HELD_OUT_SHARE = 5  # one value in five, for every attribute

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Kind:
    """Attributes that take the same values and are asked for in the same words."""

    question: str
    attributes: tuple[str, ...]
    values: tuple[str, ...]


_WORDS = tomllib.loads((ASSETS / "dialogues.toml").read_text(encoding="utf-8"))
KINDS = tuple(Kind(kind["question"], tuple(kind["attributes"]), tuple(kind["values"])) for kind in _WORDS["kinds"])
KIND_OF = {attribute: kind for kind in KINDS for attribute in kind.attributes}
STATEMENTS: tuple[str, ...] = tuple(_WORDS["statements"])
CHANGES: tuple[str, ...] = tuple(_WORDS["changes"])
QUESTIONS: tuple[str, ...] = tuple(_WORDS["questions"])
ACKNOWLEDGEMENTS: tuple[str, ...] = tuple(_WORDS["acknowledgements"])
SMALL_TALK: tuple[tuple[str, str], ...] = tuple((remark, reply) for remark, reply in _WORDS["small_talk"])
ANSWER = "Your {a} is {v}."
UNKNOWN = "You have not told me about your {a}."


@dataclass(frozen=True)
class Fact:
    """An attribute of the user and its value."""

    attribute: str
    value: str

    def say(self, form: str) -> str:
        """Fill a sentence form, in which {a} is the attribute and {v} the value."""
        return form.format(a=self.attribute, v=self.value)

    def statement(self, rng: random.Random) -> str:
        """Draw a sentence that states the fact."""
        return self.say(rng.choice(STATEMENTS))

    def change(self, rng: random.Random) -> str:
        """Draw a sentence that corrects an earlier value."""
        return self.say(rng.choice(CHANGES))

    def question(self, rng: random.Random) -> str:
        """Draw a question: half of them are general, half in the words of the attribute's kind."""
        return self.say(rng.choice((rng.choice(QUESTIONS), KIND_OF[self.attribute].question)))

    @property
    def answer(self) -> str:
        """The answer where the fact was stated."""
        return self.say(ANSWER)

    @property
    def unknown_answer(self) -> str:
        """The answer where the fact was never stated."""
        return self.say(UNKNOWN)


def user(content: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A message of the assistant."""
    return {"role": "assistant", "content": content}


def _split(attribute: str) -> tuple[list[Fact], list[Fact]]:
    """All facts about one attribute: those for training, those held out."""
    facts = [Fact(attribute, value) for value in KIND_OF[attribute].values]
    facts.sort(key=lambda fact: zlib.crc32(f"{fact.attribute}={fact.value}".encode()))
    held_out = len(facts) // HELD_OUT_SHARE
    return facts[held_out:], facts[:held_out]


SPLITS = {attribute: _split(attribute) for attribute in KIND_OF}


def sample_facts(rng: random.Random, count: int, held_out: bool, kinds: int = len(KINDS)) -> list[Fact]:
    """Draw `count` facts about different attributes, every one of them from the held-out pairs, or none.

    With few `kinds` (as many as `count` attributes need, at least) they are alike, and telling them apart takes more
    than knowing what sort of value goes with a question.
    """
    attributes = [attribute for kind in rng.sample(KINDS, kinds) for attribute in kind.attributes]
    return [sample_value(rng, attribute, held_out) for attribute in rng.sample(attributes, count)]


def sample_value(rng: random.Random, attribute: str, held_out: bool, other_than: str | None = None) -> Fact:
    """Draw a fact about `attribute`."""
    return rng.choice([fact for fact in SPLITS[attribute][held_out] if fact.value != other_than])


def fact_history(
    rng: random.Random,
    facts: Sequence[Fact],
    held_out: bool,
    small_talk: float = 0.25,
    changed: float = 0.1,
    asked: float = 0.0,
    unanswerable: float = 0.0,
) -> list[Message]:
    """Draw a conversation that states `facts` in order.

    Before each statement comes a turn of small talk with probability `small_talk`, and after it, with probability
    `asked`, a question about something told so far, answered as it stands then. The share `unanswerable` of these
    questions, one before the first statement among them, is about something that has not been told until then. With
    probability `changed` one fact is first stated with another value (of the same split) and corrected afterwards:
    `facts` holds what is true in the end.
    """
    statements = [(fact, fact.statement(rng)) for fact in facts]
    if facts and rng.random() < changed:
        index = rng.randrange(len(facts))
        fact = facts[index]
        stale = sample_value(rng, fact.attribute, held_out, other_than=fact.value)
        statements[index] = (stale, stale.statement(rng))
        statements.insert(rng.randint(index + 1, len(statements)), (fact, fact.change(rng)))
    messages = []
    known: dict[str, Fact] = {}
    if unanswerable and rng.random() < asked * unanswerable:
        messages += unanswerable_exchange(rng, untold_fact(rng, (), held_out))
    for fact, sentence in statements:
        if rng.random() < small_talk:
            remark, reply = rng.choice(SMALL_TALK)
            messages += [user(remark), assistant(reply)]
        messages += statement_exchange(rng, sentence)
        known[fact.attribute] = fact
        if asked and rng.random() < asked:
            so_far = list(known.values())
            if unanswerable and rng.random() < unanswerable:
                messages += unanswerable_exchange(rng, untold_fact(rng, so_far, held_out))
            else:
                messages += question_exchange(rng, rng.choice(so_far))
    return messages


def statement_exchange(rng: random.Random, sentence: str) -> list[Message]:
    """Draw a turn in which the user says a sentence."""
    return [user(sentence), assistant(rng.choice(ACKNOWLEDGEMENTS))]


def small_talk(rng: random.Random, turns: int) -> list[Message]:
    """Draw turns that state no fact."""
    pairs = [rng.choice(SMALL_TALK) for _ in range(turns)]
    return [message for remark, reply in pairs for message in (user(remark), assistant(reply))]


def other_facts(rng: random.Random, facts: Sequence[Fact], turns: int, held_out: bool) -> list[Message]:
    """Draw turns about other attributes than those of `facts`: each is stated, and once all have been, changed."""
    attributes = _other_attributes(rng, facts)
    known: dict[str, str] = {}
    messages = []
    for turn in range(turns):
        attribute = attributes[turn % len(attributes)]
        fact = sample_value(rng, attribute, held_out, other_than=known.get(attribute))
        messages += statement_exchange(rng, fact.change(rng) if attribute in known else fact.statement(rng))
        known[attribute] = fact.value
    return messages


def _other_attributes(rng: random.Random, facts: Sequence[Fact]) -> list[str]:
    """The attributes that none of `facts` is about, in random order."""
    attributes = sorted(KIND_OF.keys() - {fact.attribute for fact in facts})
    rng.shuffle(attributes)
    return attributes


def similar_facts(rng: random.Random, facts: Sequence[Fact], count: int, held_out: bool) -> list[Fact]:
    """Draw `count` facts about other attributes, those nearest to `facts` first.

    Those of the kind of the first of `facts` come before those of the others' kinds, and these before all others.
    """
    kinds = [KIND_OF[fact.attribute] for fact in facts]
    rank = {attribute: kinds.index(kind) if kind in kinds else len(kinds) for attribute, kind in KIND_OF.items()}
    nearest = sorted(_other_attributes(rng, facts), key=lambda attribute: rank[attribute])[:count]
    return [sample_value(rng, attribute, held_out) for attribute in nearest]


def question_exchange(rng: random.Random, fact: Fact) -> list[Message]:
    """Draw a question about one fact, and its answer."""
    return [user(fact.question(rng)), assistant(fact.answer)]


def untold_fact(rng: random.Random, facts: Sequence[Fact], held_out: bool) -> Fact:
    """Draw a fact about another attribute than those of `facts`: half of the time one of the kind of one of these."""
    if facts and rng.random() < 0.5:
        kind = KIND_OF[rng.choice(facts).attribute]
        others = [a for a in kind.attributes if a not in {fact.attribute for fact in facts}]
        if others:
            return sample_value(rng, rng.choice(others), held_out)
    return sample_value(rng, _other_attributes(rng, facts)[0], held_out)


def unanswerable_exchange(rng: random.Random, fact: Fact) -> list[Message]:
    """Draw a question about a fact that was never stated, and the answer that says so."""
    return [user(fact.question(rng)), assistant(fact.unknown_answer)]


def lexicon() -> list[str]:
    """List every sentence form and value, for building a vocabulary: all the text of these dialogues."""
    sentences = [*ACKNOWLEDGEMENTS, *(text for pair in SMALL_TALK for text in pair)]
    rng = random.Random(0)
    for kind in KINDS:
        for index, value in enumerate(kind.values):
            fact = Fact(kind.attributes[index % len(kind.attributes)], value)
            sentences += [
                fact.say(form) for form in (*STATEMENTS, *CHANGES, *QUESTIONS, kind.question, ANSWER, UNKNOWN)
            ]
    rng.shuffle(sentences)
    return sentences
