"""What a run of an ablation found, kept a line each, so that what was cut off goes on and nothing is made twice."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.conditions import STATE

RUNS_FILE = "runs.jsonl"
CPU = "CPU"


@dataclass(frozen=True)
class Run:
    """One adapter: what was trained, and how many questions it answered rightly.

    `scores` are means of exact match by condition, a number of facts an entry.
    """

    key: str
    seed: int
    facts: list[int]
    episodes: int
    scores: dict[str, list[float]]
    recipe: dict[str, Any]  # by dotted key
    steps: int
    parameters: int
    state_bytes: int
    loss: float
    minutes: float  # of training, by the clock
    processor_minutes: float  # and of all threads
    threads: int
    versions: dict[str, str]
    date: str
    device: str = CPU  # or a GPU's name

    @property
    def mean(self) -> float:
        """Over all questions, from the memory."""
        return sum(self.scores[STATE]) / len(self.scores[STATE])


def read_runs(folder: Path) -> dict[str, Run]:
    """By key; none where there is no file. A last line that was cut short is left out.

    Raises:
        DataError: a line is no run.
    """
    file = folder / RUNS_FILE
    if not file.is_file():
        return {}
    whole, _, cut = file.read_bytes().rpartition(b"\n")
    if cut:
        os.truncate(file, len(whole) + 1 if whole else 0)
    runs = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            run = Run(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file} line {number} is no run.", f"{error}.", "Choose another folder.") from error
        runs[run.key] = run
    return runs


def keep(folder: Path, run: Run) -> None:
    """Add a line to the folder's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RUNS_FILE).open("ab") as file:
        file.write(json.dumps(asdict(run)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
