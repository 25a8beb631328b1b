"""How often the model still gives the base model's answer, with a memory that is unrelated to the question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation.scoring.metrics import exact
from deltamem_tool.evaluation.task import Item, require_data
from deltamem_tool.evaluation.tasks.unrelated import read_text, unrelated_conversations

QUESTIONS = Path(__file__).parents[2] / "assets" / "questions.txt"
SAME, SAME_START = "same", "same_start"  # metrics


class Agreement:
    """Questions that need no memory. The correct answer is the base model's greedy answer.

    The scores are whether the whole answer is the same, and as `same_start` whether its first words are.

    Args:
        data: text file with one question per line; by default 200 questions of this package.
        history: conversations in a format of `deltamem train`, from which the memories are written; by default they are
            generated, one per question.
        facts: number of facts in each generated conversation, `unrelated.FACTS` by default; with 0 the memory is empty.
        start: number of words that `same_start` compares.
        new_tokens: maximum length of an answer, in tokens.
        seed: random seed for the generated conversations.

    Raises:
        ConfigError: an option is out of range.
    """

    name = "agreement"
    metrics = (SAME, SAME_START)
    reference = "no_adapter"

    def __init__(
        self,
        data: str | None = None,
        history: str | None = None,
        facts: int | None = None,
        start: int = 8,
        new_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        for option, value in (("words of the start", start), ("tokens of an answer", new_tokens)):
            if type(value) is not int or value < 1:
                raise ConfigError(f"The number of {option} must be 1 or more.", f"It is {value!r}.", "Correct it.")
        self._data = require_data(self.name, str(QUESTIONS) if data is None else data, "questions.txt", history=history)
        self._history, self._facts, self._seed = history, facts, seed
        self._start, self.max_new_tokens = start, new_tokens

    def items(self) -> list[Item]:
        """Return one item per question."""
        lines = [(number, line.strip()) for number, line in enumerate(read_text(self._data).splitlines(), start=1)]
        questions = [(number, line) for number, line in lines if line]
        talks = unrelated_conversations(len(questions), self._facts, self._seed, self._history)
        return [
            Item(
                f"question {number}",
                name,
                history,
                [{"role": "user", "content": line}],
                [],  # the base model's answer, once it is known
                "questions",
                f"{self._data} line {number}",
            )
            for (number, line), (name, history) in zip(questions, talks, strict=True)
        ]

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        """Return `same` and `same_start`. The base model's own answers count as correct."""
        if not item.answers:
            return dict.fromkeys(self.metrics, 1.0)
        (right,) = item.answers
        same_start = answer.split()[: self._start] == right.split()[: self._start]
        return {SAME: exact(answer, right), SAME_START: float(same_start)}
