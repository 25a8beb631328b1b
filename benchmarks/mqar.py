"""Measure how many pairs a trained state recalls (MQAR, arXiv 2312.04927), and compare it with the delta rule.

    OMP_NUM_THREADS=1 python benchmarks/mqar.py --out benchmarks/results/DATE-mqar.md --plots docs

A single `DeltaMemLayer` with the shipped backbone's width is trained, without a backbone. `docs/capacity.md` explains
the task and the predictions. Each trained layer is added to the `.jsonl` beside OUT, and an interrupted run continues
from there. Tables and the plot are rewritten at the end.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from common import versions
from mqar_plot import draw
from mqar_task import (
    BATCH,
    FEWEST,
    PAIRS,
    QUESTIONS,
    WATCHED,
    WIDTH,
    WORDS,
    asked,
    by_position,
    first_gate,
    mean_gate,
    overlap,
    predict,
    recall,
    recall_random_keys,
    train,
)

from deltamem_tool.bench.timing import cpu_name
from deltamem_tool.cli.console import progress
from deltamem_tool.config import DeltaMemConfig
from deltamem_tool.io.atomic import write_atomically
from deltamem_tool.ops.scan import use_implementation

RANKS = (4, 8, 16, 32)
STATES = (1, 2, 4, 8)
SHIPPED = (8, 16)  # four layers with four 8×8 states each; a read-out that sums the corrections sees sixteen states
SEEDS = 3  # for the shipped rank with the default rule; one seed for all others
DEFAULT = "no_lambda"  # the rule of the shipped adapter
RULES: dict[str, dict[str, Any]] = {  # name: options beyond those of a row of the grid, for layers of `SHIPPED`
    DEFAULT: {},
    "lambda_outside": {"update_rule": "lambda_outside"},
    "standard": {"update_rule": "standard"},
    "standard, own λ": {"update_rule": "standard", "couple_lambda": False},
    "standard, β bias −4": {"update_rule": "standard", "beta_bias": -4.0},
}

STEPS, RULE_STEPS = 200, 600  # training steps, in the grid and for the comparison of rules
SHOWN = (40, 80, 160, 320)  # steps in the table of rules, besides the last
RELIABLE = 0.9  # minimum recall for pairs to count as held

Cell = dict[str, Any]  # one line of the .jsonl


@dataclass(frozen=True)
class Setting:
    """The training run behind one line of the `.jsonl`."""

    rank: int
    states: int
    rule: str  # of `RULES`
    seed: int
    steps: int

    @property
    def config(self) -> DeltaMemConfig:
        options = {"update_rule": DEFAULT, **RULES[self.rule]}
        return DeltaMemConfig(rank=self.rank, state_heads=self.states, branches=["o"], alpha=2.0 * self.rank, **options)

    @property
    def is_watched(self) -> bool:
        return (self.rank, self.states) == SHIPPED


def rule_settings(steps: int) -> list[Setting]:
    """Return the shipped shape with every rule."""
    return [Setting(*SHIPPED, rule, 0, steps) for rule in RULES]


def grid_settings(steps: int) -> list[Setting]:
    """Return every shape, and the other seeds of the shipped rank."""
    shipped = [*STATES, SHIPPED[1]]
    once = [Setting(rank, states, DEFAULT, 0, steps) for rank in RANKS for states in STATES]
    again = [Setting(SHIPPED[0], states, DEFAULT, seed, steps) for seed in range(1, SEEDS) for states in shipped]
    return [*once, Setting(*SHIPPED, DEFAULT, 0, steps), *again]


def measure(setting: Setting) -> Cell:
    """Train a layer, measure its recall at every number of pairs, and compute the predictions."""
    start = time.process_time()
    layer, words, curve = train(setting.config, setting.seed, setting.steps, setting.is_watched)
    generator = torch.Generator().manual_seed(setting.seed + 2)
    own, random = partial(recall, layer, words), partial(recall_random_keys, layer, words, generator)
    cell = {**asdict(setting), "overlap": overlap(layer, words), "gate": mean_gate(layer, words), "pairs": list(PAIRS)}
    for name, ask in (("trained", own), ("random keys", random)):
        cell[name] = [asked(ask, words, pairs, generator) for pairs in PAIRS]
        if setting.is_watched:
            cell[f"{name}, by position"] = by_position(ask, words, generator)
    counts = [(max(FEWEST, QUESTIONS // pairs), pairs) for pairs in PAIRS]
    predictions = [predict(setting.config, *count, generator) for count in counts]
    cell["predicted"] = [max((share, beta) for beta, share in each.items()) for each in predictions]
    cell["first gate"] = [(each[first_gate(setting.config)],) for each in predictions]
    seconds = time.process_time() - start
    return {**cell, "curve": curve, "seconds": seconds, "date": time.strftime("%Y-%m-%d")}


def held(pairs: Sequence[int], recalls: Sequence[float]) -> float | None:
    """Return how many pairs are recalled with `RELIABLE`, interpolated between measured numbers on a logarithmic scale.

    None if even the fewest pairs are not, infinity if the most still are.
    """
    if recalls[0] < RELIABLE:
        return None
    for (few, high), (many, low) in pairwise(zip(pairs, recalls, strict=True)):
        if low < RELIABLE:
            return few * (many / few) ** ((high - RELIABLE) / (high - low))
    return math.inf


def mean_of(cells: Sequence[Cell], name: str) -> list[float]:
    """Return the recall at every number of pairs, as the mean over the seeds."""
    return [_mean([cell[name][n][0] for cell in cells]) for n in range(len(PAIRS))]


def report(grid: Sequence[Cell], rules: Sequence[Cell], command: str) -> str:
    """Return the results as Markdown."""
    cells = [*grid, *rules]
    lines = [
        f"# Multi-query associative recall, {max(cell['date'] for cell in cells)}",
        "",
        f"One layer of width {WIDTH}, trained on {BATCH} sequences per step, {WORDS} keys and as many values;",
        f"{versions('torch')}; {cpu_name()}, {sum(cell['seconds'] for cell in cells) / 60:.1f} minutes of one thread.",
        "",
        f"`{command}`",
        "",
        "Measurements and predictions: see [docs/capacity.md](../../docs/capacity.md#pairs-ranks-and-states).",
        "",
        f"## Pairs, ranks and states: {grid[0]['steps']} steps",
        "",
        "* trained: recall of the trained layer, mean of the seeds (minimum–maximum, if there are several)",
        "* random keys: the trained layer with each pair's key and query rotated together at random",
        "* rule alone: without training, random keys and codes, the best single β",
        "* R · H: number of keys that can be orthogonal in all states together",
        "* overlap: mean squared product of two different trained keys, and 1/R",
        f"* ±: half a 95 % interval of one seed, the widest of the row; at least {QUESTIONS} questions per point",
        "",
        *_grid(grid),
        "",
        f"Pairs recalled with {RELIABLE}: trained, (by the rule alone), [R · H]",
        "",
        *_held(grid),
        "",
        f"## Rules: {rules[0]['steps']} steps, {SHIPPED[1]} states of {SHIPPED[0]}×{SHIPPED[0]}",
        "",
        f"* step N: recall of {WATCHED} pairs in training; first, 8th, last: then of the pair in that place",
        f"* {PAIRS[0]} to {PAIRS[-1]}: recall of so many pairs, when trained; β: the trained layer's mean gate",
        f"* alone: {WATCHED} pairs by the rule alone, at the layer's first β and at the best one",
        "",
        *_rules(rules),
    ]
    return "\n".join(lines) + "\n"


def _grid(cells: Sequence[Cell]) -> Iterator[str]:
    yield _row(["R", "H", "seeds", "", *map(str, PAIRS), "R · H", "overlap", "1/R", "±"])
    yield _row(["---"] * (len(PAIRS) + 8))
    for rank, states in sorted({(cell["rank"], cell["states"]) for cell in cells}):
        mine = of(cells, rank, states)
        for name in ("trained", "random keys", "predicted"):
            means = mean_of(mine, name)
            texts = [f"{mean:.2f}" for mean in means]
            if name == "trained":
                spans = [[cell[name][n][0] for cell in mine] for n in range(len(PAIRS))]
                texts = [
                    f"**{text}** ({min(span):.2f}–{max(span):.2f})" if len(span) > 1 else f"**{text}**"
                    for text, span in zip(texts, spans, strict=True)
                ]
                overlaps = _mean([cell["overlap"] for cell in mine])
                widest = max(half for cell in mine for _, half in cell[name])
                ends = [str(rank * states), f"{overlaps:.3f}", f"{1 / rank:.3f}", f"{widest:.2f}"]
            else:
                ends = [""] * 4
            label = "rule alone" if name == "predicted" else name
            yield _row([str(rank), str(states), str(len(mine)), label, *texts, *ends])


def _held(cells: Sequence[Cell]) -> Iterator[str]:
    columns = sorted({cell["states"] for cell in cells})
    yield _row(["R", *(f"H = {states}" for states in columns)])
    yield _row(["---"] * (len(columns) + 1))
    for rank in RANKS:
        texts = []
        for states in columns:
            mine = of(cells, rank, states)
            both = [held_text(mean_of(mine, name)) for name in ("trained", "predicted")] if mine else []
            texts.append(f"**{both[0]}** ({both[1]}) [{rank * states}]" if both else "")
        yield _row([str(rank), *texts])


def _rules(cells: Sequence[Cell]) -> Iterator[str]:
    steps = [step for step, _ in next(cell["curve"] for cell in cells if cell["curve"])]
    shown = [step for step in steps if step in SHOWN or step == steps[-1]]
    watched = PAIRS.index(WATCHED)
    places = {"first": 0, "8th": WATCHED // 2 - 1, "last": WATCHED - 1}
    heads = ["rule", *(f"step {step}" for step in shown), *places, *map(str, PAIRS), "β"]
    yield _row([*heads, "alone, first β", "alone, best β"])
    yield _row(["---"] * (len(heads) + 2))
    for rule in RULES:
        mine = of(cells, *SHIPPED, rule)
        curve = [_mean([dict(cell["curve"])[step] for cell in mine]) for step in shown]
        ends = [_mean([cell["trained, by position"][place] for cell in mine]) for place in places.values()]
        recalls = [f"{recall:.2f}" for recall in (*curve, *ends, *mean_of(mine, "trained"))]
        gate = _mean([cell["gate"] for cell in mine])
        alone = [mean_of(mine, name)[watched] for name in ("first gate", "predicted")]
        best = mine[0]["predicted"][watched][1]
        yield _row([rule, *recalls, f"{gate:.2f}", f"{alone[0]:.2f}", f"{alone[1]:.2f} (β {best:.2f})"])


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def of(cells: Sequence[Cell], rank: int, states: int, rule: str = DEFAULT) -> list[Cell]:
    return [cell for cell in cells if (cell["rank"], cell["states"], cell["rule"]) == (rank, states, rule)]


def held_text(recalls: Sequence[float]) -> str:
    number = held(PAIRS, recalls)
    return "< 1" if number is None else f"> {PAIRS[-1]}" if math.isinf(number) else f"{number:.0f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Markdown file to write.")
@click.option(
    "--plots", type=click.Path(file_okay=False, path_type=Path), help="Folder for the PNG file.  [default: that of OUT]"
)
@click.option("--steps", default=STEPS, show_default=True, type=click.IntRange(1), help="Training steps of the grid.")
@click.option(
    "--rule-steps", default=RULE_STEPS, show_default=True, type=click.IntRange(20), help="Training steps for the rules."
)
def main(out: Path, plots: Path | None, steps: int, rule_steps: int) -> None:
    plots = plots or out.parent
    for folder in (out.parent, plots):
        folder.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".jsonl")
    kept = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {Setting(**{name: cell[name] for name in Setting.__annotations__}): cell for cell in kept}
    grid, rules = grid_settings(steps), rule_settings(rule_steps)
    with progress() as bar, use_implementation("recurrent"):  # the faster one at every rank, with so few tokens
        whole = bar.add_task("Layers", total=len(grid) + len(rules), note="")
        for setting in (*grid, *rules):
            bar.update(whole, note=f"{setting.states} × {setting.rank}×{setting.rank}, {setting.rule}")
            if setting not in done:
                done[setting] = measure(setting)
                with log.open("a") as file:
                    file.write(json.dumps(done[setting]) + "\n")
            bar.advance(whole)
    command = f"python benchmarks/mqar.py --steps {steps} --rule-steps {rule_steps} --out OUT.md"
    cells = [done[setting] for setting in grid], [done[setting] for setting in rules]
    write_atomically(out, report(*cells, command).encode())
    draw(*cells, plots / "capacity-mqar.png")
    click.echo(f"{out}, {log}, {plots / 'capacity-mqar.png'}")


if __name__ == "__main__":
    main()
