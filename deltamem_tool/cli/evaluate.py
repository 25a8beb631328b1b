"""`deltamem eval`: what the memory is worth, beside its controls."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from deltamem_tool.cli.options import device, torch_device, trust_remote_code
from deltamem_tool.cli.typed import typed
from deltamem_tool.evaluation import BATCH_SIZE, HARNESS, HARNESS_BATCH_SIZE, MEMORY_ONLY, RECALL

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltamem_tool.evaluation.result import Evaluation

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("eval")
@click.argument("adapter")
@click.option(
    "--task",
    default=RECALL,
    show_default=True,
    help="A task's name, package.module:Class of your own, or lm_eval:NAME,NAME of lm-evaluation-harness.",
)
@click.option(
    "--protocol",
    default=MEMORY_ONLY,
    show_default=True,
    help="What is in view besides the memory: memory (nothing), window:N (the last messages within N tokens) or full.",
)
@click.option("--data", help="What the task reads: a file, a folder, or a dataset's id on the Hub.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="An option of the task; repeatable.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many questions.")
@click.option("--conditions", help="Only these, beside the state, such as zero_state,donor_state.  [default: all]")
@click.option("--bm25", is_flag=True, help="Also the base model with what BM25 finds in the history.")
@click.option("--truncate", type=click.IntRange(1), help="Also the base model with the last messages within N tokens.")
@click.option("--lora", type=click.Path(path_type=Path), help="Also the base model with this LoRA (PEFT's folder).")
@click.option("--base", help="Where the base model is, if not where the adapter says.")
@click.option("--seed", default=0, show_default=True, help="Of the task, where it draws, and of the intervals.")
@click.option(
    "--batch-size", default=BATCH_SIZE, show_default=True, type=click.IntRange(1), help="Conversations at once."
)
@device
@trust_remote_code
@click.option(
    "--records", type=click.Path(file_okay=False, path_type=Path), help="Keep every answer here; go on from it."
)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write a page, the same in Markdown, and JSON here, beside every answer; go on from there.",
)
@click.option("--plot", type=_FILE, help="Draw the result as a PNG file.")
@click.option("--out", type=_FILE, help="Write the result as JSON, which a push describes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    adapter: str,
    task: str,
    protocol: str,
    data: str | None,
    changes: tuple[str, ...],
    limit: int | None,
    conditions: str | None,
    bm25: bool,
    truncate: int | None,
    lora: Path | None,
    base: str | None,
    seed: int,
    batch_size: int,
    device: str | None,
    trust_remote_code: bool,
    records: Path | None,
    report: Path | None,
    plot: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure what ADAPTER's memory is worth on a task, beside its controls.

    Every question is asked with the right memory, with none, with another history's, with corrections scaled to zero,
    of the base model alone, and of the base model with everything in view.
    """
    from deltamem_tool.evaluation.conditions import STATE

    if report is not None and records is not None:
        raise click.UsageError("--report keeps the records too; leave out --records.")
    options = _task_options(changes, data)
    only = None if conditions is None else [STATE, *conditions.split(",")]
    if task.startswith(HARNESS):
        asking = _of_harness(task, protocol, options, limit, only, bool(bm25 or truncate), lora)
        if click.get_current_context().get_parameter_source("batch_size") == ParameterSource.DEFAULT:
            batch_size = HARNESS_BATCH_SIZE
    else:
        asking = _of_task(task, protocol, options, seed, limit, only, bm25, truncate, lora)

    import torch

    from deltamem_tool.adapter.load import load
    from deltamem_tool.cli.console import progress
    from deltamem_tool.evaluation.report.evaluation_file import evaluation_json, write_evaluation
    from deltamem_tool.evaluation.report.page import refuse_strangers, write_report
    from deltamem_tool.evaluation.report.tables import plot_scores
    from deltamem_tool.evaluation.run_info import run_json
    from deltamem_tool.io.atomic import check_writable
    from deltamem_tool.memory.attach import adapter_of

    where = torch_device(device)
    for file in (out, plot):
        if file is not None:
            check_writable(file)
    if report is not None:
        refuse_strangers(report)
    with progress() as bar:
        task_id = bar.add_task("Evaluation", total=None, note="")
        model = load(adapter, base=base, trust_remote_code=trust_remote_code)
        cast(torch.nn.Module, model).to(where)  # transformers hides the signature
        fingerprint, started = adapter_of(model).fingerprint, time.monotonic()
        found = asking(
            model,
            only=only,
            batch_size=batch_size,
            seed=seed,
            folder=report or records,
            settings={"adapter": fingerprint, "seed": seed, "options": options},
            report=lambda what, done, of: bar.update(task_id, completed=done, total=of, note=what),
        )
    asked_with = {"adapter": adapter, "conditions": conditions, "bm25": bm25, "truncate": truncate, "lora": lora}
    asked_with |= {"limit": limit, "batch_size": batch_size}
    words, seconds = typed(click.get_current_context()), time.monotonic() - started
    run = run_json(model, found, words, {**asked_with, **options}, seconds)
    said = evaluation_json(found, fingerprint, _arguments(task, protocol, seed, data, changes, limit), run)
    if report is not None:
        write_report(report, said, found.records)
    if out is not None:
        write_evaluation(out, said)
    if plot is not None:
        plot_scores(found, plot)
    if as_json:
        click.echo(json.dumps(said))
    else:
        _print(found, plot, report)


def _task_options(changes: Sequence[str], data: str | None) -> dict[str, Any]:
    from deltamem_tool.recipe.yaml_lines import read_changes

    return {**read_changes(changes), **({} if data is None else {"data": data})}


def _of_harness(
    task: str,
    protocol: str,
    options: dict[str, Any],
    limit: int | None,
    only: list[str] | None,
    baselines: bool,
    lora: Path | None,
) -> Callable[..., Evaluation]:
    """What asks tasks of lm-evaluation-harness; what cannot be asked is said before anything is loaded."""
    from deltamem_tool.baselines.lora import Lora
    from deltamem_tool.evaluation.conditions import chosen
    from deltamem_tool.evaluation.harness import conditions_of, find_harness, prepare, refuse_histories

    refuse_histories(protocol, baselines)
    beside = None if lora is None else Lora.read(lora)
    chosen(conditions_of(beside), only)
    prepared = prepare(find_harness(task, options), limit)

    def asking(model: PreTrainedModel, **shared: Any) -> Evaluation:
        from deltamem_tool.base_model.tokenizer import tokenizer_of
        from deltamem_tool.evaluation.harness_run import evaluate_harness

        return evaluate_harness(model, tokenizer_of(model), prepared, lora=beside, **shared)

    return asking


def _of_task(
    task: str,
    protocol: str,
    options: dict[str, Any],
    seed: int,
    limit: int | None,
    only: list[str] | None,
    bm25: bool,
    truncate: int | None,
    lora: Path | None,
) -> Callable[..., Evaluation]:
    """What asks a task of ours or of one's own; what cannot be asked is said before anything is loaded."""
    from deltamem_tool.baselines.lora import Lora
    from deltamem_tool.evaluation.conditions import EvalProtocol, chosen, conditions_of
    from deltamem_tool.evaluation.task import find_task

    way = EvalProtocol.parse(protocol)
    if ":" in task:
        sys.path.insert(0, str(Path.cwd()))  # as for `python -m`: a module beside the data
    asked = find_task(task, options, {"seed": seed})
    beside = None if lora is None else Lora.read(lora)
    chosen(conditions_of(way, bm25, truncate, beside), only)
    wanted: dict[str, Any] = {"retrieved": bm25, "truncate": truncate, "lora": beside, "limit": limit}

    def asking(model: PreTrainedModel, **shared: Any) -> Evaluation:
        from deltamem_tool.base_model.tokenizer import tokenizer_of
        from deltamem_tool.evaluation.runner import evaluate

        return evaluate(model, tokenizer_of(model), asked, way, **wanted, **shared)

    return asking


def _print(found: Evaluation, plot: Path | None, report: Path | None) -> None:
    from rich.console import Console

    from deltamem_tool.evaluation.report.page import PAGE_FILE
    from deltamem_tool.evaluation.report.tables import score_table

    for metric in found.metrics:
        Console().print(score_table(found, metric))
    for line in found.verdict():
        click.echo(f"{line[0].upper()}{line[1:]}.")
    if plot is not None:
        click.echo(f"Plot: {plot}")
    if report is not None:
        click.echo(f"Report: {report / PAGE_FILE}")


def _arguments(
    task: str, protocol: str, seed: int, data: str | None, changes: Sequence[str], limit: int | None
) -> list[str]:
    """What asks the same questions; of a path, its last part."""
    said = ["--task", task, "--protocol", protocol, "--seed", str(seed)]
    if data is not None:
        said += ["--data", Path(data).name if Path(data).exists() else data]
    for change in changes:
        said += ["--set", change]
    return said if limit is None else [*said, "--limit", str(limit)]
