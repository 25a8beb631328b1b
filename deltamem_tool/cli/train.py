from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command()
@click.argument("recipe", type=click.Path())
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
@click.option("--out", help="Adapter folder to write, instead of the recipe's.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace the adapter folder if it is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(recipe, changes, out, resume, overwrite, as_json) -> None:
    """Train an adapter as RECIPE (YAML) says. Only the adapter learns.

    Example: deltamem train recipes/quickstart.yaml --set training.steps=100
    """
    from deltamem_tool.recipe import load_recipe

    chosen = load_recipe(recipe, changes, out)

    from deltamem_tool.cli.console import progress
    from deltamem_tool.training import train

    with progress() as bar:
        task = bar.add_task("Training", total=chosen.training.steps, note="")

        def report(step: int, steps: int, loss: float | None) -> None:
            bar.update(task, completed=step, note="" if loss is None else f"loss {loss:.3f}")

        result = train(chosen, resume, overwrite, report)
    if as_json:
        click.echo(json.dumps({**asdict(result), "adapter": str(result.adapter)}))
        return
    click.echo(f"{result.steps} steps in {result.seconds:.0f} s; {result.parameters:,} parameters in {result.adapter}.")
    click.echo(f"Loss {result.losses[0][1]:.3f} → {result.losses[-1][1]:.3f}.")
    click.echo(f"Next: deltamem eval {result.adapter} --task recall")
