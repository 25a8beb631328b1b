"""From a checkpoint to a remembered fact in ONNX Runtime, on the backbone that the package ships."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deltamem_tool.adapter.create import create_adapter
from deltamem_tool.adapter.folder import AdapterFolder, read_adapter
from deltamem_tool.adapter.load import load
from deltamem_tool.base_model.tokenizer import tokenizer_of
from deltamem_tool.chat.conversation import INTERRUPTED, Conversation
from deltamem_tool.chat.sampling import Sampling
from deltamem_tool.data import dialogues
from deltamem_tool.errors import DeltaMemError
from deltamem_tool.evaluation import EPISODES, MEMORY_ONLY
from deltamem_tool.evaluation.conditions import STATE, EvalProtocol
from deltamem_tool.evaluation.report.evaluation_file import EVALUATION_FILE, evaluation_json, write_evaluation
from deltamem_tool.evaluation.report.tables import plot_losses, plot_scores
from deltamem_tool.evaluation.result import Evaluation
from deltamem_tool.evaluation.runner import evaluate
from deltamem_tool.evaluation.tasks.recall import Recall
from deltamem_tool.io.atomic import check_overwrite, write_whole
from deltamem_tool.io.names import expand_user
from deltamem_tool.memory.file import read_memory
from deltamem_tool.onnx.export.export import export_onnx
from deltamem_tool.onnx.runtime.engine import OnnxModel
from deltamem_tool.recipe.load import load_recipe, shipped_recipe

SHIPPED_ADAPTER = "builtin:adapter"
FACTS = (1, 2, 4, 6, 8)
ARGUMENTS = ("--set", f"facts=[{','.join(map(str, FACTS))}]")  # of the same `deltamem eval`
AGREEMENT_EPISODES = 200
AGREEMENT_FACTS = 4
TOLD = 4  # facts in the conversation that is remembered
RECIPE = "quickstart.yaml"
ADAPTER, FRESH, ONNX, MEMORY = "adapter", "fresh-adapter", "onnx", "memory.safetensors"
RECALL_PLOT, LOSS_PLOT, REPORT = "recall.png", "loss.png", "report.json"
OWN = {ADAPTER, f"{ADAPTER}.run", FRESH, ONNX, MEMORY, RECALL_PLOT, LOSS_PLOT, REPORT}  # all that a run can leave

Report = Callable[[str, int, int, str], None]  # stage, done, of, note


@dataclass
class Remembered:
    """The two conversations in ONNX Runtime."""

    exchanges: list[tuple[str, str]] = field(default_factory=list)  # (user, model) of the first
    answers: list[tuple[str, str, str, str]] = field(default_factory=list)  # (question, answer, truth, answer without)


@dataclass
class Quickstart:
    """Everything the run made."""

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
    max_abs_diff: float
    answer_agreement: float
    remembered: Remembered
    seconds: dict[str, float]


def quickstart(
    out: str | Path, fast: bool = False, overwrite: bool = False, report: Report | None = None
) -> Quickstart:
    """Patch, train, evaluate, export, and remember; everything lands in the folder `out`.

    Args:
        out: a new folder.
        fast: take the shipped adapter instead of training one.
        overwrite: replace what an earlier run left in `out`.
        report: called with (stage, done, of, note) as work goes on.

    Raises:
        DeltaMemError: `out` is there already, or a stage failed.
    """
    out = expand_user(out)
    check_overwrite(out, overwrite)
    _clear(out)
    tell = report or (lambda stage, done, of, note: None)
    seconds: dict[str, float] = {}

    adapter, losses = _shipped(seconds, tell) if fast else _trained(out, seconds, tell)
    loss_plot = None if fast else out / LOSS_PLOT
    if loss_plot is not None:
        plot_losses(losses, loss_plot)

    with _timed("evaluate", seconds):
        model = load(adapter.path)
        tokenizer = tokenizer_of(model)
        recall = evaluate(
            model,
            tokenizer,
            Recall(FACTS, EPISODES),
            EvalProtocol.parse(MEMORY_ONLY),
            report=lambda what, done, of: tell("evaluate", done, of, what),
        )
        plot_scores(recall, out / RECALL_PLOT)
        if not fast:
            content = evaluation_json(recall, adapter.fingerprint, ARGUMENTS)
            write_evaluation(adapter.path / EVALUATION_FILE, content)
    with _timed("export", seconds):
        tell("export", 0, 2, "graph")
        manifest = export_onnx(model, tokenizer, out / ONNX, base_model=adapter.base.name)
        assert manifest.max_abs_diff is not None  # a graph for the CPU runs here
        tell("export", 1, 2, f"{AGREEMENT_EPISODES} episodes in both runtimes")
        onnx_model = OnnxModel(out / ONNX)
        agreement = _agreement(model, tokenizer, onnx_model)
        tell("export", 2, 2, f"differs by {manifest.max_abs_diff:.1e} at most")
    with _timed("remember", seconds):
        memory_file = out / MEMORY
        remembered = remember(onnx_model, memory_file, report=lambda done, of: tell("remember", done, of, ""))

    result = Quickstart(
        adapter=adapter.path,
        onnx_dir=out / ONNX,
        memory_file=memory_file,
        recall_plot=out / RECALL_PLOT,
        loss_plot=loss_plot,
        report=out / REPORT,
        parameters=adapter.num_parameters(),
        memory_bytes=sum(array.nbytes for array in read_memory(memory_file).tensors().values()),
        recall=recall,
        fingerprint=adapter.fingerprint,
        max_abs_diff=manifest.max_abs_diff,
        answer_agreement=agreement,
        remembered=remembered,
        seconds=seconds,
    )
    write_whole(result.report, (json.dumps(report_json(result), indent=2) + "\n").encode())
    return result


def _clear(out: Path) -> None:
    """Make the folder, without what an earlier run left there, and without touching anything else."""
    out.mkdir(parents=True, exist_ok=True)
    left = {entry.name: entry for entry in out.iterdir()}
    strangers = sorted(left.keys() - OWN)
    if strangers:
        raise DeltaMemError(
            f"{out} holds what no quickstart has made: {', '.join(strangers[:3])}.",
            "Nothing was changed.",
            "Choose another folder.",
        )
    for entry in left.values():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _shipped(seconds: dict[str, float], tell: Report) -> tuple[AdapterFolder, list[tuple[int, float]]]:
    with _timed("patch", seconds):
        adapter = read_adapter(SHIPPED_ADAPTER)
        tell("patch", 1, 1, f"the shipped adapter, {adapter.num_parameters():,} parameters")
    return adapter, []


def _trained(out: Path, seconds: dict[str, float], tell: Report) -> tuple[AdapterFolder, list[tuple[int, float]]]:
    """A fresh adapter for the shipped backbone, trained; and the losses on the way."""
    from deltamem_tool.training import train  # its libraries take seconds, which `fast` need not wait for

    recipe = load_recipe(shipped_recipe(RECIPE), out=str(out / ADAPTER))
    with _timed("patch", seconds):
        tell("patch", 0, 1, "")
        torch.manual_seed(recipe.training.seed)
        fresh = create_adapter(recipe.base, recipe.memory, out / FRESH)
        tell("patch", 1, 1, f"{fresh.num_parameters():,} parameters")
    with _timed("train", seconds):
        try:
            result = train(
                replace(recipe, adapter=str(fresh.path)),
                report=lambda step, steps, loss: tell("train", step, steps, "" if loss is None else f"loss {loss:.3f}"),
            )
        except DeltaMemError as error:  # its advice is for `deltamem train`
            raise DeltaMemError(error.what, error.why, "Run the quickstart again with --overwrite.") from error
    return read_adapter(result.adapter), result.losses


def _agreement(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, onnx_model: OnnxModel) -> float:
    """The share of held-out episodes on which both runtimes give the same answer."""
    task, protocol = Recall((AGREEMENT_FACTS,), AGREEMENT_EPISODES, seed=1), EvalProtocol.parse(MEMORY_ONLY)
    in_torch, in_onnx = (
        [record.answer for record in evaluate(each, tokenizer, task, protocol, only=(STATE,)).records]
        for each in (model, onnx_model)
    )
    return sum(a == b for a, b in zip(in_torch, in_onnx, strict=True)) / len(in_torch)


def remember(
    model: OnnxModel, memory_file: Path, seed: int = 3, report: Callable[[int, int], None] | None = None
) -> Remembered:
    """One conversation tells facts and saves its memory; a second has an empty context and only the file."""
    rng = random.Random(seed)
    facts = dialogues.sample_facts(rng, TOLD, held_out=True)
    remembered = Remembered()
    first = Conversation(model)
    sampling = Sampling(max_new_tokens=24)
    for done, fact in enumerate(facts):
        statement = fact.statement(rng)
        remembered.exchanges.append((statement, _said(first, statement, sampling)))
        if report is not None:
            report(done + 1, 2 * TOLD)
    first.save_memory(memory_file)
    memory = read_memory(memory_file)
    for done, fact in enumerate(facts):
        question = fact.question(rng)
        with_file = _said(Conversation(model, memory, write=False), question, sampling)
        without = _said(Conversation(model, write=False), question, sampling)
        remembered.answers.append((question, with_file, fact.answer, without))
        if report is not None:
            report(TOLD + done + 1, 2 * TOLD)
    return remembered


def _said(conversation: Conversation, text: str, sampling: Sampling) -> str:
    """The answer; whoever interrupts it means the whole quickstart."""
    answer = conversation.generate(text, sampling)
    if answer.why == INTERRUPTED:
        raise KeyboardInterrupt
    return answer.text


def report_json(result: Quickstart) -> dict[str, Any]:
    """What `report.json` holds."""
    return {
        "recall": evaluation_json(result.recall, result.fingerprint, ARGUMENTS),
        "onnx": {"max_abs_diff": result.max_abs_diff, "answer_agreement": result.answer_agreement},
        "seconds": {stage: round(seconds, 1) for stage, seconds in result.seconds.items()},
        "adapter": str(result.adapter),
        "onnx_dir": str(result.onnx_dir),
        "memory_file": str(result.memory_file),
        "adapter_parameters": result.parameters,
        "memory_bytes": result.memory_bytes,
        "conversation": {
            "told": [{"user": user, "model": reply} for user, reply in result.remembered.exchanges],
            "asked": [
                {"question": question, "answer": answer, "truth": truth, "without_memory": without}
                for question, answer, truth, without in result.remembered.answers
            ],
        },
    }


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
