"""Evaluations with known scores, and the report folders written from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltamem_tool.evaluation.conditions import Condition, EvalProtocol, conditions_of
from deltamem_tool.evaluation.records import ITEMS, Record, RecordFolder
from deltamem_tool.evaluation.report.evaluation_file import EVALUATION_FILE, evaluation_json
from deltamem_tool.evaluation.report.page import write_report
from deltamem_tool.evaluation.result import Evaluation

GROUPS = ("1 fact", "2 facts")
Score = Callable[[str, int], float]  # by condition and question number


def share_of(condition: str, number: int) -> float:
    """The score of a question: the state is right three times in four, a donor's once in five, the others never."""
    wrong = {"state": number % 4 == 0, "donor_state": number % 5 != 0}
    return float(not wrong.get(condition, True))


def evaluation_of(
    score: Score = share_of,
    questions: int = 20,
    groups: Sequence[str] = GROUPS,
    conditions: Sequence[Condition] = (),
    protocol: str = "memory",
    metrics: Sequence[str] = ("exact",),
    answer: str = "Paris",
) -> Evaluation:
    """Each history has two questions; they take the groups in turn."""
    conditions = list(conditions) or conditions_of(EvalProtocol.parse(protocol))
    records = [
        Record(
            item=f"question {number}",
            history=f"talk {number // 2}",
            group=groups[number % len(groups)],
            condition=condition.name,
            question=f"Where? {answer}",
            answer=answer,
            right=["Paris", answer],
            scores={metric: score(condition.name, number) for metric in metrics},
            prompt_tokens=7,
        )
        for condition in conditions
        for number in range(questions)
    ]
    return Evaluation("places", protocol, list(metrics), conditions, list(groups), records, 0)


def write_records(
    folder: Path,
    evaluation: Evaluation,
    adapter: str = "a" * 64,
    items: str = "all",
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the files of `deltamem eval` with --records and --out in one folder.

    The records are in another order than the items, as in a real run.
    """
    settings = {"task": evaluation.task, "protocol": evaluation.protocol, ITEMS: items, "adapter": adapter}
    RecordFolder(folder, settings).add(sorted(evaluation.records, key=lambda record: record.item[::-1]))
    content = evaluation_json(evaluation, adapter, ["--task", evaluation.task], run)
    (folder / EVALUATION_FILE).write_text(json.dumps(content))
    return folder


def report_folder(folder: Path, found: Evaluation, run: Mapping[str, Any] | None = None) -> Path:
    """The folder that `deltamem eval --report` writes."""
    evaluation = json.loads((write_records(folder, found, run=run) / EVALUATION_FILE).read_text())
    write_report(folder, evaluation, found.records)
    return folder
