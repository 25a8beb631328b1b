"""Train and evaluate every variant of the given ablations over seeds, and write a table and a plot of each to a folder.

Command: python benchmarks/ablate.py recipes/ablations/rank.yaml --out ablations [--seeds 42,43,44] [--facts 1,2,4,6,8]
    [--episodes 100] [--set KEY=VALUE …] [--keep-adapters] [--json]

To continue an interrupted run, use the same command. Runs that several ablations share are made once.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from ablation_runs import EPISODES, FACTS, RUNS_FILE, SEEDS

from deltamem_tool.cli import main
from deltamem_tool.cli.options import whole_numbers


@click.command()
@click.argument("ablations", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option(
    "--seeds",
    callback=whole_numbers,
    default=",".join(map(str, SEEDS)),
    show_default=True,
    help="Seeds of the training runs.",
)
@click.option(
    "--facts", callback=whole_numbers, default=",".join(map(str, FACTS)), show_default=True, help="Numbers of facts."
)
@click.option(
    "--episodes", default=EPISODES, show_default=True, type=click.IntRange(1), help="Conversations per number of facts."
)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of every recipe. Repeatable.")
@click.option("--keep-adapters", is_flag=True, help="Keep the adapters in the folder, named after their runs.")
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
    """Train and evaluate every variant of ABLATIONS (YAML) over seeds, and write a table and a plot of each to OUT.

    To continue an interrupted run, use the same command. Runs that several ablations share are made once.

    Example: python benchmarks/ablate.py recipes/ablations/rank.yaml --out ablations
    """
    from ablation import Questions, ablate
    from ablation_plan import read_ablation

    from deltamem_tool.base_model.launch import join_launched
    from deltamem_tool.cli.console import progress
    from deltamem_tool.evaluation.processes import Processes

    plans = [read_ablation(file) for file in ablations]
    join_launched()
    is_main = Processes.from_model(None).is_main
    with progress(hidden=not is_main) as bar:
        whole = bar.add_task("Runs", total=None, note="")
        part = bar.add_task("", total=None, note="", visible=False)  # hidden until there is a run to make

        def report(name: str, done: int, of: int, note: str) -> None:
            bar.update(part, description=name, completed=done, total=of, note=note, visible=True)

        def ended(done: int, of: int) -> None:
            bar.update(whole, completed=done, total=of)

        result = ablate(plans, out, seeds, Questions(facts, episodes), changes, keep_adapters, report, ended)
    if not is_main:
        return
    for job in result.unkept:
        click.echo(f"No adapter of {job.name}: an earlier command made the run and did not keep it.", err=True)
    if result.unkept:
        keys = ", ".join(job.key for job in result.unkept)
        click.echo(f"To repeat these runs, delete the lines with {keys} from {out / RUNS_FILE}.", err=True)
    if as_json:
        click.echo(json.dumps([asdict(run) for run in result.runs]))
        return
    for plan in plans:
        click.echo(f"{plan.title}: {out / plan.name}.md")


if __name__ == "__main__":
    main(command)
