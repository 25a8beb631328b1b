"""A small task for tests: histories of a few words, with any number of sessions and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from deltamem_tool.data import dialogues
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.scoring.metrics import exact, token_f1
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.task import Item


def history(number: int, sessions: int = 1) -> list[list[dict[str, str]]]:
    return [
        [
            dialogues.user(f"In session {session} my lucky number is {number} times {session}."),
            dialogues.assistant("Good to know."),
        ]
        for session in range(1, sessions + 1)
    ]


def item(number: int, question: int = 0, sessions: int = 1, group: str = "all") -> Item:
    message = dialogues.user(f"Question {question}: what is my lucky number?")
    name = f"history {number}"
    return Item(
        f"{name}/{question}", name, history(number, sessions), [message], [str(number)], group, f"talks:{number}"
    )


def reading(tokenizer, positions=None) -> Subject:
    """A subject of which only the tokenizer and the number of positions are used."""
    return Subject(SimpleNamespace(max_length=positions), tokenizer, None)


def answers(evaluation: Evaluation, condition: str) -> list[str]:
    """All answers under a condition, in the order of the records."""
    return [record.answer for record in evaluation.records if record.condition == condition]


class Asked:
    """A task over the items that it receives."""

    name = "asked"
    metrics = ("exact", "f1")
    max_new_tokens = 6

    def __init__(self, items: Sequence[Item] = ()) -> None:
        self._items = list(items) or [item(number) for number in range(3)]

    def items(self) -> list[Item]:
        return self._items

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        return {"exact": exact(answer, item.answers[0]), "f1": token_f1(answer, item.answers[0])}
