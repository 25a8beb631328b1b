"""Ask the documents of lm-evaluation-harness under each condition."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.baselines.lora import Lora
from deltamem_tool.baselines.static import Static
from deltamem_tool.config import check_seed
from deltamem_tool.errors import ConfigError
from deltamem_tool.evaluation import HARNESS_BATCH_SIZE
from deltamem_tool.evaluation.conditions import Condition, readable_name, select
from deltamem_tool.evaluation.harness import HarnessTasks, conditions_of
from deltamem_tool.evaluation.processes import Processes
from deltamem_tool.evaluation.records import ITEMS, Record, Records
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.runner import Report
from deltamem_tool.evaluation.scoring.statistics import check_margin
from deltamem_tool.evaluation.subject import apply_condition

AS_READ = "as it is read"  # in place of a protocol
# The harness warns about models that are loaded already, as ours always are.
_KNOWN = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model")
SCORE = "score"  # of several tasks: the first metric of each, whatever its name


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harness_tasks: HarnessTasks,
    *,
    only: Collection[str] | None = None,
    lora: Lora | None = None,
    static: Static | None = None,
    batch_size: int = HARNESS_BATCH_SIZE,
    seed: int = 0,
    margin: float | None = None,
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
    report: Report | None = None,
) -> Evaluation:
    """Ask every document of the tasks under every condition.

    Each task is a group of the result. Its score is its first metric that is a number from 0 to 1 for each document,
    with its first filter.

    Args:
        model: the model with its adapter.
        tokenizer: its tokenizer.
        harness_tasks: the tasks with their documents.
        only: names of the conditions to run; all by default.
        lora: also run the base model with this LoRA.
        static: also run the base model with this static adapter.
        batch_size: number of requests at once.
        seed: random seed for the intervals. The harness keeps its own seeds.
        margin: as in `evaluate`.
        folder: folder for the records and the settings they were made with. An interrupted run resumes at the task
            where it stopped.
        settings: further settings that a run in `folder` must match, besides the tasks.
        report: called with the current stage, how much of it is done, and the total.

    Raises:
        AdapterError: `lora` or `static` is damaged or belongs to another base model, or `static` does not match the
            memory.
        ConfigError: a task cannot be scored in this way, or needs a chat template that the model lacks.
        DataError: a prompt is too long for the model, or `folder` belongs to another run.
    """
    check_seed(seed)
    check_margin(margin)
    if lora is not None:
        lora.check_base(model)
    if static is not None:
        static.check(model)
    harness = harness_tasks.harness
    if harness.chat and tokenizer.chat_template is None:
        raise ConfigError("The tokenizer has no chat template.", "", "Pass --set chat=false.")
    conditions = select(conditions_of(lora, static), only)
    run_settings = {"task": harness.name, "protocol": AS_READ, ITEMS: harness_tasks.digest, **(settings or {})}
    run_settings |= {} if margin is None else {"margin": margin}
    run_settings |= {} if lora is None else {"lora": lora.fingerprint}
    run_settings |= {} if static is None else {"static": static.fingerprint}
    processes = Processes.from_model(model)
    answered = Records(folder, run_settings, processes)
    items = [item for documents in harness_tasks.documents.values() for item in documents]
    count = sum((condition.name, item) not in answered for condition in conditions for item in items)
    lacking = [
        (condition, name)
        for condition in conditions
        for name, documents in harness_tasks.documents.items()
        if not all((condition.name, item) in answered for item in documents)
    ]
    # The harness batches each task by itself, and its batches are kept.
    for condition, name in processes.part(lacking):
        answered.add(_ask_documents(model, tokenizer, harness_tasks, name, condition, batch_size, report))
    answered.gather()
    records = answered.store_in_order([condition.name for condition in conditions], items)
    metrics = [name for name in records[0].scores if all(name in record.scores for record in records)]
    groups = list(harness.names)
    return Evaluation(harness.name, AS_READ, metrics, conditions, groups, records, seed, count, margin=margin)


def _ask_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harness_tasks: HarnessTasks,
    name: str,
    condition: Condition,
    batch_size: int,
    report: Report | None,
) -> list[Record]:
    """Return a record for each document of the tasks of one name."""
    import lm_eval

    from deltamem_tool.evaluation.harness_model import MemoryLM

    harness = harness_tasks.harness

    def progress(done: int, of: int) -> None:
        if report is not None:
            report(f"{name}, {readable_name(condition.name)}", done, of)

    with apply_condition(model, condition), _quiet_logging():
        lm = MemoryLM(model, tokenizer, batch_size, harness.chat, progress)
        _begin(harness_tasks.tasks[name]["tasks"], harness.num_fewshot)
        # Not `simple_evaluate`, which lists all installed packages each time.
        results = lm_eval.evaluate(
            lm,
            harness_tasks.tasks[name],
            limit=harness_tasks.limit,
            apply_chat_template=harness.chat,
            fewshot_as_multiturn=harness.chat,
            system_instruction=harness.system,
            bootstrap_iters=0,  # our intervals are those of paired documents
        )
    return [
        record
        for task_name, samples in results["samples"].items()
        for record in _records(tokenizer, name, task_name, condition.name, samples, harness_tasks.is_one_task)
    ]


def _begin(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Set seeds and examples as `simple_evaluate` does, so that every condition gets the same ones."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _records(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    task_name: str,
    condition: str,
    samples: Sequence[Mapping[str, Any]],
    alone: bool,
) -> list[Record]:
    """Return the records of one task's samples under its first filter; `alone` if no other task is asked."""
    some = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metrics = [metric for metric in some[0]["metrics"] if all(_is_share(sample[metric]) for sample in some)]
    if not metrics:
        raise ConfigError(
            f"The task {task_name} has no score from 0 to 1 for each document.",
            f"Its metrics are {', '.join(some[0]['metrics'])}.",
            "Choose another task.",
        )
    records = []
    for sample in some:
        prompt, responses = str(sample["arguments"][0][0]), sample["filtered_resps"]
        answer = (
            responses[0]
            if len(responses) == 1 and isinstance(responses[0], str)
            else json.dumps(responses, default=str)
        )
        item = f"{task_name}/{sample['doc_id']}"
        scores = {} if alone else {SCORE: float(sample[metrics[0]])}
        scores |= {metric: float(sample[metric]) for metric in metrics}
        tokens = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        records.append(Record(item, item, name, condition, prompt, answer, [str(sample["target"])], scores, tokens))
    return records


def _is_share(value: Any) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= 1


@contextmanager
def _quiet_logging() -> Iterator[None]:
    """Hide the harness's progress bar for prompts, and its warnings about models that it has not loaded itself.

    Its other warnings are shown.
    """
    from lm_eval.api import task

    bar, logger = task.tqdm, logging.getLogger("lm_eval.models.huggingface")
    task.tqdm = partial(bar, disable=True)  # no option of the harness disables it
    logger.addFilter(_is_news)
    try:
        yield
    finally:
        task.tqdm = bar
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KNOWN)
