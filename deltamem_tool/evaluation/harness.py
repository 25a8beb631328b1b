"""Tasks of lm-evaluation-harness, which measure general ability with the memory on, run through its own API.

The documents of the harness have no history. For every request, the memory starts from zeros and is written while the
request is read. So the conditions are the adapter, the adapter with its corrections scaled to zero, and the base model
alone. They are compared document by document, with the statistics of the other tasks; each document counts as a history
of its own. Conditions with the memory of another history or with a full context are not possible.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from deltamem_tool.baselines.lora import Lora
from deltamem_tool.baselines.static import Static
from deltamem_tool.errors import ConfigError, DataError, first_line
from deltamem_tool.evaluation import HARNESS, MEMORY_ONLY
from deltamem_tool.evaluation.conditions import NOTHING, OWN, PYTORCH, SCALE_ZERO, STATE, Condition
from deltamem_tool.evaluation.task import create_task
from deltamem_tool.io.names import expand_user


def conditions_of(lora: Lora | None = None, static: Static | None = None) -> list[Condition]:
    """Return the state and those of its controls that are possible without a history.

    Args:
        lora: also the base model with this LoRA.
        static: also the base model with this static adapter.
    """
    conditions = [
        Condition(STATE, OWN, NOTHING, "the memory from zeros, written as the request is read"),
        Condition("scale_zero", SCALE_ZERO, NOTHING, "the same with the corrections scaled to zero"),
        Condition("no_adapter", None, NOTHING, "the base model without adapter"),
    ]
    if static is not None:
        conditions.append(Condition("static", None, NOTHING, static.description, static))
    if lora is not None:
        conditions.append(Condition("lora", None, NOTHING, f"the base model with the LoRA {lora.folder.name}", lora))
    return conditions


@dataclass(frozen=True)
class Harness:
    """The tasks to run, and how they are asked.

    Args:
        names: names of tasks, groups or tags.
        include_path: folder with the user's own tasks, instead of those of the harness.
        num_fewshot: number of examples in the prompt; by default each task's own number.
        chat: render prompts with the chat template.
        system: system prompt.
    """

    names: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    chat: bool = True
    system: str | None = None

    @property
    def name(self) -> str:
        """The name of the task as a user writes it."""
        return HARNESS + ",".join(self.names)


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks with their documents.

    Args:
        tasks: the tasks as loaded by the harness, by requested name.
        documents: for each requested name, the names and the texts of the documents of its tasks.
    """

    harness: Harness
    tasks: dict[str, Any]
    documents: dict[str, dict[str, str]]
    limit: int | None

    @property
    def is_one_task(self) -> bool:
        """Whether all documents belong to one task."""
        return sum(len(loaded["tasks"]) for loaded in self.tasks.values()) == 1

    @property
    def digest(self) -> str:
        """SHA-256 over all documents."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def find_harness(task: str, options: Mapping[str, Any]) -> Harness:
    """Parse `lm_eval:name,name` and the options of the task.

    Raises:
        ConfigError: a name is missing, or an option is unknown or invalid.
    """
    names = tuple(dict.fromkeys(name.strip() for name in task.removeprefix(HARNESS).split(",") if name.strip()))
    if not names:
        raise ConfigError(
            f"{task!r} does not name a task.", "", f"Write {HARNESS}ifeval,gpqa_diamond_zeroshot, for example."
        )
    harness: Harness = create_task(partial(Harness, names), task, options, None)
    _check_types(harness)
    return harness


def _check_types(harness: Harness) -> None:
    """Check the values of options, since `--set` accepts any YAML value."""
    shots = harness.num_fewshot
    texts = {"include_path": harness.include_path, "system": harness.system}
    wanted = {name: "text" for name, value in texts.items() if not isinstance(value, str | None)}
    if shots is not None and (type(shots) is not int or shots < 0):
        wanted["num_fewshot"] = "a number, 0 or more"
    if not isinstance(harness.chat, bool):
        wanted["chat"] = "true or false"
    for name, what in wanted.items():
        raise ConfigError(f"{name} must be {what}.", f"It is {getattr(harness, name)!r}.", "Correct this option.")


def check_options(protocol: str, baselines: bool, write: bool, runtime: str) -> None:
    """Reject options that do not apply to tasks of lm-evaluation-harness.

    Args:
        protocol: name of the protocol.
        baselines: whether a baseline is requested that shows a part of the history.
        write: whether questions should write, which they always do here.
        runtime: runtime of the model.

    Raises:
        ConfigError: an option needs a history or has no effect here, or the model is an ONNX folder.
    """
    if runtime != PYTORCH:
        raise ConfigError(
            "Tasks of lm-evaluation-harness need PyTorch.",
            "The harness asks models of transformers, and this is an ONNX folder.",
            "Evaluate the adapter that was exported, or choose another task.",
        )
    if write:
        raise ConfigError(
            "In tasks of lm-evaluation-harness, questions always write into the memory.",
            "The memory starts from zeros for every request, and the request itself writes it.",
            "Leave out --write.",
        )
    if protocol != MEMORY_ONLY or baselines:
        raise ConfigError(
            "Tasks of lm-evaluation-harness have no history.",
            "There is nothing for a protocol to show, for BM25 to find, or to truncate.",
            "Leave out --protocol, --bm25 and --truncate.",
        )


def prepare(harness: Harness, limit: int | None = None) -> HarnessTasks:
    """Find the tasks, and load the first `limit` documents of each.

    Raises:
        ConfigError: the harness, or a package that a task needs, is not installed; there is no such task, or it runs
            code, or two names contain it.
        DataError: a task's documents cannot be loaded.
    """
    manager = _manager(harness)
    tasks = {name: _load_task(manager, name) for name in harness.names}
    _check_distinct(tasks)
    documents = {name: _documents(loaded["tasks"], limit) for name, loaded in tasks.items()}
    return HarnessTasks(harness, tasks, documents, limit)


def _check_distinct(tasks: Mapping[str, Any]) -> None:
    """Check that no task is in two of the requested names, such as a group and one of its tasks."""
    owners: dict[str, str] = {}
    for name, loaded in tasks.items():
        for task_name in loaded["tasks"]:
            if (owner := owners.setdefault(task_name, name)) != name:
                raise ConfigError(
                    f"The task {task_name} is named twice, by {owner} and by {name}.",
                    "Its documents would count twice.",
                    "Leave out one of the names.",
                )


def _manager(harness: Harness) -> Any:
    """Return the harness's index of tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            "Tasks of lm-evaluation-harness need the package lm_eval.",
            f"{error}.",
            "pip install 'deltamem-tool[harness]'",
        ) from error
    include_path = None if harness.include_path is None else expand_user(harness.include_path)
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"There is no folder {include_path}.", "", "Correct include_path.")
    manager = TaskManager(include_path=include_path and str(include_path), include_defaults=include_path is None)
    unknown = next((name for name in harness.names if name not in manager.task_index), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, manager.all_tasks, n=5, cutoff=0.5)
        where = "lm-evaluation-harness" if harness.include_path is None else harness.include_path
        raise ConfigError(
            f"There is no task {unknown!r} in {where}.",
            f"Did you mean {', '.join(near)}?" if near else "",
            "Correct the name; `lm_eval ls tasks` lists them all.",
        )
    return manager


def _load_task(manager: Any, name: str) -> dict[str, Any]:
    """Load the tasks of a name with their documents."""
    from datasets.exceptions import DatasetsError

    try:
        loaded: dict[str, Any] = manager.load([name])
        for task in loaded["tasks"].values():
            len(task.eval_docs)
    except ImportError as error:
        raise ConfigError(
            f"The task {name} needs another package.",
            f"{error}.",
            "Install it, or pip install 'deltamem-tool[harness]'",
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError, LookupError) as error:
        raise DataError(
            f"The data of the task {name} cannot be loaded.",
            f"{first_line(error)}.",
            "Try again with a network; where a dataset is gated, accept its terms on the Hub and run `hf auth login`.",
        ) from error
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            why = "It runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "It shows pictures"
            raise ConfigError(f"The task {task_name} is not supported.", f"{why}.", "Run it with lm_eval itself.")
    return loaded


def _documents(tasks: Mapping[str, Any], limit: int | None) -> dict[str, str]:
    """Return the text of each document by its name, for a digest."""
    return {
        f"{task_name}/{number}": json.dumps(task.eval_docs[number], default=str)
        for task_name, task in tasks.items()
        for number in range(min(len(task.eval_docs), limit or len(task.eval_docs)))
    }
