"""The two conversations of the quickstart: one tells facts, and the other has only their memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from deltamem_tool.chat.conversation import INTERRUPTED, Conversation, Engine, turn_content
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.data import dialogues, facts
from deltamem_tool.data.fact_conversations import phrasings
from deltamem_tool.data.fact_words import CHAT, EVERYTHING
from deltamem_tool.evaluation.scoring.metrics import exact, mentions_only
from deltamem_tool.evaluation.tasks.natural_recall import DIALOGUES, NATURAL, NaturalRecall
from deltamem_tool.evaluation.tasks.recall import Recall
from deltamem_tool.memory.file import read_memory


@dataclass(frozen=True)
class ToldFact:
    """A fact that the first conversation tells and the second asks for.

    Args:
        statement: sentence in which the user states the fact.
        question: question of the user about the fact.
        truth: value that a right answer contains.
        others: values that a right answer does not contain.
        words: option `words` of the recall task, which scores in the same way.
    """

    statement: str
    question: str
    truth: str
    others: tuple[str, ...]
    words: str

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right by the rules of the recall task with the same words."""
        score = exact(answer, self.truth) if self.words == DIALOGUES else mentions_only(answer, self.truth, self.others)
        return bool(score)


@dataclass(frozen=True)
class SecondAnswer:
    """A question of the second conversation, and the answers with and without the memory."""

    question: str
    answer: str
    truth: str
    is_right: bool
    without_memory: str


@dataclass
class TalkResult:
    """The two conversations."""

    exchanges: list[tuple[str, str]] = field(default_factory=list)  # (user, model) of the first
    answers: list[SecondAnswer] = field(default_factory=list)


def told_facts(words: str, count: int, seed: int = 3) -> list[ToldFact]:
    """Draw facts that no training has told, in `dialogues` or `natural` words."""
    rng = random.Random(seed)
    if words == DIALOGUES:
        drawn = dialogues.sample_facts(rng, count, held_out=True)
        statements = [fact.statement(rng) for fact in drawn]
        questions = [fact.question(rng) for fact in drawn]
        truths = [fact.answer for fact in drawn]
    else:
        natural = facts.sample_facts(rng, count, EVERYTHING)
        sentences = phrasings(rng, "chat", EVERYTHING)
        statements = [fact.statement(rng, next(sentences)) for fact in natural]
        questions = [fact.question(rng, CHAT, EVERYTHING) for fact in natural]
        truths = [fact.value for fact in natural]
    return [
        ToldFact(statement, question, truth, tuple(other for other in truths if other != truth), words)
        for statement, question, truth in zip(statements, questions, truths, strict=True)
    ]


def remember(
    engine: Engine,
    memory_file: Path,
    told: list[ToldFact],
    system: str | None = None,
    report: Callable[[int, int], None] | None = None,
) -> TalkResult:
    """One conversation tells facts and saves its memory; a second has an empty context and only the file.

    Args:
        engine: the model.
        memory_file: file of the memory.
        told: the facts.
        system: system prompt of both conversations; None for what the chat template adds by itself.
        report: called with the number of finished turns, and of all.
    """
    remembered, first = TalkResult(), Conversation(engine)
    sampling = Sampling(max_new_tokens=_TASKS[told[0].words].max_new_tokens)
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(done, 2 * len(told))

    for fact in told:
        remembered.exchanges.append((fact.statement, _answer(first, fact.statement, system, sampling)))
        tell()
    first.save_memory(memory_file)
    memory = read_memory(memory_file)
    for fact in told:
        answer = _answer(Conversation(engine, memory, write=False), fact.question, system, sampling)
        without = _answer(Conversation(engine, write=False), fact.question, system, sampling)
        again = SecondAnswer(fact.question, answer, fact.truth, fact.is_right(answer), without)
        remembered.answers.append(again)
        tell()
    return remembered


_TASKS = {DIALOGUES: Recall, NATURAL: NaturalRecall}


def _answer(conversation: Conversation, text: str, system: str | None, sampling: Sampling) -> str:
    """Return the answer. An interrupt ends the whole quickstart."""
    answer = conversation.generate(turn_content(conversation, text, system), sampling)
    if answer.why == INTERRUPTED:
        raise KeyboardInterrupt
    return answer.text
