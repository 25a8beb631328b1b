"""What a memory learns on the shipped backbone: the paper's three ways to write, beside their controls.

    python benchmarks/learning.py --out benchmarks/results/DATE-learning.md --plot docs/learning.png

For each strategy and seed, `recipes/learn-STRATEGY.yaml` is trained and its adapter evaluated on the recall task. Each
run is added to OUT's `.jsonl` beside it as it ends, and a run that was cut off goes on from there: what is in that file
is not run again. The table and the plot are written anew after each run, of runs with this `--set` and `--episodes`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scan import cpu_name

from deltamem_tool.adapter import load, tokenizer_of
from deltamem_tool.cli.console import progress
from deltamem_tool.evaluation.conditions import STATE, EvalProtocol, conditions_of
from deltamem_tool.evaluation.runner import Evaluation, evaluate
from deltamem_tool.evaluation.tasks.recall import Recall
from deltamem_tool.recipe import Recipe, load_recipe
from deltamem_tool.surgery import adapter_of
from deltamem_tool.training import train

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STRATEGIES = {
    "tsw": ("TSW", "#0b6e4f"),
    "ssw": ("SSW", "#3d85c6"),
    "msw": ("MSW", "#c8553d"),
}
FACTS = (1, 2, 4, 6, 8)
PROTOCOL = EvalProtocol.parse("memory")
CONTROLS = ("donor_state", "zero_state", "scale_zero", "full_context")
MEANINGS = {condition.name: condition.meaning for condition in conditions_of(PROTOCOL)}
PACKAGES = ("torch", "transformers")

Run = dict[str, Any]  # one line of the .jsonl


def one_run(strategy: str, recipe: Recipe, changes: list[str], episodes: int, note) -> Run:
    """Train and evaluate one adapter, which is thrown away; `note(what, done, of)` follows the work."""

    def step(done: int, of: int, loss: float | None) -> None:
        note("training" + ("" if loss is None else f", loss {loss:.3f}"), done, of)

    started = time.process_time()
    trained = train(recipe, overwrite=True, report=step)
    processor = time.process_time() - started
    started = time.monotonic()
    model = load(recipe.out)
    found = evaluate(
        model,
        tokenizer_of(model),
        Recall(FACTS, episodes),
        PROTOCOL,
        only=(STATE, *CONTROLS),
        report=lambda what, done, of: note(f"evaluation, {what}", done, of),
    )
    return {
        "strategy": strategy,
        "seed": recipe.training.seed,
        "changes": changes,
        "recall": recall_of(found, episodes),
        "minutes": round(trained.seconds / 60, 2),
        "processor_minutes": round(processor / 60, 2),  # of all threads
        "evaluation_minutes": round((time.monotonic() - started) / 60, 2),
        "steps": trained.steps,
        "parameters": trained.parameters,
        "state_bytes": 4 * sum(state.numel() for state in adapter_of(model).empty_memory(1).layers.values()),
        "loss": trained.losses[-1][1],
        "memory": recipe.memory.to_dict(),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "versions": {name: version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }


def recall_of(found: Evaluation, episodes: int) -> dict[str, Any]:
    """Exact matches by condition, a number of facts an entry."""
    means = {
        condition.name: [found.estimate("exact", condition.name, group).mean for group in found.groups]
        for condition in found.conditions
    }
    return {"facts": list(FACTS), **means, "episodes": episodes}


def table(runs: list[Run]) -> str:
    """The results as Markdown: one table of the states, one of what they are compared with."""
    some = runs[0]
    episodes, facts = some["recall"]["episodes"], some["recall"]["facts"]
    dates = sorted({run["date"] for run in runs})
    threads = ", ".join(str(count) for count in sorted({run["threads"] for run in runs}))
    lines = [
        f"# What a memory learns on the shipped backbone, {dates[-1]}",
        "",
        f"Exact match of the first answer, {episodes} conversations for each number of facts, from the memory alone:",
        "the mean over the seeds, and below it the smallest and the largest. "
        + ", ".join(f"{name} {number}" for name, number in some["versions"].items())
        + ";",
        f"{some['cpu']}, threads: {threads}. Minutes are those of training: by the clock, and of processor time.",
        "",
        "`python benchmarks/learning.py --out OUT.md`",
        "",
        _row(["strategy", "seeds", *(f"{count} fact{'s' * (count > 1)}" for count in facts), "minutes", "processor"]),
        _row(["---"] * (len(facts) + 4)),
    ]
    for strategy, mine in _by_strategy(runs).items():
        cells = [_mean_and_range([run["recall"][STATE][i] for run in mine]) for i in range(len(facts))]
        minutes = [_range([run[kind] for run in mine], ".1f") for kind in ("minutes", "processor_minutes")]
        seeds = ", ".join(str(run["seed"]) for run in mine)
        lines.append(_row([f"**{STRATEGIES[strategy][0]}**", seeds, *cells, *minutes]))
    lines += [
        "",
        "What the states are compared with, mean over the seeds (the largest of any seed; of the full context the",
        "smallest):",
        "",
        _row(["strategy", "condition", *map(str, facts)]),
        _row(["---"] * (len(facts) + 2)),
    ]
    for strategy, mine in _by_strategy(runs).items():
        for condition in CONTROLS:
            worst = min if condition == "full_context" else max
            cells = []
            for i in range(len(facts)):
                of_seeds = [run["recall"][condition][i] for run in mine]
                cells.append(f"{statistics.mean(of_seeds):.2f} ({worst(of_seeds):.2f})")
            lines.append(_row([STRATEGIES[strategy][0], condition.replace("_", " "), *cells]))
    conditions = (STATE, *CONTROLS)
    lines += ["", *(f"* {condition.replace('_', ' ')}: {MEANINGS[condition]}" for condition in conditions), ""]
    lines += [
        "| strategy | states a layer | bytes of a memory | parameters | steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for strategy, (run, *_) in _by_strategy(runs).items():
        size = f"{run['memory']['state_heads']} of {run['memory']['rank']}×{run['memory']['rank']}"
        name = STRATEGIES[strategy][0]
        lines.append(_row([name, size, f"{run['state_bytes']:,}", f"{run['parameters']:,}", str(run["steps"])]))
    changed = sorted({change for run in runs for change in run["changes"]})
    if changed:
        lines += ["", "Changed in the recipes: " + ", ".join(f"`{change}`" for change in changed) + "."]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _range(values: list[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low}–{high}"


def _mean_and_range(values: list[float]) -> str:
    return f"**{statistics.mean(values):.2f}**<br>{_range(values, '.2f')}"


def _by_strategy(runs: list[Run]) -> dict[str, list[Run]]:
    found = {name: [run for run in runs if run["strategy"] == name] for name in STRATEGIES}
    return {name: sorted(mine, key=lambda run: run["seed"]) for name, mine in found.items() if mine}


def draw(runs: list[Run], path: Path) -> None:
    """Recall by number of facts: a line a strategy, its mean, in a band from the smallest to the largest."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    facts = runs[0]["recall"]["facts"]

    def of(chosen: list[Run], condition: str) -> list[list[float]]:
        """By number of facts, the values of all runs."""
        return [[run["recall"][condition][i] for run in chosen] for i in range(len(facts))]

    for strategy, mine in _by_strategy(runs).items():
        name, colour = STRATEGIES[strategy]
        values = of(mine, STATE)
        heads = mine[0]["memory"]["state_heads"]
        label = f"{name}, {heads} state{'s' * (heads > 1)} a layer"
        axes.plot(facts, [statistics.mean(v) for v in values], color=colour, marker="o", linewidth=2.2, label=label)
        axes.fill_between(facts, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.18, linewidth=0)
    dashed = {
        "full_context": ("full context, no memory", "#555555", "s", statistics.mean),
        "donor_state": ("another's state (highest run)", "#7b6db5", "^", max),
        "zero_state": ("state zeroed (highest run)", "#d9a404", "v", max),
        "scale_zero": ("corrections off (highest run)", "#888888", "x", max),
    }
    for condition, (label, colour, marker, choose) in dashed.items():
        values = [choose(v) for v in of(runs, condition)]
        axes.plot(facts, values, color=colour, marker=marker, linestyle="--", linewidth=1.2, label=label)
    axes.set(xlabel="facts told", ylabel="exact match of the first answer", ylim=(-0.03, 1.03), xticks=facts)
    most = max(len(mine) for mine in _by_strategy(runs).values())
    axes.set_title(f"What the memory alone recalls; mean and range of {most} seed{'s' * (most > 1)}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=140)


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--strategies", default=",".join(STRATEGIES), show_default=True, help="Which ways to write.")
@click.option("--seeds", default="42,43,44", show_default=True, help="Of initialisation and training data.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Markdown file to write.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="PNG; OUT's .png unless told otherwise.")
@click.option("--episodes", default=200, show_default=True, help="Conversations for each number of facts.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of every recipe; repeatable.")
def main(strategies: str, seeds: str, out: Path, plot: Path | None, episodes: int, changes: tuple[str, ...]) -> None:
    chosen = strategies.split(",")
    unknown = [name for name in chosen if name not in STRATEGIES]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(STRATEGIES)}", param_hint="--strategies")
    try:
        wanted = [(int(seed), strategy) for seed in seeds.split(",") for strategy in chosen]
    except ValueError:
        raise click.BadParameter(f"{seeds!r} is no list like 42,43", param_hint="--seeds") from None
    plot = plot or out.with_suffix(".png")
    for path in (out, plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".jsonl")
    lines = log.read_text().splitlines() if log.exists() else []
    runs = [
        run
        for run in map(json.loads, lines)
        if (run["changes"], run["recall"]["episodes"]) == (list(changes), episodes)
    ]
    done = {(run["seed"], run["strategy"]) for run in runs}
    with progress() as bar, tempfile.TemporaryDirectory() as folder:
        whole = bar.add_task("Runs", total=len(wanted), note="")
        part = bar.add_task("", total=None, note="")
        for seed, strategy in wanted:
            if (seed, strategy) not in done:
                recipe = load_recipe(
                    RECIPES / f"learn-{strategy}.yaml",
                    [*changes, f"training.seed={seed}"],
                    str(Path(folder) / f"{strategy}-{seed}"),
                )
                name = f"{STRATEGIES[strategy][0]}, seed {seed}"

                def note(what: str, at: int, of: int, name: str = name) -> None:
                    bar.update(part, description=name, completed=at, total=of, note=what)

                run = one_run(strategy, recipe, list(changes), episodes, note)
                runs.append(run)
                with log.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                click.echo(f"{name}: {run['recall']['state_only']} in {run['minutes']} min")
            out.write_text(table(runs))
            draw(runs, plot)
            bar.advance(whole)


if __name__ == "__main__":
    main()
