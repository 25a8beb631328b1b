"""A task under a protocol: its histories are written once, then its questions are asked under every condition."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.baselines.lora import Lora
from deltamem_tool.evaluation import BATCH_SIZE
from deltamem_tool.evaluation.answer import ask
from deltamem_tool.evaluation.conditions import (
    DONOR,
    ZERO,
    Condition,
    EvalProtocol,
    chosen,
    conditions_of,
)
from deltamem_tool.evaluation.likelihood import log_probs, mean_log_prob, scored_answers
from deltamem_tool.evaluation.prompts import Views
from deltamem_tool.evaluation.questions import check, digest_of, donors_of
from deltamem_tool.evaluation.records import ITEMS, Answered, Record
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.scoring.scales import LOG_PROB
from deltamem_tool.evaluation.task import Item, LikelihoodTask, Task, is_by_likelihood
from deltamem_tool.evaluation.write_pass import memorise
from deltamem_tool.memory.state import MemoryState

Report = Callable[[str, int, int], None]  # what is done, done, of


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
        lora.check_base(model)
    everyone = task.items()
    check(everyone)
    items, donors = everyone[:limit], donors_of(everyone)
    conditions = chosen(conditions_of(protocol, retrieved, truncate, lora), only)
    said = {"task": task.name, "protocol": protocol.name, ITEMS: digest_of(items, everyone, donors), **(settings or {})}
    said |= {} if truncate is None else {"truncate": truncate}
    said |= {} if lora is None else {"lora": lora.fingerprint}
    answered = Answered(folder, said)
    left = [(c, item) for c in conditions for item in items if (c.name, item.id) not in answered]
    count = len(conditions) * len(items)
    done = count - len(left)
    tell = report or (lambda stage, count, of: None)
    views = Views(tokenizer, protocol, _positions(model), _new_tokens(task), truncate)
    for new in _asked(model, tokenizer, task, views, left, everyone, donors, batch_size, tell):
        done += answered.add(new)
        tell("questions", done, count)
    records = answered.of([c.name for c in conditions], [item.id for item in items])
    groups = list(dict.fromkeys(item.group for item in items))
    return Evaluation(task.name, protocol.name, _metrics(task), conditions, groups, records, seed, len(left))


def _asked(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | LikelihoodTask,
    views: Views,
    left: Sequence[tuple[Condition, Item]],
    everyone: Sequence[Item],
    donors: Mapping[str, str],
    batch_size: int,
    tell: Report,
) -> Iterator[list[Record]]:
    """The records of what is `left`, a batch at a time."""
    if not left:
        return
    # Once for all conditions with this view; what is too long is named now.
    shown = {(condition.view, item.id): item for condition, item in left}
    prompts = {(view, name): views.prompt(item, view) for (view, name), item in shown.items()}
    likely = scored_answers(tokenizer, shown, prompts, _positions(model)) if is_by_likelihood(task) else {}
    memories = _memories(model, tokenizer, _to_write(everyone, left, donors), batch_size, tell)
    for condition, items in _batches(left, prompts, batch_size, _new_tokens(task)):
        texts = [prompts[condition.view, item.id] for item in items]
        memory = None if memories is None else memories.of([_history(condition, item, donors) for item in items])
        if is_by_likelihood(task):
            rows = [likely[condition.view, item.id] for item in items]
            found = [("", mean_log_prob(row)) for row in log_probs(model, tokenizer, rows, memory, condition)]
        else:
            found = _answers(model, tokenizer, cast(Task, task), items, texts, memory, condition)
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
        yield [
            _record(item, condition, answer, scores, length)
            for item, (answer, scores), length in zip(items, found, lengths, strict=True)
        ]


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
