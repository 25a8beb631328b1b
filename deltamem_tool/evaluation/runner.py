"""A task under a protocol: its histories are written once, then its questions are asked under every condition."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation import BATCH_SIZE
from deltamem_tool.evaluation.asking import ask
from deltamem_tool.evaluation.conditions import (
    DONOR,
    STATE,
    ZERO,
    Condition,
    EvalProtocol,
    chosen,
    conditions_of,
    in_words,
)
from deltamem_tool.evaluation.likelihood import log_probs, mean_log_prob, scored_answers
from deltamem_tool.evaluation.lora import Lora
from deltamem_tool.evaluation.records import ITEMS, Record, RecordFolder
from deltamem_tool.evaluation.scales import LOG_PROB, scale_of
from deltamem_tool.evaluation.statistics import Difference, Estimate, difference, estimate, verdict
from deltamem_tool.evaluation.task import Item, LikelihoodTask, Task, is_by_likelihood
from deltamem_tool.evaluation.views import Views
from deltamem_tool.evaluation.writing import memorise
from deltamem_tool.state import MemoryState

Report = Callable[[str, int, int], None]  # what is done, done, of


@dataclass(frozen=True)
class Evaluation:
    """Every answer, and what they come to."""

    task: str
    protocol: str
    metrics: list[str]  # the first decides
    conditions: list[Condition]
    groups: list[str]
    records: list[Record]
    seed: int
    asked: int = 0  # of the records, how many are of this run; the others were there

    def scores(self, metric: str, condition: str, group: str | None = None) -> tuple[list[float], list[str]]:
        """Of a group, or of all: one a question, and the history of each, in the order of the items."""
        some = [r for r in self.records if r.condition == condition and group in (None, r.group)]
        return [record.scores[metric] for record in some], [record.history for record in some]

    def weights(self, metric: str, condition: str, group: str | None = None) -> list[float] | None:
        """How much each of `scores` counts; None where all count the same."""
        weight = scale_of(metric).weight
        return self.scores(weight, condition, group)[0] if weight else None

    def estimate(self, metric: str, condition: str, group: str | None = None) -> Estimate:
        weights = self.weights(metric, condition, group)
        return estimate(*self.scores(metric, condition, group), self.seed, scale_of(metric), weights)

    def difference(self, metric: str, other: str, group: str | None = None) -> Difference:
        """Of the state's scores to another condition's, question by question."""
        ours, histories = self.scores(metric, STATE, group)
        theirs, weights = self.scores(metric, other, group)[0], self.weights(metric, STATE, group)
        return difference(ours, theirs, histories, self.seed, scale_of(metric), weights)

    def verdict(self) -> list[str]:
        """In words: what the state adds to each of the others."""
        metric = self.metrics[0]
        unit = scale_of(metric).unit
        return [verdict(in_words(name), self.difference(metric, name), unit) for name in self.others]

    @property
    def others(self) -> list[str]:
        """The conditions beside the state, which they are compared with; none without it."""
        names = [condition.name for condition in self.conditions]
        return [name for name in names if name != STATE] if STATE in names else []


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | LikelihoodTask,
    protocol: EvalProtocol,
    *,
    only: Collection[str] | None = None,
    retrieved: bool = False,
    truncate: int | None = None,
    lora: Lora | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Ask every question of `task` under every condition of `protocol`.

    Args:
        only: names of conditions, where not all are wanted.
        retrieved: BM25 beside the controls.
        truncate: the base model with the last messages within so many tokens, beside the controls.
        lora: the base model with this on it, beside the controls.
        limit: only the first so many questions; donors are of all.
        batch_size: questions, or histories, at once.
        seed: of the intervals.
        folder: keeps records, and what they were made with; a run that stopped goes on from there.
        settings: what `folder` shall be of, beside the task and the protocol.

    Raises:
        AdapterError: `lora` is damaged, or of another base model.
        DataError: an item cannot be asked, or there are too few histories; or `folder` is of another run.
    """
    if lora is not None:
        lora.refuse_other_base(model)
    items = task.items()
    _check(items)
    conditions = chosen(conditions_of(protocol, retrieved, truncate, lora), only)
    donors = _donors(items)
    everyone, items = items, items[:limit]
    kept = None
    if folder is not None:
        said = {"task": task.name, "protocol": protocol.name, ITEMS: _digest(items), **(settings or {})}
        said |= {} if truncate is None else {"truncate": truncate}
        said |= {} if lora is None else {"lora": lora.fingerprint}
        kept = RecordFolder(folder, said)
    done = {(record.condition, record.item): record for record in (kept.read() if kept else [])}
    tell = report or (lambda stage, count, of: None)
    left = [(c, item) for c in conditions for item in items if (c.name, item.id) not in done]
    if left:
        views = Views(tokenizer, protocol, _positions(model), _new_tokens(task), truncate)
        # Once for all conditions with this view; what is too long is named now.
        shown = {(condition.view, item.id): item for condition, item in left}
        prompts = {(view, name): views.prompt(item, view) for (view, name), item in shown.items()}
        likely = scored_answers(tokenizer, shown, prompts, _positions(model)) if is_by_likelihood(task) else {}
        memories = _memories(model, tokenizer, _to_write(everyone, left, donors), batch_size, tell)
        for condition, some in _batches(left, prompts, batch_size, _new_tokens(task)):
            texts = [prompts[condition.view, item.id] for item in some]
            whose = [_history(condition, item, donors) for item in some]
            memory = None if memories is None else memories.of(whose)
            if is_by_likelihood(task):
                rows = [likely[condition.view, item.id] for item in some]
                found = [("", mean_log_prob(row)) for row in log_probs(model, tokenizer, rows, memory, condition)]
            else:
                found = _answers(model, tokenizer, cast(Task, task), some, texts, memory, condition)
            lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
            new = [
                _record(item, condition, answer, scores, length)
                for item, (answer, scores), length in zip(some, found, lengths, strict=True)
            ]
            if kept is not None:
                kept.add(new)
            done |= {(record.condition, record.item): record for record in new}
            tell("questions", len(done), len(conditions) * len(items))
    records = [done[c.name, item.id] for c in conditions for item in items]
    groups = list(dict.fromkeys(item.group for item in items))
    return Evaluation(task.name, protocol.name, _metrics(task), conditions, groups, records, seed, len(left))


@dataclass(frozen=True)
class _Memories:
    """A row a history."""

    rows: dict[str, int]
    memory: MemoryState

    def of(self, histories: Sequence[str | None]) -> MemoryState | None:
        """None where they are nobody's."""
        rows = [self.rows[history] for history in histories if history is not None]
        return self.memory.select(rows) if rows else None


def _history(condition: Condition, item: Item, donors: Mapping[str, str]) -> str | None:
    """Whose memory an item is asked with; None where it is nobody's."""
    if condition.memory in (None, ZERO):
        return None
    return donors[item.history_id] if condition.memory == DONOR else item.history_id


def _to_write(
    items: Sequence[Item], left: Sequence[tuple[Condition, Item]], donors: Mapping[str, str]
) -> dict[str, Item]:
    """The first item of each history that is still asked about, by its name."""
    wanted = {_history(condition, item, donors) for condition, item in left}
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.history_id, item)
    return {history: item for history, item in first.items() if history in wanted}


def _memories(
    model: Any, tokenizer: Any, wanted: Mapping[str, Item], batch_size: int, tell: Report
) -> _Memories | None:
    if not wanted:
        return None
    histories = [item.history for item in wanted.values()]
    places = [item.where for item in wanted.values()]

    def told(done: int, of: int) -> None:
        tell("histories written", done, of)

    memory = memorise(model, tokenizer, histories, batch_size, told, places, _positions(model))
    return _Memories({history: row for row, history in enumerate(wanted)}, memory)


def _check(items: Sequence[Item]) -> None:
    """
    Raises:
        DataError: two items have one name, or one history's name is that of two.
    """
    seen: dict[str, Item] = {}
    histories: dict[str, Item] = {}
    for item in items:
        first = seen.setdefault(item.id, item)
        owner = histories.setdefault(item.history_id, item)
        if first is not item or list(owner.history) != list(item.history):
            other = first if first is not item else owner
            name = item.id if first is not item else item.history_id
            what = f"{item.where} and {other.where} have one name, {name!r}."
            raise DataError(what, "Their answers would be mixed up.", "Give each its own.")


def _digest(items: Sequence[Item]) -> str:
    """SHA-256 over all that is asked."""
    digest = hashlib.sha256()
    for name, history in {item.history_id: item.history for item in items}.items():
        digest.update(json.dumps([name, history]).encode())
    for item in items:
        digest.update(
            json.dumps([item.id, item.history_id, item.question, item.answers, item.query, item.new_tokens]).encode()
        )
    return digest.hexdigest()


def _donors(items: Sequence[Item]) -> dict[str, str]:
    """The history whose memory stands in for each one's: the next one.

    Raises:
        DataError: there is one alone, or none.
    """
    histories = list(dict.fromkeys(item.history_id for item in items))
    if len(histories) < 2:
        raise DataError(
            f"{len(histories)} history is too few for an evaluation." if histories else "There is nothing to ask.",
            "The control is another history's memory.",
            "Use two histories or more.",
        )
    return dict(zip(histories, [*histories[1:], histories[0]], strict=True))


def _batches(
    left: Sequence[tuple[Condition, Item]], prompts: dict[tuple[str, str], str], size: int, new_tokens: int
) -> Iterator[tuple[Condition, list[Item]]]:
    """Condition by condition, answers of one limit and prompts of like length together, the longest first: what does
    not fit fails at once."""
    for condition in dict.fromkeys(condition for condition, _ in left):
        some = [item for one, item in left if one == condition]
        for limit in dict.fromkeys(item.new_tokens or new_tokens for item in some):
            alike = [item for item in some if (item.new_tokens or new_tokens) == limit]
            alike.sort(key=lambda item: -len(prompts[condition.view, item.id]))
            for start in range(0, len(alike), size):
                yield condition, alike[start : start + size]


def _positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _new_tokens(task: Task | LikelihoodTask) -> int:
    return 0 if is_by_likelihood(task) else cast(Task, task).max_new_tokens


def _metrics(task: Task | LikelihoodTask) -> list[str]:
    return [LOG_PROB] if is_by_likelihood(task) else list(cast(Task, task).metrics)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    items: Sequence[Item],
    texts: Sequence[str],
    memory: MemoryState | None,
    condition: Condition,
) -> list[tuple[str, dict[str, float]]]:
    """What is generated, and its scores."""
    new_tokens = items[0].new_tokens or task.max_new_tokens  # of a batch, they are the same
    answers = ask(model, tokenizer, texts, memory, condition, new_tokens)
    return [(answer, dict(task.score(item, answer))) for item, answer in zip(items, answers, strict=True)]


def _record(item: Item, condition: Condition, answer: str, scores: dict[str, float], tokens: int) -> Record:
    return Record(
        item.id,
        item.history_id,
        item.group,
        condition.name,
        item.question[-1]["content"],
        answer,
        list(item.answers),
        scores,
        tokens,
    )
