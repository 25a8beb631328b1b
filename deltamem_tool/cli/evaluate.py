"""`deltamem eval`: measure what the memory of an adapter or an ONNX folder is worth, compared with controls."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from deltamem_tool.cli.command_line import command_line
from deltamem_tool.cli.engines import check_runtime_options, load_on
from deltamem_tool.cli.options import (
    MARGIN,
    NAME,
    SEED,
    UserPath,
    allow_other_base,
    device,
    trust_remote_code,
)
from deltamem_tool.evaluation import BATCH_SIZE, HARNESS, HARNESS_BATCH_SIZE, MEMORY_ONLY, RECALL

if TYPE_CHECKING:
    from deltamem_tool.evaluation.result import Evaluation

_FILE = UserPath(dir_okay=False, path_type=Path)
GO_ON = "With --records or --report, the same command goes on from the answers that are there."


@click.command("eval")
@click.argument("model", type=NAME)
@click.option(
    "--task",
    default=RECALL,
    show_default=True,
    help="Name of a task, your own package.module:Class, or lm_eval:NAME,NAME for lm-evaluation-harness.",
)
@click.option(
    "--protocol",
    default=MEMORY_ONLY,
    show_default=True,
    help="Context besides the memory: memory (none), window:N (the last messages within N tokens) or full.",
)
@click.option("--data", type=NAME, help="Data for the task: a file, a folder, or the id of a dataset on the Hub.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Set an option of the task; repeatable.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Ask only the first N questions.  [default: all]")
@click.option(
    "--conditions", help="Conditions to run besides the state, such as zero_state,donor_state.  [default: all]"
)
@click.option("--bm25", is_flag=True, help="Also run the base model with the passages that BM25 finds in the history.")
@click.option(
    "--truncate",
    type=click.IntRange(1),
    help="Also run the base model with the last messages within N tokens.",
    metavar="N",
)
@click.option("--lora", type=NAME, help="Also run the base model with this LoRA, a PEFT folder or a Hub id.")
@click.option(
    "--static", type=NAME, help="Also run the base model with this static adapter (`train --set static=true`)."
)
@click.option("--write", is_flag=True, help="Let questions and answers write into the memory too, as in a chat.")
@click.option("--base", type=NAME, help="Folder or Hub id of an adapter's base model, if not the recorded one.")
@allow_other_base
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Random seed for the task, the permuted layers and the intervals.",
)
@click.option(
    "--margin", type=MARGIN, help="Margin that a difference must exceed to matter; recorded with the answers."
)
@click.option(
    "--batch-size",
    default=BATCH_SIZE,
    show_default=True,
    type=click.IntRange(1),
    help="Number of conversations at once.",
)
@device
@trust_remote_code
@click.option(
    "--provider", type=click.Choice(["cpu", "cuda"]), help="Execution provider for an ONNX folder.  [default: cpu]"
)
@click.option(
    "--records",
    type=UserPath(file_okay=False, path_type=Path),
    help="Record every answer in this folder, and resume from the answers in it.",
)
@click.option(
    "--report",
    type=UserPath(file_okay=False, path_type=Path),
    help="Write an HTML page, the same in Markdown, JSON and every answer to this folder, and resume from it.",
)
@click.option(
    "--plot", type=_FILE, help="Plot the result to FILE; its extension sets the format: .png, .svg, .pdf, .jpg, …"
)
@click.option("--out", type=_FILE, help="Write the result as JSON, for the model card of `deltamem push`.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    task: str,
    protocol: str,
    data: str | None,
    changes: tuple[str, ...],
    limit: int | None,
    conditions: str | None,
    bm25: bool,
    truncate: int | None,
    lora: str | None,
    static: str | None,
    write: bool,
    base: str | None,
    allow_other_base: bool,
    seed: int,
    margin: float | None,
    batch_size: int,
    device: str | None,
    trust_remote_code: bool,
    provider: str | None,
    records: Path | None,
    report: Path | None,
    plot: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure what the memory of MODEL is worth on a task, compared with controls.

    MODEL is an adapter (folder, Hub id or builtin:adapter), which runs in PyTorch, or an ONNX folder, which runs in
    ONNX Runtime.

    Every question is asked under each of these conditions: with the right memory, with a memory of zeros, with the
    memory of another history, with the mean memory of 100 other histories, with the layers of the right memory
    permuted, with the corrections scaled to zero, with the base model alone, and with the base model and the full
    context. An ONNX folder leaves out the conditions that change weights.
    """
    from deltamem_tool.base_model.launch import join_launched, members, report_lost_processes
    from deltamem_tool.evaluation.conditions import ONNX, PYTORCH, STATE
    from deltamem_tool.evaluation.processes import Processes
    from deltamem_tool.io.atomic import check_writable
    from deltamem_tool.io.pictures import picture_format
    from deltamem_tool.onnx.locate import is_onnx

    if report is not None and records is not None:
        raise click.UsageError("--report keeps the records too; leave out --records.")
    runtime = ONNX if is_onnx(model) else PYTORCH
    for_adapter = {"base": base, "allow_other_base": allow_other_base, "trust_remote_code": trust_remote_code}
    check_runtime_options(runtime == ONNX, provider, **for_adapter, device=device)
    options = _task_options(changes, data)
    only = None if conditions is None else [STATE, *conditions.split(",")]
    on_base = {"lora": _lora(lora), "static": _static(static)}
    baselines: dict[str, Any] = {"retrieved": bm25, "truncate": truncate, **on_base}
    if task.startswith(HARNESS):
        ask = _ask_harness(task, protocol, options, limit, only, baselines, write, runtime)
        if click.get_current_context().get_parameter_source("batch_size") == ParameterSource.DEFAULT:
            batch_size = HARNESS_BATCH_SIZE
    else:
        ask = _ask_task(task, protocol, options, seed, limit, only, baselines, write, runtime)

    from deltamem_tool.cli.console import progress
    from deltamem_tool.evaluation.report.evaluation_file import evaluation_json, write_evaluation
    from deltamem_tool.evaluation.report.page import check_folder, write_report
    from deltamem_tool.evaluation.report.tables import plot_scores
    from deltamem_tool.evaluation.run_info import run_json

    if plot is not None:
        picture_format(plot)
    for file in (out, plot):
        if file is not None:
            check_writable(file)
    if report is not None:
        check_folder(report)
    where = join_launched()
    if where is not None and device is None and runtime == PYTORCH:
        device = str(where)
    processes = Processes.from_model(None)
    together = nullcontext() if where is None else report_lost_processes(members(), GO_ON)
    with progress(hidden=not processes.is_main) as bar, together:
        task_id = bar.add_task("Evaluation", total=None, note="")
        if runtime == ONNX:
            loaded, tokenizer, fingerprint = _load_onnx(model, provider)
        else:
            loaded, tokenizer, fingerprint = _load(model, device, for_adapter)
        started = time.monotonic()
        evaluation = ask(
            loaded,
            tokenizer,
            only=only,
            batch_size=batch_size,
            seed=seed,
            margin=margin,
            folder=report or records,
            settings={"adapter": fingerprint, "seed": seed, "options": options},
            report=lambda stage, done, of: bar.update(task_id, completed=done, total=of, note=stage),
        )
    if not processes.is_main:
        return
    settings: dict[str, Any] = {
        "adapter": model,
        "conditions": conditions,
        "bm25": bm25,
        "truncate": truncate,
        "lora": lora,
        "static": static,
        "write": write or None,
        "limit": limit,
        "batch_size": batch_size,
        "margin": margin,
    }
    words, seconds = command_line(click.get_current_context()), time.monotonic() - started
    run = run_json(loaded, evaluation, words, {**settings, **options}, seconds)
    payload = evaluation_json(evaluation, fingerprint, _arguments(task, protocol, seed, data, changes, limit), run)
    if report is not None:
        write_report(report, payload, evaluation.records)
    if out is not None:
        write_evaluation(out, payload)
    if plot is not None:
        plot_scores(evaluation, plot)
    if as_json:
        click.echo(json.dumps(payload))
    else:
        _print(evaluation, plot, report)


def _load(adapter: str, device: str | None, loading: dict[str, Any]) -> tuple[Any, Any, str]:
    """Load the model with its adapter, its tokenizer, and the adapter's fingerprint."""
    from deltamem_tool.base_model.tokenizer import tokenizer_of
    from deltamem_tool.memory.attach import adapter_of

    model = load_on(device, adapter, loading)
    return model, tokenizer_of(model), adapter_of(model).fingerprint


def _load_onnx(folder: str, provider: str | None) -> tuple[Any, Any, str]:
    from deltamem_tool.io.installation import check_installation

    check_installation("cpu")
    from deltamem_tool.onnx.runtime.engine import OnnxModel

    model = OnnxModel(folder, provider or "cpu")
    return model, None, model.adapter


def _task_options(changes: Sequence[str], data: str | None) -> dict[str, Any]:
    from deltamem_tool.recipe.yaml_lines import read_changes

    options = read_changes(changes)
    if "seed" in options:
        raise click.UsageError("--set seed: pass --seed.")
    if data is not None and "data" in options:
        raise click.UsageError("--data and --set data are the same option: give one.")
    return {**options, **({} if data is None else {"data": data})}


def _ask_harness(
    task: str,
    protocol: str,
    options: dict[str, Any],
    limit: int | None,
    only: list[str] | None,
    baselines: dict[str, Any],
    write: bool,
    runtime: str,
) -> Callable[..., Evaluation]:
    """Prepare tasks of lm-evaluation-harness, and report what cannot be asked before the model is loaded."""
    from deltamem_tool.evaluation.conditions import select
    from deltamem_tool.evaluation.harness import check_options, conditions_of, find_harness, prepare

    check_options(protocol, bool(baselines["retrieved"] or baselines["truncate"]), write, runtime)
    on_base = {"lora": baselines["lora"], "static": baselines["static"]}
    select(conditions_of(**on_base), only)
    harness_tasks = prepare(find_harness(task, options), limit)

    def ask(model: Any, tokenizer: Any, **shared: Any) -> Evaluation:
        from deltamem_tool.evaluation.harness_run import evaluate_harness

        return evaluate_harness(model, tokenizer, harness_tasks, **on_base, **shared)

    return ask


def _ask_task(
    task: str,
    protocol: str,
    options: dict[str, Any],
    seed: int,
    limit: int | None,
    only: list[str] | None,
    baselines: dict[str, Any],
    write: bool,
    runtime: str,
) -> Callable[..., Evaluation]:
    """Prepare a built-in task or the user's own, and report what cannot be asked before the model is loaded."""
    from deltamem_tool.evaluation.conditions import EvalProtocol, conditions_of, select
    from deltamem_tool.evaluation.task import find_task

    parsed = EvalProtocol.parse(protocol)
    if ":" in task:
        sys.path.insert(0, str(Path.cwd()))  # as for `python -m`: a module beside the data
    chosen = find_task(task, options, {"seed": seed})
    select(conditions_of(parsed, **baselines, runtime=runtime), only, runtime)

    def ask(model: Any, tokenizer: Any, **shared: Any) -> Evaluation:
        from deltamem_tool.evaluation.runner import evaluate

        return evaluate(model, tokenizer, chosen, parsed, limit=limit, write=write, **baselines, **shared)

    return ask


def _lora(name: str | None) -> Any:
    if name is None:
        return None
    from deltamem_tool.baselines.lora import Lora

    return Lora.read(name)


def _static(name: str | None) -> Any:
    if name is None:
        return None
    from deltamem_tool.baselines.static import Static

    return Static.read(name)


def _print(evaluation: Evaluation, plot: Path | None, report: Path | None) -> None:
    from deltamem_tool.cli.console import STDOUT
    from deltamem_tool.evaluation.report.page import PAGE_FILE
    from deltamem_tool.evaluation.report.tables import score_table

    for metric in evaluation.metrics:
        STDOUT.print(score_table(evaluation, metric))
    for line in evaluation.verdict():
        click.echo(f"{line[0].upper()}{line[1:]}.")
    if plot is not None:
        click.echo(f"Plot: {plot}")
    if report is not None:
        click.echo(f"Report: {report / PAGE_FILE}")


def _arguments(
    task: str, protocol: str, seed: int, data: str | None, changes: Sequence[str], limit: int | None
) -> list[str]:
    """Return the arguments that ask the same questions, with the last part of each path."""
    from deltamem_tool.evaluation.run_info import without_folders

    arguments = ["--task", task, "--protocol", protocol, "--seed", str(seed)]
    if data is not None:
        arguments += ["--data", without_folders(data)]
    for change in changes:
        arguments += ["--set", without_folders(change)]
    return arguments if limit is None else [*arguments, "--limit", str(limit)]
