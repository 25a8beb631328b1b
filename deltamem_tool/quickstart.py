"""From a checkpoint to a remembered fact in ONNX Runtime, on the backbone that the package ships."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from deltamem_tool import dialogues
from deltamem_tool.adapter import create_adapter, load, read_adapter, tokenizer_of
from deltamem_tool.evaluation.agreement import answer_onnx
from deltamem_tool.evaluation.recall import RecallResult, answer, evaluate_recall, memorise, recall_episodes
from deltamem_tool.evaluation.report import plot_losses, plot_recall, recall_json
from deltamem_tool.files import refuse_existing, write_whole
from deltamem_tool.onnx.export import export_onnx
from deltamem_tool.onnx.runtime import OnnxModel
from deltamem_tool.recipe import load_recipe
from deltamem_tool.training import train

SHIPPED_ADAPTER = "builtin:adapter"
FACTS = (1, 2, 4, 6, 8)
AGREEMENT_EPISODES = 200
AGREEMENT_FACTS = 4
TOLD = 4  # facts in the conversation that is remembered
STAGES = ("patch", "train", "evaluate", "export", "remember")

Report = Callable[[str, int, int, str], None]  # stage, done, of, note


@dataclass
class Remembered:
    """The two conversations in ONNX Runtime."""

    told: list[tuple[str, str]] = field(default_factory=list)  # (user, model) of the first
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)  # (question, answer, truth, without the file)


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
    recall: RecallResult
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
    out = Path(out)
    refuse_existing(out, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    tell = report or (lambda stage, done, of, note: None)
    seconds: dict[str, float] = {}

    with _timed("patch", seconds):
        tell("patch", 0, 1, "")
        with as_file(files("deltamem_tool.recipes") / "quickstart.yaml") as file:
            recipe = load_recipe(file, out=str(out / "adapter"))
        torch.manual_seed(recipe.training.seed)
        if fast:
            adapter = read_adapter(SHIPPED_ADAPTER)
        else:
            adapter = create_adapter(recipe.base, recipe.memory, out / "fresh-adapter", overwrite=overwrite)
        tell("patch", 1, 1, f"{adapter.num_parameters():,} parameters")

    loss_plot = None
    if not fast:
        with _timed("train", seconds):
            result = train(
                replace(recipe, adapter=str(out / "fresh-adapter")),
                overwrite=overwrite,
                report=lambda step, steps, loss: tell("train", step, steps, "" if loss is None else f"loss {loss:.3f}"),
            )
            loss_plot = out / "loss.png"
            plot_losses(result.losses, loss_plot)
            adapter = read_adapter(result.adapter)

    with _timed("evaluate", seconds):
        model = load(adapter.path)
        tokenizer = tokenizer_of(model)
        recall = evaluate_recall(
            model, tokenizer, FACTS, report=lambda done, of: tell("evaluate", done, of, "recall and controls")
        )
        plot_recall(recall, out / "recall.png")

    with _timed("export", seconds):
        tell("export", 0, 2, "graph")
        base_model = adapter.base.name
        manifest = export_onnx(model, tokenizer, out / "onnx", base_model=base_model, overwrite=overwrite)
        tell("export", 1, 2, f"{AGREEMENT_EPISODES} episodes in both runtimes")
        episodes = recall_episodes(AGREEMENT_FACTS, AGREEMENT_EPISODES, seed=1)
        in_torch = answer(model, tokenizer, episodes, memorise(model, tokenizer, episodes), "state_only")
        onnx_model = OnnxModel(out / "onnx")
        in_onnx = answer_onnx(onnx_model, tokenizer, episodes)
        agreement = sum(a == b for a, b in zip(in_torch, in_onnx, strict=True)) / len(episodes)
        tell("export", 2, 2, f"largest difference {manifest.max_abs_diff:.1e}")

    with _timed("remember", seconds):
        memory_file = out / "memory.safetensors"
        remembered = remember(onnx_model, memory_file, report=lambda done, of: tell("remember", done, of, ""))

    made = Quickstart(
        adapter=adapter.path,
        onnx_dir=out / "onnx",
        memory_file=memory_file,
        recall_plot=out / "recall.png",
        loss_plot=loss_plot,
        report=out / "report.json",
        parameters=adapter.num_parameters(),
        memory_bytes=sum(state.nbytes for state in onnx_model.load_memory(memory_file).values()),
        recall=recall,
        max_abs_diff=manifest.max_abs_diff,
        answer_agreement=agreement,
        remembered=remembered,
        seconds=seconds,
    )
    write_whole(made.report, (json.dumps(report_json(made), indent=2) + "\n").encode())
    return made


def remember(
    model: OnnxModel, memory_file: Path, seed: int = 3, report: Callable[[int, int], None] | None = None
) -> Remembered:
    """One conversation tells facts and saves its memory; a second has an empty context and only the file."""
    rng = random.Random(seed)
    facts = dialogues.sample_facts(rng, TOLD, held_out=True)
    made = Remembered()
    first = model.start()
    for done, fact in enumerate(facts):
        said = fact.statement(rng)
        made.told.append((said, first.generate(said, max_new_tokens=24).text))
        if report is not None:
            report(done + 1, 2 * TOLD)
    first.save_memory(memory_file)
    memory = model.load_memory(memory_file)
    for done, fact in enumerate(facts):
        question = fact.question(rng)
        with_file = model.start(memory, write=False).generate(question, max_new_tokens=24).text
        without = model.start(write=False).generate(question, max_new_tokens=24).text
        made.asked.append((question, with_file, fact.answer, without))
        if report is not None:
            report(TOLD + done + 1, 2 * TOLD)
    return made


def report_json(made: Quickstart) -> dict[str, Any]:
    """What `report.json` holds."""
    return {
        "recall": recall_json(made.recall),
        "onnx": {"max_abs_diff": made.max_abs_diff, "answer_agreement": made.answer_agreement},
        "seconds": {stage: round(seconds, 1) for stage, seconds in made.seconds.items()},
        "adapter": str(made.adapter),
        "onnx_dir": str(made.onnx_dir),
        "memory_file": str(made.memory_file),
        "adapter_parameters": made.parameters,
        "memory_bytes": made.memory_bytes,
        "conversation": {
            "told": [{"user": user, "model": said} for user, said in made.remembered.told],
            "asked": [
                {"question": question, "answer": said, "truth": truth, "without_memory": without}
                for question, said, truth, without in made.remembered.asked
            ],
        },
    }


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
