"""Store the results of runs, one per line, so that an interrupted ablation continues without repeating runs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltamem_tool.errors import DataError
from deltamem_tool.evaluation.conditions import STATE

SEEDS = (42, 43, 44)
EPISODES = 100  # conversations per number of facts
FACTS = (1, 2, 4, 6, 8)
RUNS_FILE = "runs.jsonl"
CPU = "CPU"


@dataclass(frozen=True)
class Run:
    """One adapter: how it was trained, and its scores.

    `scores` has the mean exact match by condition, one entry per number of facts.
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
    minutes: float  # wall-clock time of training
    processor_minutes: float  # CPU time of all threads
    threads: int
    versions: dict[str, str]
    date: str
    device: str = CPU  # or a GPU's name

    @property
    def mean(self) -> float:
        """Return the score from the memory, over all questions."""
        return sum(self.scores[STATE]) / len(self.scores[STATE])


def read_runs(folder: Path) -> dict[str, Run]:
    """Read the runs, by key; none if there is no file. An incomplete last line is removed.

    Raises:
        DataError: a line is not a run.
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
            raise DataError(
                f"Line {number} of {file} is not a run.", f"{error}.", "Delete the line, or choose another folder."
            ) from error
        runs[run.key] = run
    return runs


def append_run(folder: Path, run: Run) -> None:
    """Add a line to the folder's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RUNS_FILE).open("ab") as file:
        file.write(json.dumps(asdict(run)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
