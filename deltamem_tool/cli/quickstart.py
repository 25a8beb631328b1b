from __future__ import annotations

import json

import click


@click.command()
@click.option("--out", default="deltamem-quickstart", show_default=True, type=click.Path(), help="Folder to fill.")
@click.option("--fast", is_flag=True, help="Use the adapter that the package ships instead of training one.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(out, fast, overwrite, as_json) -> None:
    """Patch, train, evaluate, export and remember, on a small model that the package ships. No network.

    It says how long that takes; with --fast it is less.
    """
    from deltamem_tool.cli.console import STDERR, progress
    from deltamem_tool.io.atomic import check_overwrite

    check_overwrite(out, overwrite)
    how_long = "less than a minute" if fast else "2 to 5 minutes, most of them training"
    STDERR.print(f"On 2 CPU cores this takes {how_long}.", highlight=False)
    with progress() as bar:
        bar_of: dict = {}

        def report(stage: str, done: int, of: int, note: str) -> None:
            if stage not in bar_of:
                bar_of[stage] = bar.add_task(stage.capitalize(), total=of, note=note)
            bar.update(bar_of[stage], completed=done, total=of, note=note)

        report("patch", 0, 1, "loading libraries")
        from deltamem_tool.quickstart import quickstart, report_json

        made = quickstart(out, fast, overwrite, report)
    if as_json:
        click.echo(json.dumps(report_json(made)))
    else:
        _show(made)


def _show(made) -> None:
    from rich.console import Console
    from rich.table import Table

    from deltamem_tool.evaluation.report.tables import score_table
    from deltamem_tool.quickstart import AGREEMENT_EPISODES

    console = Console()
    console.print("\n[bold]First conversation[/bold], in ONNX Runtime")
    for user, said in made.remembered.told:
        console.print(f"  user   {user}\n  model  {said}", highlight=False)
    console.print(f"  [dim]saved {made.memory_file}; this conversation is over[/dim]")
    console.print("\n[bold]Second conversation[/bold]: an empty context and that file")
    for question, said, truth, without in made.remembered.asked:
        mark = "[green]✓[/green]" if said == truth else f"[red]✗ {truth}[/red]"
        console.print(f"  user   {question}\n  model  {said} {mark}", highlight=False)
        console.print(f"  [dim]without the file: {without}[/dim]", highlight=False)
    console.print()
    console.print(score_table(made.recall))
    table = Table(show_header=False)
    table.add_row("ONNX Runtime against PyTorch", f"{made.max_abs_diff:.1e} at most, over logits and states")
    table.add_row("same answers", f"{made.answer_agreement:.1%} of {AGREEMENT_EPISODES} held-out conversations")
    table.add_row("trained parameters", f"{made.parameters:,}")
    table.add_row("memory of one conversation", f"{made.memory_bytes:,} bytes")
    table.add_row("seconds", ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in made.seconds.items()))
    table.add_row("adapter", str(made.adapter))
    table.add_row("ONNX folder", str(made.onnx_dir))
    table.add_row("memory file", str(made.memory_file))
    table.add_row("plots", ", ".join(str(plot) for plot in (made.recall_plot, made.loss_plot) if plot))
    table.add_row("report", str(made.report))
    console.print(table)
    question = made.remembered.asked[0][0]
    console.print("\nNext, ask it yourself:", highlight=False)
    click.echo(f'  deltamem run {made.onnx_dir} --memory {made.memory_file} --prompt "{question}"')
    click.echo("Then your own model: see “A real model” in the README.")
