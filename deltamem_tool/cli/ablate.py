"""`deltamem ablate`: what each option of a recipe is worth."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from deltamem_tool.ablation import EPISODES, FACTS, SEEDS
from deltamem_tool.cli.options import whole_numbers


@click.command()
@click.argument("ablations", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option(
    "--seeds", callback=whole_numbers, default=",".join(map(str, SEEDS)), show_default=True, help="Of training."
)
@click.option("--facts", callback=whole_numbers, default=",".join(map(str, FACTS)), show_default=True, help="Told.")
@click.option(
    "--episodes", default=EPISODES, show_default=True, type=click.IntRange(1), help="Conversations for each number."
)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of every recipe; repeatable.")
@click.option("--keep-adapters", is_flag=True, help="Leave the adapters in the folder, named after their runs.")
@click.option("--json", "as_json", is_flag=True, help="Print the runs as JSON.")
def command(
    ablations: tuple[str, ...],
    out: Path,
    seeds: tuple[int, ...],
    facts: tuple[int, ...],
    episodes: int,
    changes: tuple[str, ...],
    keep_adapters: bool,
    as_json: bool,
) -> None:
    """Train and evaluate every variant of ABLATIONS (YAML), over seeds; write a table and a plot of each into a folder.

    A run that was cut off goes on with the same command. Runs that ablations share are made once.

    Example: deltamem ablate recipes/ablations/rank.yaml --out ablations
    """
    from deltamem_tool.ablation.plan import read_ablation

    plans = [read_ablation(file) for file in ablations]

    from deltamem_tool.ablation.ablate import Questions, ablate
    from deltamem_tool.ablation.runs import RUNS_FILE
    from deltamem_tool.cli.console import progress

    with progress() as bar:
        whole = bar.add_task("Runs", total=None, note="")
        part = bar.add_task("", total=None, note="", visible=False)  # until there is a run to make
        done = ablate(
            plans,
            out,
            seeds,
            Questions(facts, episodes),
            changes,
            keep_adapters,
            lambda name, done, of, what: bar.update(
                part, description=name, completed=done, total=of, note=what, visible=True
            ),
            lambda done, of: bar.update(whole, completed=done, total=of),
        )
    for one in done.unkept:
        click.echo(f"No adapter of {one.name}: it was made before, and its adapter was not kept.", err=True)
    if done.unkept:
        keys = ", ".join(one.key for one in done.unkept)
        click.echo(f"To make them again, take the lines with {keys} out of {out / RUNS_FILE}.", err=True)
    if as_json:
        click.echo(json.dumps([asdict(run) for run in done.runs]))
        return
    for plan in plans:
        click.echo(f"{plan.title}: {out / plan.name}.md")
