"""`deltamem quickstart`: from a checkpoint to a remembered fact."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from deltamem_tool.cli.options import UserPath

if TYPE_CHECKING:
    from rich.progress import TaskID

    from deltamem_tool.quickstart import Quickstart


@click.command()
@click.option("--out", default="deltamem-quickstart", show_default=True, type=UserPath(), help="Folder to fill.")
@click.option("--fast", is_flag=True, help="Use the adapter that the package ships instead of training one.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(out: str, fast: bool, overwrite: bool, as_json: bool) -> None:
    """Patch, train, evaluate, export and remember, on a small model that the package ships. No network.

    It prints how long this takes; --fast takes less.
    """
    from deltamem_tool.cli.console import STDERR, progress
    from deltamem_tool.io.atomic import check_overwrite

    check_overwrite(out, overwrite)
    how_long = "less than a minute" if fast else "2 to 5 minutes, most of them training"
    STDERR.print(f"On 2 CPU cores this takes {how_long}.", highlight=False)
    with progress() as bar:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, of: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage.capitalize(), total=of, note=note)
            bar.update(tasks[stage], completed=done, total=of, note=note)

        report("patch", 0, 1, "loading libraries")
        from deltamem_tool.quickstart import quickstart, report_json

        result = quickstart(out, fast, overwrite, report)
    if as_json:
        click.echo(json.dumps(report_json(result)))
    else:
        _show(result)


def _show(result: Quickstart) -> None:
    from rich.markup import escape
    from rich.table import Table

    from deltamem_tool.cli.console import STDOUT
    from deltamem_tool.evaluation.report.tables import score_table
    from deltamem_tool.quickstart import AGREEMENT_EPISODES

    STDOUT.print("\n[bold]First conversation[/bold], in ONNX Runtime")
    for user, answer in result.remembered.exchanges:
        STDOUT.print(f"  user   {user}\n  model  {answer}", markup=False, highlight=False)
    STDOUT.print(f"  [dim]saved {escape(str(result.memory_file))}; this conversation is over[/dim]")
    STDOUT.print("\n[bold]Second conversation[/bold]: an empty context and that file")
    for question, answer, truth, without in result.remembered.answers:
        mark = "[green]✓[/green]" if answer == truth else f"[red]✗ {escape(truth)}[/red]"
        STDOUT.print(f"  user   {escape(question)}\n  model  {escape(answer)} {mark}", highlight=False)
        STDOUT.print(f"  [dim]without the file: {escape(without)}[/dim]", highlight=False)
    STDOUT.print()
    STDOUT.print(score_table(result.recall))
    table = Table(show_header=False)
    table.add_row("ONNX Runtime against PyTorch", f"{result.max_abs_diff:.1e} at most, over logits and states")
    table.add_row("same answers", f"{result.answer_agreement:.1%} of {AGREEMENT_EPISODES} held-out conversations")
    table.add_row("trained parameters", f"{result.parameters:,}")
    table.add_row("memory of one conversation", f"{result.memory_bytes:,} bytes")
    table.add_row("seconds", ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result.seconds.items()))
    plots = ", ".join(str(plot) for plot in (result.recall_plot, result.loss_plot) if plot)
    files = (result.adapter, result.onnx_dir, result.memory_file, plots, result.report)
    for name, file in zip(("adapter", "ONNX folder", "memory file", "plots", "report"), files, strict=True):
        table.add_row(name, escape(str(file)))
    STDOUT.print(table)
    question = result.remembered.answers[0][0]
    STDOUT.print("\nNext, ask it yourself:", highlight=False)
    click.echo(f'  deltamem run {result.onnx_dir} --memory {result.memory_file} --prompt "{question}"')
    click.echo("Then your own model: see “A real model” in the README.")
