"""Train every variant of an ablation and tabulate its losses on held-out episodes, for bases that learn recall slowly.

Command: python benchmarks/held_out_loss.py recipes/ablations/smollm2/start.yaml --out ablations [--seed 42]
    [--set KEY=VALUE …]

Losses are in nats per token, with the state, with that of another conversation, and with zeros. To continue an
interrupted run, use the same command.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
from ablation_plan import Variant, read_ablation

from deltamem_tool.cli import main
from deltamem_tool.cli.console import progress
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.io.formats import versions
from deltamem_tool.recipe.load import Recipe
from deltamem_tool.training.run import train
from deltamem_tool.training.run_folder import flat_options

EPISODES = 64  # number of held-out episodes per loss
LOSSES = {"state": "eval_loss", "donor": "eval_loss_donor", "zero": "eval_loss_zero"}


def measured(name: str, recipe: Recipe) -> dict[str, Any]:
    """Train a variant and return its results. Its adapter is removed."""
    with progress() as bar:
        task = bar.add_task(name, total=None, note="")

        def report(done: int, of: int, loss: float | None) -> None:
            bar.update(task, completed=done, total=of, note="" if loss is None else f"loss {loss:.3f}")

        result = train(recipe, overwrite=True, report=report)
    logged = json.loads((Path(recipe.out) / "training.json").read_text(encoding="utf-8"))["log"]
    shutil.rmtree(recipe.out)
    last = [entry for entry in logged if LOSSES["state"] in entry][-1]
    losses = {condition: last[key] for condition, key in LOSSES.items()}
    return {**losses, "parameters": result.parameters, "minutes": round(result.seconds / 60, 1), "versions": versions()}


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with a row per variant."""
    lines = [
        f"# {title}",
        "",
        "| | state | donor | zero | donor − state | parameters | minutes |",
        "|---|" + "---|" * 6,
    ]
    for name, row in rows.items():
        losses = " | ".join(f"{row[condition]:.2f}" for condition in LOSSES)
        gain = row["donor"] - row["state"]
        lines.append(f"| {name} | {losses} | {gain:.2f} | {row['parameters']:,} | {row['minutes']} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("ablation", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to write.")
@click.option("--seed", default=42, show_default=True, help="Seed of the training runs.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe. Repeatable.")
def command(ablation: Path, out: Path, seed: int, changes: tuple[str, ...]) -> None:
    """Train every variant of ABLATION (YAML), and write a table of their losses on held-out episodes."""
    plan = read_ablation(ablation)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{plan.name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = {line["key"]: line for line in map(json.loads, lines)}
    rows = {}
    for variant in plan.variants:
        recipe = _evaluated_at_its_end(variant, changes, seed, out)
        key = json.dumps(flat_options(recipe), sort_keys=True)
        if key not in done:
            done[key] = {"key": key, "variant": variant.name, **measured(variant.name, recipe)}
            write_atomically(file, "".join(json.dumps(line) + "\n" for line in done.values()).encode())
        rows[variant.name] = done[key]
        write_atomically(out / f"{plan.name}.md", table(plan.title, rows).encode())
    click.echo(table(plan.title, rows))


def _evaluated_at_its_end(variant: Variant, changes: tuple[str, ...], seed: int, out: Path) -> Recipe:
    """Return the recipe of a variant with one evaluation, after its last step."""
    adapter = str(out / "adapter")
    steps = variant.load(changes, seed, adapter).training.steps
    return variant.load((*changes, f"training.eval_every={steps}", f"training.eval_episodes={EPISODES}"), seed, adapter)


if __name__ == "__main__":
    main(command)
