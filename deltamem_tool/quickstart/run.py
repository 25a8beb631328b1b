"""The quickstart: from a checkpoint to a remembered fact in ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.adapter.folder import AdapterFolder, read_adapter
from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.evaluation import EPISODES, MEMORY_ONLY
from deltamem_tool.evaluation.conditions import STATE, EvalProtocol
from deltamem_tool.evaluation.report.evaluation_file import EVALUATION_FILE, evaluation_json, write_evaluation
from deltamem_tool.evaluation.report.tables import plot_losses, plot_scores
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.tasks.natural_recall import DIALOGUES, recall
from deltamem_tool.io.atomic import check_overwrite, is_unfinished, write_atomically
from deltamem_tool.io.names import BACKBONE, expand_user
from deltamem_tool.memory.file import read_memory
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.quickstart.bases import BASES, QuickstartBase, choose_adapter
from deltamem_tool.quickstart.talk import TalkResult, remember, told_facts
from deltamem_tool.recipe.load import Recipe, load_recipe, shipped_recipe

ADAPTER, FRESH, ONNX, MEMORY = "adapter", "fresh-adapter", "onnx", "memory.safetensors"
RECALL_PLOT, LOSS_PLOT, REPORT = "recall.png", "loss.png", "report.json"
OWN = {ADAPTER, f"{ADAPTER}.run", FRESH, ONNX, MEMORY, RECALL_PLOT, LOSS_PLOT, REPORT}  # all that a run can write

Report = Callable[[str, int, int, str], None]  # stage, done, of, note


@dataclass
class Quickstart:
    """The results of a quickstart."""

    adapter: Path
    onnx_dir: Path
    memory_file: Path
    recall_plot: Path
    loss_plot: Path | None
    report: Path
    parameters: int
    memory_bytes: int
    recall: Evaluation
    fingerprint: str  # of the adapter
    arguments: tuple[str, ...]  # of the same `deltamem eval`
    max_abs_diff: float
    answer_agreement: float
    compared: int  # number of conversations behind answer_agreement
    remembered: TalkResult
    seconds: dict[str, float]


def quickstart(
    out: str | Path,
    fast: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
    *,
    base: str = BACKBONE,
    adapter: str | None = None,
    allow_other_base: bool = False,
    steps: int | None = None,
    resume: bool = False,
) -> Quickstart:
    """Patch, train, evaluate, export, and remember; everything lands in the folder `out`.

    Args:
        out: a new folder.
        fast: use the base's trained adapter instead of training one.
        overwrite: replace the files of an earlier run in `out`.
        report: called with (stage, done, of, note) as work goes on.
        base: one of `BASES`.
        adapter: use this adapter, a folder or an id on the Hub, instead of training one.
        allow_other_base: accept an `adapter` that was made for another base model, with an `OtherBaseWarning`.
        steps: number of training steps, instead of the recipe's.
        resume: resume the training that was interrupted in `out`.

    Raises:
        ConfigError: the options cannot be combined.
        DeltaMemError: `out` already exists, or a stage failed.
        HubError: the base or the adapter cannot be fetched.
    """
    out, kind = expand_user(out), BASES[base]
    adapter_name = choose_adapter(base, adapter, fast, steps)
    if resume:
        _check_resume(out, adapter_name)
    else:
        check_overwrite(out, overwrite)
        _check_contents(out, adapter_name)
    tell = report or (lambda stage, done, of, note: None)
    seconds: dict[str, float] = {}

    with _time_stage("patch", seconds):
        tell("patch", 0, 1, kind.name)
        trained = None if adapter_name is None else read_adapter(adapter_name)
        checkpoint = kind.fetch()
        if not resume:
            _clear(out)
        if trained is None:
            recipe = _recipe(out, kind, checkpoint, steps, resume)
            kind = replace(kind, system=recipe.data.system)
        parameters = (trained or read_adapter(out / FRESH)).num_parameters()
        tell("patch", 1, 1, f"{parameters:,} parameters")
    if trained is None:
        with _time_stage("train", seconds):
            trained, losses = _train(recipe, resume, tell)
        plot_losses(losses, out / LOSS_PLOT)

    with _time_stage("evaluate", seconds):
        model = load(trained.path, checkpoint, allow_other_base=allow_other_base, dtype=torch.float32)
        tokenizer = tokenizer_of(model)
        recalled = evaluate(
            model,
            tokenizer,
            recall(kind.words, facts=kind.facts, episodes=kind.episodes, **kind.task_options()),
            EvalProtocol.parse(MEMORY_ONLY),
            batch_size=kind.batch_size,
            report=lambda what, done, of: tell("evaluate", done, of, what),
        )
        plot_scores(recalled, out / RECALL_PLOT)
        if adapter_name is None:
            content = evaluation_json(recalled, trained.fingerprint, _arguments(kind))
            write_evaluation(trained.path / EVALUATION_FILE, content)
    with _time_stage("export", seconds):
        tell("export", 0, 2, "graph")
        manifest = export_onnx(model, tokenizer, out / ONNX, base_model=trained.base.name)
        assert manifest.max_abs_diff is not None  # a graph for the CPU runs here
        tell("export", 1, 2, f"{kind.agreement[1]} episodes in both runtimes")
        onnx_model = OnnxModel(out / ONNX)
        agreement = _agreement(model, tokenizer, onnx_model, kind)
        tell("export", 2, 2, f"differs by {manifest.max_abs_diff:.1e} at most")
    with _time_stage("remember", seconds):
        memory_file, told = out / MEMORY, told_facts(kind.words, kind.told)
        remembered = remember(
            onnx_model, memory_file, told, kind.system, lambda done, of: tell("remember", done, of, "")
        )

    result = Quickstart(
        adapter=trained.path,
        onnx_dir=out / ONNX,
        memory_file=memory_file,
        recall_plot=out / RECALL_PLOT,
        loss_plot=out / LOSS_PLOT if adapter_name is None else None,
        report=out / REPORT,
        parameters=parameters,
        memory_bytes=sum(array.nbytes for array in read_memory(memory_file).tensors().values()),
        recall=recalled,
        fingerprint=trained.fingerprint,
        arguments=_arguments(kind),
        max_abs_diff=manifest.max_abs_diff,
        answer_agreement=agreement,
        compared=kind.agreement[1],
        remembered=remembered,
        seconds=seconds,
    )
    write_atomically(result.report, (json.dumps(report_json(result), indent=2) + "\n").encode())
    return result


def _arguments(kind: QuickstartBase) -> tuple[str, ...]:
    """The options of the same `deltamem eval`."""
    options = [f"facts=[{','.join(map(str, kind.facts))}]"]
    options += [f"words={kind.words}"] if kind.words != DIALOGUES else []
    options += [f"episodes={kind.episodes}"] if kind.episodes != EPISODES else []
    options += [f"{name}={json.dumps(value)}" for name, value in kind.task_options().items()]
    return tuple(word for option in options for word in ("--set", option))


def _check_resume(out: Path, adapter_name: str | None) -> None:
    """Check that the training of an earlier run can be resumed."""
    from deltamem_tool.training.run_folder import checkpoints, run_folder

    if adapter_name is not None or not checkpoints(run_folder(out / ADAPTER)):
        raise DeltaMemError(
            f"There is nothing to resume in {out}.",
            "It has no training checkpoint."
            if adapter_name is None
            else f"The adapter {adapter_name} is already trained.",
            "Run the quickstart without --resume.",
        )


def _check_contents(out: Path, adapter_name: str | None) -> None:
    """Check that the folder contains only files of a quickstart, and not the adapter that will be used."""
    if adapter_name is not None and expand_user(adapter_name).resolve().is_relative_to(out.resolve()):
        raise DeltaMemError(
            f"The adapter {adapter_name} is in {out}.",
            "It would be removed together with the files of an earlier run.",
            "Choose another folder.",
        )
    names = {entry.name for entry in out.iterdir()} - OWN if out.is_dir() else set()
    strangers = sorted(name for name in names if not is_unfinished(name, OWN))
    if strangers:
        raise DeltaMemError(
            f"{out} contains files that are not from a quickstart: {', '.join(strangers[:3])}.",
            "Nothing was changed.",
            "Choose another folder.",
        )


def _clear(out: Path) -> None:
    """Create the folder, or remove the files of an earlier run from it."""
    out.mkdir(parents=True, exist_ok=True)
    for entry in out.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _recipe(out: Path, kind: QuickstartBase, checkpoint: str, steps: int | None, resume: bool) -> Recipe:
    """Return the recipe of the training, which starts from a fresh adapter for the checkpoint."""
    changes = [f"base={json.dumps(checkpoint)}", *([] if steps is None else [f"training.steps={steps}"])]
    recipe = load_recipe(shipped_recipe(kind.recipe), changes, str(out / ADAPTER))
    if not resume:
        torch.manual_seed(recipe.training.seed)
        create_adapter(recipe.base, recipe.memory, out / FRESH)
    return replace(recipe, adapter=str(out / FRESH))


def _train(recipe: Recipe, resume: bool, tell: Report) -> tuple[AdapterFolder, list[tuple[int, float]]]:
    """Train, and return the adapter and the losses by step."""
    from deltamem_tool.training import train  # its libraries take seconds, which others need not wait for
    from deltamem_tool.training.run_folder import checkpoints, run_folder

    def report(step: int, steps: int, loss: float | None) -> None:
        tell("train", step, steps, "" if loss is None else f"loss {loss:.3f}")

    try:
        result = train(recipe, resume, report=report)
    except DeltaMemError as error:  # its advice is for `deltamem train`
        go_on = "--resume to continue, or with " if checkpoints(run_folder(recipe.out)) else ""
        again = f"Run the same command with {go_on}--overwrite to start again."
        raise DeltaMemError(error.what, error.why, again) from error
    return read_adapter(result.adapter), result.losses


def _agreement(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, onnx_model: OnnxModel, kind: QuickstartBase
) -> float:
    """Return the share of held-out episodes on which both runtimes give the same answer."""
    facts, episodes = kind.agreement
    task = recall(kind.words, seed=1, facts=facts, episodes=episodes, **kind.task_options())
    protocol = EvalProtocol.parse(MEMORY_ONLY)
    options: dict[str, Any] = {"only": (STATE,), "batch_size": kind.batch_size}
    in_torch, in_onnx = (
        [record.answer for record in evaluate(each, tokenizer, task, protocol, **options).records]
        for each in (model, onnx_model)
    )
    return sum(a == b for a, b in zip(in_torch, in_onnx, strict=True)) / len(in_torch)


def report_json(result: Quickstart) -> dict[str, Any]:
    """Return the content of `report.json`."""
    return {
        "recall": evaluation_json(result.recall, result.fingerprint, result.arguments),
        "onnx": {"max_abs_diff": result.max_abs_diff, "answer_agreement": result.answer_agreement},
        "seconds": {stage: round(seconds, 1) for stage, seconds in result.seconds.items()},
        "adapter": str(result.adapter),
        "onnx_dir": str(result.onnx_dir),
        "memory_file": str(result.memory_file),
        "adapter_parameters": result.parameters,
        "memory_bytes": result.memory_bytes,
        "conversation": {
            "told": [{"user": user, "model": reply} for user, reply in result.remembered.exchanges],
            "asked": [asdict(answer) for answer in result.remembered.answers],
        },
    }


@contextmanager
def _time_stage(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
