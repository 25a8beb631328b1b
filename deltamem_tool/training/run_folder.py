"""The folder of a run in progress. It holds the recipe and the checkpoints, to resume the run however it ended."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltamem_tool._compat import PREFIX_CHECKPOINT_DIR, SAFE_WEIGHTS_NAME, TRAINER_STATE_NAME
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.io.atomic import exclusive_lock, is_unfinished, write_atomically
from deltamem_tool.recipe.load import Recipe, TrainingOptions

RECIPE_FILE = "recipe.json"  # what the run was started with
BEST_FILE = "best.safetensors"  # the weights of the best evaluation so far
DATA_FILES = ("data.path", "data.eval_path", "data.unrelated")  # keys of a recipe that may name a file
_DIGEST = "sha256 of "  # before a key of these, that of the digest of its file
_DEFAULTS = Recipe(base="-", out="-", training=TrainingOptions(steps=1))  # but for what every run has said


def run_folder(out: str | Path) -> Path:
    """Return the folder of a run, which is next to its adapter folder."""
    return Path(f"{Path(out)}.run")


def check_run_folder(run: Path) -> None:
    """Raise if the folder is not that of a run: its files would be removed.

    Raises:
        DeltaMemError: the folder has files, and none of them is the recipe of a run.
    """
    if not run.exists() or (run / RECIPE_FILE).is_file():
        return
    if not run.is_dir():
        raise DeltaMemError(f"{run} is a file.", "A run keeps its checkpoints there.", "Choose another --out.")
    others = [entry.name for entry in run.iterdir() if not is_unfinished(entry.name, [RECIPE_FILE])]
    if others:
        raise DeltaMemError(
            f"{run} is not the folder of a run.",
            f"It has {min(others)} and no {RECIPE_FILE}, and a run would remove what is in it.",
            "Move the folder, or choose another --out.",
        )


@contextmanager
def remove_if_empty(run: Path) -> Iterator[None]:
    """Remove the folder after the block if it is empty, however the block ends."""
    try:
        yield
    finally:
        with suppress(OSError):
            run.rmdir()


@contextmanager
def open_run_folder(run: Path, start: Mapping[str, object], resume: bool) -> Iterator[None]:
    """Open the folder during a run. A run that is not resumed starts with an empty folder.

    Unfinished checkpoints, such as those of a full disk, are removed at the end. So is the folder, if no checkpoint is
    left.

    Raises:
        DeltaMemError: another run is writing to the folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(run):
        try:
            if not resume:
                _empty(run)
            write_atomically(run / RECIPE_FILE, json.dumps(start).encode())
            yield
        finally:
            complete = checkpoints(run)
            for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                if folder not in complete:
                    shutil.rmtree(folder, ignore_errors=True)
            if not complete:
                shutil.rmtree(run, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. The Trainer writes the state of a checkpoint last."""
    complete = []
    for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            complete.append((step_of(folder), folder))
        except (OSError, ValueError, KeyError):
            continue
    return [folder for _, folder in sorted(complete)]


def step_of(checkpoint: Path) -> int:
    """Read the number of steps after which a checkpoint was written."""
    return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"])


def checkpoint_to_resume(run: Path, start: Mapping[str, object]) -> Path:
    """Find the last checkpoint of a run that was started with the same `start_of`.

    Raises:
        DeltaMemError: there is no complete checkpoint; or the recipe, the data or the number of episodes per step has
            changed.
    """
    complete = checkpoints(run)
    if not complete or not (run / RECIPE_FILE).is_file():
        raise DeltaMemError(f"There is nothing to resume in {run}.", "It has no checkpoint.", "Start without --resume.")
    # An option that is newer than the run had its default in it, and a file that it did not record may be any.
    digests = {key: value for key, value in start.items() if key.startswith(_DIGEST)}
    before = flat_options(_DEFAULTS) | digests | json.loads((run / RECIPE_FILE).read_text())
    free = {"training.shard"} | (_BATCH if _batches(before) == _batches(start) else set())
    # The options of a section that is left out now, such as `lora`, are no keys of `start`.
    left_out = [key for key in before if key not in start and start.get(key.partition(".")[0], "") is None]
    changed = [
        f"{key} was {before.get(key)}, is {start.get(key)}"
        for key in (*start, *left_out)
        if before.get(key) != start.get(key) and key not in free
    ]
    if changed:
        raise DeltaMemError(
            f"The run in {run} was started with other settings.",
            "; ".join(changed) + ".",
            "Resume with the same recipe, --set and data, and with processes, training.batch_size and "
            f"training.gradient_accumulation that make {_batches(before)}; or start again with another --out.",
        )
    if not (complete[-1] / SAFE_WEIGHTS_NAME).is_file():
        raise DeltaMemError(
            f"{complete[-1]} is not a checkpoint of this command.",
            f"It has no {SAFE_WEIGHTS_NAME}; another program may have written its weights in parts.",
            "Start again with another --out.",
        )
    return complete[-1]


# What may change if a step has the same episodes.
_BATCH = {"processes", "training.batch_size", "training.gradient_accumulation"}


def _batches(start: Mapping[str, Any]) -> str:
    """Describe the data of a step. Generated episodes depend on the number that all processes use per step."""
    episodes_per_step = start["processes"] * start["training.batch_size"]
    episodes = episodes_per_step * start["training.gradient_accumulation"]
    is_generated = start["data.path"] is None or start["data.mix"] > 0
    return f"{episodes} episodes per step" + (f", {episodes_per_step} at once" if is_generated else "")


def start_of(recipe: Recipe, processes: int) -> dict[str, object]:
    """Return everything that determines a run: recipe, number of processes, and content of the data files."""
    options = flat_options(recipe)
    digests = {f"{_DIGEST}{key}": file_digest(options[key]) for key in DATA_FILES}
    return {**options, "processes": processes, **digests}


def file_digest(path: Any) -> str | None:
    """Return the SHA-256 of a data file; None if `path` is None or names no file, such as a dataset of the Hub."""
    if path is None or not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flat_options(recipe: Recipe) -> dict[str, object]:
    """Return the recipe's options by dotted key, as JSON returns them, without `out`, which names the run."""
    flat: dict[str, object] = {}
    for name, value in json.loads(json.dumps(asdict(recipe))).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    del flat["out"]
    return flat
