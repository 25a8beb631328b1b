"""Conversations that tell natural facts: a single short message, or a chat with small talk, replies and corrections."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from deltamem_tool.data.dialogues import Message, assistant, user
from deltamem_tool.data.fact_words import ACKNOWLEDGEMENTS, CHAT, PLAIN, SMALL_TALK, HeldOut, Phrases
from deltamem_tool.data.facts import Fact, other_value, untold_fact

FORMS: dict[str, Phrases] = {"plain": PLAIN, "chat": CHAT}
_SYSTEM = 0.5  # probability that a chat has a system prompt,
_CHANGED = 0.1  # that one of its facts is told wrongly first,
_TOGETHER = 0.15  # that a message states the next fact too,
_ASKED = 0.15  # and that a statement is followed by a question about what was told so far


def system_prompt(rng: random.Random, form: str, systems: Sequence[str], system: str | None = None) -> list[Message]:
    """Draw the system prompt of a conversation: `system`, or in a chat none or one of `systems`."""
    if system is None and systems and form == "chat" and rng.random() < _SYSTEM:
        system = rng.choice(systems)
    return [] if system is None else [{"role": "system", "content": system}]


def fact_history(
    rng: random.Random,
    facts: Sequence[Fact],
    form: str,
    held_out: HeldOut,
    talk: float = 0.0,
    changed: float = _CHANGED,
    unanswerable: float = 0.0,
) -> list[Message]:
    """Draw a conversation that states `facts` in order.

    Args:
        rng: what it is drawn with.
        facts: what is true in the end.
        form: "plain": one message. "chat": statements, replies, now and then a question and its answer, and with
            probability `changed` one fact is first stated with another value and corrected later.
        held_out: which words no training sees.
        talk: mean number of turns of small talk before each statement of a chat.
        changed: see `form`.
        unanswerable: the share of the questions in a chat that are about something which has not been told.
    """
    statements = [
        (fact, fact.statement(rng, phrasing))
        for fact, phrasing in zip(facts, phrasings(rng, form, held_out), strict=False)
    ]
    if form == "plain":
        return [user(" ".join(sentence for _, sentence in statements))]
    if facts and rng.random() < changed:
        index = rng.randrange(len(facts))
        fact = facts[index]
        stale = other_value(rng, fact, facts, held_out)
        statements[index] = (stale, statement_sentence(rng, stale, form, held_out))
        statements.insert(rng.randint(index + 1, len(statements)), (fact, fact.change(rng, held_out)))
    remarks = _remarks(rng)
    messages: list[Message] = []
    known_facts: dict[object, Fact] = {}
    while statements:
        together = statements[: 1 + (rng.random() < _TOGETHER)]
        del statements[: len(together)]
        messages += _turns(rng, talk, remarks)
        messages += statement_exchange(rng, " ".join(sentence for _, sentence in together))
        known_facts |= {fact.key: fact for fact, _ in together}
        if rng.random() < _ASKED:
            so_far = list(known_facts.values())
            if unanswerable and rng.random() < unanswerable:
                messages += unanswerable_exchange(rng, untold_fact(rng, [*so_far, *facts], held_out), form, held_out)
            else:
                messages += question_exchange(rng, rng.choice(so_far), form, held_out)
    return messages


def phrasings(rng: random.Random, form: str, held_out: HeldOut) -> Iterator[str]:
    """Draw phrasings of statements: none comes again before all have come."""
    templates = FORMS[form].statements[held_out.phrasings]
    return itertools.cycle(rng.sample(templates, len(templates)))


def statement_sentence(rng: random.Random, fact: Fact, form: str, held_out: HeldOut) -> str:
    """Draw a sentence in which the user states a fact."""
    return fact.statement(rng, next(phrasings(rng, form, held_out)))


def statement_exchange(rng: random.Random, sentence: str) -> list[Message]:
    """Draw a turn in which the user says a sentence."""
    return [user(sentence), assistant(rng.choice(ACKNOWLEDGEMENTS))]


def small_talk(rng: random.Random, turns: float) -> list[Message]:
    """Draw turns that state no fact, `turns` in the mean: as many as its whole part, or one more."""
    return _turns(rng, turns, _remarks(rng))


def _turns(rng: random.Random, turns: float, remarks: Iterator[tuple[str, str]]) -> list[Message]:
    pairs = itertools.islice(remarks, int(turns) + (rng.random() < turns % 1))
    return [message for remark, reply in pairs for message in (user(remark), assistant(reply))]


def _remarks(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Remarks and replies: none comes again before all have come."""
    return itertools.cycle(rng.sample(SMALL_TALK, len(SMALL_TALK)))


def question_exchange(rng: random.Random, fact: Fact, form: str, held_out: HeldOut) -> list[Message]:
    """Draw a question about a fact that was told, and its answer."""
    return [user(fact.question(rng, FORMS[form], held_out)), assistant(fact.answer)]


def unanswerable_exchange(rng: random.Random, fact: Fact, form: str, held_out: HeldOut) -> list[Message]:
    """Draw a question about a fact that was never told, and the answer that says so."""
    return [user(fact.question(rng, FORMS[form], held_out)), assistant(fact.unknown_answer)]
