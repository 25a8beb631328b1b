"""Run a task under a protocol: write its histories once, then ask its questions under every condition."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.baselines.lora import Lora
from deltamem_tool.baselines.static import Static
from deltamem_tool.chat.engine import Engine
from deltamem_tool.config import check_seed
from deltamem_tool.evaluation import BATCH_SIZE
from deltamem_tool.evaluation.conditions import (
    DONOR,
    MEAN,
    NEVER_WRITTEN,
    ONNX,
    PERMUTED,
    ZERO,
    Condition,
    EvalProtocol,
    check_pytorch,
    conditions_of,
    select,
)
from deltamem_tool.evaluation.likelihood import ScoredAnswer, check_logits, log_probs, mean_log_prob, scored_answers
from deltamem_tool.evaluation.memories import has_layers_to_permute, join_rows, mean_rows, permute_layers
from deltamem_tool.evaluation.processes import Processes
from deltamem_tool.evaluation.prompts import Views
from deltamem_tool.evaluation.questions import check, digest_of, other_histories
from deltamem_tool.evaluation.records import ITEMS, Record, Records
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.scoring.scales import LOG_PROB
from deltamem_tool.evaluation.scoring.statistics import check_margin
from deltamem_tool.evaluation.subject import Subject
from deltamem_tool.evaluation.task import Item, LikelihoodTask, Task, is_by_likelihood, reference_of, scores_of
from deltamem_tool.evaluation.write_pass import memorise
from deltamem_tool.memory.file import StoredMemory
from deltamem_tool.segments.messages import text_of

Report = Callable[[str, int, int], None]  # current stage, amount done, total


def evaluate(
    model: PreTrainedModel | Engine,
    tokenizer: PreTrainedTokenizerBase | None,
    task: Task | LikelihoodTask,
    protocol: EvalProtocol,
    *,
    only: Collection[str] | None = None,
    retrieved: bool = False,
    truncate: int | None = None,
    lora: Lora | None = None,
    static: Static | None = None,
    write: bool = False,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    margin: float | None = None,
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Ask every question of `task` under every condition of `protocol`.

    In a torch process group, every process must call this function. Each process asks a share of the questions, and all
    of them return the whole result.

    Args:
        model: a model with its adapter, as returned by `load`, or an `OnnxModel`.
        tokenizer: the model's tokenizer; None for an `OnnxModel`, which has its own.
        task: the questions.
        protocol: what is in the context besides the memory.
        only: names of the conditions to run; all by default.
        retrieved: also run the base model with passages that BM25 finds.
        truncate: also run the base model with the last messages within this many tokens.
        lora: also run the base model with this LoRA.
        static: also run the base model with this static adapter.
        write: let questions and answers write into the memory, as in a conversation.
        limit: ask only this many questions, from the first. The controls still use the histories of all questions.
        batch_size: number of questions, or of histories, at once.
        seed: random seed for the intervals and for the permutation of layers.
        margin: margin that a difference must exceed to matter; one of the settings recorded in `folder`.
        folder: folder for the records and the settings they were made with. An interrupted run resumes from it.
        settings: further settings that a run in `folder` must match, besides the task and the protocol.
        report: called with the current stage, how much of it is done, and the total.

    Raises:
        AdapterError: `lora` or `static` is damaged or belongs to another base model, or `static` does not match the
            memory.
        ConfigError: a condition needs PyTorch but `model` is an ONNX folder; `seed` or `margin` is invalid; or `write`
            is set for a memory that writes by segments; or a score of the task is no number from 0 to 1.
        DataError: a question cannot be asked, there are too few histories, or `folder` belongs to another run.
        ExportError: the task needs the log-probability of answers, but the graph has only the logits of the last
            position.

    Example:
        >>> import deltamem_tool as deltamem
        >>> from deltamem_tool.base_model.tokenizer import tokenizer_of
        >>> from deltamem_tool.evaluation.conditions import EvalProtocol
        >>> from deltamem_tool.evaluation.tasks.recall import Recall
        >>> model = deltamem.load("builtin:adapter")
        >>> task, protocol = Recall(facts=1, episodes=20), EvalProtocol.parse("memory")
        >>> evaluation = deltamem.evaluate(model, tokenizer_of(model), task, protocol)
        >>> evaluation.estimate("exact", "state").mean
        1.0
    """
    check_seed(seed)
    check_margin(margin)
    subject = Subject.from_model(model, tokenizer, write)
    reference = reference_of(task)
    if reference is not None:
        check_pytorch(reference, subject.runtime)
        only = only and {*only, reference}
    can_permute = has_layers_to_permute(subject.engine.memory_shape)
    baselines: dict[str, Any] = {"retrieved": retrieved, "truncate": truncate, "lora": lora, "static": static}
    possible = partial(conditions_of, protocol, **baselines, runtime=subject.runtime, can_permute=can_permute)
    select(possible(), only, subject.runtime)  # before anything is read
    if is_by_likelihood(task) and subject.runtime == ONNX:
        check_logits(subject)
    if lora is not None and subject.model is not None:
        lora.check_base(subject.model)
    if static is not None and subject.model is not None:
        static.check(subject.model)
    everyone = task.items()
    check(everyone)
    items, others = everyone[:limit], other_histories(everyone)
    conditions = select(possible(others=len(others[everyone[0].history_id])), only, subject.runtime)
    asked: dict[str, Any] = {"task": task.name, "protocol": protocol.name, ITEMS: digest_of(items, everyone, others)}
    asked |= {"seed": seed, **(settings or {})}
    options = {
        "write": write or None,
        "margin": margin,
        "truncate": truncate,
        "lora": None if lora is None else lora.fingerprint,
        "static": None if static is None else static.fingerprint,
        "runtime": ONNX if subject.runtime == ONNX else None,
    }
    asked |= {name: value for name, value in options.items() if value is not None}
    processes = Processes.from_model(subject.model)
    records = Records(folder, asked, processes)
    before = sum((c.name, item.id) in records for c in conditions for item in items)
    tell = report or (lambda stage, done, of: None)
    views = Views(subject, protocol, _new_tokens(task), truncate)
    run = _Run(subject, task, views, everyone, others, seed, batch_size, tell, records, processes)
    names = [item.id for item in items]
    if reference is not None:  # its records come first, because its answers count as correct
        run.ask([(c, item) for c in conditions for item in items if c.name == reference])
        right = {record.item: record.answer for record in records.select([reference], names)}
        items = [replace(item, answers=[right[item.id]]) for item in items]
    run.ask([(c, item) for c in conditions for item in items if c.name != reference])
    groups = list(dict.fromkeys(item.group for item in items))
    metrics = [LOG_PROB] if is_by_likelihood(task) else list(cast(Task, task).metrics)
    return Evaluation(
        task.name,
        protocol.name,
        metrics,
        conditions,
        groups,
        records.store_in_order([c.name for c in conditions], names),
        seed,
        len(conditions) * len(items) - before,
        subject.runtime,
        margin,
    )


@dataclass(frozen=True)
class _Run:
    """Asks questions in batches."""

    subject: Subject
    task: Task | LikelihoodTask
    views: Views
    everyone: Sequence[Item]
    others: Mapping[str, Sequence[str]]  # the histories that replace a history, by its name
    seed: int
    batch_size: int
    tell: Report
    records: Records
    processes: Processes

    def ask(self, pairs: Sequence[tuple[Condition, Item]]) -> None:
        """Ask all questions without a record, in batches; each process asks a share of the batches.

        The last digits of a score depend on the other rows of its batch. So batches are formed from all `pairs`, even
        if some have records already, and their histories are written in batches of all histories that they read.
        """
        lacking = [pair for pair in pairs if self._lacks(*pair)]
        if not lacking:
            return
        # Once for all conditions with this view; questions that are too long raise an error now.
        shown = {(condition.view, item.id): item for condition, item in pairs}
        prompts = {(view, name): self.views.prompt(item, view) for (view, name), item in shown.items()}
        to_score = scored_answers(self.subject, shown, prompts) if is_by_likelihood(self.task) else {}
        batches = [batch for batch in self._batches(pairs, prompts) if any(self._lacks(batch[0], i) for i in batch[1])]
        histories, memories = self._memories(
            pairs, [(condition, item) for condition, items in batches for item in items]
        )
        share = self.processes.part(batches)
        done = sum(not self._lacks(*pair) for pair in pairs)
        count = done + sum(self._lacks(condition, item) for condition, items in share for item in items)
        for condition, items in share:
            done += self.records.add(self._answer_batch(condition, items, prompts, to_score, histories, memories))
            self.tell("questions", done, count)
        self.records.gather()

    def _lacks(self, condition: Condition, item: Item) -> bool:
        return (condition.name, item.id) not in self.records

    def _answer_batch(
        self,
        condition: Condition,
        items: Sequence[Item],
        prompts: Mapping[tuple[str, str], str],
        to_score: Mapping[tuple[str, str], ScoredAnswer],
        histories: Mapping[str, int],
        memories: StoredMemory | None,
    ) -> list[Record]:
        """Return the records of one batch."""
        texts = [prompts[condition.view, item.id] for item in items]
        rows = [[histories[name] for name in self._read(condition, item)] for item in items]
        memory = self._memory(condition, memories, rows)
        if is_by_likelihood(self.task):
            scored = [to_score[condition.view, item.id] for item in items]
            answers = [""] * len(items)
            scores = [mean_log_prob(row) for row in log_probs(self.subject, scored, memory, condition)]
        else:
            limit = items[0].new_tokens or _new_tokens(self.task)  # the same for all rows of a batch
            answers = self.subject.ask(texts, memory, condition, limit)
            task = cast(Task, self.task)
            scores = [scores_of(task, item, answer) for item, answer in zip(items, answers, strict=True)]
        lengths = map(len, self.subject.tokens(texts))
        return [
            Record(
                item=item.id,
                history=item.history_id,
                group=item.group,
                condition=condition.name,
                question=text_of(item.question[-1]),
                answer=answer,
                right=list(item.answers),
                scores=of_item,
                prompt_tokens=length,
            )
            for item, answer, of_item, length in zip(items, answers, scores, lengths, strict=True)
        ]

    def _read(self, condition: Condition, item: Item) -> Sequence[str]:
        """Return the histories whose memories an item is asked with: one, several for their mean, or none."""
        if condition.memory in (None, ZERO, NEVER_WRITTEN):
            return ()
        others = {DONOR: self.others[item.history_id][:1], MEAN: self.others[item.history_id]}
        return others.get(condition.memory, (item.history_id,))

    def _memory(
        self, condition: Condition, memories: StoredMemory | None, rows: Sequence[Sequence[int]]
    ) -> StoredMemory | None:
        """Return a memory with one row per question, from its `rows` of `memories`; None for zeros."""
        if memories is None or not rows[0]:
            return None
        memory = mean_rows(memories, rows)
        return permute_layers(memory, self.seed) if condition.memory == PERMUTED else memory

    def _memories(
        self, pairs: Sequence[tuple[Condition, Item]], asked: Sequence[tuple[Condition, Item]]
    ) -> tuple[dict[str, int], StoredMemory | None]:
        """Write the histories of `asked`, and return the row of each and their memories.

        The batches consist of all histories that `pairs` read. Each process writes some of them.
        """
        read, needed = ({name for pair in some for name in self._read(*pair)} for some in (pairs, asked))
        first = {item.history_id: item for item in reversed(self.everyone) if item.history_id in read}
        items = [first[name] for name in dict.fromkeys(item.history_id for item in self.everyone) if name in first]
        batches = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        batches = [batch for batch in batches if any(item.history_id in needed for item in batch)]
        share = [item for batch in self.processes.part(batches) for item in batch]
        memory = None
        if share:
            memory = memorise(
                self.subject,
                [item.history for item in share],
                self.batch_size,
                lambda done, of: self.tell("histories written", done, of),
                [item.where for item in share],
                [item.template_kwargs for item in share],
            )
        parts = self.processes.all(([item.history_id for item in share], memory))
        written = [part for _, part in parts if part is not None]
        names = [name for names, _ in parts for name in names]
        return {name: row for row, name in enumerate(names)}, join_rows(written) if written else None

    def _batches(
        self, pairs: Sequence[tuple[Condition, Item]], prompts: Mapping[tuple[str, str], str]
    ) -> Iterator[tuple[Condition, list[Item]]]:
        """Return batches by condition and by limit of the answer, with prompts of similar length together.

        The longest come first, so that a batch that does not fit fails at once.
        """
        for condition in dict.fromkeys(condition for condition, _ in pairs):
            items = [item for one, item in pairs if one == condition]
            default = _new_tokens(self.task)
            for limit in dict.fromkeys(item.new_tokens or default for item in items):
                alike = [item for item in items if (item.new_tokens or default) == limit]
                alike.sort(key=lambda item: -len(prompts[condition.view, item.id]))
                for start in range(0, len(alike), self.batch_size):
                    yield condition, alike[start : start + self.batch_size]


def _new_tokens(task: Task | LikelihoodTask) -> int:
    return 0 if is_by_likelihood(task) else cast(Task, task).max_new_tokens
