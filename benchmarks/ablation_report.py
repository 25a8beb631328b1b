"""Show the runs of an ablation as a table and a plot, beside the paper's figures."""

from __future__ import annotations

import io
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ablation_plan import Ablation
from ablation_runs import EPISODES, FACTS, SEEDS, Run
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltamem_tool.evaluation.conditions import CONTROLS, STATE, readable_name
from deltamem_tool.io.atomic import write_atomically

Runs = Mapping[str, Sequence[Run]]  # by variant, one or more runs, each with its own seed


def markdown(ablation: Ablation, runs: Runs, changes: Sequence[str], plot: str) -> str:
    """Return a table with the mean over the seeds for each variant, and the minimum and maximum below it."""
    every = [run for of_variant in runs.values() for run in of_variant]
    dates = sorted({run.date for run in every})
    environments = dict.fromkeys(map(_environment, every))
    episodes = every[0].episodes
    controls = [name for name in CONTROLS if any(name in run.scores for run in every)]  # older runs have fewer
    paper = [f"paper: {ablation.paper_what}"] if ablation.paper else []
    facts = [_facts(count) for count in every[0].facts]
    columns = ["", "seeds", *facts, "all", "highest control", "parameters", "state", "minutes", *paper]
    lines = [
        f"# {ablation.title}, {dates[-1]}",
        "",
        f"Exact match of held-out facts from the memory alone, {episodes} conversations per number of facts:",
        "the mean over the seeds, and below it minimum and maximum. The highest control is the highest score of any",
        f"seed, over all questions, with {_any_of(controls)}. Minutes are",
        "CPU time of training.",
        "",
        _row(columns),
        _row(["---"] * len(columns)),
        *(_row(_cells(ablation, name, of_variant)) for name, of_variant in runs.items()),
        "",
        f"![{ablation.title}]({plot})",
        "",
        f"`{_command(ablation, runs, changes)}`",
        "",
        *(f"{environment}." for environment in environments),
    ]
    return "\n".join(lines) + "\n"


def _environment(run: Run) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    return f"{packages}; {run.device}, threads: {run.threads}"


def _command(ablation: Ablation, runs: Runs, changes: Sequence[str]) -> str:
    """Return the command that repeats these runs, without options that have their default value."""
    some = next(run for of_variant in runs.values() for run in of_variant)
    seeds = dict.fromkeys(run.seed for of_variant in runs.values() for run in of_variant)
    words = ["python", "benchmarks/ablate.py", f"recipes/ablations/{ablation.name}.yaml", "--out", "DIR"]
    for option, value, default in (("seeds", seeds, SEEDS), ("facts", some.facts, FACTS)):
        if tuple(value) != default:
            words += [f"--{option}", ",".join(map(str, value))]
    if some.episodes != EPISODES:
        words += ["--episodes", str(some.episodes)]
    return shlex.join(words + [word for change in changes for word in ("--set", change)])


def _cells(ablation: Ablation, name: str, runs: Sequence[Run]) -> list[str]:
    label = f"**{name}** (reference)" if name == ablation.reference else f"**{name}**"
    by_facts = [[run.scores[STATE][i] for run in runs] for i in range(len(runs[0].facts))]
    control = max(statistics.mean(run.scores[name]) for run in runs for name in CONTROLS if name in run.scores)
    cells = [
        label,
        ", ".join(str(run.seed) for run in runs),
        *map(_spread, by_facts),
        _spread([run.mean for run in runs]),
        f"{control:.2f}",
        f"{runs[0].parameters:,}",
        f"{runs[0].state_bytes:,} B",
        f"{statistics.mean(run.processor_minutes for run in runs):.1f}",
    ]
    if ablation.paper:
        cells.append(f"{ablation.paper[name]:.2f}" if name in ablation.paper else "")
    return cells


def _facts(count: int) -> str:
    return f"{count} fact{'s' * (count > 1)}"


def _any_of(names: Sequence[str]) -> str:
    *most, last = (f"“{readable_name(name)}”" for name in names)
    return f"{', '.join(most)} or {last}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{statistics.mean(values):.2f}" + (f"<br>{low}–{high}" if len(values) > 1 else "")


def draw(ablation: Ablation, runs: Runs, path: Path) -> None:
    """Plot a row per variant: exact match by number of facts, and the paper's figure beside it."""
    names = list(runs)
    figure = Figure(figsize=(8 if ablation.paper else 6.4, 1.5 + 0.36 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, width_ratios=(3, 1.4), sharey=True) if ablation.paper else [figure.subplots()]
    _draw_ours(panels[0], runs)
    if ablation.paper:
        figures = {name: figure for name, figure in ablation.paper.items() if name in runs}
        panels[1].plot([*figures.values()], [names.index(name) for name in figures], "D", color="#555555", markersize=5)
        panels[1].set_title("the paper, other task", fontsize=9)
        panels[1].set_xlabel("average of its benchmarks", fontsize=8)
        panels[1].grid(alpha=0.3)
        panels[1].margins(x=0.2)
    panels[0].set_yticks(
        range(len(names)), [f"{name} (reference)" if name == ablation.reference else name for name in names]
    )
    panels[0].invert_yaxis()
    figure.suptitle(ablation.title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def _draw_ours(axes: Axes, runs: Runs) -> None:
    facts = next(run.facts for of_variant in runs.values() for run in of_variant)
    colours = colormaps["viridis"]
    for number, count in enumerate(facts):
        colour = colours(0.05 + 0.8 * number / max(1, len(facts) - 1))
        for place, of_variant in enumerate(runs.values()):
            values = [run.scores[STATE][number] for run in of_variant]
            label = _facts(count) if place == 0 else None
            at = place + 0.12 * (number - (len(facts) - 1) / 2)
            axes.plot([min(values), max(values)], [at, at], color=colour, linewidth=2, alpha=0.6)
            axes.plot(statistics.mean(values), at, "o", color=colour, markersize=5, label=label)
    axes.set(xlim=(-0.03, 1.03))
    axes.set_xlabel("exact match from the memory alone; line: range of the seeds", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(facts), frameon=False)
