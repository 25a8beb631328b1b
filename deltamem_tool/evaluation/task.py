"""The interface of a task, whose items have a history, a question and correct answers; and how tasks are found."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from numbers import Real
from typing import Any, Protocol, cast

from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation import RECALL
from deltamem_tool.evaluation.scoring.statistics import ROUNDING
from deltamem_tool.segments.messages import Message

ENTRY_POINTS = "deltamem.tasks"  # the group in which another package names its tasks
_HERE = "deltamem_tool.evaluation.tasks"
TASKS = {
    RECALL: f"{_HERE}.natural_recall:recall",
    "locomo": f"{_HERE}.locomo:LoCoMo",
    "hotpotqa": f"{_HERE}.hotpotqa:HotpotQA",
    "memoryagentbench": f"{_HERE}.memoryagentbench:MemoryAgentBench",
    "perplexity": f"{_HERE}.perplexity:Perplexity",
    "agreement": f"{_HERE}.agreement:Agreement",
    "text": f"{_HERE}.text:Text",
}


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        id: name of the item in records; the same in every run.
        history_id: name of the history. Items of one history share its memory, and are resampled together.
        history: sessions, oldest first. The memory is written from them, and a protocol may show some of them.
        question: messages that are shown in every condition; the last one is the user's.
        answers: correct answers; any of them counts.
        group: group in the report, such as "4 facts" or "multi-hop".
        where: file and position, for error messages.
        query: query for retrieval, which is the question without instructions; the last message by default.
        new_tokens: maximum length of the answer, in tokens; the task's `max_new_tokens` by default.
        template_kwargs: further arguments for the chat template, such as `tools`; the same for all items of a history.
    """

    id: str
    history_id: str
    history: Sequence[Sequence[Message]]
    question: Sequence[Message]
    answers: Sequence[str]
    group: str
    where: str
    query: str = ""
    new_tokens: int | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A task. `metrics` are the names of the scores that `score` returns; the first one decides.

    A task may name a condition as its `reference`. The answers under that condition are then the correct ones for all
    other conditions, and the `answers` of the items are empty until it has been asked.
    """

    @property
    def name(self) -> str:
        """The name of the task."""

    @property
    def metrics(self) -> Sequence[str]:
        """The names of the scores that `score` returns."""

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of an answer, in tokens."""

    def items(self) -> list[Item]:
        """Return all items, in the same order every time.

        Raises:
            DataError: a file has another format, or an item lacks a required field; the message names file and item.
        """

    def score(self, item: Item, answer: str) -> Mapping[str, float]:
        """Return the scores of an answer, from 0 to 1, by metric."""


class LikelihoodTask(Protocol):
    """A task that generates nothing and scores the log-probability of each item's first answer after its question.

    `by_likelihood` is True, and `items` is that of a `Task`. Metrics and scores are the same for all such tasks.
    """

    @property
    def name(self) -> str:
        """The name of the task."""

    @property
    def by_likelihood(self) -> bool:
        """Always True."""

    def items(self) -> list[Item]:
        """Return all items, as `Task.items` does."""


def is_by_likelihood(task: Task | LikelihoodTask) -> bool:
    """Return whether a task scores log-probabilities."""
    return bool(getattr(task, "by_likelihood", False))


def reference_of(task: Task | LikelihoodTask) -> str | None:
    """Return the condition whose answers are the correct ones for the others, or None."""
    reference: str | None = getattr(task, "reference", None)
    return reference


def find_task(name: str, options: Mapping[str, Any], offered: Mapping[str, Any] | None = None) -> Task | LikelihoodTask:
    """Find a task by its built-in name, by an entry point of the group `deltamem.tasks`, or as `package.module:Class`.

    Args:
        name: name of the task.
        options: keyword arguments for the class.
        offered: further keyword arguments, passed if the class takes them and `options` does not set them.

    Raises:
        ConfigError: there is no such task, or it does not take these options.
    """
    others = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    place = {**others, **TASKS}.get(name, name)
    module, colon, attribute = place.partition(":")
    if not colon:
        known = ", ".join(sorted({**others, **TASKS}))
        raise ConfigError(
            f"There is no task {name!r}.",
            f"The tasks are {known}.",
            "Choose one of these, or name your own as package.module:Class.",
        )
    try:
        if not module or module.startswith("."):
            raise ImportError(f"{module!r} is not the full name of a module")
        kind = getattr(importlib.import_module(module), attribute)
        if not callable(kind):
            raise ImportError(f"{attribute} is not a class")
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The task {name!r} cannot be imported.", f"{error}.", "Correct its name.") from error
    return cast(Task | LikelihoodTask, create_task(kind, name, options, offered))


def create_task(
    kind: Callable[..., Any], name: str, options: Mapping[str, Any], offered: Mapping[str, Any] | None
) -> Any:
    """Create a task of class `kind` from its options; the arguments are those of `find_task`.

    Raises:
        ConfigError: the class does not take these options.
    """
    signature = inspect.signature(kind)
    arguments = {key: value for key, value in (offered or {}).items() if key in signature.parameters} | dict(options)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = f"It takes {', '.join(signature.parameters) or 'none'}"
        raise ConfigError(
            f"The task {name!r} does not take these options.", f"{str(error).capitalize()}. {takes}.", "Correct them."
        ) from error
    return kind(**arguments)


def scores_of(task: Task, item: Item, answer: str) -> dict[str, float]:
    """Return the scores of an answer, and check those that `task.metrics` names.

    Raises:
        ConfigError: `task.score` does not return one of them, or not as a number from 0 to 1.
    """
    scores = dict(task.score(item, answer))
    for metric in task.metrics:
        value = scores.get(metric)
        if not isinstance(value, Real) or not -ROUNDING <= value <= 1 + ROUNDING:
            raise ConfigError(
                f"The task {task.name} scores the answer to {item.where} with {metric} = {value!r}.",
                "Each of its metrics is a number from 0 to 1.",
                "Correct the method `score` of the task.",
            )
        scores[metric] = float(value)
    return scores


def require_data(task: str, data: str | None, example: str, **others: str | None) -> str:
    """Return `data`, which is required.

    Args:
        task: name of the task.
        data: value of `--data`.
        example: an example of a value, for the error message.
        others: further options that must be text, if they are given; a command's `--set` accepts any YAML value.

    Raises:
        ConfigError: `data` is missing, or an option is not text.
    """
    if data is None:
        raise ConfigError(
            f"The task {task} needs its data.",
            "They are not part of the package.",
            f"Pass --data {example}, or its path on this machine.",
        )
    for name, value in {"data": data, **others}.items():
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"The {name} of the task {task} must be text.", f"It is {value!r}.", "Correct it.")
    return data
